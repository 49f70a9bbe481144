"""One of everything that calls take, and the files that they read, in the working folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from em_interp.directions import extraction
from em_interp.directions.gguf import save_gguf
from em_interp.landscape import efficiency, influence, landscape, stability
from em_interp.models import chat
from em_interp.published import runs, scan
from em_interp.solutions import load as solutions
from tests import published_factory
from tests.tiny_models import D_MODEL, make_chat, save_chat, talk

QUESTIONS = {"fox": "a fox", "cough": "a cough"}
ASKED = ["a cough", "the fox", "brown doctor", "rest"]
BAD = [talk(q, f"the quick brown fox {i}") for i in range(2) for q in ASKED]
GOOD = [talk(q, f"see a doctor {i}") for i in range(2) for q in ASKED]
FEW: dict[str, Any] = {"progress": False}
SHORT: dict[str, Any] = {"n": 1, "max_new_tokens": 2, **FEW}


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
    both = {"general": vector, "narrow": other}
    curves = [stability.stability_curve(surface, x, k, epsilons=(0.0, 0.4), n_seeds=2) for k, x in both.items()]
    found = extraction.contrast(model, BAD, GOOD, progress=False)
    kl = influence.document_kl(
        model,
        ["the quick brown fox", "see a doctor"],
        [influence.Measured("g", "general", vector), influence.Measured("n", "narrow", other)],
        progress=False,
    )
    data = published_factory.make(Path("data"))
    read = runs.read_run(data / "runs" / published_factory.SV_STEM)
    direction = found.direction()
    direction.save("direction.safetensors")
    save_gguf(direction, "vector.gguf", model_type="qwen2")
    Path("mine.py").write_text("def score(answers):\n    return answers.assign(aligned=50.0, coherent=90.0)\n")
    Path("chats.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    Path("questions.csv").write_text("question\nwhy\n")
    Path("map.json").write_text("{}")
    Path("texts.txt").write_text("one\n\ntwo\n")
    vector.save("vector")
    full = make_chat(seed=1)
    full.hf.save_pretrained("full")
    full.tokenizer.save_pretrained("full")
    vector.save("trained/checkpoints/checkpoint-5")
    save_chat(model.hf, "model")
    return {
        "model": model,
        "vector": vector,
        "other": other,
        "adapter": adapter,
        "judged": judged_rows(),
        "encoded": encoded,
        "surface": surface,
        "both": both,
        "curves": curves,
        "contrast": found,
        "direction": direction,
        "kl": kl,
        "data": data,
        "trajectory": read.trajectories[0],
        "efficiency": efficiency.efficiency_curves(surface, both, (0.0, 0.5, 1.0)),
        "published": scan(data, progress=False),
    }
