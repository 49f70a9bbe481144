"""Solutions, their training, and what compares them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from em_interp.landscape import curvature, efficiency, influence, landscape, pairs, seeds, stability
from em_interp.models import pretrained as models
from em_interp.solutions import load as solutions
from em_interp.solutions import space as solution_space
from em_interp.solutions.base import rotate_away
from em_interp.solutions.dora import DoraAdapter
from em_interp.solutions.lora import as_lora
from em_interp.training import finetune as training
from em_interp.training import gradients, recipes, screening, trajectories
from tests import published_factory
from tests.fuzz import Call, then
from tests.fuzz.world import BAD, FEW, GOOD, judged_rows, world_of
from tests.tiny_models import make_chat

LINE = np.array([0.0, 1.0]), np.array([1.0, 0.5])


def judged_of(model: models.ChatModel) -> pd.DataFrame:
    run(model)
    return judged_rows()


def attached(model: Any) -> None:
    with world_of()["vector"].attached(model):
        run(world_of()["model"])


def run(model: models.ChatModel) -> None:
    with torch.no_grad():
        model.hf(torch.tensor([[5, 6]]))


def train_adapter(adapter: Any) -> None:
    train(recipes.TrainingSpec(adapter, 1e-3, max_steps=1, batch_size=2))


def train(spec: recipes.TrainingSpec) -> None:
    folder = Path("spec")
    shutil.rmtree(folder, ignore_errors=True)
    training.finetune(make_chat(), BAD, spec, kl_conversations=GOOD if spec.kl_weight else None, out_dir=folder, **FEW)


def calls(w: dict[str, Any]) -> list[Call]:
    model, vector, adapter = (w[k] for k in ("model", "vector", "adapter"))
    rng = torch.Generator().manual_seed(0)
    repeated = pd.DataFrame({"a": ["x", "x"], "x": [1.0, 2.0], "training_seed": [0, 1]})
    both = trajectories.References(w["trajectory"], w["trajectory"], ())
    return [
        (
            curvature.curvature,
            {"landscape": w["surface"], "solution": vector, "n_probes": 2, "first_seed": 0, "on": "both"},
        ),
        (
            efficiency.efficiency_curves,
            {"landscape": w["surface"], "solutions": w["both"], "scales": (0.0, 1.0), "progress": False},
        ),
        (
            efficiency.efficiency,
            {"model": model, "solutions": w["both"], "chats": BAD, "scales": (0.0, 1.0), "progress": False},
        ),
        (
            stability.stability,
            {"model": model, "solutions": w["both"], "chats": BAD, "epsilons": (0.0, 0.5), "n_seeds": 2, **FEW},
        ),
        (
            influence.influence,
            {
                "model": model,
                "solutions": w["both"],
                "texts": ["the quick brown fox", "see a doctor"],
                "relative_norms": (1.0,),
                "n_random": 1,
                "seed": 0,
                "max_tokens": 8,
                **FEW,
            },
        ),
        (
            pairs.measure_pair,
            {
                "landscape": w["surface"],
                "general": vector,
                "narrow": w["other"],
                "texts": ["the quick brown fox", "see a doctor"],
                "kl_removed": vector,
                "keep": lambda *_: pd.DataFrame(),
            },
        ),
        (pairs.norm_reaching, {"norms": [0.0, 1.0], "losses": [1.0, 0.5], "to": 0.7}),
        (pairs.mean_lead, {"general": LINE, "narrow": LINE, "up_to": 0.5}),
        (pairs.efficiency_measures, dict(zip(("general", "narrow"), w["efficiency"], strict=True))),
        (pairs.stability_measures, dict(zip(("general", "narrow"), w["curves"], strict=True))),
        (pairs.influence_measures, {"sums": w["kl"]}),
        (pairs.drift_measures, {"general": vector, "narrow": w["other"], "kl_removed": vector}),
        (efficiency.efficiency_table, {"curves": w["efficiency"]}),
        (efficiency.optimum, {"curve": w["efficiency"][0]}),
        (
            efficiency.lead_at_equal_norm,
            {
                "landscape": w["surface"],
                "general": vector,
                "narrow": w["other"],
                "relative_norms": (0.5, 1.0),
                "progress": False,
            },
        ),
        (gradients.loss_gradient, {"model": model, "solution": vector, "conversations": BAD, "tokens_per_batch": 512}),
        (
            gradients.gradient_cosines,
            {
                "model": model,
                "checkpoints": {1: vector},
                "conversations": BAD,
                "general": vector,
                "narrow": w["other"],
                "tokens_per_batch": 512,
                **FEW,
            },
        ),
        (influence.Measured, {"direction": "g", "kind": "general", "solution": vector, "relative_norm": 1.0}),
        (
            influence.at_equal_norms,
            {
                "trained": [influence.Measured("g", "general", vector)],
                "relative_norms": (1.0,),
                "n_random": 1,
                "seed": 0,
            },
        ),
        (
            influence.document_kl,
            {
                "model": model,
                "texts": ["the quick brown fox"],
                "solutions": [influence.Measured("g", "general", vector)],
                "max_tokens": 8,
                "label": None,
                "tokens_per_batch": 64,
                **FEW,
            },
        ),
        (influence.with_all, {"sums": w["kl"]}),
        (influence.influence_table, {"sums": w["kl"], "level": 0.95}),
        (
            influence.influence_ratio,
            {
                "sums": w["kl"],
                "numerator": "general",
                "denominator": "narrow",
                "level": 0.95,
            },
        ),
        (landscape.Landscape, {"model": model, "chats": w["encoded"], "tokens_per_pass": 512, "cache_bytes": 10**8}),
        (w["surface"].losses, {"solutions": [vector], "progress": False}),
        (w["surface"].plain_losses, {"solutions": [vector]}),
        (then(recipes.VectorSpec, train_adapter), {"layer": 1, "alpha": 256.0}),
        (
            then(recipes.LoraSpec, train_adapter),
            {"rank": 1, "alpha": 1.0, "rslora": True, "target_modules": ("down_proj",), "layers": (1,)},
        ),
        (
            then(recipes.TrainingSpec, train),
            {
                "adapter": recipes.VectorSpec(1, 16.0),
                "learning_rate": 1e-3,
                "epochs": 1.0,
                "max_steps": 2,
                "batch_size": 2,
                "micro_batch_size": 1,
                "warmup_steps": 1,
                "schedule": "linear",
                "weight_decay": 0.0,
                "betas": (0.9, 0.999),
                "max_grad_norm": 1.0,
                "kl_weight": 0.0,
                "kl_batch_size": 2,
                "kl_scope": "all",
                "train_turns": "last",
                "empty_assistant_turn": False,
                "max_tokens": 64,
                "seed": 0,
                "save_steps": 1,
            },
        ),
        (recipes.reference_kl_weight, {"repo_weight": 1.0, "logit_width": 10}),
        (recipes.preset, {"name": "p1-steering-vector", "layer": 1}),
        (
            then(solutions.SteeringVector, lambda made: made.save("made-vector")),
            {"vector": torch.ones(4), "layer": 1, "alpha": 1.0, "base": None},
        ),
        (
            then(solutions.LoraAdapter, lambda made: made.save("made-lora")),
            {"a": dict(adapter.a), "b": dict(adapter.b), "alpha": 8.0, "rslora": False},
        ),
        (vector.scaled, {"factor": 2.0}),
        (attached, {"model": model}),
        (vector.save, {"path": "again"}),
        (solutions.SteeringVector.load, {"path": "vector"}),
        (adapter.perturbed, {"eps": 0.5, "generator": rng, "on": "both"}),
        (solutions.folder_of, {"source": "vector"}),
        (solutions.load, {"source": "full", "base": model}),
        (solutions.load_checkpoints, {"path": "trained", "base": None}),
        (solutions.is_model, {"source": "vector"}),
        (models.load_on_disk, {"source": "full", "revision": None}),
        (
            then(DoraAdapter, lambda made: made.save("made-dora")),
            {
                "lora": adapter,
                "m": {name: b.norm(dim=1) for name, b in adapter.b.items()},
                "weights": {name: adapter.delta(name).float() + 1.0 for name in adapter.modules},
                "factors": {},
            },
        ),
        (solution_space.check_comparable, {"solutions": {"a": vector}, "model": model, "may_be_zero": False}),
        (vector.delta, {"place": "layer 1"}),
        (vector.along, {"parts": {"layer 1": torch.ones(32)}}),
        (vector.tensors, {"on": "both"}),
        (adapter.tensors, {"on": "A"}),
        (adapter.scale_of, {"name": next(iter(adapter.a))}),
        (solution_space.check_inside_blocks, {"solution": adapter}),
        (solution_space.refuse_zero, {"solutions": w["both"]}),
        (solution_space.refuse_other_models, {"model": model, "solutions": [vector]}),
        (vector.inner, {"other": vector}),
        (adapter.inner, {"other": adapter}),
        (vector.random_like, {"generator": rng}),
        (as_lora, {"solution": adapter}),
        (solutions.kind_of, {"path": "vector"}),
        (stability.turned, {"solution": vector, "eps": 0.5, "seed": 0, "on": "both"}),
        (
            stability.stability_curve,
            {
                "landscape": w["surface"],
                "solution": vector,
                "name": "general",
                "epsilons": (0.0, 0.5),
                "n_seeds": 2,
                "first_seed": 0,
                "on": "both",
            },
        ),
        (stability.stability_table, {"curves": w["curves"]}),
        (
            stability.behavioural_stability,
            {
                "model": model,
                "solutions": w["both"],
                "evaluate": judged_of,
                "epsilons": (0.0, 0.5),
                "n_seeds": 2,
                "first_seed": 0,
                "on": "both",
                **FEW,
            },
        ),
        (
            training.finetune,
            {
                "model": make_chat(),
                "conversations": BAD,
                "spec": recipes.TrainingSpec(recipes.VectorSpec(1, 16.0), 1e-3, max_steps=1, batch_size=2),
                "kl_conversations": None,
                "start_from": None,
                "interventions": (),
                "out_dir": None,
                "on_checkpoint": None,
                "cache_bytes": 10**6,
                "resume": False,
                **FEW,
            },
        ),
        (
            screening.projections,
            {"model": model, "conversations": BAD, "direction": w["direction"], "layer": 1, "scope": "all", **FEW},
        ),
        (
            screening.own_answers,
            {"model": model, "conversations": BAD, "n": 1, "seed": 0, "max_new_tokens": 2, **FEW},
        ),
        (
            screening.screen,
            {
                "model": model,
                "conversations": BAD,
                "direction": w["direction"],
                "layer": 1,
                "drop": 0.5,
                "against": "nothing",
                "n": 1,
                "seed": 0,
                "max_new_tokens": 2,
                "tokens_per_batch": 64,
                **FEW,
            },
        ),
        (trajectories.RunName.parse, {"name": published_factory.SV_STEM}),
        (trajectories.cosines_to, {"vectors": torch.randn(3, 4), "reference": torch.randn(4)}),
        (
            trajectories.local_cosine,
            {"steps": [1, 2, 3, 4, 5], "vectors": torch.randn(5, 4), "k": 1, "movement": 0.0},
        ),
        (
            trajectories.fit_pca,
            {"trajectories": [w["trajectory"]], "standardised": True, "n_components": 2},
        ),
        (
            trajectories.find_references,
            {"family": [w["trajectory"]], "everything": [w["trajectory"]], "general": None, "narrow": None},
        ),
        (seeds.over_training_seeds, {"table": repeated, "by": ["a"], "value": "x"}),
        (seeds.over_repeated_seeds, {"table": repeated, "by": ["a"], "value": "x"}),
        (rotate_away, {"x": torch.ones(4), "eps": 0.5, "generator": rng, "what": "theta"}),
        (solution_space.check_bare, {"model": model}),
        (stability.dispersion, {"table": stability.stability_table(w["curves"]), "value": "relative_increase_percent"}),
        (stability.stability_gap, {"general": w["curves"][0], "narrow": w["curves"][1]}),
        (trajectories.runs_named, {"role": "general", "name": w["trajectory"].name, "everything": [w["trajectory"]]}),
        (
            trajectories.drift,
            {
                "trajectory": w["trajectory"],
                "references": both,
            },
        ),
    ]
