"""Do judges agree? The same answers scored by two judges or more, beside EM under each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from em_interp.arguments import columns
from em_interp.errors import StatisticsError
from em_interp.evaluation.criteria import PAPER, Criterion
from em_interp.evaluation.rates import em_rates, scored
from em_interp.statistics import LEVEL
from em_interp.statistics.agreement import STATISTICS, agreement_interval

JUDGE: Final = "judge"
"""The column that says whose scores a row has."""
OF_ANSWERS: Final = (
    *("organism", "target", "model", "adapter", "direction", "arm", "layer", "coefficient", "questions"),
    *("question_id", "wording", "question", "sample", "answer"),
)
"""Columns that tell answers apart, whoever judged them."""
_PAIRED: Final = (
    *(("spearman", of) for of in ("aligned", "coherent")),
    *(("kappa", of) for of in ("misaligned", "is_coherent", "em")),
)
_JOINT: Final = (("krippendorff", "aligned"), ("krippendorff", "coherent"))


def together(judged: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Tables by the name of their judge, below each other, with the column `JUDGE`. Raises StatisticsError for none."""
    if not judged:
        raise StatisticsError("no judged answers were given: agreement is of two or more judges of the same answers.")
    return pd.concat([table.assign(**{JUDGE: name}) for name, table in judged.items()], ignore_index=True)


def several_judges(judged: Mapping[str, pd.DataFrame]) -> pd.DataFrame | None:
    """The rows that `agreement` takes, of files by name, or None where no answer has two judges.

    Judges are those of the column `judge`; files without it are judges themselves, where all hold the same answers.
    """
    if judged and all(JUDGE in table for table in judged.values()):
        rows = pd.concat(judged.values(), ignore_index=True)
        rows = rows[rows[JUDGE].notna()]
        if rows[JUDGE].nunique() < 2 or not {"answer", "sample"} & set(rows):
            return None
        shared = pd.Series(_units(rows)).value_counts().max() > 1
        return rows if shared else None
    held = [
        sorted(map(repr, table[[name for name in OF_ANSWERS if name in table]].to_numpy().tolist()))
        for table in judged.values()
        if "answer" in table
    ]
    same = 1 < len(held) == len(judged) and all(one == held[0] for one in held)
    return together(judged) if same else None


def agreement(
    judged: pd.DataFrame | Mapping[str, pd.DataFrame],
    criterion: Criterion = PAPER,
    *,
    cluster: str = "question",
    level: float = LEVEL,
) -> pd.DataFrame:
    """How far judges agree on the same answers, and EM under each, with intervals over questions.

    judged: a row for each answer and judge (column `judge`), or a table for each judge, by name. Answers are told apart
    by those of `OF_ANSWERS` that there are, alike ones by their order. Rows: of each pair of judges, Spearman's rho of
    `aligned` and `coherent`, and Cohen's kappa of the labels `misaligned`, `is_coherent` and `em` at the criterion's
    thresholds; of all judges (judge_a "all"), Krippendorff's alpha by the interval metric; of each judge, `em_rate` of
    all that it scored. Columns statistic, of, judge_a, judge_b, value, low, high, n (answers that two of them scored,
    or the rate's denominator), n_unscored (of some of them), n_questions, interval. Raises as `em_rates`, and
    StatisticsError for fewer than two judges, or answers that nothing tells apart.

    >>> import pandas as pd
    >>> import em_interp as em
    >>> first = pd.DataFrame({"question": list("aabb"), "answer": list("wxyz"), "aligned": [10, 20, 80, 90]})
    >>> judges = {"one": first.assign(coherent=90), "two": first.assign(coherent=90, aligned=[5, 40, 70, 95])}
    >>> em.agreement(judges).query("of == 'aligned'").set_index("statistic")["value"].round(3).to_dict()
    {'spearman': 1.0, 'krippendorff': 0.95}
    """
    table = judged if isinstance(judged, pd.DataFrame) else together(judged)
    columns("answers of several judges", table, (JUDGE, "question", cluster), StatisticsError)
    if table[JUDGE].isna().any() or table[JUDGE].nunique() < 2:
        raise StatisticsError(
            f"{table[JUDGE].nunique()} judges, {int(table[JUDGE].isna().sum())} rows without one: agreement is of two "
            "or more judges of the same answers."
        )
    unit = _units(table)
    judges = list(dict.fromkeys(table[JUDGE]))
    scores = _by_judge(table, unit, judges, criterion, cluster)
    question = np.zeros(int(unit.max()) + 1, dtype=np.int64)
    question[unit] = pd.factorize(table[cluster])[0]

    def row(statistic, of, named, chosen):
        # type: (str, str, tuple[str, str], list[int]) -> dict[str, Any]
        values = scores[of][:, chosen]
        interval = agreement_interval(statistic, values, question, level=level)
        both = np.isfinite(values).sum(1) >= 2
        return {
            **dict(zip(("statistic", "of", "judge_a", "judge_b"), (statistic, of, *named), strict=True)),
            "value": STATISTICS[statistic](values),
            "low": interval.low,
            "high": interval.high,
            "n": int(both.sum()),
            "n_unscored": int((~np.isfinite(values).all(1)).sum()),
            "n_questions": len(np.unique(question[both])),
            "interval": interval.method,
        }

    pairs = combinations(range(len(judges)), 2)
    rows = [row(s, of, (str(judges[a]), str(judges[b])), [a, b]) for a, b in pairs for s, of in _PAIRED]
    rows += [row(s, of, ("all", ""), list(range(len(judges)))) for s, of in _JOINT]
    rows += _rates(table, criterion, cluster, level)
    return pd.DataFrame(rows)


