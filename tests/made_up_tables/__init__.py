"""Small made-up tables of every analysis, in which what is claimed holds, is undecided, or is the other way round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from tests.made_up_tables.asked import (
    finetunes_ablation,
    finetunes_cosines,
    finetunes_em_rates,
    finetunes_lora_scalars,
    finetunes_steering,
)
from tests.made_up_tables.causes import controls, mitigations
from tests.made_up_tables.columns import Tables
from tests.made_up_tables.losses import claims, efficiency, gradients, influence, kl_sweep, register, stability
from tests.made_up_tables.pretraining import pretraining
from tests.made_up_tables.read import (
    released_ablation,
    released_cosines,
    released_em_rates,
    released_layer_convention,
    released_mean_diff,
    released_question_sets,
    released_steering,
    released_thresholds,
    released_trained_vectors,
    released_wordings,
    runs_kl_removal,
    runs_local_cosine,
    runs_pca,
    runs_training_log,
    runs_trajectory,
)

MADE: Final[dict[str, Callable[[int], Tables]]] = {
    "released.em_rates": released_em_rates,
    "released.steering": released_steering,
    "released.ablation": released_ablation,
    "released.cosines": released_cosines,
    "released.layer_convention": released_layer_convention,
    "released.mean_diff": released_mean_diff,
    "released.question_sets": released_question_sets,
    "released.thresholds": released_thresholds,
    "released.trained_vectors": released_trained_vectors,
    "released.wordings": released_wordings,
    "runs.kl_removal": runs_kl_removal,
    "runs.local_cosine": runs_local_cosine,
    "runs.pca": runs_pca,
    "runs.training_log": runs_training_log,
    "runs.trajectory": runs_trajectory,
    "finetunes.em_rates": finetunes_em_rates,
    "finetunes.steering": finetunes_steering,
    "finetunes.ablation": finetunes_ablation,
    "finetunes.cosines": finetunes_cosines,
    "finetunes.lora_scalars": finetunes_lora_scalars,
    "causes.controls": controls,
    "causes.mitigations": mitigations,
    "causes.pretraining": pretraining,
    "general_vs_narrow.claims": claims,
    "general_vs_narrow.efficiency": efficiency,
    "general_vs_narrow.stability": stability,
    "general_vs_narrow.influence": influence,
    "general_vs_narrow.gradients": gradients,
    "general_vs_narrow.kl_sweep": kl_sweep,
    "general_vs_narrow.register": register,
}
"""Full name -> its tables where the effect is there (1), absent (0), or the other way round (-1)."""
SEEDED: Final[dict[str, Callable[[int, Sequence[int]], Tables]]] = {
    "general_vs_narrow.claims": claims,
    "general_vs_narrow.efficiency": efficiency,
    "general_vs_narrow.stability": stability,
    "general_vs_narrow.influence": influence,
    "general_vs_narrow.register": register,
}
"""Those that are measured over training seeds."""


def without_intervals(tables: Tables) -> Tables:
    """The same, where no interval could be given: ends of all intervals are empty."""
    ends = ("low", "high")
    return {
        name: table.assign(**{c: np.nan for c in table if c in ends or c.endswith(("_low", "_high"))})
        for name, table in tables.items()
    }
