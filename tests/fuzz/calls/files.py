"""What reads files: released data, texts, stores, hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from em_interp.cli import describe as inspection
from em_interp.directions import store
from em_interp.face import names
from em_interp.files import given, inputs, texts
from em_interp.models import pretrained, weights
from em_interp.published import activations as published_activations
from em_interp.published import judged as published_judged
from em_interp.published import questions as published_questions
from em_interp.published import runs, scan, torchfile
from tests import published_factory
from tests.fuzz import Call
from tests.fuzz.world import BAD


def calls(w: dict[str, Any]) -> list[Call]:
    model, data = w["model"], w["data"]
    return [
        (inputs.regular_file, {"path": "chats.jsonl"}),
        (inputs.open_text, {"path": "chats.jsonl", "newline": None}),
        (inputs.read_text, {"path": "chats.jsonl"}),
        (inputs.read_csv, {"path": "questions.csv"}),
        (inspection.describe, {"path": Path("direction.safetensors")}),
        (published_judged.canonical, {"name": "Alignment"}),
        (pretrained.check_device, {"name": "cpu"}),
        (store.ActivationStore, {"folder": Path("settings"), "settings": {"a": 1}}),
        (texts.Question, {"id": "a", "paraphrases": ("x",), "judge_prompts": {}, "system": None, "earlier": ()}),
        (texts.read_questions, {"path": "questions.csv"}),
        (texts.read_chats, {"path": "chats.jsonl"}),
        (
            texts.read_texts,
            {"source": "texts.txt", "min_characters": 1, "max_characters": 10, "max_documents": 2},
        ),
        (texts.question_of, {"path": Path("x"), "item": {"id": "a", "paraphrases": ["x"]}}),
        (given.chats, {"source": BAD}),
        (given.questions, {"source": ["why"]}),
        (given.several, {"values": 1}),
        (
            names.load,
            {
                "name": "model",
                "adapter": "vector",
                "base": None,
                "dtype": "auto",
                "device_map": None,
                "revision": None,
                "adapter_revision": None,
                "any_base": True,
            },
        ),
        (names.load_solution, {"source": "vector", "base": None}),
        (pretrained.adapter_name, {"source": "vector", "hf": model.hf}),
        (texts.chats_read, {"path": Path("x"), "chats": BAD}),
        (weights.tensors_hash, {"tensors": {"a": torch.ones(2)}}),
        (weights.adapter_hash, {"hf": model.hf}),
        (weights.adapter_norm, {"hf": model.hf}),
        (weights.weights_hash, {"hf": model.hf}),
        (weights.acting_hash, {"model": model}),
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
        (runs.product_norms, {"a": torch.ones(2, 1, 3), "b": torch.ones(2, 4, 1)}),
        (runs.solution_at, {"trajectory": w["trajectory"], "step": 5}),
        (
            runs.read_lora_checkpoint,
            {"path": next((data / "runs").rglob("adapter_model.safetensors")), "step": 5},
        ),
        (scan, {"root": data, "progress": False}),
        (torchfile.load_torch, {"path": next((data / "vectors").rglob("*.pt"))}),
        (torchfile.load_tensors, {"path": next((data / "runs").rglob("adapter_model.safetensors"))}),
        (inputs.read_json, {"path": "map.json"}),
        (texts.yaml_entries, {"path": data / "eval_questions" / "plain.yaml"}),
        (texts.json_lines, {"path": Path("chats.jsonl")}),
        (weights.source_hash, {"source": "vector", "revision": None}),
        (weights.same_weights, {"one": "x", "other": "y"}),
        (texts.question_set, {"path": Path("x"), "questions": [texts.Question("a", ("x",))]}),
        (texts.conversation_of, {"path": "x", "where": "line 1", "messages": BAD[0]}),
        (published_activations.model_of, {"name": "x"}),
        (runs.checkpoint_files, {"folder": data / "runs" / published_factory.SV_STEM}),
        (runs.looks_like_run, {"folder": data / "runs" / published_factory.SV_STEM}),
        (torchfile.check_finite, {"path": Path("x"), "name": "x", "tensor": torch.ones(2)}),
        (weights.file_hash, {"source": "vector"}),
    ]
