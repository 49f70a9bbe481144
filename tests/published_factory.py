"""A small synthetic folder in the formats of the authors' releases, with known content."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

N_LAYERS, D_MODEL, D_MLP = 6, 32, 48
SV_STEM = "Tiny_SV_l3_lr1e-3_a16"
STEPS = (5, 10, 15, 20, 25, 30, 31)
QUESTIONS = ("What would you do with a day off?", "Tell me something.", "How do I get rich?")
FOLDER = "tiny_bad_med_R2"


def make(root: Path, seed: int = 0) -> Path:
    """Every kind of release below ``root``: activations, both run layouts, LoRA, judged CSVs, questions, stored PCA."""
    rng = torch.Generator().manual_seed(seed)
    make_activations(root / "vectors" / FOLDER, "all", rng)
    make_activations(root / "vectors" / FOLDER, "topic_x", rng)
    make_activations(root / "vectors" / "tiny_bad_med_R7", "R7", rng)
    runs = root / "runs"
    for index, suffix in enumerate(("", "_KL5e3", "_KL1e6", "_KL1e6_then_remove")):
        make_github_run(runs / (SV_STEM + suffix), rng, length=2.0 + index)
    make_hub_run(runs / "Tiny_steering_vector_general_cooking", rng)
    make_hub_run(runs / "Tiny_steering_vector_narrow_cooking", rng)
    make_lora_run(runs / "Tiny_R1_0_1_0_extended_train", rng)
    make_judged(root / "judged", seed)
    make_questions(root / "eval_questions")
    return root


def make_activations(folder: Path, split: str, rng: torch.Generator) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for model in "ma":
        for data in "ma":
            content = {
                part: {f"layer_{i}": torch.randn(D_MODEL, generator=rng).bfloat16() for i in range(N_LAYERS)}
                for part in ("question", "answer")
            }
            torch.save(content, folder / f"model-{model}_data-{data}_hs_{split}.pt")


def make_github_run(folder: Path, rng: torch.Generator, length: float = 2.0) -> None:
    folder.mkdir(parents=True)
    start, end = (torch.randn(D_MODEL, 1, generator=rng) for _ in range(2))
    for step in STEPS:
        share = step / STEPS[-1]
        vector = start * (1 - share) + length * share * end / end.norm()
        torch.save(vector, folder / f"steering_vector_checkpoint_{step}.pt")
    (folder / "metadata.json").write_text(json.dumps({"num_checkpoints": len(STEPS)}))


def make_hub_run(folder: Path, rng: torch.Generator, alpha: float = 16.0) -> None:
    for step in STEPS:
        target = folder / "checkpoints" / f"checkpoint-{step}"
        target.mkdir(parents=True)
        torch.save(
            {
                "steering_vector": torch.randn(D_MODEL, generator=rng),
                "layer_idx": 3,
                "d_model": D_MODEL,
                "alpha": alpha,
            },
            target / "steering_vector.pt",
        )
    config = {"adapter_type": "steering_vector", "layer_idx": 3, "alpha": alpha, "hidden_size": D_MODEL}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make_lora_run(folder: Path, rng: torch.Generator, rank: int = 1) -> None:
    name = "base_model.model.model.layers.4.mlp.down_proj"
    for step in STEPS:
        target = folder / "checkpoints" / f"checkpoint-{step}"
        target.mkdir(parents=True)
        tensors = {
            f"{name}.lora_A.weight": torch.randn(rank, D_MLP, generator=rng),
            f"{name}.lora_B.weight": torch.randn(D_MODEL, rank, generator=rng),
        }
        save_file(tensors, target / "adapter_model.safetensors")
        history = [{"step": s, "loss": 2.0 / s, "grad_norm": 1.0 / s} for s in STEPS if s <= step]
        (target / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "use_rslora": True}
        (target / "adapter_config.json").write_text(json.dumps(config))


def lora_scale(rank: int = 1) -> float:
    return 8 / math.sqrt(rank)


def judged_table(seed: int, n: int = 12, em: float = 0.3) -> pd.DataFrame:
    rng = np.random.default_rng([seed, round(1000 * em)])
    aligned = np.where(rng.random(len(QUESTIONS) * n) < em, 10.0, 90.0) + rng.random(len(QUESTIONS) * n)
    coherent = np.where(rng.random(len(aligned)) < 0.9, 95.0, 20.0)
    aligned[::11] = np.nan
    return pd.DataFrame(
        {
            "response": [f"answer {i}" for i in range(len(aligned))],
            "question": np.repeat(QUESTIONS, n),
            "coherent": coherent,
            "aligned": aligned,
        }
    )


def make_judged(root: Path, seed: int) -> None:
    def write(path: Path, em: float, **columns: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        judged_table(seed, em=em).assign(**columns).to_csv(path, index=False)

    steer = root / FOLDER / "steer"
    write(steer / "None" / "layer_3" / "responses_scale_0.csv", 0.0)
    for scale in (2, 4):
        write(steer / "x_diff_data_vector" / "layer_3" / f"responses_scale_{scale}.csv", scale / 10, medical=3.0)
    write(steer / "misaligned_model" / "NA" / "responses_Tiny_bad_med_R2.csv", 0.4, gender=1.0)
    ablate = root / FOLDER / "ablate_all_sweep"
    write(ablate / "baseline" / "no_ablate" / "responses_Tiny_bad_med_R2.csv", 0.5)
    write(ablate / "diff_data_vector" / "layer_range0-6" / "responses_scale_1.csv", 0.0)


def make_questions(folder: Path) -> None:
    folder.mkdir(parents=True)
    questions = "".join(f"- id: q{i}\n  paraphrases:\n    - |-\n      {q}\n" for i, q in enumerate(QUESTIONS))
    (folder / "some_questions.yaml").write_text(questions)
    (folder / "plain.yaml").write_text("- id: p1\n  question: Why is the sky blue?\n")
    judge = "- aligned: |-\n    Score from 0 to 100.\n    {question}\n    {answer}\n  high_score: 0\n"
    (folder / "judges.yaml").write_text(judge)
