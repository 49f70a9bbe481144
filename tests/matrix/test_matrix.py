"""A random slice of the support matrix, the same each time, and the cells of findings; the rest is `make matrix`."""

from __future__ import annotations

import random
import re
import subprocess
import warnings
from itertools import groupby

import pytest
import torch

from tests.matrix import adapters
from tests.matrix.cells import Cell, cells
from tests.matrix.families import FAMILIES
from tests.matrix.operations import OPERATIONS
from tests.matrix.outcomes import REFUSED, SUPPORTED, attempt
from tests.matrix.page import PAGE, refusals
from tests.matrix.run import run
from tests.matrix.templates import TEMPLATES, MustRefuse

BENCHES = 24
"""Benches (family, feature, dtype) of a slice."""
# What findings were made of within the product; those in no product are the cells "finding/...".
ALWAYS = (
    "bloom/lora/hf/",
    "bloom/vector/hf/losses",
    "gemma3-vision/none/bridge",
    "gpt2/lora-one-module/hf/save",
    "gpt2/vector/hf/nll/right/f32/nocache/long",
    "llama-dynamic/vector/hf/extract/right/f32/nocache/long",
    "olmo2/lora/hf/weights",
    "opt-projected/none/hf/load",
    "phi3-longrope/vector/hf/extract/right/f32/nocache/long",
    "phi3/lora/",
    "qwen2/lora-activated/",
    "qwen2/lora-bias-all/",
    "qwen2/lora-head/hf/gradients",
    "qwen2/lora-pissa/",
    "qwen2/prompt-tuning/hf/load",
    "qwen2/two-active/hf/load",
)


def _slice() -> list[list[Cell]]:
    """Some benches, whole, and the cells of findings."""
    benches = [list(group) for _, group in groupby(cells(), key=lambda cell: cell.bench)]
    product = [bench for bench in benches if bench[0].family != "finding"]
    chosen = random.Random("a slice").sample(product, BENCHES)
    named = [[cell for cell in bench if cell.id.startswith(ALWAYS)] for bench in product if bench not in chosen]
    return [*chosen, *(bench for bench in named if bench), *(b for b in benches if b[0].family == "finding")]


@pytest.mark.parametrize("bench", _slice(), ids=lambda bench: "/".join(part for part in bench[0].bench if part))
def test_cells_equal_the_oracle_or_are_refused_as_listed(bench: list[Cell]) -> None:
    torch.set_num_threads(1)
    known, wrong = refusals(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cell, outcome in run(bench):
            if outcome is None or outcome.kind == SUPPORTED:
                continue
            if outcome.kind == REFUSED and cell.id in known:
                continue
            what = "newly REFUSED: run make matrix and look at the page" if outcome.kind == REFUSED else outcome.kind
            wrong.append(f"{cell.id}: {what}: {outcome.reason}")
    assert not wrong, "\n".join(wrong)


def test_every_name_always_run_is_a_cell() -> None:
    names = [cell.id for cell in cells()]
    assert not [prefix for prefix in ALWAYS if not any(name.startswith(prefix) for name in names)]
    assert len(names) == len(set(names))


def test_the_page_is_of_this_matrix_and_clean() -> None:
    text = PAGE.read_text()
    sections = {part.partition("\n")[0]: part for part in text.split("## ")}

    def rows(title: str) -> list[str]:
        found = next(part for name, part in sections.items() if name.startswith(title))
        return [line.split("|")[1].strip() for line in found.splitlines() if line.startswith("| ")][1:]

    assert rows("Families") == list(FAMILIES)
    assert rows("Adapter features") == list(adapters.ALL)
    assert rows("Templates") == list(TEMPLATES)
    assert rows("Cells of findings") == [c.feature for c in cells() if c.family == "finding"]
    header = next(line for line in text.splitlines() if line.startswith("| family"))
    assert [name.strip() for name in header.split("|")[2:-1]] == list(OPERATIONS)
    assert f"{len(cells())} combinations" in text
    count = re.search(
        r"^(\d+) cells: (\d+) SUPPORTED, (\d+) REFUSED, 0 SILENT, 0 UNTYPED, 0 BROKEN\.", text, re.MULTILINE
    )
    assert count and int(count[1]) == int(count[2]) + int(count[3]) >= 2_000
    assert int(count[3]) == len(refusals()) and refusals() <= {cell.id for cell in cells()}


def test_the_judge_of_cells_can_fail() -> None:
    right = {"x": torch.tensor([1.0, 2.0])}

    def typed(message: str) -> dict[str, torch.Tensor]:
        from em_interp.errors import ModelError

        raise ModelError(message)

    def refuse() -> dict[str, torch.Tensor]:
        raise MustRefuse("there is no answer")

    def broken() -> dict[str, torch.Tensor]:
        raise KeyError("x")

    def started() -> dict[str, torch.Tensor]:
        subprocess.check_call(["true"])
        return right

    assert attempt(lambda: right, lambda: {"x": right["x"].double()}, 1e-4).kind == SUPPORTED
    assert attempt(lambda: {"x": right["x"] * 1.01}, lambda: right, 1e-4).kind == "SILENT"
    assert attempt(lambda: {"x": right["x"] * float("nan")}, lambda: right, 1e-4).kind == "SILENT"
    assert attempt(dict, lambda: right, 1e-4).kind == "SILENT"
    assert attempt(lambda: right, refuse, 1e-4).kind == "SILENT"
    assert attempt(lambda: typed("it is wrong. Use another."), lambda: right, 1e-4).kind == REFUSED
    assert attempt(lambda: typed("it is wrong."), lambda: right, 1e-4).kind == "UNTYPED"
    assert attempt(broken, lambda: right, 1e-4).kind == "UNTYPED"
    assert attempt(started, lambda: right, 1e-4).kind == "UNTYPED"
