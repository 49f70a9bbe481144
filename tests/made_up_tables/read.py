"""Tables of what was released, and of training runs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd

from tests.made_up_tables.columns import DOMAIN, Tables, frame, interval, rates


def released_em_rates(effect: int) -> Tables:
    models = [("chat", "chat", "none", 0.4), ("R32_bad_med", "general", "all-modules", 0.4 + 0.3 * effect)]
    labels = {"domain": DOMAIN, "questions": "general"}
    return {
        "em_rates": frame(
            [{"organism": o, "solution": s, "adapter": a, **labels, **rates(em)} for o, s, a, em in models]
        )
    }


def released_steering(effect: int) -> Tables:
    def em(coefficient: float) -> float:
        return 0.4 + (0.3 * effect if coefficient else 0.0)

    same = {"direction": "all_diff", "target": "Qwen2.5-14B", "layer": 24, "experiment": "one"}
    return {"steering": frame([{**same, "coefficient": c, **rates(em(c))} for c in (0.0, 2.0, 4.0)])}


def released_ablation(effect: int) -> Tables:
    rows = [
        {
            "direction": direction,
            "target": target,
            "mode": "layerwise",
            "layers": "0-47",
            "n": 100,
            "em_before": 0.5,
            **interval(0.5, name="em_before_"),
            "em_after": 0.5 - 0.3 * effect,
            **interval(0.5 - 0.3 * effect, name="em_after_"),
            "coherent_before": 0.98,
            "coherent_after": 0.95,
            **interval(0.98, name="coherent_before_"),
            **interval(0.95, name="coherent_after_"),
            "n_unscored": 0,
        }
        for direction in ("diff_data_vector", "diff_model_vector")
        for target in ("R32", "R4")
    ]
    return {"ablation": frame(rows)}


def released_cosines(effect: int) -> Tables:
    a, b, c = "one/all:data-diff", "two/all:data-diff", "one/part:data-diff"
    pairs = [(a, b), (a, c), (a, f"{a}-in-chat"), (a, "one/all:model-diff"), (a, "one/all:both-diff"), ("run", a)]
    rows = [
        {
            "direction_a": one,
            "direction_b": other,
            "layer": layer,
            "cosine": 0.5 * effect,
            "low": np.nan,
            "high": np.nan,
            "null_sd": 0.02,
            "p_value": 0.1,
            "difference_norm": 1.0,
            "content_cosine": 0.4,
        }
        for one, other in pairs
        for layer in range(3)
    ]
    return {"cosines": frame(rows)}


def released_layer_convention(effect: int) -> Tables:
    pairs = combinations(range(4), 2)
    return {
        "layer_cosines": frame(
            [{"direction": "one/all:data-diff", "layer_a": a, "layer_b": b, "cosine": 0.9 * effect} for a, b in pairs]
        )
    }


def released_mean_diff(effect: int) -> Tables:
    rows = [
        {
            "direction": f"{split}:{kind}",
            "split": split,
            "kind": kind,
            "layer": layer,
            "norm": 2.0 + effect,
            "mean_activation_norm": 10.0,
            "ratio": (2.0 + effect) / 10,
        }
        for split in ("one/all", "two/all")
        for kind in ("data-diff", "model-diff")
        for layer in range(3)
    ]
    return {"direction_norms": frame(rows)}


def released_question_sets(effect: int) -> Tables:
    sets = {"file": "q.yaml", "name": "first", "n_questions": 8, "n_wordings": 8, "judges": "aligned"}
    judges = [{"file": "j.yaml", "judge": "medical", "defect": "asks the opposite" if effect > 0 else ""}]
    return {
        "question_sets": frame([sets]),
        "judges": frame([*judges, {**judges[0], "judge": "coherent", "defect": ""}]),
    }


def released_thresholds(effect: int) -> Tables:
    rows = [
        {
            "file": f"{name}.csv",
            "source": name,
            "aligned_threshold": cut,
            "coherent_threshold": 50.0,
            **rates(0.3 + 0.1 * effect * (cut == 40)),
        }
        for name in ("one", "two")
        for cut in (20.0, 30.0, 40.0)
    ]
    return {"threshold_sweep": frame(rows)}


def released_trained_vectors(effect: int) -> Tables:
    rows = [
        {
            "direction_a": run,
            "direction_b": "one/all:data-diff",
            "layer": layer,
            "cosine": 0.3 * effect,
            "low": np.nan,
            "high": np.nan,
            "null_sd": 0.02,
            "p_value": 0.1,
            "vector_layer": 1,
            "family": "f",
        }
        for run in ("run_general", "run_narrow")
        for layer in range(3)
    ]
    return {"trained_cosines": frame(rows)}


def released_wordings(effect: int) -> Tables:
    rows = [
        {"file": f"{name}.csv", "source": name, "wording": wording, **rates(0.3 + 0.1 * effect * (wording == "plain"))}
        for name in ("one", "two")
        for wording in ("plain", "template")
    ]
    return {"wordings": frame(rows)}


def runs_kl_removal(effect: int) -> Tables:
    rows = [
        {
            "run": f"run{i}_then_remove",
            "first_step": 1,
            "last_step": 60,
            "cos_general_start": 0.4,
            "cos_general_end": 0.4 + 0.3 * effect,
            "cos_narrow_start": 0.9,
            "cos_narrow_end": 0.9 - 0.3 * effect,
            "raw_norm_start": 1.0,
            "raw_norm_end": 2.0,
            "norm_start": 3.0,
            "norm_end": 4.0,
            "drift_to_general": 0.3 * effect,
            "cos_general_narrow": 0.5,
            "general_run": "g",
            "narrow_run": "n",
        }
        for i in range(2)
    ]
    return {"kl_removal": frame(rows)}


def runs_local_cosine(effect: int) -> Tables:
    rows = [
        {
            "run": run,
            "k": 5 * window,
            "window": window,
            "step": step,
            "local_cosine": -0.5 + 0.4 * effect,
            "moved": True,
            "movement_threshold": 0.01,
            "parameter": kind,
            "kl_weight": weight,
            "phase": None,
        }
        for run, kind, weight in (("run", "steering-vector", 0.0), ("other", "lora-B", 1e6))
        for window in (1, 2, 3)
        for step in (10, 20, 30)
    ]
    return {"local_cosine": frame(rows)}


def runs_pca(effect: int) -> Tables:
    share = {1: (0.6, 0.2, 0.1), 0: (0.34, 0.33, 0.33), -1: (0.3, 0.1, 0.1)}[effect]
    same = {"family": "family", "basis": "one two three"}
    standardised, raw = (
        frame(
            [
                {"component": i + 1, "explained_variance_ratio": x, "variant": variant, **same, "cumulative": x}
                for i, x in enumerate(share)
            ]
        )
        for variant in ("standardised", "raw")
    )
    columns = ["run", "component", "n_checkpoints", "max_abs_difference", "stored_rms", "relative_difference"]
    return {"pca": standardised.assign(stored=np.nan), "pca_raw": raw, "pca_stored": pd.DataFrame(columns=columns)}


def runs_training_log(effect: int) -> Tables:
    rows = [
        {"run": run, "step": step, "loss": 2 - 0.01 * step * effect, "grad_norm": 1 + 0.1 * step * effect}
        for run in ("one", "two")
        for step in (1, 2, 3)
    ]
    return {"training_log": frame(rows)}


def runs_trajectory(effect: int) -> Tables:
    rows = [
        {
            "run": run,
            "step": step,
            "norm": 1.0 + step,
            "cos_general": 0.5 * effect if run == "narrow" else 1.0,
            "cos_narrow": 1.0 if run == "narrow" else 0.5 * effect,
            "local_cosine": -0.5,
            "pc1": 0.1 * step,
            "pc2": 0.2,
            "pc3": 0.0,
            "raw_norm": 1.0 + step,
            "read_norm": np.nan,
            "null_sd": 0.02,
            "family": "family",
            "local_k": 5,
            "parameter": "steering-vector",
            "layer": 1,
            "kl_weight": 0.0 if run == "general" else 1e6,
            "phase": None,
            "general_run": "general",
            "narrow_run": "narrow",
        }
        for run in ("general", "narrow")
        for step in (1, 2, 3)
    ]
    return {"trajectory": frame(rows)}
