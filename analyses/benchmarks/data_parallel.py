"""A pass that several processes share, beside the same pass in one: time, and whether the results are the same.

`python -m analyses.benchmarks.data_parallel run --out artifacts/benchmarks`: means of all layers and seeded answers,
one thread a process, rounds in turns (one process, then several). A time is that of the slowest process, from the
moment at which all have their model to the whole result; starting a process and loading are left out on both sides.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import pandas as pd
import torch
import typer
from tqdm.auto import tqdm

import em_interp as em
from analyses.benchmarks.common import random_chats, random_model
from em_interp.files.atomic import atomic_path, make_folder
from em_interp.files.manifest import write_manifest
from em_interp.files.tables import load_state, save_state

WIDTH: Final = 256
N_LAYERS: Final = 8
N_WORDS: Final = 2000
app = typer.Typer(add_completion=False)


@app.command()
def measure(out: Path, n: int, questions: int) -> None:
    """What each process of a launch runs: times and results go to `out`, by the first."""
    torch.set_num_threads(1)
    model = random_model(WIDTH, N_LAYERS, N_WORDS, seed=0)
    chats = random_chats(n, 60, 0.5, N_WORDS, seed=0)
    asked = {f"q{i}": chat[0]["content"] for i, chat in enumerate(chats[:questions])}
    em.collect(model, chats[:16], progress=False)
    with em.data_parallel() as ranks:

        def timed(work: Callable[[], Any]) -> tuple[Any, float]:
            ranks.wait()
            begun = time.perf_counter()
            found = work()
            ranks.wait()
            return found, time.perf_counter() - begun

        means, collecting = timed(lambda: em.collect(model, chats, progress=False))
        answers, sampling = timed(lambda: em.sample(model, asked, n=4, max_new_tokens=40, progress=False))
        if ranks.is_first:
            note = {"collect": collecting, "sample": sampling, "answers": answers["answer"].tolist()}
            save_state(out, {"mean": means.mean()}, note)


def _launch(processes: int, *words: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run([*command, "-m", "--", "analyses.benchmarks.data_parallel", "measure", *words], check=True)


@app.command()
def run(
    out: Annotated[Path, typer.Option()] = Path("artifacts/benchmarks"),
    processes: Annotated[int, typer.Option()] = 2,
    n: Annotated[int, typer.Option(help="conversations")] = 600,
    questions: Annotated[int, typer.Option()] = 24,
    rounds: Annotated[int, typer.Option()] = 3,
) -> None:
    """Write `data_parallel.csv` (a row a round) and its manifest, with the ratios of the medians."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=2 * rounds, desc="rounds") as bar:
        for number in range(rounds):
            found = {}
            for count in (1, processes):
                path = Path(folder) / f"{number}-{count}.safetensors"
                _launch(count, str(path), str(n), str(questions))
                found[count] = load_state(path)
                bar.update()
            (one, alone), (several, shared) = found[1], found[processes]
            error = float((several["mean"] - one["mean"]).norm() / one["mean"].norm())
            same = float(np.mean([a == b for a, b in zip(alone["answers"], shared["answers"], strict=True)]))
            for what in ("collect", "sample"):
                row = {"round": number, "what": what, "processes": processes, "one_s": alone[what]}
                agree = {"relative_error": error} if what == "collect" else {"same_answers": same}
                rows.append(row | {"several_s": shared[what], "ratio": shared[what] / alone[what]} | agree)
    table = pd.DataFrame(rows)
    with atomic_path(make_folder(out) / "data_parallel.csv") as new:
        table.to_csv(new, index=False)
    ratios = {str(what): float(part["ratio"].median()) for what, part in table.groupby("what")}
    settings = {"width": WIDTH, "layers": N_LAYERS, "conversations": n, "questions": questions, "threads": 1}
    write_manifest(out / "data_parallel_manifest.json", {"settings": settings, "ratios": ratios})
    for what, ratio in ratios.items():
        typer.echo(f"{what}: {processes} processes take {ratio:.3f} of the time of one")


if __name__ == "__main__":
    app()
