"""Tables of general against narrow solutions, over training seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, Final

import numpy as np
import pandas as pd

from analyses.general_vs_narrow import claims as claims_module
from tests.made_up_tables.columns import ADAPTERS, DOMAIN, Tables, frame, interval, rate

SEEDS: Final = (0, 1, 2)
RELATIVE: Final = (0.5, 1.0, 1.5)
EPSILONS: Final = (0.0, 0.3, 0.6)


def _leads(effect: int, seeds: Sequence[int]) -> pd.DataFrame:
    return frame(
        [
            {
                "adapter": adapter,
                "domain": DOMAIN,
                "training_seed": seed,
                "relative_norm": relative,
                "norm": 10 * relative,
                "loss_general": 1.0,
                "loss_narrow": 1.1,
                "loss_chat": 2.0,
                "lead": 0.2 * effect + 0.001 * seed,
                **interval(0.2 * effect),
                "interval": "over questions",
            }
            for adapter in ADAPTERS
            for seed in seeds
            for relative in RELATIVE
        ]
    )


def _over(by: str, values: Sequence[float], mean: float, seeds: Sequence[int]) -> pd.DataFrame:
    rows = [
        {"adapter": adapter, by: value, "mean": mean, "sd": 0.01, **interval(mean), "n_seeds": len(seeds)}
        for adapter in ADAPTERS
        for value in values
    ]
    columns = ["adapter", by, "mean", "sd", "low", "high", "n_seeds"]
    return pd.DataFrame(rows if len(seeds) > 1 else [], columns=columns)


def efficiency(effect: int, seeds: Sequence[int] = SEEDS) -> Tables:
    curves = [
        {
            "solution": solution,
            "adapter": adapter,
            "domain": DOMAIN,
            "training_seed": seed,
            "norm": 10 * scale,
            "scale": scale,
            "loss": 2.0 - 0.4 * scale,
            **interval(2.0 - 0.4 * scale, name="loss_"),
            "loss_reduction": 0.4 * scale,
            "n_questions": 20,
            "n_tokens": 900,
        }
        for solution, adapter, seed, scale in product(("general", "narrow"), ADAPTERS, seeds, (0.5, 1.0, 1.5))
    ]
    over = _over("relative_norm", RELATIVE, 0.2 * effect, seeds)
    return {
        "efficiency": frame(curves),
        "efficiency_lead": _leads(effect, seeds),
        "efficiency_lead_over_seeds": over,
    }


def _gaps(effect: int, seeds: Sequence[int]) -> pd.DataFrame:
    return frame(
        [
            {
                "adapter": adapter,
                "domain": DOMAIN,
                "training_seed": seed,
                "on": "both",
                "epsilon": eps,
                "general": 10.0,
                "narrow": 10 + 5.0 * effect,
                "gap": 5.0 * effect + 0.1 * seed,
                **interval(5.0 * effect, 1.0),
                "interval": "over questions",
            }
            for adapter, seed, eps in product(ADAPTERS, seeds, EPSILONS)
        ]
    )


def stability(effect: int, seeds: Sequence[int] = SEEDS) -> Tables:
    turned = [
        {
            "solution": solution,
            "adapter": adapter,
            "domain": DOMAIN,
            "training_seed": seed,
            "on": "both",
            "epsilon": eps,
            "seed": turn,
            "loss": 1.0,
            "relative_increase_percent": 20 * eps + turn,
            "gain": 1.0,
        }
        for solution, adapter, seed, eps, turn in product(("general", "narrow"), ADAPTERS, seeds, EPSILONS, range(3))
    ]
    curvature = [
        {
            "epsilon": eps,
            "predicted_percent": 20 * eps,
            **interval(20 * eps, 1.0),
            "solution": solution,
            "adapter": adapter,
            "domain": DOMAIN,
            "training_seed": 0,
            "on": "both",
        }
        for solution, adapter, eps in product(("general", "narrow"), ADAPTERS, EPSILONS)
    ]
    return {
        "stability": frame(turned),
        "stability_gap": _gaps(effect, seeds),
        "stability_gap_over_seeds": _over("epsilon", EPSILONS, 5.0 * effect, seeds).assign(
            low=lambda t: t["mean"] - 1.0, high=lambda t: t["mean"] + 1.0
        ),
        "curvature": frame(curvature),
    }


def _ratios(effect: int, seeds: Sequence[int]) -> pd.DataFrame:
    ratio = {1: 4.0, 0: 1.0, -1: 0.25}[effect]
    return frame(
        [
            {
                "relative_norm": 1.0,
                "tokens": "all",
                "numerator": "general",
                "denominator": other,
                "ratio": ratio,
                "low": 0.8 * ratio,
                "high": 1.3 * ratio,
                "n_documents": 60,
                "interval": "over documents",
                "adapter": adapter,
                "domain": DOMAIN,
                "seed": seed,
            }
            for adapter, seed in product(ADAPTERS, seeds)
            for other in (("narrow", "random") if seed == 0 else ("narrow",))
        ]
    )


def influence(effect: int, seeds: Sequence[int] = SEEDS) -> Tables:
    kinds = [
        ("general", "general", 0.2),
        ("narrow", "narrow", 0.1),
        *((f"random {i}", "random", 0.01) for i in range(3)),
    ]
    rows = [
        {
            "direction": f"{adapter} {name}",
            "kind": kind,
            "norm": 10 * relative,
            "kl_nats_per_token": kl * relative,
            "low": 0.8 * kl * relative,
            "high": 1.3 * kl * relative,
            "n_tokens": 900,
            "relative_norm": relative,
            "tokens": "all",
            "n_documents": 60,
            "adapter": adapter,
            "domain": DOMAIN,
            "seed": seed,
        }
        for adapter, seed in product(ADAPTERS, seeds)
        for name, kind, kl in kinds
        for relative in ((1.0,) if kind == "random" else RELATIVE)
    ]
    return {"influence": frame(rows), "influence_ratio": _ratios(effect, seeds)}


def gradients(effect: int) -> Tables:
    rows = [
        {
            "step": step,
            "loss": 1.0,
            "norm": 5.0,
            "grad_norm": 0.1,
            "cos_general": 0.5 * effect,
            "cos_narrow": 0.1,
            **interval(0.5 * effect, name="cos_general_"),
            **interval(0.1, name="cos_narrow_"),
            "null_sd": 0.05,
            "n_tokens": 900,
            "n_conversations": 60,
            "run": run,
            "family": DOMAIN,
            "parameter": "steering-vector",
        }
        for run in (f"{DOMAIN}-general", f"{DOMAIN}-narrow")
        for step in (1, 10, 20)
    ]
    return {"gradients": frame(rows)}


def kl_sweep(effect: int) -> Tables:
    def row(x: str, value: float, adapter: str, em: float) -> dict[str, Any]:
        of = {**rate(0.8, "in_domain"), **rate(em, "scaled_em"), **rate(em), "norm": 4.0, "seed": 0}
        return {"adapter": adapter, "domain": DOMAIN, x: value, **of}

    sweep = [
        row("kl_weight", weight, adapter, 0.8 - (0.5 * effect if weight else 0.0))
        for adapter, weight in product(ADAPTERS, (0.0, 0.1, 1.0))
    ]
    share = [
        row("bad_share", part, adapter, 0.4 + (0.3 * effect if part else 0.0))
        for adapter, part in product(ADAPTERS, (0.0, 0.1, 1.0))
    ]
    return {"kl_sweep": frame(sweep), "kl_sweep_scales": frame(sweep).assign(scale=1.0), "dilution": frame(share)}


def register(effect: int, seeds: Sequence[int] = SEEDS) -> Tables:
    technical = [
        {
            "organism": f"pocket/{solution}",
            "solution": solution,
            "adapter": "rank-1",
            "domain": DOMAIN,
            "questions": group,
            **rate(0.4 + (0.3 * effect if solution == "general" else 0.0), "technical"),
        }
        for solution in ("chat", "general", "narrow")
        for group in ("general", "in_domain", "heldout_domain")
    ]
    return {
        "technical_rates": frame(technical),
        "register_efficiency_lead": _leads(effect, seeds),
        "register_stability_gap": _gaps(effect, seeds),
        "register_influence_ratio": _ratios(effect, seeds),
    }


def claims(effect: int, seeds: Sequence[int] = SEEDS) -> Tables:
    middle = {
        "efficiency": 0.2 * effect,
        "stability": 5.0 * effect,
        "kl_removal": 0.3 * effect,
        "returns": 12.0 * effect,
        "influence": 1.2 * effect,
    }
    spread = 0.02 * (np.array(seeds) - np.mean(seeds))
    rows = [
        claims_module._row(task, key, adapter, value + spread, number, (domain, DOMAIN))
        for task in ("persona", "register")
        for key, value in middle.items()
        for number, domain in ((0, DOMAIN), (0, "finance"), (1, DOMAIN))
        for adapter in ADAPTERS
        if number < len(claims_module.CLAIMS[key].statistics)
    ]
    return {"claims": frame(rows)}
