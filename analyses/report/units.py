"""Units of the tables' columns, for their heads. What is not named here is a name, a count or a pure number."""

from __future__ import annotations

from typing import Final

_SAID: Final = {
    "fraction": "em_rate em_low em_high coherent_rate em_rate_all_rows em_all_rows_low em_all_rows_high em_rate_strict "
    "em_strict_low em_strict_high coherent_rate_all_rows em_before em_before_low em_before_high em_after em_after_low "
    "em_after_high em_after_all_rows coherent_before coherent_after relative_reduction transfer.low transfer.high "
    "bad_share in_domain_rate in_domain_low in_domain_high open_rate open_low open_high scaled_em_rate scaled_em_low "
    "scaled_em_high scaled_in_domain_rate scaled_coherent_rate technical_rate technical_low technical_high accuracy "
    "accuracy_low accuracy_high explained_variance_ratio cumulative stored residual_share",
    "nats per token": "loss loss_low loss_high loss_reduction loss_general loss_narrow loss_chat lead gain "
    "kl_nats_per_token along across across_low across_high trace trace_low trace_high efficiency.low efficiency.high "
    "efficiency_lead.low efficiency_lead.high efficiency_lead_over_seeds.mean efficiency_lead_over_seeds.sd "
    "efficiency_lead_over_seeds.low efficiency_lead_over_seeds.high register_efficiency_lead.low "
    "register_efficiency_lead.high influence.low influence.high",
    "percent": "predicted_percent relative_increase_percent curvature.low curvature.high",
    "percentage points": "gap stability_gap.general stability_gap.narrow stability_gap.low stability_gap.high "
    "stability_gap_over_seeds.mean stability_gap_over_seeds.sd stability_gap_over_seeds.low "
    "stability_gap_over_seeds.high register_stability_gap.general register_stability_gap.narrow "
    "register_stability_gap.low register_stability_gap.high",
    "training steps": "step first_step last_step window local_k",
    "norm of theta": "norm raw_norm norm_a norm_b raw_norm_start raw_norm_end norm_start norm_end movement_threshold",
    "norm of activations": "added_norm difference_norm mean_activation_norm direction_norms.norm",
    "nats per token / norm²": "loss_reduction_per_norm2 loss_over_norm2",
    "score": "aligned_threshold coherent_threshold",
}
_UNITS: Final = {column: unit for unit, columns in _SAID.items() for column in columns.split()}


def unit_of(table: str, column: str) -> str:
    """The unit of a table's column; nothing where it has none."""
    return _UNITS.get(f"{table}.{column}", _UNITS.get(column, ""))
