"""The page that a whole run writes, and the list of what is refused."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.matrix import adapters
from tests.matrix.cells import DTYPES, FEATURED, PLAIN, Cell, cells
from tests.matrix.families import FAMILIES
from tests.matrix.operations import OPERATIONS
from tests.matrix.outcomes import KINDS
from tests.matrix.templates import TEMPLATES

PAGE = Path(__file__).with_name("README.md")
REFUSALS = Path(__file__).with_name("refused.txt")
_MARKS = dict(zip(KINDS, ("", "R", "!", "?", "x"), strict=True))


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Outcomes by cell id; the last line of a killed run may be cut."""
    found = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["id"]] = row
    return found


def refusals() -> frozenset[str]:
    """The cells that the last whole run found refused."""
    return frozenset(REFUSALS.read_text().split()) if REFUSALS.is_file() else frozenset()


def _entry(kinds: Counter[str]) -> str:
    """`12` supported, `12 3R`: three refused; empty where there is no cell."""
    return " ".join(f"{kinds[kind]}{_MARKS[kind]}" for kind in KINDS if kinds[kind])


def _table(
    first: str, names: Iterable[str], chosen: Iterable[tuple[Cell, str]], name_of: Callable[[Cell], str]
) -> list[str]:
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for cell, kind in chosen:
        counts[name_of(cell), cell.operation][kind] += 1
    lines = [f"| {first} | {' | '.join(OPERATIONS)} |", "|---" * (len(OPERATIONS) + 1) + "|"]
    for name in names:
        entries = [_entry(counts[name, operation]) for operation in OPERATIONS]
        lines.append(f"| {name} | {' | '.join(entries)} |")
    return lines


def _plain(reason: str) -> str:
    """A refusal without the names of one model, adapter or file, so that equal ones are one line."""
    for pattern, name in (
        (r"\S*/made(/\S+?)?(?=[:\s])", "FOLDER"),
        (r"tiny/[\w-]+", "MODEL"),
        (r"\w+ForC\w+|\w+LMHeadModel", "CLASS"),
        (r"\d+(\.\d+)?(e-?\d+)?", "N"),
    ):
        reason = re.sub(pattern, name, reason)
    return reason.replace("|", "\\|")[:240]


def write(found: Mapping[str, Mapping[str, Any]]) -> None:
    """README.md and refused.txt beside this file, from the outcomes of every cell."""
    ran = [(cell, str(found[cell.id]["kind"])) for cell in cells() if found[cell.id]["kind"] in KINDS]
    total, out = Counter(kind for _, kind in ran), len(cells()) - len(ran)
    seconds = sum(float(row["seconds"]) for row in found.values())
    usual = [(c, k) for c, k in ran if c.family != "finding" and c.template is None]
    lines = [
        "# Support matrix",
        "",
        f"{len(ran)} cells: {', '.join(f'{total[kind]} {kind}' for kind in KINDS)}. {seconds:.0f} s of one core.",
        "Written by `make matrix`; `make test` runs a random slice, the same each time, and every cell of a finding.",
        "",
        "A cell is one computation of the package beside a slow one in float64: a row at a time, no padding, no cache,",
        "plain hooks and loops, adapters by PEFT itself. SUPPORTED: both agree. REFUSED: a typed error that names a",
        "remedy. Silently wrong values (SILENT) and other exceptions (UNTYPED) fail the build.",
        "",
        f"Of {len(cells())} combinations, {out} are no cell: PEFT cannot make the adapter, or it or the bridge is",
        "refused once and for all, which one cell says. Out by design: losses, influence, gradients, sampling,",
        "training and saving never go through the bridge; bfloat16, float64 and training are for the families",
        f"{', '.join((*FEATURED, *DTYPES))}; all else is float32.",
        "",
        "In the tables: `12` supported, `3R` refused, `1!` silently wrong, `1?` untyped, of all ways through (hf and",
        "bridge, padding side, dtype, cache, token scope) with these adapters.",
        "",
        f"## Families, with {', '.join(PLAIN)}",
        "",
        *_table("family", FAMILIES, [(c, k) for c, k in usual if c.feature in PLAIN], lambda c: c.family),
        "",
        f"## Adapter features, in {', '.join(FEATURED)}",
        "",
        *_table("feature", adapters.ALL, [(c, k) for c, k in usual if c.family in FEATURED], lambda c: c.feature),
        "",
        "## Templates, in one family",
        "",
        *_table("template", TEMPLATES, [(c, k) for c, k in ran if c.template], lambda c: c.template or ""),
        "",
        "## What is refused, and with which words",
        "",
        "| cells | refusal | example |",
        "|---|---|---|",
    ]
    reasons: dict[str, list[str]] = defaultdict(list)
    for cell, kind in ran:
        if kind == "REFUSED":
            reasons[_plain(str(found[cell.id]["reason"]))].append(cell.id)
    lines += [f"| {len(ids)} | {r} | `{ids[0]}` |" for r, ids in sorted(reasons.items(), key=lambda x: -len(x[1]))]
    lines += ["", "## Cells of findings", "", "| cell | outcome |", "|---|---|"]
    lines += [f"| {cell.feature} | {kind} |" for cell, kind in ran if cell.family == "finding"]
    PAGE.write_text("\n".join(lines) + "\n")
    REFUSALS.write_text("".join(f"{cell.id}\n" for cell, kind in ran if kind == "REFUSED"))
