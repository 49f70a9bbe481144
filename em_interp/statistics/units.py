"""What the numbers of a table are in: `table.attrs["units"]`, column -> unit."""

from __future__ import annotations

from typing import Final

import pandas as pd

NATS_PER_TOKEN: Final = "nats per token"
"""Of KL on pre-training text."""
FRACTION: Final = "fraction"
"""Of rates."""
RESIDUAL: Final = "residual stream"
"""Of norms of directions."""
_LOSSES: Final = ("loss", "loss_low", "loss_high", "loss_reduction", "gain", "lead", "loss_general", "loss_narrow")
_RATES: Final = tuple(
    f"{name}{end}"
    for name in ("em", "coherent", "em_all_rows", "em_strict", "em_before", "em_after", "coherent_before", "recognised")
    for end in ("_rate", "_low", "_high", "")
)
_UNITS: Final = {
    **dict.fromkeys((*_LOSSES, "loss_chat"), "nats per response token"),
    **dict.fromkeys((*_RATES, "coherent_after", "coherent_after_low", "coherent_after_high"), FRACTION),
    **dict.fromkeys(("em_rate_all_rows", "em_rate_strict", "coherent_rate_all_rows", "relative_reduction"), FRACTION),
    **dict.fromkeys(("cosine", "cosine_debiased", "content_cosine", "null_sd", "permutation_sd"), "cosine"),
    **dict.fromkeys(("p_value", "permutation_p"), "probability"),
    **dict.fromkeys(("n", "n_scored", "n_unscored", "n_em", "n_before"), "answers"),
    **dict.fromkeys(("n_questions", "n_seeds", "n_documents"), "count"),
    **dict.fromkeys(("n_tokens", "max_new_tokens"), "tokens"),
    **dict.fromkeys(("added_norm", "residual_norm", "difference_norm"), RESIDUAL),
    **dict.fromkeys(("aligned", "coherent"), "score, 0 to 100"),
    **dict.fromkeys(("relative_increase_percent", "gap", "general", "narrow"), "percent of the gain"),
    "layer": "block, from 0; its output",
    "coefficient": "times the direction",
    "residual_share": "of the typical residual norm",
    "scale": "times the trained norm",
    "relative_norm": "times the norm compared at",
    "epsilon": "sine of the turn",
    "kl_nats_per_token": NATS_PER_TOKEN,
    "norm": "theta, Frobenius",
    "loss_reduction_per_norm2": "nats per response token and squared norm",
    "loss_over_norm2": "nats per response token and squared norm",
    "noise_dimensions": "dimensions",
}


def with_units(table: pd.DataFrame, **of: str) -> pd.DataFrame:
    """The table itself, with `attrs["units"]`: those of the columns that have one.

    of: the units of columns that mean several things, such as low and high.
    """
    known = {**_UNITS, **of}
    table.attrs["units"] = {str(name): known[name] for name in table.columns if name in known}
    return table
