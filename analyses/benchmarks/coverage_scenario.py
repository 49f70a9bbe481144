"""What a row of the coverage table is: data sets of known truth, and the intervals that two methods give them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float

from em_interp.statistics import Interval

GOOD: Final = (0.93, 0.97)
"""Where the coverage of a nominal 95% interval must lie with eight questions and a rate of .1 or more."""
LEAST: Final = 0.90
"""What it must reach wherever an interval is given at all."""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Truth and bounds of every simulated data set; bounds are NaN where the method gives no interval."""

    truth: Float[np.ndarray, " data"]
    """The population value that the estimator aims at: the same in every data set, unless a data set fixes its own."""
    old_low: Float[np.ndarray, " data"]
    old_high: Float[np.ndarray, " data"]
    new_low: Float[np.ndarray, " data"]
    new_high: Float[np.ndarray, " data"]
    conservative: Bool[np.ndarray, " data"] | None = None
    """Where the new interval is named conservative, so that it may cover more than is asked."""


def bounds_of(intervals: Iterable[Interval]) -> tuple[Float[np.ndarray, " data"], Float[np.ndarray, " data"]]:
    """Low and high ends."""
    low, high = np.array([(i.low, i.high) for i in intervals]).T
    return low, high


@dataclass(frozen=True)
class Scenario:
    """One row. questions: number of clusters (questions, documents or seeds). icc, rate: NaN where there is none.

    simulate: generator and number of data sets -> outcomes. conservative: whether the interval says of itself that it
    may cover more than its level, so that no upper limit is asked of it. within: whether `GOOD` is asked of it, rather
    than `LEAST` alone.
    """

    interval: str
    setting: str
    questions: int
    simulate: Callable[[np.random.Generator, int], Outcomes]
    icc: float = float("nan")
    rate: float = float("nan")
    conservative: bool = False

    @property
    def labels(self) -> dict[str, Any]:
        names = ("interval", "setting", "questions", "icc", "rate")
        return {name: getattr(self, name) for name in names}

    @property
    def within(self) -> bool:
        return self.questions >= 8 and not min(self.rate, 1 - self.rate) < 0.1 - 1e-9  # no rate: asked


def row(scenario: Scenario, n_datasets: int, seed: int = 0) -> dict[str, Any]:
    """Coverage, misses, median width and share refused, of the old method and of the one in use.

    Coverage is of the data sets that got an interval. miss_low: the interval lies above the truth; miss_high: below.
    conservative_new: the share whose interval is named so; of half or more, no upper limit is asked.
    met: whether the new coverage is what is asked, None where every data set was refused.
    """
    stream = zlib.crc32(repr(sorted(scenario.labels.items())).encode())
    found = scenario.simulate(np.random.default_rng((seed, stream)), n_datasets)
    result: dict[str, Any] = {**scenario.labels, "n_datasets": n_datasets, "truth": float(np.mean(found.truth))}
    for name, low, high in (("old", found.old_low, found.old_high), ("new", found.new_low, found.new_high)):
        given = np.isfinite(low) & np.isfinite(high)
        n = int(given.sum())
        above, below = (found.truth < low)[given], (found.truth > high)[given]
        result |= {
            f"coverage_{name}": float(1 - above.mean() - below.mean()) if n else float("nan"),
            f"width_{name}": float(np.median((high - low)[given])) if n else float("nan"),
            f"refused_{name}": 1 - n / n_datasets,
            f"miss_low_{name}": float(above.mean()) if n else float("nan"),
            f"miss_high_{name}": float(below.mean()) if n else float("nan"),
        }
    coverage = result["coverage_new"]
    named = 0.0 if found.conservative is None else float(found.conservative.mean())
    least, most = GOOD if scenario.within else (LEAST, 1.0)
    most = 1.0 if scenario.conservative or named >= 0.5 else most
    met = None if np.isnan(coverage) else bool(least <= coverage <= most)
    return result | {"conservative_new": named, "asked": f"{least:g}-{most:g}", "met": met}
