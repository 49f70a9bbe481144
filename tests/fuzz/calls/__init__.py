"""A valid call of each public function that a user makes: what the fuzz then spoils, one argument at a time."""

from __future__ import annotations

from functools import cache

from tests.fuzz import Call
from tests.fuzz.calls import files, finetunes, measures, passes, pocket
from tests.fuzz.world import world_of


@cache
def calls() -> dict[str, Call]:
    """By module and name, the function (bound, where it is a method) and arguments that it takes."""
    table = [call for theme in (passes, finetunes, measures, files, pocket) for call in theme.calls(world_of())]
    named = {f"{f.__module__.removeprefix('em_interp.')}.{f.__qualname__}": (f, given) for f, given in table}
    assert len(named) == len(table), "two calls are of one function"
    return named
