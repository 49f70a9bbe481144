"""What efficiency and stability compare: solutions with the labels that tables carry, and intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from em_interp.arguments import columns, members
from em_interp.errors import SolutionError, UsageError
from em_interp.solutions.base import Solution
from em_interp.statistics import t_interval


@dataclass(frozen=True)
class Contender:
    """A trained theta. solution: general or narrow; adapter: steering-vector, rank-1 or all-modules.

    training_seed tells repetitions of one finetune apart. Raises SolutionError for a zero theta.
    """

    solution: str
    adapter: str
    domain: str
    theta: Solution
    training_seed: int = 0

    def __post_init__(self) -> None:
        if not self.theta.norm > 0:
            raise SolutionError(
                f"the {self.solution} {self.adapter} ({self.domain}) is zero: it has no norm to scale and "
                "nothing is orthogonal to it. Give a trained solution; theta = 0 is the chat model."
            )

    def labels(self) -> dict[str, str | int]:
        """The columns that identify it."""
        return {
            "solution": self.solution,
            "adapter": self.adapter,
            "domain": self.domain,
            "training_seed": self.training_seed,
        }

    def norms(self) -> dict[str, float]:
        """norm, that of theta, and the papers' other conventions under their own names."""
        return {"norm": self.theta.norm, **self.theta.paper_norms()}


def over_training_seeds(table: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Mean of `value` over training seeds, for each combination of the columns `by`.

    Columns: `by`, mean, sd, low, high (Student), n_seeds. Raises UsageError where a combination has more than
    one row a seed, StatisticsError where it has fewer than two seeds.
    """
    rows = []
    if not len(by):
        raise UsageError("no columns to tell the combinations apart: name at least one in `by`.")
    columns("a table over training seeds", table, (*members("by", by, of="columns"), "training_seed", value))
    for key, group in table.groupby(list(by), sort=True):
        if group["training_seed"].duplicated().any():
            raise UsageError(
                f"{dict(zip(by, key, strict=True))} has several rows a training seed. Group by more columns."
            )
        interval = t_interval(group[value].to_numpy())
        spread = {"mean": group[value].mean(), "sd": group[value].std(), "low": interval.low, "high": interval.high}
        rows.append({**dict(zip(by, key, strict=True)), **spread, "n_seeds": len(group)})
    return pd.DataFrame(rows)


def over_repeated_seeds(table: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """`over_training_seeds` of the combinations that several seeds have; no rows where nothing was trained twice."""
    columns("a table over training seeds", table, (*members("by", by, of="columns"), value))
    several = table[table.groupby(list(by))[value].transform("size") > 1]
    if several.empty:
        return pd.DataFrame(columns=[*by, "mean", "sd", "low", "high", "n_seeds"])
    return over_training_seeds(several, by, value)
