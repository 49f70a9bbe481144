"""Of experiments of many finetunes."""

from __future__ import annotations

from itertools import product

from analyses.causes import controls as analysis
from analyses.findings import AGREES, DIFFERS, UNDECIDED
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
        | {"estimate": value, **interval(value, 6.0), "unit": unit, "claimed": row.claimed}
        | {
            "verdict": AGREED[effect],
            "published": 20.0,
            "paper": row.paper,
            "source": row.source,
            "n": 100,
            "n_seeds": 3,
        }
        for row, unit in (*((row, "points") for row in analysis.ROWS), (analysis.LOGPROB, "nats"))
        for adapter, group in product(ADAPTERS, GROUPS)
        for value in [{"rise": 30.0, "drop": -30.0, "no EM": 30.0 - 30.0 * effect}[row.claimed] * (effect or 0.1)]
    ]
    return {"controls": frame([*rates, *chat]).drop_duplicates(ignore_index=True), "controls_published": frame(rows)}
