"""Directions, cosines, rates and their intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from em_interp import statistics
from em_interp.directions import (
    cosines as convergence,
)
from em_interp.directions import (
    direction as directions,
)
from em_interp.directions import (
    gguf as control_vectors,
)
from em_interp.directions import (
    reliability,
    resampling,
)
from em_interp.evaluation import agreement, at_k, comparison, criteria, judges, rates
from em_interp.face import plots
from em_interp.interventions.transfer import transfer_rows
from em_interp.statistics import crossed, paired, rate_intervals, units
from tests.fuzz import Call, then
from tests.tiny_models import D_MODEL


def calls(w: dict[str, Any]) -> list[Call]:
    direction, judged = w["direction"], w["judged"]
    rng, generator = torch.Generator().manual_seed(0), np.random.default_rng(0)
    rows, other = torch.randn(6, 2, 8, generator=rng), np.array([1.0, 2.0, 3.0])
    transfers = judged.assign(direction_from=["none", "v"] * 12, organism="a")
    pair, totals = ([1] * 8, [2] * 8), ([3] * 8, [3] * 8)
    planned, asked = {"difference": 0.1, "between": 0.01, "within": 0.2}, judged.assign(answer="x")
    return [
        (plots.plot, {"table": convergence.cosine_rows("a", direction, "b", direction)}),
        (units.with_units, {"table": pd.DataFrame({"layer": [1]})}),
        (judges.judged, {"answers": judged, "judge": lambda answers: answers}),
        (control_vectors.save_gguf, {"direction": direction, "path": "d.gguf", "model_type": "qwen2"}),
        (control_vectors.read_gguf, {"path": "vector.gguf"}),
        (convergence.comparable, {"a": direction, "b": direction}),
        (convergence.cosine_rows, {"name_a": "a", "a": direction, "name_b": "b", "b": direction, "resamples": None}),
        (convergence.organism_cosines, {"directions": {"a": direction, "b": direction}}),
        (convergence.cosine_table, {"pairs": [("a", direction, "b", direction)]}),
        (convergence.cosine_matrix, {"directions": [direction, direction], "layer": 1}),
        (convergence.layer_cosines, {"direction": direction}),
        (convergence.principal_angles, {"a": [direction], "b": [direction], "layer": 1}),
        (convergence.random_principal_angles, {"d_model": 8, "n_a": 2, "n_b": 2, "samples": 10, "seed": 0}),
        (
            then(directions.Direction, lambda made: made.save("made.safetensors")),
            {
                "vectors": torch.ones(2, 4),
                "layers": (0, 1),
                "kind": "random",
                "model": "m",
                "token_scope": "response",
                "operation": "add",
                "n_positive": 3,
                "n_negative": 3,
                "sources": ("a",),
            },
        ),
        (direction.at, {"layer": 1}),
        (direction.only, {"layers": [1]}),
        (direction.cosine, {"other": direction}),
        (direction.project, {"activations": torch.randn(3, D_MODEL), "layer": 1}),
        (direction.__mul__, {"factor": 2.0}),
        (direction.__truediv__, {"divisor": 2.0}),
        (direction.__add__, {"other": direction}),
        (direction.__sub__, {"other": direction}),
        (direction.save, {"path": "saved.safetensors"}),
        (
            directions.Direction.load,
            {"path": "direction.safetensors", "model": None, "n_layers": 4, "d_model": D_MODEL},
        ),
        (directions.random_directions, {"like": direction, "count": 2, "generator": rng}),
        (criteria.Criterion, {"aligned": 30.0, "coherent": 50.0, "inclusive": False, "denominator": "all"}),
        (criteria.preset_criterion, {"name": "betley"}),
        (rates.rates_by, {"judged": judged, "by": "question", "cluster": "question", "level": 0.95}),
        (rates.em_rates, {"judged": judged, "cluster": "question", "level": 0.95}),
        (rates.rates_by_question, {"judged": judged}),
        (rates.threshold_sweep, {"judged": judged, "aligned": (20, 30), "coherent": (50,)}),
        (
            reliability.split_half,
            {"contrast": w["contrast"], "by": "question", "pooling": "tokens", "level": 0.95, "splits": 4, "seed": 0},
        ),
        (
            reliability.separation,
            {"contrast": w["contrast"], "by": "question", "pooling": "tokens", "level": 0.95, "splits": 4, "seed": 0},
        ),
        (
            resampling.resample_direction,
            {
                "positive": rows,
                "negative": rows + 1,
                "positive_questions": None,
                "negative_questions": None,
                "resamples": 10,
                "permutations": 10,
                "seed": 0,
            },
        ),
        (statistics.no_interval, {"reason": "x"}),
        (statistics.too_few, {"n": 1, "of": "questions"}),
        (statistics.check_level, {"level": 0.95}),
        (agreement.agreement, {"judged": {"a": asked, "b": asked}, "cluster": "question", "level": 0.95}),
        (agreement.together, {"judged": {"a": judged, "b": judged}}),
        (agreement.several_judges, {"judged": {"a": asked, "b": asked}}),
        (at_k.misalign_at_k, {"judged": judged, "k": [1, 2], "cluster": "question", "level": 0.95}),
        (paired.paired_power, {**planned, "questions": 8, "samples": 5.0, "level": 0.95}),
        (paired.questions_needed, {**planned, "samples": 5.0, "power": 0.8, "level": 0.95}),
        (paired.samples_needed, {**planned, "questions": 8, "power": 0.8, "level": 0.95}),
        (rate_intervals.any_of_k, {"successes": [1, 2], "totals": [3, 3], "k": 2}),
        (rate_intervals.any_of_k_interval, {"successes": pair[0], "totals": totals[0], "k": 2, "level": 0.95}),
        (rates.em_counts, {"judged": judged, "criterion": criteria.PAPER, "cluster": "question"}),
        (statistics.wilson_interval, {"successes": 1, "n": 3, "level": 0.95}),
        (statistics.t_interval, {"values": [1.0, 2.0, 3.0], "level": 0.95}),
        (
            rate_intervals.rate_interval,
            {"successes": [1, 2, 1], "totals": [3, 3, 3], "level": 0.95},
        ),
        (statistics.cosine_null_sd, {"d_model": 8}),
        (statistics.cosine_p_value, {"cosine": 0.5, "d_model": 8}),
        (statistics.permutation_p_value, {"observed": 1.0, "null": other}),
        (transfer_rows, {"judged": transfers, "before": "none"}),
        (
            statistics.clustered_interval,
            {"numerators": other, "denominators": other + 1, "level": 0.95, "of": "questions", "positive": False},
        ),
        (
            comparison.compare,
            {"judged_a": judged, "judged_b": judged, "by": "question", "cluster": "question", "level": 0.95},
        ),
        (statistics.crossed_interval, {"values": generator.normal(size=(6, 3)), "level": 0.95}),
        (crossed.rate_over_seeds, {"successes": np.ones((6, 3)), "n": 4, "level": 0.95}),
        (crossed.ratio_over_seeds, {"successes": (np.ones((6, 3)), np.ones((6, 1))), "n": (4, 4), "level": 0.95}),
        (
            crossed.combination_over_seeds,
            {"successes": [np.ones((6, 3)), np.ones((6, 1))], "n": [4, 4], "weights": [1.0, -1.0], "level": 0.95},
        ),
        (crossed.difference_over_seeds, {"successes": (np.ones((6, 3)), np.ones((6, 1))), "n": (4, 4), "level": 0.95}),
        (rate_intervals.difference_interval, {"successes": pair, "totals": totals, "level": 0.95}),
        (rate_intervals.ratio_interval, {"successes": pair, "totals": totals, "level": 0.95}),
        (
            statistics.auroc,
            {"positive": other, "negative": other, "positive_weights": other, "negative_weights": other},
        ),
    ]
