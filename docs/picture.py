"""The first screen of a report as a picture, drawn by Chrome: what the README shows.

python -m docs.picture REPORT.html PICTURE.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from em_interp.errors import OutputError
from em_interp.figures.export import CHROME

SCREEN = (1200, 1000)
"""Pixels across and down."""


def picture(report: Path, path: Path) -> Path:
    """Write what a browser of `SCREEN` shows first of a report. Raises `OutputError` where Chrome cannot."""
    chrome = next(filter(None, map(shutil.which, CHROME)), None)
    if chrome is None:
        raise OutputError(f"{path} is drawn by Chrome, and none of {', '.join(CHROME)} is here. Install one.")
    with tempfile.TemporaryDirectory() as profile:
        quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
        options = [*quiet.split(), "--hide-scrollbars", "--virtual-time-budget=30000", f"--user-data-dir={profile}"]
        size = ",".join(map(str, SCREEN))
        given = [*options, f"--window-size={size}", f"--screenshot={path.absolute()}", report.absolute().as_uri()]
        done = subprocess.run([chrome, *given], capture_output=True, text=True, timeout=180, check=False)
    if done.returncode or not path.is_file():
        raise OutputError(f"{path} was not drawn: {done.stderr.strip()[-300:]}")
    return path


if __name__ == "__main__":
    print(picture(Path(sys.argv[1]), Path(sys.argv[2])))
