"""Checkpoints and bases at load: what is missing, damaged or ambiguous is refused for what it is."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from em_interp.directions.extraction import contrast
from em_interp.errors import ChatTemplateError, EmInterpError, ModelError, UsageError
from em_interp.interventions.ablation import Ablate
from em_interp.interventions.orthogonalise import orthogonalised
from em_interp.models.chat import collate, encode_all
from em_interp.models.chat_model import ChatModel
from em_interp.models.pretrained import load
from em_interp.solutions.steering_vector import SteeringVector
from tests.adapter_folders import lora_folder
from tests.tiny_models import CONVERSATIONS, make_chat, make_hf, save_chat, tokenizer


@pytest.fixture
def folder(tmp_path):
    save_chat(make_hf(), tmp_path / "tiny")
    return tmp_path / "tiny"


def fill(value):
    return lambda tensors, key: tensors[key].fill_(value)


DAMAGE = {
    "missing": (lambda tensors, key: tensors.pop(key), r"missing, and would be drawn at random.*up_proj"),
    "mismatched": (lambda tensors, key: tensors.update({key: torch.ones(3, 32)}), "other shapes than the model's"),
    "unexpected": (lambda tensors, key: tensors.update({"model.layers.9.x": torch.ones(2)}), "no place in the model"),
    "one NaN": (lambda tensors, key: tensors[key][0].fill_(math.nan), "up_proj.* NaN"),
    "infinite": (fill(math.inf), "up_proj.* NaN or infinite"),
    "zero": (fill(0.0), "up_proj.* zero throughout"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_weights_that_are_not_the_models(folder, damage):
    edit, match = DAMAGE[damage]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors, "model.layers.2.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=match):
        load(folder)


def test_a_nan_where_no_probe_looks_is_refused():
    hf = make_hf()
    with torch.no_grad():
        hf.get_input_embeddings().weight[300, 5] = math.nan
    with pytest.raises(ModelError, match=r"embed_tokens.* NaN"):
        ChatModel(hf, tokenizer())


def test_tied_embeddings_are_not_missing(tmp_path):
    hf = make_hf(tie_word_embeddings=True)
    save_chat(hf, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    batch = collate(encode_all(tokenizer(), CONVERSATIONS), [0, 1], pad=0).inputs()
    with torch.no_grad():
        assert torch.equal(load(tmp_path).hf(**batch).logits, hf(**batch).logits)


def test_folders_that_are_not_one_model(folder, tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"a link to .*nowhere, which is not there"):
        load(tmp_path / "gone")
    for name in ("a" * 5000, "a/" * 5000):
        with pytest.raises(ModelError, match="name too long"):
            load(name)
        with pytest.raises(ModelError, match="name too long"):
            make_chat().add_adapter("x", name)
    bare = tmp_path / "bare"
    make_hf().save_pretrained(bare)
    with pytest.raises(ModelError, match="no tokenizer"):
        load(bare)
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(EmInterpError, match="cannot be loaded"):
        load(bare)
    tokenizer().save_pretrained(bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ChatTemplateError, match="no chat template"):
        load(bare)
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no weights"):
        load(folder)
    weights.unlink()
    (tmp_path / "elsewhere").rename(weights)
    lora_folder(folder / "inner")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "inner" / file).rename(folder / file)
    with pytest.raises(ModelError, match="a model and an adapter"):
        load(folder)


def test_one_rule_for_bases():
    from em_interp.files.base_names import same_base

    qwen = "Qwen/Qwen2.5-14B-Instruct"
    for other in (
        "unsloth/Qwen2.5-14B-Instruct",
        "/models/qwen2.5-14b-instruct/",
        "unsloth/Qwen2.5-14B-Instruct-bnb-4bit",
        "unsloth/qwen2.5-14b-instruct-unsloth-bnb-4bit",
        r"D:\models\Qwen2.5-14B-Instruct",
        "/x/hub/models--Qwen--Qwen2.5-14B-Instruct/snapshots/0123abcd",
        "../Qwen2.5-14B-Instruct",
    ):
        assert same_base(other, "chat", qwen), other
    for other in ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-14B", "run/checkpoint-500"):
        assert not same_base(other, "", qwen), other
    assert same_base("/a/run1/checkpoint-500", "b/run1/checkpoint-500")
    assert not same_base("run1/checkpoint-500", "run2/checkpoint-500")


@pytest.mark.parametrize(
    ("recorded", "match"),
    [
        ("unsloth/tiny-bnb-4bit", "a quantised copy"),
        ("../tiny-elsewhere", "no folder here"),
        ("/data/runs/tiny", "no folder here"),
        ("", "does not name its base"),
    ],
)
def test_an_adapter_alone_says_which_base_it_lacks(folder, tmp_path, recorded, match):
    adapter = lora_folder(tmp_path / "x", base_model_name_or_path=recorded or None)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": recorded}))
    with pytest.raises(ModelError, match=rf"{match}.*base=.*--base"):
        load(adapter)
    model = load(adapter, base=folder)
    assert (model.active, model.name) == (adapter.name, str(folder))
    assert load(folder, adapter=adapter, any_base=True).active == adapter.name
    with pytest.raises(UsageError, match="is a model, not an adapter"):
        load(folder, base=folder)


def test_an_adapter_that_cannot_be_merged_is_refused_by_orthogonalisation(tmp_path):
    model = make_chat()
    direction = contrast(model, CONVERSATIONS[:3], CONVERSATIONS[2:], progress=False).direction()
    model.add_adapter("x", lora_folder(tmp_path / "x", lora_bias=True))  # the base's modules have no bias to take it
    with pytest.raises(ModelError, match=r"cannot merge 'x'.*Ablate with hooks"):
        orthogonalised(model, Ablate(direction, from_layer=1))


def test_d_model_is_the_residuals_width_not_the_embeddings():
    model = make_chat("opt")
    assert model.hf.get_input_embeddings().weight.shape[-1] == 16
    assert model.d_model == 32
    batch = collate(encode_all(tokenizer(), CONVERSATIONS), [0, 1], pad=0).inputs()
    with torch.no_grad(), SteeringVector(torch.ones(32), 1, 2.0).attached(model):
        steered = model.hf(**batch).logits
    assert not torch.allclose(steered, model.hf(**batch).logits)
    direction = contrast(model, CONVERSATIONS[:3], CONVERSATIONS[2:], progress=False).direction()
    assert direction.d_model == 32
    with pytest.raises(ModelError, match="Ablate with hooks"):
        orthogonalised(model, Ablate(direction, from_layer=1))
