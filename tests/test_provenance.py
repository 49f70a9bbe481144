"""A direction knows the weights that it was made on, and says which finetune: two `checkpoint-500` are told apart."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from em_interp.directions.direction import Direction
from em_interp.directions.extraction import extract
from em_interp.errors import DirectionError, ShapeError
from em_interp.interventions.ablation import Ablate
from em_interp.interventions.intervening import intervening
from em_interp.interventions.steering import Steer
from em_interp.models import pretrained as models
from em_interp.models.chat_model import ChatModel
from em_interp.models.weights import weights_hash
from em_interp.solutions.lora import LoraAdapter
from tests.tiny_models import CONVERSATIONS, D_MODEL, make_chat, make_hf, save_chat, tokenizer

IDS = torch.tensor([[5, 6, 7]])


def lora(seed, base="tiny-qwen2"):
    made = torch.Generator().manual_seed(seed)
    name = "model.layers.1.mlp.down_proj"
    a, b = torch.randn(1, 48, generator=made), torch.randn(D_MODEL, 1, generator=made)
    return LoraAdapter({name: a}, {name: b / b.norm() / a.norm() * 30}, 1.0, base=base)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two models that a Trainer wrote in two runs, each with a direction of its own."""
    found = {}
    for run, seed in (("a", 0), ("b", 1)):
        folder = tmp_path_factory.mktemp(run) / "checkpoint-500"
        save_chat(make_hf(seed=seed), folder)
        model = models.load(folder)
        direction = extract(model, CONVERSATIONS[:2], CONVERSATIONS[2:], progress=False)
        found[run] = (model, Direction.load(direction.save(folder.parent / "d.safetensors")))
    return found


def uses(direction):
    return Steer(direction, 1, 1.0), Ablate(direction)


def test_a_direction_of_another_model_with_the_same_folder_name_is_refused(checkpoints):
    (model, own), (_, other) = checkpoints["a"], checkpoints["b"]
    for mine, foreign in zip(uses(own), uses(other), strict=True):
        with intervening(model, [mine]):
            model.hf(IDS)
        with (
            pytest.raises(DirectionError, match=r"whose weights are others.*--any-model"),
            intervening(model, [foreign]),
        ):
            model.hf(IDS)
    with pytest.raises(DirectionError, match="their residual streams share no axes"):
        own.cosine(other)
    with intervening(model, [Steer(other.for_model(model.name), 1, 1.0)]):
        model.hf(IDS)
    own.cosine(other.for_model(own.model))


def test_the_same_base_under_another_name_is_accepted(checkpoints):
    model, direction = checkpoints["a"]
    moved = ChatModel(model.hf, tokenizer(), name="another-name")
    moved.hf.config._name_or_path = "somewhere/else"
    with intervening(moved, [Steer(direction, 1, 1.0)]):
        moved.hf(IDS)
    half = ChatModel(make_hf(seed=0).bfloat16(), tokenizer(), name=direction.model)  # another dtype: names decide
    with intervening(half, [Steer(direction, 1, 1.0)]):
        half.hf(IDS)


def test_weights_edited_after_the_extraction_are_other_weights():
    model = make_chat()
    direction = extract(model, CONVERSATIONS[:2], CONVERSATIONS[2:], progress=False)
    model.hf.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)
    with (
        pytest.raises(DirectionError, match="whose weights are others"),
        intervening(model, [Steer(direction, 1, 1.0)]),
    ):
        model.hf(IDS)


def test_a_finetunes_direction_steers_its_chat_model(tmp_path):
    model = make_chat()
    lora(0).save(tmp_path / "tuned")
    tuned = ChatModel(make_hf(), tokenizer(), name="tiny-qwen2")
    tuned.add_adapter("tuned", tmp_path / "tuned")
    for finetune in (lora(0), "tuned"):
        direction = extract(tuned, CONVERSATIONS, kind="model-diff", finetune=finetune, progress=False)
        assert direction.weights == weights_hash(model.hf)
        with intervening(model, [Steer(direction, 1, 1.0)]):
            model.hf(IDS)


def test_sources_tell_finetunes_apart(tmp_path):
    said = []
    for seed in (0, 1):
        model = make_chat()
        solution = lora(seed)
        solution.save(tmp_path / f"run-{seed}" / "tuned")
        model.add_adapter("default", tmp_path / f"run-{seed}" / "tuned")
        model.add_adapter("attached", solution, activate=False)
        for finetune in ("default", "attached", solution):
            found = extract(model, CONVERSATIONS, kind="model-diff", finetune=finetune, layers=[1], progress=False)
            said.append(found.sources[0])
            assert f"norm {solution.norm:.6g}" in said[-1] and "SHA-256" in said[-1]
    assert abs(lora(0).norm - lora(1).norm) < 1e-4  # so that the norms do not tell
    assert len({text.partition(" in ")[2] for text in said}) == 6
    assert "with default" in said[0] and "with attached" in said[1] and lora(0).fingerprint[:16] in said[2]


def test_files_carry_the_weights_and_old_files_do_without(checkpoints, tmp_path):
    model, direction = checkpoints["a"]
    path = direction.save(tmp_path / "d.safetensors")
    assert Direction.load(path, model="other name", weights=weights_hash(model.hf)).weights == weights_hash(model.hf)
    with pytest.raises(ShapeError, match=r"made on .*checkpoint-500"):
        Direction.load(path, model=direction.model, weights=checkpoints["b"][1].weights)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["em_interp"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del metadata["weights"]
    save_file(tensors, path, metadata={"em_interp": json.dumps(metadata)})
    old = Direction.load(path, model=direction.model)
    assert old.weights == "unknown" and torch.equal(old.vectors, direction.vectors)
    with intervening(model, [Steer(old, 1, 1.0)]):
        model.hf(IDS)
    assert (direction + direction).weights == direction.weights and (direction + old).weights == "unknown"
    assert (2 * direction).unit().only([1]).weights == direction.weights
