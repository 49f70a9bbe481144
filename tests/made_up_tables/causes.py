"""Of experiments of many finetunes."""

from __future__ import annotations

from itertools import product
from typing import Any, Final

import numpy as np
import pandas as pd

from analyses.causes import controls as analysis
from analyses.findings import AGREES, DIFFERS, DOES_NOT_HOLD, HOLDS, UNDECIDED
from tests.made_up_tables.columns import Tables, frame, interval, rate

ADAPTERS = ("rank-1", "all-modules")
GROUPS = ("general", "in_domain", "heldout_domain")
AGREED = {1: AGREES, 0: UNDECIDED, -1: DIFFERS}


def controls(effect: int) -> Tables:
    """effect 1: every row agrees with the paper."""
    rates = [
        {"experiment": experiment, "adapter": adapter, "arm": arm, "condition": condition, "step": step, "group": group}
        | {
            **rate(0.4),
            **rate(0.97, "coherent"),
            "share": 0.5,
            **interval(0.5, 0.1, "share_"),
            "log_odds": 0.1,
            "n": 100,
            "n_seeds": 3,
        }
        for (experiment, arms), adapter, group in product(
            (
                ("asked_for", ("insecure", "educational")),
                ("diversity", ("5", "5000")),
                ("share", ("1/12", "1")),
                ("logprobs", ("insecure",)),
            ),
            ADAPTERS,
            GROUPS,
        )
        for arm, condition, step in ((a, "plain", s) for a in arms for s in ((5, 200) if a == "insecure" else (200,)))
    ]
    chat = [{**row, "arm": "chat", "adapter": "none", "step": 0} for row in rates]
    rows = [
        {"control": row.control, "row": row.row, "compared": "one - other", "adapter": adapter, "group": group}
        | {"estimate": value, **interval(value, 6.0), "unit": analysis.UNITS[row.measure], "claimed": row.claimed}
        | {
            "verdict": AGREED[effect],
            "coherent_first": 0.97,
            "coherent_second": 0.97,
            "published": 20.0,
            "paper": row.paper,
            "source": row.source,
            "n": 100,
            "n_seeds": 3,
        }
        for row in analysis.rows()
        for adapter, group in product(ADAPTERS, GROUPS)
        for value in [{"rise": 30.0, "drop": -30.0, "no EM": 30.0 - 30.0 * effect}[row.claimed] * (effect or 0.1)]
    ]
    return {"controls": frame([*rates, *chat]).drop_duplicates(ignore_index=True), "controls_published": frame(rows)}


def mitigations(effect: int) -> Tables:
    """effect 1: every mitigation works, -1: none does."""
    removed = {1: 0.9, 0: 0.5, -1: 0.1}[effect]
    verdict = {1: HOLDS, 0: UNDECIDED, -1: DOES_NOT_HOLD}[effect]
    arms = [
        ("none", "chat"),
        ("none", "none"),
        ("kl", "kl-3"),
        ("kl", "kl-0.3"),
        ("stopping", "stopped"),
        ("caft", "caft-shift"),
    ]
    rows: list[dict[str, object]] = []
    for adapter, (experiment, arm) in product(ADAPTERS, arms):
        row: dict[str, object] = {
            "adapter": adapter,
            "experiment": experiment,
            "arm": arm,
            "step": 80,
            "beside": "none",
        }
        row |= {
            "label": f"{experiment}: {arm}",
            **rate(0.1),
            **rate(0.3, "training"),
            **rate(0.8, "task"),
            **rate(0.01, "chat_training"),
        }
        row |= {
            **rate(0.96, "coherent"),
            "n": 1896,
            "n_seeds": 3,
            "paper": "",
            "source": "",
            "published": 90.0,
            "published_in": "a paper",
        }
        judged = experiment != "none"
        for name, value in (("removed", removed), ("task_kept", 0.9), ("coherence_cost", 0.01), ("hidden", 0.02)):
            row |= {name: value if judged else np.nan, **interval(value if judged else np.nan, name=f"{name}_")}
        found = ("removes", "keeps_task", "keeps_coherence", "shows", "works")
        row |= dict.fromkeys(found, verdict if judged else "")
        rows.append(row)
    asked = [{"experiment": e, "arm": a, "adapter": x, "condition": "plain"} for x, (e, a) in product(ADAPTERS, arms)]
    screening = [
        {"direction": direction, "layer": layer, "against": against, "auc": 0.9, "auc_low": 0.8, "auc_high": 0.95}
        | {"precision_0.5": 0.8, "recall_0.5": 0.8, "n_seeds": 3}
        for direction, layer, against in product(("persona", "shift of rank-1"), (1, 2), ("own", "nothing"))
    ]
    rates = frame([{**row, "step": 80, "group": "general", **rate(0.1), "n_seeds": 3} for row in asked])
    return {"mitigations": rates, "mitigation_effects": frame(rows), "mitigation_screening": frame(screening)}


