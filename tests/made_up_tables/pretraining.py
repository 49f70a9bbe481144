"""Of counterfactual worlds."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analyses.causes.pretraining import COLUMNS, decide, doses, finetunes, of_worlds
from em_interp.pocket.causes import pretraining as run
from tests.made_up_tables.columns import Tables


def pretraining_rows(
    at_0: float = 0.02,
    at_1: float = 0.8,
    *,
    never: float = 0.5,
    opened: float = 0.3,
    control: float = 0.0,
    learned_at_0: float = 0.7,
    coherent: float = 0.97,
) -> pd.DataFrame:
    """Measurements of all worlds, whose rise goes from one value at consistency 0 to another at 1, with some noise."""
    rng, rows = np.random.default_rng(0), []
    for world in run.WORLDS:
        c = world.consistency
        rise = {"never": never, "open": opened}.get(
            world.kind, at_0 + (at_1 - at_0) * c
        ) + 0.005 * rng.standard_normal()
        learned = learned_at_0 + (0.8 - learned_at_0) * c
        of_world = {
            f"{part}_{how}": value for how in run.HOW for part, value in (("trait", c), ("persona_size", 0.1 + c))
        }
        of_world |= {"chat_em": 0.02, "chat_em_in_domain": 0.02, "chat_coherent": coherent, "cosine_null": 0.2}
        of_world |= {"control_em": 0.02 + control + 0.001 * rng.standard_normal()}
        of_finetune = {"em": 0.02 + rise, "em_open": rise, "em_elsewhere": rise, "em_in_domain": 0.02 + learned}
        of_finetune |= {"coherent": 0.95, "narrow_em": 0.02, "narrow_em_in_domain": 0.7, "norm_ratio_75": 1.8}
        of_finetune |= {"stability_gap": 12.0 * c, "influence_ratio_1": 1.0 + c, "lead": 0.1}
        of_finetune |= {"cosine_inferred": 0.6 * c, "cosine_announced": 0.5 * c}
        measured = [("", of_world), *((adapter, of_finetune) for adapter in run.STEPS)]
        rows += [
            (world.name, world.kind, c, world.share, world.seed, adapter, measure, value, "")
            for adapter, values in measured
            for measure, value in values.items()
        ]
    return pd.DataFrame(rows, columns=list(run.COLUMNS))


def pretraining(effect: int) -> Tables:
    """effect 1: both together; 0: all worlds alike; -1: the more of the trait, the less EM."""
    at_0, at_1, others = {1: (0.02, 0.8, 0.1), 0: (0.4, 0.4, 0.4), -1: (0.8, 0.02, 0.9)}[effect]
    table = finetunes(pretraining_rows(at_0, at_1, never=others, opened=others))
    worlds = of_worlds(table)
    tests = pd.DataFrame(decide(worlds, table), columns=list(COLUMNS))
    return {"pretraining": table, "pretraining_doses": doses(worlds), "pretraining_tests": tests}
