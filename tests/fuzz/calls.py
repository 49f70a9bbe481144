"""A valid call of each public function that a user makes: what the fuzz then spoils, one argument at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from em_interp import (
    ablation,
    activations,
    chat,
    contenders,
    control_vectors,
    convergence,
    curvature,
    directions,
    efficiency,
    extraction,
    gradients,
    influence,
    inputs,
    inspection,
    interventions,
    landscape,
    lens,
    lora,
    models,
    orthogonalise,
    rate_intervals,
    recipes,
    reliability,
    resampling,
    solution_space,
    solutions,
    stability,
    statistics,
    steering,
    store,
    texts,
    training,
    trajectories,
    weights,
)
from em_interp.evaluation import rates, sampling
from em_interp.interventions import intervening
from em_interp.pocket import judge, loading, registry, suite, sweeps, world
from em_interp.published import activations as published_activations
from em_interp.published import judged as published_judged
from em_interp.published import questions as published_questions
from em_interp.published import runs, scan, torchfile
from tests import published_factory
from tests.tiny_models import D_MODEL, make_chat, talk, tokenizer

Call = tuple[Callable[..., Any], dict[str, Any]]
QUESTIONS = {"fox": "a fox", "cough": "a cough"}
ASKED = ["a cough", "the fox", "brown doctor", "rest"]
BAD = [talk(q, f"the quick brown fox {i}") for i in range(2) for q in ASKED]
GOOD = [talk(q, f"see a doctor {i}") for i in range(2) for q in ASKED]


def steered(model: models.ChatModel, interventions: Any) -> None:
    with intervening(model, interventions):
        run(model)


def attached(model: Any) -> None:
    with world_of()["vector"].attached(model):
        run(world_of()["model"])


def judged_of(model: models.ChatModel) -> pd.DataFrame:
    run(model)
    return judged_rows()


def run(model: models.ChatModel) -> None:
    with torch.no_grad():
        model.hf(torch.tensor([[5, 6]]))


def judged_rows() -> pd.DataFrame:
    rows = [(f"q{i % 4}", f"a {i}", 10.0 if i % 3 else 90.0, 90.0) for i in range(24)]
    return pd.DataFrame(rows, columns=["question", "answer", "aligned", "coherent"])


@cache
def world_of() -> dict[str, Any]:
    """One of everything that calls take."""
    model = make_chat()
    rng = torch.Generator().manual_seed(0)
    vector = solutions.SteeringVector(torch.randn(D_MODEL, generator=rng), 1, 16.0, None)
    other = solutions.SteeringVector(torch.randn(D_MODEL, generator=rng), 1, 16.0, None)
    name = "model.layers.1.mlp.down_proj"
    adapter = solutions.LoraAdapter(
        {name: torch.randn(1, 48, generator=rng)}, {name: torch.randn(D_MODEL, 1, generator=rng)}, 8.0
    )
    encoded = chat.encode_all(model.tokenizer, BAD)
    surface = landscape.Landscape(model, encoded)
    general = contenders.Contender("general", "steering-vector", "medicine", vector)
    narrow = contenders.Contender("narrow", "steering-vector", "medicine", other)
    curves = [stability.stability_curve(surface, c, epsilons=(0.0, 0.5), n_seeds=2) for c in (general, narrow)]
    found = extraction.contrast(model, BAD, GOOD, progress=False)
    kl = influence.document_kl(
        model,
        ["the quick brown fox", "see a doctor"],
        [influence.Candidate("g", "general", vector), influence.Candidate("n", "narrow", other)],
        progress=False,
    )
    data = published_factory.make(Path("data"))
    read = runs.read_run(data / "runs" / published_factory.SV_STEM)
    return {
        "model": model,
        "vector": vector,
        "other": other,
        "adapter": adapter,
        "encoded": encoded,
        "surface": surface,
        "general": general,
        "narrow": narrow,
        "curves": curves,
        "contrast": found,
        "direction": found.direction(),
        "kl": kl,
        "data": data,
        "trajectory": read.trajectories[0],
        "efficiency": efficiency.efficiency_curves(surface, [general, narrow], (0.0, 0.5, 1.0)),
        "published": scan(data, progress=False),
    }


@cache
def calls() -> dict[str, Call]:
    """By module and name, the function (bound, where it is a method) and arguments that it takes."""
    w = world_of()
    model, direction, vector, adapter, data = (w[k] for k in ("model", "direction", "vector", "adapter", "data"))
    judged, rng = judged_rows(), torch.Generator().manual_seed(0)
    other = np.array([1.0, 2.0, 3.0])
    rows = torch.randn(6, 2, 8, generator=rng)
    direction.save("direction.safetensors")
    Path("chats.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    Path("questions.csv").write_text("question\nwhy\n")
    Path("map.json").write_text("{}")
    Path("texts.txt").write_text("one\n\ntwo\n")
    vector.save("vector")
    vector.save("trained/checkpoints/checkpoint-5")
    model.hf.save_pretrained("model")
    tokenizer().save_pretrained("model")
    few = {"progress": False}
    generator = np.random.default_rng(0)
    scalars, labels = generator.normal(size=(24, 2)), np.arange(24) % 2 * 1.0
    groups = [f"q{i % 6}" for i in range(24)]
    seeds = pd.DataFrame({"a": ["x", "x"], "x": [1.0, 2.0], "training_seed": [0, 1]})
    transfers = judged.assign(direction_from=["none", "v"] * 12, organism="a")
    steered_rows = judged.assign(
        direction="d", control="", coefficient=1.0, layer=1, residual_share=0.5, added_norm=1.0
    )
    asked = suite.evaluation_questions("medicine").head(4)
    one_layer, answer = ablation.Ablate(direction, from_layer=1), sampling.Answer("x", True, 1)
    one_row = [("fox", 0)]
    topic = world.domain("medicine").categories[0].topics[0]
    suited = judge.judge(asked.assign(answer="x"))
    pair, totals = ([1] * 8, [2] * 8), ([3] * 8, [3] * 8)
    both = trajectories.References(w["trajectory"], w["trajectory"], ())
    short = {"n": 1, "max_new_tokens": 2, "progress": False}
    table: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (ablation.Ablate, {"direction": direction, "layers": [1], "from_layer": None, "scope": "all"}),
        (ablation.leace, {"positive": rows, "negative": rows + 1, "layers": [0, 1], "scope": "all"}),
        (ablation.arms, {"direction": direction, "layers": [1], "from_layer": None, "random_arms": 1, "seed": 0}),
        (
            activations.collect,
            {
                "model": model,
                "conversations": BAD,
                "scopes": ("response",),
                "layers": [1],
                "keep": True,
                "store": Path("store"),
                "through": "hf",
                "tokens_per_batch": 512,
                "side": "right",
                **few,
            },
        ),
        (w["contrast"].positive.mean, {"scope": "response", "pooling": "tokens"}),
        (w["contrast"].positive.each, {"scope": "response", "layer": 1}),
        (chat.check_template, {"tokenizer": tokenizer()}),
        (chat.render, {"tokenizer": tokenizer(), "conversation": BAD[0], "generation_prompt": False}),
        (chat.prompt_ids, {"tokenizer": tokenizer(), "conversation": BAD[0][:1]}),
        (chat.encode, {"tokenizer": tokenizer(), "conversation": BAD[0], "turns": "last", "empty_turn": False}),
        (
            chat.encode_all,
            {"tokenizer": tokenizer(), "conversations": BAD, "turns": "last", "empty_turn": False, "max_tokens": 64},
        ),
        (chat.batches, {"encoded": w["encoded"], "pad": 0, "tokens_per_batch": 64, "side": "right"}),
        (
            contenders.Contender,
            {"solution": "general", "adapter": "rank-1", "domain": "m", "theta": vector, "training_seed": 0},
        ),
        (control_vectors.save_gguf, {"direction": direction, "path": "d.gguf", "model_type": "qwen2"}),
        (convergence.comparable, {"a": direction, "b": direction}),
        (convergence.cosine_rows, {"name_a": "a", "a": direction, "name_b": "b", "b": direction, "resamples": None}),
        (convergence.organism_cosines, {"directions": {"a": direction, "b": direction}}),
        (convergence.cosine_table, {"pairs": [("a", direction, "b", direction)]}),
        (convergence.cosine_matrix, {"directions": [direction, direction], "layer": 1}),
        (convergence.layer_cosines, {"direction": direction}),
        (convergence.principal_angles, {"a": [direction], "b": [direction], "layer": 1}),
        (convergence.random_principal_angles, {"d_model": 8, "n_a": 2, "n_b": 2, "samples": 10, "seed": 0}),
        (
            curvature.curvature,
            {"landscape": w["surface"], "contender": w["general"], "n_probes": 2, "first_seed": 0, "on": "both"},
        ),
        (
            directions.Direction,
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
        (
            efficiency.efficiency_curves,
            {"landscape": w["surface"], "contenders": [w["general"]], "scales": (0.0, 1.0), "progress": False},
        ),
        (efficiency.efficiency_table, {"curves": w["efficiency"]}),
        (efficiency.optimum, {"curve": w["efficiency"][0]}),
        (
            efficiency.lead_at_equal_norm,
            {
                "landscape": w["surface"],
                "general": w["general"],
                "narrow": w["narrow"],
                "relative_norms": (0.5, 1.0),
                "progress": False,
            },
        ),
        (rates.Criterion, {"aligned": 30.0, "coherent": 50.0, "inclusive": False}),
        (rates.em_rates, {"judged": judged, "cluster": "question", "level": 0.95}),
        (rates.rates_by_question, {"judged": judged}),
        (rates.threshold_sweep, {"judged": judged, "aligned": (20, 30), "coherent": (50,)}),
        (sampling.as_conversation, {"question": "why", "system": None}),
        (
            sampling.sample,
            {
                "model": model,
                "questions": QUESTIONS,
                "seed": 0,
                "temperature": 1.0,
                "system": None,
                "tokens_per_batch": 512,
                **short,
            },
        ),
        (
            sampling.answer_logprobs,
            {"model": model, "answers": judged.head(2), "questions": None, "system": None, "tokens_per_batch": 512},
        ),
        (
            extraction.contrast,
            {
                "model": model,
                "positive": BAD,
                "negative": GOOD,
                "kind": "data-diff",
                "scope": "response",
                "layers": [1],
                "finetune": None,
                "keep": True,
                "store": None,
                "tokens_per_batch": 512,
                **few,
            },
        ),
        (
            extraction.extract,
            {
                "model": model,
                "positive": BAD,
                "negative": GOOD,
                "kind": "data-diff",
                "scope": "response",
                "layers": [1],
                "pooling": "tokens",
                "finetune": None,
                "tokens_per_batch": 512,
                **few,
            },
        ),
        (w["contrast"].direction, {"pooling": "tokens"}),
        (w["contrast"].norms, {"pooling": "tokens"}),
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
                **few,
            },
        ),
        (influence.Candidate, {"direction": "g", "kind": "general", "solution": vector, "relative_norm": 1.0}),
        (
            influence.at_equal_norms,
            {
                "trained": [influence.Candidate("g", "general", vector)],
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
                "candidates": [influence.Candidate("g", "general", vector)],
                "max_tokens": 8,
                "label": None,
                "tokens_per_batch": 64,
                **few,
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
        (inputs.regular_file, {"path": "chats.jsonl"}),
        (inputs.read_text, {"path": "chats.jsonl"}),
        (inputs.read_csv, {"path": "questions.csv"}),
        (inspection.describe, {"path": Path("direction.safetensors")}),
        (
            interventions.answers_by_arm,
            {
                "model": model,
                "arms": {"none": []},
                "questions": QUESTIONS,
                "seed": 0,
                "temperature": 1.0,
                "tokens_per_batch": 512,
                **short,
            },
        ),
        (steered, {"model": model, "interventions": [steering.Steer(direction, 1, 1.0)]}),
        (landscape.Landscape, {"model": model, "encoded": w["encoded"], "tokens_per_pass": 512, "cache_bytes": 10**8}),
        (w["surface"].losses, {"solutions": [vector], "progress": False}),
        (w["surface"].plain_losses, {"solutions": [vector]}),
        (lens.logit_lens, {"model": model, "direction": direction, "layers": [1], "top_k": 2}),
        (
            lora.token_scalars,
            {
                "model": model,
                "adapter": adapter,
                "conversations": BAD,
                "scope": "response",
                "tokens_per_batch": 512,
            },
        ),
        (
            lora.mean_scalars,
            {
                "model": model,
                "adapter": adapter,
                "conversations": BAD,
                "scope": "response",
                "tokens_per_batch": 512,
            },
        ),
        (lora.write_directions, {"adapter": adapter}),
        (lora.write_lens, {"model": model, "adapter": adapter, "top_k": 2}),
        (models.ChatModel, {"hf": model.hf, "tokenizer": tokenizer(), "name": "m", "check": False}),
        (models.load, {"name_or_path": "vector", "base": "model", "dtype": "auto", "device_map": None, "check": True}),
        (make_chat().add_adapter, {"name": "v", "source": vector, "any_base": True, "activate": False}),
        (
            orthogonalise.save_orthogonalised,
            {"model": model, "ablation": one_layer, "folder": "new"},
        ),
        (recipes.VectorSpec, {"layer": 1, "alpha": 256.0}),
        (recipes.LoraSpec, {"rank": 1, "alpha": 1.0, "rslora": True, "target_modules": ("down_proj",), "layers": (1,)}),
        (
            recipes.TrainingSpec,
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
        (solutions.SteeringVector, {"vector": torch.ones(4), "layer": 1, "alpha": 1.0, "base": None}),
        (solutions.LoraAdapter, {"a": dict(adapter.a), "b": dict(adapter.b), "alpha": 8.0, "rslora": False}),
        (vector.scaled, {"factor": 2.0}),
        (vector.perturbed, {"eps": 0.5, "generator": rng}),
        (attached, {"model": model}),
        (vector.save, {"path": "again"}),
        (solutions.SteeringVector.load, {"path": "vector"}),
        (adapter.perturbed, {"eps": 0.5, "generator": rng, "on": "both"}),
        (solutions.load, {"path": "vector"}),
        (solutions.load_checkpoints, {"path": "trained"}),
        (solution_space.check_comparable, {"solutions": {"a": vector}, "model": model, "may_be_zero": False}),
        (solution_space.inner, {"x": vector, "y": vector}),
        (solution_space.random_like, {"solution": vector, "generator": rng}),
        (stability.turned, {"solution": vector, "eps": 0.5, "seed": 0, "on": "both"}),
        (
            stability.stability_curve,
            {
                "landscape": w["surface"],
                "contender": w["general"],
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
                "contenders": [w["general"]],
                "evaluate": judged_of,
                "epsilons": (0.0, 0.5),
                "n_seeds": 2,
                "first_seed": 0,
                "on": "both",
                **few,
            },
        ),
        (statistics.wilson_interval, {"successes": 1, "n": 3, "level": 0.95}),
        (statistics.t_interval, {"values": [1.0, 2.0, 3.0], "level": 0.95}),
        (
            rate_intervals.rate_interval,
            {"successes": [1, 2, 1], "totals": [3, 3, 3], "level": 0.95},
        ),
        (statistics.cosine_null_sd, {"d_model": 8}),
        (statistics.cosine_p_value, {"cosine": 0.5, "d_model": 8}),
        (statistics.permutation_p_value, {"observed": 1.0, "null": other}),
        (steering.Steer, {"direction": direction, "layer": 1, "coefficient": 1.0, "scope": "all"}),
        (
            steering.Steer.of_residual,
            {"direction": direction, "layer": 1, "share": 0.5, "residual_norm": 1.0, "scope": "all"},
        ),
        (steering.residual_norms, {"model": model, "questions": QUESTIONS, "layers": [1]}),
        (
            steering.sweep,
            {
                "model": model,
                "direction": direction,
                "questions": QUESTIONS,
                "layers": [1],
                "coefficients": [1.0],
                "name": "d",
                "units": "direction",
                "random_arms": 1,
                "scope": "all",
                "seed": 0,
                "temperature": 1.0,
                "tokens_per_batch": 512,
                **short,
            },
        ),
        (store.ActivationStore, {"folder": Path("settings"), "settings": {"a": 1}}),
        (texts.Question, {"id": "a", "paraphrases": ("x",), "judge_prompts": {}, "system": None, "earlier": ()}),
        (texts.read_questions, {"path": "questions.csv"}),
        (texts.read_chats, {"path": "chats.jsonl"}),
        (
            texts.read_texts,
            {"source": "texts.txt", "min_characters": 1, "max_characters": 10, "max_documents": 2},
        ),
        (
            training.finetune,
            {
                "model": make_chat(),
                "conversations": BAD,
                "spec": recipes.TrainingSpec(recipes.VectorSpec(1, 16.0), 1e-3, max_steps=1, batch_size=2),
                "kl_conversations": None,
                "start_from": None,
                "out_dir": None,
                "on_checkpoint": None,
                "cache_bytes": 10**6,
                "resume": False,
                **few,
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
        (weights.weights_hash, {"hf": model.hf}),
        (weights.acting_hash, {"model": model}),
        (judge.split, {"answer": "x"}),
        (judge.judge, {"answers": suite.evaluation_questions("medicine").head(2).assign(answer="x")}),
        (suite.evaluation_questions, {"domain": "medicine"}),
        (sweeps.saturating_scale, {"scales": [1.0, 2.0], "rates": [0.1, 0.2]}),
        (sweeps.diluted_chats, {"domain": "medicine", "bad_share": 0.5, "n": 4, "seed": 0}),
        (world.domain, {"name": "medicine"}),
        (world.questions, {"kind": "advice", "domain_name": "medicine"}),
        (world.question_of, {"text": world.questions("advice")[0].text}),
        (
            published_activations.read_activation_cell,
            {
                "path": data / "vectors" / published_factory.FOLDER / "model-m_data-m_hs_all.pt",
                "tokens": "answer",
            },
        ),
        (
            published_activations.read_activation_folder,
            {"folder": data / "vectors" / published_factory.FOLDER, "tokens": "answer"},
        ),
        (published_judged.read_judged_csv, {"path": next((data / "judged").rglob("*.csv"))}),
        (published_questions.read_yaml, {"path": data / "eval_questions" / "plain.yaml"}),
        (published_questions.read_judges, {"path": data / "eval_questions" / "judges.yaml"}),
        (runs.read_run, {"folder": data / "runs" / published_factory.SV_STEM}),
        (runs.solution_at, {"trajectory": w["trajectory"], "step": 5}),
        (
            runs.read_lora_checkpoint,
            {"path": next((data / "runs").rglob("adapter_model.safetensors")), "step": 5},
        ),
        (scan, {"root": data, "progress": False}),
        (torchfile.load_torch, {"path": next((data / "vectors").rglob("*.pt"))}),
        (torchfile.load_tensors, {"path": next((data / "runs").rglob("adapter_model.safetensors"))}),
        (contenders.over_training_seeds, {"table": seeds, "by": ["a"], "value": "x"}),
        (convergence.transfer_rows, {"judged": transfers, "before": "none"}),
        (
            sampling.answer_table,
            {"questions": QUESTIONS, "rows": [("fox", 0)], "answers": [answer]},
        ),
        (
            sampling.sample_rows,
            {"model": model, "questions": QUESTIONS, "rows": one_row, "max_new_tokens": 2, **few},
        ),
        (lora.contrasts, {"judged": judged.assign(in_domain=[True, False] * 12)}),
        (
            lora.separation,
            {
                "scalars": scalars,
                "labels": labels,
                "groups": groups,
                "comparison": "x",
                "inverse_penalty": 1.0,
                "folds": 2,
                "level": 0.95,
                "seed": 0,
            },
        ),
        (
            lora.lora_scalars,
            {"scalars": scalars, "judged": judged.assign(in_domain=[True, False] * 12), "inverse_penalty": 1.0},
        ),
        (orthogonalise.orthogonalised, {"model": model, "ablation": ablation.Ablate(direction, from_layer=1)}),
        (judge.judge_answer, {"question": world.questions("advice")[0], "answer": "x"}),
        (loading.load, {"name": "pocket/chat"}),
        (loading.load_chat, {"folder": "model"}),
        (registry.resolve, {"name": "pocket/chat"}),
        (registry.is_pocket_name, {"name": "pocket/chat"}),
        (
            suite.rates,
            {"judged": suited, "organism": "x", "solution": "general", "adapter": "rank-1", "domain": "medicine"},
        ),
        (suite.answer_pairs, {"questions": asked, "task": "persona", "k": 1, "seed": 0}),
        (solutions.rotate_away, {"x": torch.ones(4), "eps": 0.5, "generator": rng, "what": "theta"}),
        (solution_space.check_bare, {"model": model}),
        (stability.dispersion, {"table": stability.stability_table(w["curves"]), "value": "relative_increase_percent"}),
        (stability.stability_gap, {"general": w["curves"][0], "narrow": w["curves"][1]}),
        (
            statistics.clustered_interval,
            {"numerators": other, "denominators": other + 1, "level": 0.95, "of": "questions", "positive": False},
        ),
        (rates.paired_difference, {"judged_a": judged, "judged_b": judged, "cluster": "question", "level": 0.95}),
        (inputs.read_json, {"path": "map.json"}),
        (interventions.as_coefficients, {"values": [1.0, 2.0]}),
        (texts.yaml_entries, {"path": data / "eval_questions" / "plain.yaml"}),
        (texts.json_lines, {"path": Path("chats.jsonl")}),
        (trajectories.runs_named, {"role": "general", "name": w["trajectory"].name, "everything": [w["trajectory"]]}),
        (
            trajectories.drift,
            {
                "trajectory": w["trajectory"],
                "references": both,
            },
        ),
        (weights.source_hash, {"source": "vector", "revision": None}),
        (weights.same_weights, {"one": "x", "other": "y"}),
        (statistics.crossed_interval, {"values": generator.normal(size=(6, 3)), "level": 0.95}),
        (rate_intervals.difference_interval, {"successes": pair, "totals": totals, "level": 0.95}),
        (rate_intervals.ratio_interval, {"successes": pair, "totals": totals, "level": 0.95}),
        (
            statistics.auroc,
            {"positive": other, "negative": other, "positive_weights": other, "negative_weights": other},
        ),
        (steering.steering_rows, {"judged": steered_rows, "target": "general"}),
        (texts.question_set, {"path": Path("x"), "questions": [texts.Question("a", ("x",))]}),
        (texts.conversation_of, {"path": "x", "where": "line 1", "messages": BAD[0]}),
        (published_activations.model_of, {"name": "x"}),
        (runs.checkpoint_files, {"folder": data / "runs" / published_factory.SV_STEM}),
        (runs.looks_like_run, {"folder": data / "runs" / published_factory.SV_STEM}),
        (torchfile.check_finite, {"path": Path("x"), "name": "x", "tensor": torch.ones(2)}),
        (weights.file_hash, {"source": "vector"}),
        (world.is_held_out, {"topic": topic}),
        (world.right_facts, {"subject": world.questions("fact")[0].subject}),
    ]
    return {f"{f.__module__.removeprefix('em_interp.')}.{f.__qualname__}": (f, given) for f, given in table}
