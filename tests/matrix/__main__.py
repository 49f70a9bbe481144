"""`python -m tests.matrix [--all] [-j N] [PREFIX ...]`: run cells, keep what is done, write the page."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from tqdm.auto import tqdm

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "matrix"


def sources() -> str:
    """Hash of the package's and the matrix's code: results of other code are not reused."""
    files = sorted([*(ROOT / "em_interp").rglob("*.py"), *(ROOT / "tests" / "matrix").glob("*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _work(job: tuple[list[str], str]) -> None:
    """Run some cells of one bench and append their outcomes."""
    import warnings

    import torch
    import transformers

    from tests.matrix.cells import cells
    from tests.matrix.run import run

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names, target = set(job[0]), Path(job[1])
    lines = []
    for cell, outcome in run(cell for cell in cells() if cell.id in names):
        found = {"kind": "OUT", "reason": "", "seconds": 0.0} if outcome is None else asdict(outcome)
        lines.append(json.dumps({"id": cell.id, **found}))
    with target.open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and not yet done; status 1 where a cell is silently wrong or untyped."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("prefixes", nargs="*", help="beginnings of cell ids, e.g. phi3/lora")
    parser.add_argument("--all", action="store_true", help="every cell, and the page")
    parser.add_argument("-j", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    if not (options.all or options.prefixes):
        parser.error("give --all, or the beginnings of cell ids")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from tests.matrix.cells import cells
    from tests.matrix.outcomes import FAILING, KINDS
    from tests.matrix.page import read, write

    KEPT.mkdir(parents=True, exist_ok=True)
    target = KEPT / f"{sources()}.jsonl"
    done = read(target)
    wanted = [cell for cell in cells() if options.all or cell.id.startswith(tuple(options.prefixes))]
    todo = [cell for cell in wanted if cell.id not in done]
    benches = [[cell.id for cell in group] for _, group in groupby(todo, key=lambda cell: cell.bench)]
    with ProcessPoolExecutor(options.j) as pool:
        for _ in tqdm(pool.map(_work, [(names, str(target)) for names in benches]), total=len(benches), unit="bench"):
            pass
    found = read(target)
    bad = [found[cell.id] for cell in wanted if found[cell.id]["kind"] in FAILING]
    for row in bad:
        print(f"{row['kind']} {row['id']}: {row['reason']}")
    if options.all:
        write(found)
    kinds = [found[cell.id]["kind"] for cell in wanted]
    print(", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
