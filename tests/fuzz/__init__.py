"""What hostile arguments make of the functions of users; and the drawing of samples, for other sweeps too."""

import subprocess
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

Call = tuple[Callable[..., Any], dict[str, Any]]


def then(make: Callable[..., Any], use: Callable[[Any], Any]) -> Callable[..., Any]:
    """`make`, the same arguments, and what is done with the result."""

    @wraps(make, updated=())
    def both(**given: Any) -> None:
        use(make(**given))

    return both


def commit() -> str:
    """What the drawing depends on: each commit tries others, and one commit always the same."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return found.stdout.strip()


def sample(of: Sequence[Any], n: int, check: Callable[[Any], None]) -> None:
    """`check` n members, drawn by hypothesis as the commit has it."""

    @seed(commit())
    @settings(
        max_examples=n,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(of))
    def one(member: Any) -> None:
        check(member)

    one()
