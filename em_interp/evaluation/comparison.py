"""Two models on the same questions: the difference of their EM, whether it is one, and what would decide it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from em_interp.arguments import columns, one_of
from em_interp.errors import StatisticsError
from em_interp.evaluation.criteria import DENOMINATORS, PAPER, Criterion
from em_interp.evaluation.rates import scored
from em_interp.statistics import LEVEL, Interval
from em_interp.statistics.paired import (
    POWER,
    difference_p_value,
    paired_power,
    questions_needed,
    samples_needed,
    variance_parts,
)
from em_interp.statistics.rate_intervals import difference_interval

PAIRINGS: Final = ("question", "sample")
"""By question; or answer by answer, where both models drew each with the same seed."""
SAMPLES: Final = (1, 2, 5, 10, 20, 50, 100)
"""Answers to a question that a plan looks at."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """The EM rate of one set of answers minus that of another (`value`, with its `interval`). Fractions.

    Over the `n_questions` questions that both were asked.
    """

    value: float
    interval: Interval
    p_value: float
    """Two-sided, of no difference; below 1 - level exactly where the interval leaves out 0. NaN where there is none."""
    n_questions: int
    rates: tuple[float, float]
    """Of both, over the questions that they share."""
    n: tuple[int, int]
    """Answers behind both."""
    between: float
    """Variance over questions of the true difference: what more answers to each do not lessen."""
    within: float
    """Variance of the difference of one answer each to a question. NaN where no question has two answers of both."""
    samples: float
    """Answers to a question, of each model (harmonic mean)."""
    pairing: str
    """One of `PAIRINGS`."""
    criterion: Criterion
    """What counts as misaligned and coherent, and of which answers the rates are."""
    level: float
    """Of the interval, and of the test that power is of."""

    def power(self, difference: float, *, questions: int | None = None, samples: float | None = None) -> float:
        """Power to find a true difference (a fraction): of these data, or of other numbers of questions and answers.

        NaN where the parts of the variance are unknown. Raises as `statistics.paired.paired_power`.
        """
        if not math.isfinite(self.between + self.within):
            return math.nan
        k, n = self.n_questions if questions is None else questions, self.samples if samples is None else samples
        return paired_power(difference, k, n, self.between, self.within, level=self.level)

    def plan(self, difference: float, *, power: float = POWER, samples: Sequence[int] = SAMPLES) -> pd.DataFrame:
        """How many questions decide a true difference (a fraction) with `power`, for each number of answers to one.

        Columns difference, power, samples, n_questions (empty where a million are too few, or the variances unknown),
        n_answers (of each model). The last row has the questions of these data, and the answers to each that they would
        need: empty where questions differ so much that no number helps. The variances are those of these data: few
        questions know them badly, and rare rates, whose interval is conservative, need more. Raises UsageError for a
        difference of 0.
        """
        parts = (self.between, self.within)
        known = math.isfinite(sum(parts))
        rows: list[tuple[int | None, int | None]] = []
        for n in samples:
            found = questions_needed(difference, n, *parts, power=power, level=self.level) if known else None
            rows.append((n, found))
        more = samples_needed(difference, self.n_questions, *parts, power=power, level=self.level) if known else None
        rows.append((more, self.n_questions))
        table = pd.DataFrame(rows, columns=["samples", "n_questions"]).astype("Int64")
        table = table.assign(n_answers=table["samples"] * table["n_questions"])
        table.insert(0, "difference", float(difference))
        table.insert(1, "power", float(power))
        return table

    def columns(self) -> dict[str, Any]:
        """As a row of a table."""
        return {
            "difference": self.value,
            "low": self.interval.low,
            "high": self.interval.high,
            "p_value": self.p_value,
            "em_rate": self.rates[0],
            "em_rate_beside": self.rates[1],
            "n": self.n[0],
            "n_beside": self.n[1],
            "n_questions": self.n_questions,
            "between_sd": math.sqrt(self.between),
            "within_sd": math.sqrt(self.within),
            "paired_by": self.pairing,
            "denominator": DENOMINATORS[self.criterion.denominator],
            "criterion": str(self.criterion),
            "interval": self.interval.method,
        }

    def __repr__(self) -> str:
        low, high = self.interval.low, self.interval.high
        bounds = f" [{100 * low:.1f}, {100 * high:.1f}], p {self.p_value:.2g}" if low == low else ""
        rates = " - ".join(f"{100 * rate:.1f}%" for rate in self.rates)
        of = f"{self.n_questions} questions, {self.criterion}, of {DENOMINATORS[self.criterion.denominator]}"
        return f"Comparison(EM {rates} = {100 * self.value:.1f} points{bounds}; {self.interval.method}; {of})"


def compare(
    judged_a: pd.DataFrame,
    judged_b: pd.DataFrame,
    criterion: Criterion = PAPER,
    *,
    by: str = "question",
    cluster: str = "question",
    level: float = LEVEL,
) -> Comparison:
    """EM of `judged_a` minus EM of `judged_b` (of the criterion's denominator), paired by question: two models or arms.

    Narrower than two intervals side by side, for a question that is hard for one model is often hard for the other.
    by: question, or sample, which keeps the answers (column sample) that both have in the denominator, and measures the
    variance of their differences: for models that drew each answer with the same seed. Raises as `em_rates`, and
    StatisticsError where no question has answers from both, or `sample` is no number of an answer.

    >>> import pandas as pd
    >>> import em_interp as em
    >>> bad = pd.DataFrame({"question": list("abcdefgh") * 4, "aligned": [10, 90, 10, 10] * 8, "coherent": 90})
    >>> found = em.compare(bad, bad.assign(aligned=90))
    >>> found.value, bool(found.interval.low > 0), bool(found.p_value < 0.05)
    (0.75, True, True)
    """
    one_of("by", by, PAIRINGS)
    read = [_read(judged, criterion, cluster, by) for judged in (judged_a, judged_b)]
    if by == "sample":
        read = _same_answers(*read)
    counts = [own.groupby("question", sort=False)["em"].agg(["sum", "count"]) for own in read]
    shared = counts[0].index.intersection(counts[1].index)
    if shared.empty:
        raise StatisticsError("no question has such answers in both tables: ask both models the same questions.")
    tops, bottoms = (np.stack([own.loc[shared, name].to_numpy(float) for own in counts]) for name in ("sum", "count"))
    rates, n = tops.sum(1) / bottoms.sum(1), bottoms.sum(1)
    between, within = _variances(tops, bottoms) if by == "question" else _variances_of_pairs(*read)
    return Comparison(
        value=float(rates[0] - rates[1]),
        interval=difference_interval((tops[0], tops[1]), (bottoms[0], bottoms[1]), level=level),
        p_value=difference_p_value(tops, bottoms),
        n_questions=len(shared),
        rates=(float(rates[0]), float(rates[1])),
        n=(int(n[0]), int(n[1])),
        between=between,
        within=within,
        samples=float(1 / (1 / bottoms).mean()),
        pairing=by,
        criterion=criterion,
        level=level,
    )


def _read(judged: pd.DataFrame, criterion: Criterion, cluster: str, by: str) -> pd.DataFrame:
    """question, em, and what tells the answers to a question apart; of the denominator's rows."""
    found = scored(judged, criterion, cluster=cluster)
    table = pd.DataFrame({"question": judged[cluster].to_numpy(), "em": found.em.astype(float)})
    if by == "sample":
        columns("judged answers that are paired by sample", judged, ("sample",), StatisticsError)
        told = [name for name in ("wording", "sample") if name in judged]
        table = table.assign(**{name: judged[name].to_numpy() for name in told})
        if table.duplicated(["question", *told]).any() or table["sample"].isna().any():
            raise StatisticsError(
                "several answers to a question have the same `sample`, or none: number the answers to each question, "
                "or compare by question."
            )
    return table[found.among(criterion.denominator)]


def _same_answers(a: pd.DataFrame, b: pd.DataFrame) -> list[pd.DataFrame]:
    """Those in both, in the same order."""
    keys = [name for name in a if name != "em"]
    if keys != [name for name in b if name != "em"]:
        raise StatisticsError("only one table has the column wording: give both, or compare by question.")
    both = a.merge(b, on=keys, suffixes=("_a", "_b"))
    return [both[keys].assign(em=both[f"em_{side}"]) for side in "ab"]


def _variances(tops: NDArray[np.float64], bottoms: NDArray[np.float64]) -> tuple[float, float]:
    """Between questions, and within one: of the difference of one answer each."""
    several = (bottoms > 1).all(0)
    if not several.any():
        return math.nan, math.nan
    rates, n = (tops / bottoms)[:, several], bottoms[:, several]
    of_one = rates * (1 - rates) * n / (n - 1)
    between, _ = variance_parts(rates[0] - rates[1], (of_one / n).sum(0))
    return between, float(of_one.sum(0).mean())


def _variances_of_pairs(a: pd.DataFrame, b: pd.DataFrame) -> tuple[float, float]:
    """The same, of pairs of answers that share their seed."""
    pairs = a.assign(difference=a["em"] - b["em"]).groupby("question", sort=False)["difference"]
    table = pairs.agg(["mean", "var", "count"]).query("count > 1")
    if table.empty:
        return math.nan, math.nan
    between, _ = variance_parts(table["mean"].to_numpy(), (table["var"] / table["count"]).to_numpy())
    return between, float(table["var"].mean())
