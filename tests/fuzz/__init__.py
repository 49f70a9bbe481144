"""What hostile arguments make of the functions of users; and the drawing of samples, for other sweeps too."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Call = tuple[Callable[..., Any], dict[str, Any]]


def then(make: Callable[..., Any], use: Callable[[Any], Any]) -> Callable[..., Any]:
    """`make`, the same arguments, and what is done with the result."""

    @wraps(make, updated=())
    def both(**given: Any) -> None:
        use(make(**given))

    return both


def sample(of: Sequence[Any], n: int, check: Callable[[Any], None]) -> None:
    """`check` n members, drawn by hypothesis: the same each time. To try all is what the sweeps are for."""

    @settings(
        derandomize=True,
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
