"""`python -m tests.fuzz [N]`: what leaks from the functions of users, from all trials or from a sample of N."""

from __future__ import annotations

import os
import sys
import tempfile

from tests.fuzz import functions, sample

with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    functions.prepare()
    leaks, trials = functions.unlisted(), list(functions.trials())
    if len(sys.argv) > 1:
        leaks += [leak for trial in functions.FOUND if (leak := functions.leak(*trial)) is not None]
        sample(trials, int(sys.argv[1]), functions.check)
    else:
        leaks += [*functions.unguarded(), *functions.leaks()]
    os.chdir("/")
print("\n".join(leaks).encode(errors="replace").decode())
print(f"{len(trials)} trials of {len({name for name, *_ in trials})} functions: {len(leaks)} leaks")
sys.exit(bool(leaks))
