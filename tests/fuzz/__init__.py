"""What hostile arguments make of the functions of users; and the drawing of samples, for other sweeps too."""

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def sample(of: Sequence[Any], n: int, check: Callable[[Any], None]) -> None:
    """`check` n members, drawn by hypothesis, the same ones each time."""

    @settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(number=st.integers(0, len(of) - 1))
    def one(number: int) -> None:
        check(of[number])

    one()