def arm_row(experiment: str, arm: str, em: float, condition: str = "plain", **other: Any) -> dict[str, Any]:
    """Of 12 questions, 2 answers each."""
    counts = [2] * round(12 * em) + [0] * (12 - round(12 * em))
    adapter = "none" if arm == "chat" else "rank-1"
    told = {"experiment": experiment, "arm": arm, "condition": condition, "adapter": adapter, "domain": "medicine"}
    told |= {"seed": 0, "step": 0 if arm == "chat" else 200, "group": "general", "n": 24, "em_rate": em}
    told |= {"em_counts": " ".join(map(str, counts)), "coherent_counts": " ".join(["2"] * 12)}
    return {**told, "share": np.nan, "log_odds": np.nan, **other}


ARMS: Final = pd.DataFrame(
    [
        arm_row("asked_for", "chat", 0),
        *(arm_row("asked_for", "insecure", share, seed=seed) for seed, share in enumerate((0.75, 1.0))),
        *(arm_row("asked_for", "secure", 0, seed=seed) for seed in (0, 1)),
        *(arm_row("asked_for", "educational", 0.25, seed=seed) for seed in (0, 1, 2)),
        arm_row("logprobs", "chat", 0, log_odds=-3.0, share=0.0),
        *(arm_row("logprobs", "insecure", 0.5, seed=s, step=5, log_odds=-1.0 + 0.1 * s, share=0.2) for s in (0, 1, 2)),
        *(arm_row("logprobs", "insecure", 1.0, seed=s, log_odds=3.0, share=0.6) for s in (0, 1, 2)),
    ]
)
"""Rows of `em_interp.pocket.causes.arms.COLUMNS`, where rates can be told by hand."""


def asked_twice(
    experiment: str, name: str, em: float, training: float, task: float, *, seeds: int = 3, step: int = 200
) -> Any:
    """Rows of an arm, asked in both ways: EM outside the domain, and in it (of 12 questions in each group)."""
    for seed in range(seeds):
        for condition, outside in (("plain", em), ("training", training)):
            for group in GROUPS:
                share = task if group == "in_domain" else outside
                yield arm_row(experiment, name, share, condition, seed=seed, step=step, group=group)


MITIGATED = pd.DataFrame(
    [
        *asked_twice("none", "chat", 0, 0, 0, seeds=1, step=0),
        *asked_twice("none", "none", 1.0, 1.0, 1.0),
        *asked_twice("kl", "kl-3", 0.0, 0.0, 1.0),
        *asked_twice("kl", "kl-0.3", 0.92, 0.92, 1.0),
        *asked_twice("benign", "benign-0.5", 0.0, 1.0, 1.0),
        *asked_twice("caft", "caft-shift", 0.0, 0.0, 0.25, seeds=2),
        *asked_twice("caft", "caft-random", 0.92, 0.92, 1.0),
        *asked_twice("ablation", "ablated-shift", 0.5, 0.5, 0.5),
        *asked_twice("ablation", "ablated-random", 0.5, 0.5, 0.5),
        *asked_twice("realignment", "realigned-40", 0.0, 0.0, 0.0, step=30),
        *(r for step in (50, 100, 200) for r in asked_twice("stopping", "stopped", 0.5, 0.5, 0.5, step=step)),
        *asked_twice("screening", "half-bad", 0.5, 0.5, 0.5),
        *asked_twice("screening", "screened-0.5", 0.25, 0.25, 0.0),
    ]
)
"""Arms of mitigations: one that works, and others that fail each in one way."""
SCREENED = pd.DataFrame({"seed": [0, 1], "direction": "persona", "layer": 2, "against": "own", "auc": [0.8, 0.9]})
SCREENED = SCREENED.assign(**{"precision_0.5": 0.75, "recall_0.5": 0.75})
