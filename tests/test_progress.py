"""The bar of a run over several workers says what is being done now."""

from __future__ import annotations

import io
import time
from pathlib import Path

from tqdm.std import tqdm

from analyses.progress import now, told

NAMES = {f"mark{i}": f"losses of run{i}" for i in range(6)}


def test_what_has_begun_and_is_not_done_is_named(tmp_path: Path) -> None:
    assert now(tmp_path, NAMES) == ""
    for i in range(2):
        (tmp_path / f"mark{i}").touch()
    assert now(tmp_path, NAMES) == "losses of run0, losses of run1"
    (tmp_path / "mark0").rename(tmp_path / "mark0.done")
    assert now(tmp_path, NAMES) == "losses of run1"
    for i in range(2, 6):
        (tmp_path / f"mark{i}").touch()
    assert now(tmp_path, NAMES) == "losses of run1, losses of run2, losses of run3 and 2 more"


def test_the_bar_moves_while_nothing_is_finished(tmp_path: Path) -> None:
    (tmp_path / "mark0").touch()
    written = io.StringIO()
    with tqdm(desc="analysing", total=6, file=written, ncols=120) as bar, told(bar, tmp_path, NAMES, every=0.02):
        time.sleep(0.2)
    said = written.getvalue()
    assert said.count("losses of run0") >= 3 and "0/6" in said


def test_a_file_is_not_filled(tmp_path: Path) -> None:
    (tmp_path / "mark0").touch()
    written = io.StringIO()
    with tqdm(total=6, file=written) as bar, told(bar, tmp_path, NAMES):
        time.sleep(0.2)
    assert "losses of run0" not in written.getvalue()
