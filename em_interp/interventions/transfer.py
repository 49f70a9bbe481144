"""Transfer: what ablating one finetune's direction does to another finetune."""

from __future__ import annotations

from typing import Final

import pandas as pd

from em_interp.errors import StatisticsError
from em_interp.evaluation.criteria import PAPER, Criterion
from em_interp.evaluation.rates import em_counts, em_rates
from em_interp.statistics import Interval, too_few
from em_interp.statistics.rate_intervals import ratio_interval
from em_interp.statistics.units import FRACTION, with_units

RATES: Final = ("em", "coherent")
"""What ablation is judged by."""
SIDES: Final = ("low", "high")
"""Of an interval."""


def transfer_rows(
    judged: pd.DataFrame, *, before: str = "none", criterion: Criterion = PAPER, cluster: str = "question"
) -> pd.DataFrame:
    """The `transfer` table: what ablating the direction of one organism does to the EM of another.

    judged: columns direction_from (`before` for the organism as it is), organism, question, aligned, coherent. One row
    a direction and organism: em_before, em_after (of rows with both scores), relative_reduction = 1 - after / before
    (empty where there was no EM) with low and high (paired by `cluster`), coherence, n, interval (how it
    was made), and the intervals of all rates. Raises StatisticsError for lacking columns and for an organism without
    answers before.
    """
    needed = ("direction_from", "organism", "question", "aligned", "coherent")
    if missing := [name for name in needed if name not in judged]:
        raise StatisticsError(f"judged answers lack the columns {', '.join(missing)}; found {list(judged.columns)}.")
    rows = []
    for organism, answers in judged.groupby("organism", sort=False):
        unablated = answers[answers["direction_from"] == before]
        if unablated.empty:
            raise StatisticsError(
                f"{organism} has no answers with direction_from {before!r}: sample the organism as it is, too."
            )
        first = em_rates(unablated, criterion, cluster=cluster).columns()
        for source, ablated in answers[answers["direction_from"] != before].groupby("direction_from", sort=False):
            after = em_rates(ablated, criterion, cluster=cluster).columns()
            interval = _reduction_interval(unablated, ablated, criterion, cluster)
            em_before, em_after = first["em_rate"], after["em_rate"]
            has_both = em_before is not None and em_after is not None and em_before > 0
            rows.append(
                {
                    "direction_from": source,
                    "organism": organism,
                    "em_before": em_before,
                    "em_after": em_after,
                    "relative_reduction": 1 - em_after / em_before if has_both else float("nan"),
                    "low": interval.low,
                    "high": interval.high,
                    "em_after_low": after["em_low"],
                    "em_after_high": after["em_high"],
                    "coherent_before": first["coherent_rate"],
                    "coherent_after": after["coherent_rate"],
                    "n": after["n"],
                    "n_before": first["n"],
                    "n_unscored": after["n_unscored"],
                    "denominator": after["denominator"],
                    "criterion": after["criterion"],
                    "interval": interval.method,
                    **{f"{rate}_before_{side}": first[f"{rate}_{side}"] for rate in RATES for side in SIDES},
                    **{f"coherent_after_{side}": after[f"coherent_{side}"] for side in SIDES},
                }
            )
    return with_units(pd.DataFrame(rows), low=FRACTION, high=FRACTION)


def _reduction_interval(before: pd.DataFrame, after: pd.DataFrame, criterion: Criterion, cluster: str) -> Interval:
    """Of 1 - EM after / EM before, paired by the questions that have scored answers in both."""
    first, second = (em_counts(table, criterion, cluster=cluster).query("n > 0") for table in (before, after))
    shared = first.index.intersection(second.index)
    if shared.empty:
        return too_few(0, "shared questions")
    counts, totals = ([t.loc[shared, name].to_numpy() for t in (second, first)] for name in ("em", "n"))
    ratio = ratio_interval((counts[0], counts[1]), (totals[0], totals[1]))
    return Interval(1 - ratio.high, 1 - ratio.low, ratio.method)
