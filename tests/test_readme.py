"""The README's Python runs on the released files and prints the numbers that stand beside it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def test_quick_start(tmp_path: Path) -> None:
    given = os.environ.get("EM_INTERP_PUBLISHED")
    data = Path(given) if given else ROOT.parent / "shared" / "published"
    needed = "q14b_bad_med_bad_med_dpR1_15-17_21-23_27-29"
    if not data.is_dir() or not any(data.rglob(needed)):
        pytest.skip(f"the released activations ({needed}) are not below {data}; set EM_INTERP_PUBLISHED")
    (tmp_path / "released").symlink_to(data.resolve(), target_is_directory=True)
    code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = re.findall(r"print\(.*\)  # (\d+\.\d+)", code)
    printed = done.stdout.split()
    assert len(expected) == len(printed) == 3
    for said, found in zip(expected, printed, strict=True):
        assert f"{float(found):.{len(said.split('.')[1])}f}" == said
    assert {p.name for p in tmp_path.iterdir()} >= {"cosine.html", "direction.safetensors"}


def test_it_names_every_analysis_table_and_no_machine() -> None:
    from analyses.suite import Suite

    text = README.read_text(encoding="utf-8")
    suites = [Suite.load(name) for name in ("published", "pocket")]
    tables = {table for suite in suites for name in suite.analyses for table in suite.analysis(name).TABLES}
    assert not [table for table in tables if f"`{table}`" not in text]
    assert not re.search(r"/(home|work|root|tmp)/", text)
