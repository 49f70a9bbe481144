"""Tables over training seeds: repetitions of one finetune, told apart by the column training_seed."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from em_interp.arguments import columns, members
from em_interp.errors import UsageError
from em_interp.statistics import t_interval


def over_training_seeds(table: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Mean of `value` over training seeds, for each combination of the columns `by`.

    Columns: `by`, mean, sd, low, high (Student), n_seeds. Raises UsageError where a combination has more than
    one row a seed, StatisticsError where it has fewer than two seeds.
    """
    _check(table, by, value)
    rows = []
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
    _check(table, by, value)
    table = table[table[value].notna()]
    several = table[table.groupby(list(by))[value].transform("size") > 1]
    if several.empty:
        return pd.DataFrame(columns=[*by, "mean", "sd", "low", "high", "n_seeds"])
    return over_training_seeds(several, by, value)


def _check(table: pd.DataFrame, by: Sequence[str], value: str) -> None:
    names = members("by", by, of="columns")
    if not names:
        raise UsageError("no columns to tell the combinations apart: name at least one in `by`.")
    columns("a table over training seeds", table, (*names, "training_seed", value))
