"""Several models at one Inspect task: rates with intervals, and what each lost against the first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from inspect_ai.log import EvalLog
from inspect_ai.model import Model
from inspect_ai.scorer import value_to_float

from em_interp.errors import MissingDataError, UsageError
from em_interp.inspect.run import run
from em_interp.statistics.rate_intervals import difference_interval, rate_interval


def compared(
    models: Mapping[str, Model], task: str, out: str | Path, *, seed: int = 0, **arguments: Any
) -> pd.DataFrame:
    """One row a model: how well it does at a task of Inspect's whose scores are right or wrong, or from 0 to 1.

    models: by what the table calls them, such as `provider.as_model(chat, interventions=[...])`. arguments: the
    task's, and `limit`. Logs lie in OUT/NAME, and a run that was stopped goes on. Columns of `compared_rates`. Raises
    UsageError for no model and for scores of another kind, MissingDataError where a log has none.
    """
    if not models:
        raise UsageError("there is no model to compare: give at least one, by name.")
    scores = {}
    for name, model in models.items():
        log = run(model, Path(out) / name, task=task, seed=seed, display="none", **arguments)
        scores[name] = scores_of(log)
    return compared_rates(scores)


def scores_of(log: EvalLog) -> pd.DataFrame:
    """One row an answer of a log's first scorer: question (the sample's id), score (0 to 1, missing where unscored).

    Raises MissingDataError for a log without scores, UsageError for scores that are not right, wrong or 0 to 1.
    """
    to_float = value_to_float()
    rows = []
    for sample in log.samples or ():
        score = next(iter((sample.scores or {}).values()), None)
        if score is not None and isinstance(score.value, (list, dict)):
            raise UsageError(
                f"{log.eval.task} gives {score.value!r:.60} as a score, not one number: name another task."
            )
        rows.append({"question": str(sample.id), "score": None if score is None else to_float(score.value)})
    table = pd.DataFrame(rows, columns=["question", "score"]).astype({"score": float})
    if table["score"].notna().sum() == 0:
        raise MissingDataError(log.location, f"it holds no scores ({log.status}: {log.error})", "run the task again")
    if not table["score"].dropna().between(0, 1).all():
        raise UsageError(f"{log.eval.task} gives scores outside 0 to 1, which are no rates: name another task.")
    return table


def compared_rates(scores: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a model, of tables with question and score (0 to 1).

    Columns model, rate, low, high (over questions), difference, difference_low, difference_high (from the first
    model, on the same questions; empty for the first itself), n, n_unscored, n_questions, interval.
    """
    rows, first = [], None
    for name, table in scores.items():
        counts = table.dropna(subset="score").groupby("question")["score"].agg(["sum", "size"])
        interval = rate_interval(counts["sum"].to_numpy(), counts["size"].to_numpy())
        rate = float(table["score"].mean())
        row = {"model": name, "rate": rate, "low": interval.low, "high": interval.high}
        row |= dict.fromkeys(("difference", "difference_low", "difference_high"))
        if first is not None:
            both = counts.join(first.add_suffix("_first"), how="inner")
            tops = (both["sum"].to_numpy(), both["sum_first"].to_numpy())
            totals = (both["size"].to_numpy(), both["size_first"].to_numpy())
            lost = difference_interval(tops, totals)
            row |= {"difference": tops[0].sum() / totals[0].sum() - tops[1].sum() / totals[1].sum()}
            row |= {"difference_low": lost.low, "difference_high": lost.high}
        first = counts if first is None else first
        n = {"n": len(table), "n_unscored": int(table["score"].isna().sum()), "n_questions": len(counts)}
        rows.append({**row, **n, "interval": interval.method})
    return pd.DataFrame(rows)
