"""Tables of finetunes that were asked."""

from __future__ import annotations

from itertools import combinations, product

from tests.made_up_tables.columns import DOMAIN, Tables, frame, interval, rates


def finetunes_em_rates(effect: int) -> Tables:
    groups = ("general", "in_domain", "heldout_domain")
    outside = {"chat": 0.4, "general": 0.4 + 0.3 * effect, "narrow": 0.5 - 0.3 * effect}
    rows = [
        {
            "organism": f"pocket/{solution}{i}",
            "solution": solution,
            "adapter": "rank-1",
            "domain": DOMAIN,
            "questions": group,
            "seed": i,
            **rates(0.5 if (solution, group) == ("narrow", "in_domain") else outside[solution]),
        }
        for solution in outside
        for i in range(1 if solution == "chat" else 3)
        for group in groups
    ]
    return {"em_rates": frame(rows)}


def finetunes_steering(effect: int) -> Tables:
    rows = [
        {
            "direction": name,
            "target": "chat",
            "control": name.startswith("random"),
            "layer": layer,
            "coefficient": c,
            "residual_share": c / 10,
            "added_norm": c,
            **rates(0.4 + (0.3 * effect if c and not name.startswith("random") else 0.0)),
        }
        for name in ("pocket/one", "random 0", "random 1")
        for layer in (0, 1)
        for c in (0.0, 2.0, 4.0)
    ]
    return {"steering": frame(rows)}


def finetunes_ablation(effect: int) -> Tables:
    names, left = ("pocket/one", "pocket/two", "pocket/three"), 0.5 - 0.3 * effect
    modes = ("layerwise", "layerwise model-diff", "layerwise subspace", "random")
    rows = [
        {
            "direction": "random" if mode == "random" else name,
            "target": name,
            "mode": mode,
            "layers": "0-5",
            "em_before": 0.5,
            **interval(0.5, name="em_before_"),
            "n": 100,
            "adapter": "rank-1",
            "em_after": 0.5 if mode == "random" else left,
            "coherent_before": 0.98,
            "coherent_after": 0.95,
            **interval(0.5 if mode == "random" else left, name="em_after_"),
            **interval(0.98, name="coherent_before_"),
            **interval(0.95, name="coherent_after_"),
        }
        for name in names
        for mode in modes
    ]
    moved = [
        {
            "direction_from": source,
            "organism": organism,
            "em_before": 0.5,
            "em_after": left,
            "n": 100,
            "relative_reduction": 0.6 * effect,
            **interval(0.6 * effect, 0.2),
            "kind": kind,
            "coherent_before": 0.98,
            "coherent_after": 0.95,
            "n_before": 100,
        }
        for kind in ("mean-diff", "model-diff")
        for source, organism in product(names, names)
    ]
    return {"ablation": frame(rows), "transfer": frame(moved)}


def finetunes_cosines(effect: int) -> Tables:
    names = ("pocket/one", "pocket/two", "pocket/three")
    personas = [f"persona ({how}, pre-trained)" for how in ("announced", "inferred")]
    between = [(a, b, "between finetunes") for a, b in combinations(names, 2)]
    readings = [
        (f"{n}:{kind}", p, "between readings") for n in names for kind in ("mean-diff", "model-diff") for p in personas
    ]
    rows = [
        {
            "direction_a": a,
            "direction_b": b,
            "layer": layer,
            "cosine": 0.5 * effect,
            "null_sd": 0.05,
            "cosine_debiased": 0.55 * effect,
            **interval(0.55 * effect, 0.2),
            "p_value": 0.1,
            "permutation_p": 0.1,
            "content_cosine": 0.4,
            "noise_dimensions": 9.0,
            "comparison": comparison,
        }
        for a, b, comparison in (*between, *readings)
        for layer in range(3)
    ]
    return {"cosines": frame(rows)}


def finetunes_lora_scalars(effect: int) -> Tables:
    comparisons = (
        "out-of-domain aligned / in-domain aligned",
        "out-of-domain aligned / out-of-domain misaligned",
    )
    rows = [
        {
            "comparison": comparison,
            "accuracy": 0.6,
            "auc": 0.5 + 0.2 * effect,
            **interval(0.5 + 0.2 * effect),
            "n": 60,
            "n_questions": 20,
            "organism": f"pocket/r{i}",
            "domain": DOMAIN,
            "seed": i,
        }
        for comparison in comparisons
        for i in range(3)
    ]
    return {"lora_scalars": frame(rows)}
