"""`python -m tests.bad_inputs [N|WORDS]`: the sweep, a sample of N, or the cases with the words in their names."""

import sys

from tests.bad_inputs import Case, judged, prepared, sweep
from tests.fuzz import sample


def say(line: str) -> None:
    print(line.encode(errors="replace").decode(), flush=True)


def check(case: Case) -> None:
    wrong = judged(case)[1]
    assert not wrong, wrong


part = " ".join(sys.argv[1:])
if part.isdecimal():
    with prepared() as cases:
        sample(cases, int(part), check)
else:
    counts, wrong = sweep(part, say)
    say("\n".join(["", *wrong]))
    say(f"{sum(counts[found] for found in ('typed', 'valid'))} as expected; {dict(counts)}")
    sys.exit(bool(wrong))
