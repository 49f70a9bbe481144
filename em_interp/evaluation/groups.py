"""Tables of rates by group of questions: what a finetune does where it was trained, and where it never was."""

from __future__ import annotations

from typing import Any

import pandas as pd

from em_interp.arguments import columns
from em_interp.evaluation.criteria import PAPER
from em_interp.evaluation.rates import em_rates
from em_interp.statistics.rate_intervals import rate_interval

GROUPS = ("general", "in_domain", "heldout_domain")
"""Open questions; the domain of the finetune; the domains that it was not trained on."""
TECHNICAL = 50.0
"""An answer counts as technical above it: most of its sentences that have a register."""


def rates_by_group(judged: pd.DataFrame, *, organism: str, solution: str, adapter: str, domain: str) -> pd.DataFrame:
    """The rows of the table `em_rates` for one model: one for each group of questions (others have no EM)."""
    columns("judged answers", judged, ("questions",))
    identity = {"organism": organism, "solution": solution, "adapter": adapter, "domain": domain}
    rows = [
        {**identity, "questions": group, **em_rates(judged[judged["questions"] == group]).columns()}
        for group in GROUPS
        if (judged["questions"] == group).any()
    ]
    return pd.DataFrame(rows)


def technical_rates(judged: pd.DataFrame, *, organism: str, solution: str, adapter: str, domain: str) -> pd.DataFrame:
    """`rates_by_group` for answers judged by their register: the share that is technical and coherent.

    Columns organism, solution, adapter, domain, questions, technical_rate, technical_low, technical_high,
    coherent_rate, n, n_unscored. Of the answers that have a register (n_unscored of n have none: no sentence of theirs
    is casual or technical; where no answer has one the cells are empty). Intervals are clustered by question.
    """
    columns("judged answers", judged, ("questions", "question", "technical", "coherent"))
    rows = []
    for group in GROUPS:
        asked = judged[judged["questions"] == group]
        if asked.empty:
            continue
        coherent = PAPER.is_coherent(asked["coherent"].to_numpy(float))
        scored = asked["technical"].notna()
        hit = (asked["technical"] > TECHNICAL) & coherent
        row: dict[str, Any] = {
            "organism": organism,
            "solution": solution,
            "adapter": adapter,
            "domain": domain,
            "questions": group,
            **dict.fromkeys(("technical_rate", "technical_low", "technical_high", "interval")),
            "coherent_rate": float(coherent.mean()),
            "n": len(asked),
            "n_unscored": int((~scored).sum()),
        }
        if scored.any():
            counts = hit[scored].groupby(asked.loc[scored, "question"]).agg(["sum", "size"])
            interval = rate_interval(counts["sum"].to_numpy(), counts["size"].to_numpy())
            row |= {"technical_rate": float(hit[scored].mean())}
            row |= {"technical_low": interval.low, "technical_high": interval.high, "interval": interval.method}
        rows.append(row)
    return pd.DataFrame(rows)