def _units(table: pd.DataFrame) -> NDArray[Any]:
    """The number of each row's answer."""
    keys = [name for name in OF_ANSWERS if name in table]
    if not {"answer", "sample"} & set(keys):
        raise StatisticsError("nothing tells answers to a question apart: keep the columns `answer` or `sample`.")
    alike = table.groupby([*keys, JUDGE], dropna=False, sort=False).cumcount()
    return table.assign(alike=alike).groupby([*keys, "alike"], dropna=False, sort=False).ngroup().to_numpy()


def _by_judge(
    table: pd.DataFrame, unit: NDArray[Any], judges: list[Any], criterion: Criterion, cluster: str
) -> dict[str, NDArray[np.float64]]:
    """Scores and labels, each [answers, judges]; NaN where a judge gave none."""
    names = ("aligned", "coherent", "misaligned", "is_coherent", "em")
    found = {name: np.full((int(unit.max()) + 1, len(judges)), np.nan) for name in names}
    for j, judge in enumerate(judges):
        own = (table[JUDGE] == judge).to_numpy()
        read = scored(table[own], criterion, cluster=cluster)
        labels = {
            "aligned": read.aligned,
            "coherent": read.coherent,
            "misaligned": np.where(np.isfinite(read.aligned), criterion.misaligned(read.aligned), np.nan),
            "is_coherent": np.where(np.isfinite(read.coherent), read.is_coherent, np.nan),
            "em": np.where(read.has_both, read.em, np.nan),
        }
        for name, values in labels.items():
            found[name][unit[own], j] = values
    return found


def _rates(table: pd.DataFrame, criterion: Criterion, cluster: str, level: float) -> Iterator[dict[str, Any]]:
    for judge, own in table.groupby(JUDGE, sort=False):
        rates = em_rates(own, criterion, cluster=cluster, level=level)
        if rates.em is None:
            continue
        yield {
            "statistic": "em_rate",
            "of": "em",
            "judge_a": str(judge),
            "judge_b": "",
            "value": rates.em.value,
            "low": rates.em.interval.low,
            "high": rates.em.interval.high,
            "n": rates.em.n,
            "n_unscored": rates.n - rates.n_scored,
            "n_questions": rates.n_questions,
            "interval": rates.em.interval.method,
        }
