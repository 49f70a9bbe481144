"""`python -m tests.fuzz [functions|commands] [--all]`: what leaks. Sampled by the commit, or whole with --all."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

SHARE = 0.03
"""Of the trials, in `make test`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("functions", "commands"))
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    os.chdir(tempfile.mkdtemp())
    if options.what == "functions":
        from tests.fuzz import functions

        found = functions.unlisted() + functions.unguarded() + functions.leaks(1.0 if options.all else SHARE, commit)
    else:
        from tests import bad_inputs

        found = bad_inputs.sweep(1.0 if options.all else SHARE, commit)[1]
    print("\n".join(found))
    sys.exit(bool(found))


main()
