"""Units of the columns of analyses' tables, beside those that `em_interp.statistics.units` knows, for their heads."""

from __future__ import annotations

from typing import Final

import pandas as pd

from em_interp.statistics.units import FRACTION, NATS_PER_TOKEN, RESIDUAL, with_units

_LOSS: Final = "nats per response token"
_OF_GAIN: Final = "percent of the gain"
_NORM: Final = "theta, Frobenius"
_STEPS: Final = "training steps"
_UNITS: Final = {
    **dict.fromkeys(("em_after_all_rows", "bad_share", "accuracy", "accuracy_low", "accuracy_high"), FRACTION),
    **dict.fromkeys(
        (f"{of}_{end}" for of in ("in_domain", "open", "technical") for end in ("rate", "low", "high")), FRACTION
    ),
    **dict.fromkeys(("scaled_em_rate", "scaled_em_low", "scaled_em_high", "scaled_in_domain_rate"), FRACTION),
    **dict.fromkeys(("scaled_coherent_rate", "explained_variance_ratio", "cumulative", "stored"), FRACTION),
    **dict.fromkeys(("along", "across", "across_low", "across_high", "trace", "trace_low", "trace_high"), _LOSS),
    **dict.fromkeys(("step", "first_step", "last_step", "window", "local_k"), _STEPS),
    **dict.fromkeys(("norm_a", "norm_b", "norm_start", "norm_end"), _NORM),
    **dict.fromkeys(("raw_norm", "raw_norm_start", "raw_norm_end", "movement_threshold"), "norm as stored"),
    **dict.fromkeys(("aligned_threshold", "coherent_threshold"), "score, 0 to 100"),
    "predicted_percent": _OF_GAIN,
    "mean_activation_norm": RESIDUAL,
    "local_cosine": "cosine",
}
_BY_TABLE: Final = {
    "transfer": dict.fromkeys(("low", "high"), FRACTION),
    "efficiency": dict.fromkeys(("low", "high"), _LOSS),
    "efficiency_lead": dict.fromkeys(("low", "high"), _LOSS),
    "efficiency_lead_over_seeds": dict.fromkeys(("mean", "sd", "low", "high"), _LOSS),
    "register_efficiency_lead": dict.fromkeys(("low", "high"), _LOSS),
    "influence": dict.fromkeys(("low", "high"), NATS_PER_TOKEN),
    "curvature": dict.fromkeys(("low", "high"), _OF_GAIN),
    "stability_gap": dict.fromkeys(("low", "high"), _OF_GAIN),
    "stability_gap_over_seeds": dict.fromkeys(("mean", "sd", "low", "high"), _OF_GAIN),
    "register_stability_gap": dict.fromkeys(("low", "high"), _OF_GAIN),
    "direction_norms": {"norm": RESIDUAL},
    "cosines": dict.fromkeys(("low", "high"), "cosine"),
}
"""Of columns that mean several things."""


def units_of(name: str, table: pd.DataFrame) -> dict[str, str]:
    """Column -> unit, of the columns of the table of that name that have one."""
    units: dict[str, str] = with_units(table.head(0).copy(), **_UNITS, **_BY_TABLE.get(name, {})).attrs["units"]
    return units
