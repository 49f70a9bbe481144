"""`python -m tests.fuzz [N]`: what leaks from the functions of users, from all trials or from a sample of N."""

from __future__ import annotations

import os
import sys
import tempfile

from tests.fuzz import functions, sample


def check(trial: tuple[str, str, str]) -> None:
    found = functions.leak(*trial)
    assert found is None, found.encode(errors="replace").decode()


os.chdir(tempfile.mkdtemp())
functions.prepare()
leaks = functions.unlisted()
if len(sys.argv) > 1:
    sample(list(functions.trials()), int(sys.argv[1]), check)
else:
    leaks += [*functions.unguarded(), *functions.leaks()]
print("\n".join(leaks).encode(errors="replace").decode())
sys.exit(bool(leaks))
