"""What an adapter's config means: everything is understood, or refused by name, with nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from em_interp.errors import EmInterpError, ModelError, SolutionError
from em_interp.files.adapter_folders import read_lora
from em_interp.models import chat_model
from em_interp.models.adapters import quiet_peft
from em_interp.models.chat import collate, encode_all
from em_interp.models.chat_model import ChatModel
from em_interp.solutions import load as solutions
from tests.adapter_folders import lora_folder, peft_folder, peft_logits, untrained
from tests.tiny_models import CONVERSATIONS, make_chat, make_hf, tokenizer


@pytest.fixture(scope="module")
def batch():
    return collate(encode_all(tokenizer(), CONVERSATIONS), range(5), pad=0, side="left").inputs()


@torch.no_grad()
def logits(model, batch):
    return model.hf(**batch, use_cache=False).logits


def refused(model, folder, batch, match, theta_match=None):
    """Neither way to load it takes it, and the model is as before."""
    before = logits(model, batch)
    parts = [name for name, _ in model.hf.named_modules()]
    trainable = [p.requires_grad for p in model.hf.parameters()]
    with pytest.raises(ModelError, match=match):
        model.add_adapter("x", folder)
    with pytest.raises(SolutionError, match=theta_match or match):
        solutions.load(folder)
    assert (model.adapters, model.active, model.peft) == ([], None, None)
    assert [name for name, _ in model.hf.named_modules()] == parts
    assert [p.requires_grad for p in model.hf.parameters()] == trainable
    assert torch.equal(logits(model, batch), before)


def test_every_key_of_the_installed_peft_is_classified():
    from peft import LoraConfig, TaskType

    from em_interp.files import adapters as own

    sets = [own._NO_EFFECT, own._BY_PEFT, own._UNUSED, own._SIZES, set(own._VALUES) - own._BY_PEFT]
    known = set().union(*sets)
    assert sum(map(len, sets)) == len(known)  # in one class each
    assert {field.name for field in dataclasses.fields(LoraConfig)} == known
    for task in ("CAUSAL_LM", TaskType.CAUSAL_LM):
        assert own.describe("a new one", LoraConfig(task_type=task).to_dict()).beyond == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": "lora_only"},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"alora_invocation_tokens": [1]},
        {"layer_replication": [(0, 2), (1, 4)]},
        {"task_type": "FEATURE_EXTRACTION"},
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused_with_its_name(tmp_path, batch, changes):
    family = {"bias": "gpt_neox"}.get(next(iter(changes)), "qwen2")  # a model with biases
    folder = lora_folder(tmp_path / "x", family, **changes)
    (key,) = changes
    refused(make_chat(family), folder, batch, rf"{key} is .*(Merge|Save|Take)")


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_qalora", True), ("kasa_config", {"r": 2}), ("arrow_config", {"top_k": 1}), ("monteclora_config", {"x": 1})]
    + [("velora_config", {"scale": 1.0}), ("use_bdlora", {"nblocks": 2}), ("megatron_config", {"x": 1})]
    + [("init_lora_weights", how) for how in ("corda", "loftq", "lora_ga", "mica", 1)]
    + [("new_in_peft_9", False), ("ensure_weight_tying", True), ("use_rslora", "false"), ("r", 0), ("r", True)]
    + [("r", 2.5), ("lora_alpha", 0), ("lora_alpha", math.nan), ("lora_alpha", "4"), ("r", None), ("bias", True)],
    ids=str,
)
def test_values_that_cannot_be_meant(tmp_path, batch, key, value):
    folder = lora_folder(tmp_path / "x")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    refused(make_chat(), folder, batch, key)


def test_adapters_of_other_kinds_are_refused(tmp_path, batch):
    import peft

    task = {"task_type": "CAUSAL_LM"}
    configs = {
        "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=4, **task),
        "PREFIX_TUNING": peft.PrefixTuningConfig(num_virtual_tokens=4, **task),
        "P_TUNING": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, **task),
        "IA3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], **task),
        "LOHA": peft.LoHaConfig(r=2, target_modules=["down_proj"], **task),
        "ADALORA": peft.AdaLoraConfig(init_r=2, target_modules=["down_proj"], total_step=10, **task),
        "VERA": peft.VeraConfig(r=2, target_modules=["o_proj"], **task),
    }
    model = make_chat()
    for kind, config in configs.items():
        refused(model, peft_folder(tmp_path / kind, config), batch, kind)


PLAIN = [
    ("qwen2", {}),
    ("gemma2", {"use_rslora": True}),
    ("gpt_neox", {"init_lora_weights": "gaussian"}),
    ("gpt2", {"init_lora_weights": "orthogonal"}),
    ("bloom", {"lora_dropout": 0.3}),
    ("phi3", {"init_lora_weights": False}),
    ("falcon", {}),
    ("opt", {"layers_to_transform": [0, 2]}),
    ("qwen2", {"rank_pattern": {"layers.1.mlp.down_proj": 5}, "alpha_pattern": {"q_proj": 9}}),
]
BEYOND = [
    ("qwen2", {"use_dora": True}),
    ("gpt2", {"use_dora": True}),
    ("gpt_neox", {"lora_bias": True}),
    ("qwen2", {"modules_to_save": ["lm_head"]}),
    ("gemma2", {"modules_to_save": ["norm"]}),
    ("qwen2", {"modules_to_save": ["embed_tokens"]}),
    ("qwen2", {"trainable_token_indices": [3, 40]}),
    ("mixtral", {"target_parameters": ["experts.down_proj"]}),
]


@pytest.mark.parametrize(("family", "changes"), PLAIN + BEYOND, ids=str)
def test_what_is_taken_equals_a_fresh_peft_model(tmp_path, batch, family, changes):
    folder = lora_folder(tmp_path / "x", family, **changes)
    model = make_chat(family)
    base = logits(model, batch)
    model.add_adapter("x", folder)
    expected = peft_logits(folder, batch, family)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-2)
    with model.no_adapter():
        assert torch.equal(logits(model, batch), base)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    fresh = make_chat(family)
    if (family, changes) in PLAIN:
        with solutions.load(folder).attached(fresh):
            torch.testing.assert_close(logits(fresh, batch), expected, atol=1e-4, rtol=1e-4)
    else:
        with pytest.raises(SolutionError, match="not plain LoRA"):
            solutions.load(folder)
    if changes == {"use_dora": True}:
        with solutions.load(folder, base=fresh).attached(fresh):
            torch.testing.assert_close(logits(fresh, batch), expected, atol=1e-4, rtol=1e-4)


def test_two_adapters_of_which_one_saves_whole_modules(tmp_path, batch):
    plain = lora_folder(tmp_path / "plain", seed=1)
    whole = lora_folder(tmp_path / "whole", seed=2, modules_to_save=["lm_head"])
    dora = lora_folder(tmp_path / "dora", seed=3, use_dora=True, target_modules=["v_proj"])
    base = logits(make_chat(), batch)
    for order in ((plain, whole, dora), (whole, dora, plain)):
        model = make_chat()
        for folder in order:
            model.add_adapter(folder.name, folder, activate=False)
        for folder in (*order, *reversed(order)):
            with model.adapter(folder.name):
                torch.testing.assert_close(logits(model, batch), peft_logits(folder, batch), atol=1e-5, rtol=1e-5)
            assert torch.equal(logits(model, batch), base)


def test_a_failed_second_adapter_leaves_the_first(tmp_path, batch):
    model = make_chat()
    model.add_adapter("one", lora_folder(tmp_path / "one"))
    before = logits(model, batch)
    parts = [name for name, _ in model.hf.named_modules()]
    wide = lora_folder(tmp_path / "wide", "gpt_neox", base_model_name_or_path="tiny-qwen2")
    zero = untrained(lora_folder(tmp_path / "zero"))
    part = lora_folder(tmp_path / "part", target_modules=["o_proj", "k_proj"])
    tensors = load_file(part / "adapter_model.safetensors")
    save_file({k: x for k, x in tensors.items() if "layers.3" not in k}, part / "adapter_model.safetensors")
    for folder, match in ((wide, "does not fit"), (zero, "changes no logit"), (part, "no counterpart")):
        with pytest.raises(ModelError, match=match):
            model.add_adapter("two", folder)
        assert (model.adapters, model.active) == (["one"], "one")
        assert [name for name, _ in model.hf.named_modules()] == parts
        assert torch.equal(logits(model, batch), before)
    model.add_adapter("two", lora_folder(tmp_path / "good", seed=5))
    torch.testing.assert_close(logits(model, batch), peft_logits(tmp_path / "good", batch), atol=1e-5, rtol=1e-5)


def test_damaged_adapters_are_refused_for_what_they_are(tmp_path, batch):
    model = make_chat()

    def damaged(name, edit):
        folder = lora_folder(tmp_path / name)
        edit(folder / "adapter_model.safetensors")
        return folder

    def change(edit):
        def apply(path):
            tensors = load_file(path)
            edit(tensors)
            save_file(tensors, path)

        return apply

    def nan(tensors):
        next(iter(tensors.values()))[0, 0] = math.nan

    def two_in_one(tensors):
        tensors |= {k.replace(".weight", ".b.weight"): x.clone() for k, x in tensors.items()}

    def drop(path):
        path.unlink()
        path.symlink_to(path.parent / "gone.safetensors")
        (path.parent / "other.bin").write_bytes(b"1")

    cases = [
        ("empty", lambda path: path.write_bytes(b""), "empty"),
        ("cut", lambda path: path.write_bytes(path.read_bytes()[:-100]), "was cut"),
        ("nan", change(nan), "NaN"),
        ("two", change(two_in_one), "no counterpart|two adapters are in one file"),
        ("link", drop, "not there"),
    ]
    for name, edit, match in cases:
        refused(model, damaged(name, edit), batch, match)
    dora = lora_folder(tmp_path / "dora")
    path = dora / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    refused(model, dora, batch, "lora_magnitude_vector.*not in its weights", "not plain LoRA")
    grown = lora_folder(tmp_path / "grown", target_modules=["lm_head"])
    change(lambda tensors: tensors.update({"base_model.model.lm_head.base_layer.weight": torch.ones(320, 32)}))(
        grown / "adapter_model.safetensors"
    )
    refused(model, grown, batch, "brings its own lm_head", "not a LoRA factor")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    refused(model, tmp_path / "dangling", batch, "a link to .*gone, which is not there")
    (tmp_path / "file").write_text("x")
    refused(model, tmp_path / "file", batch, "a file|no such folder")


def test_the_proof_catches_what_the_config_does_not_say(tmp_path, batch, monkeypatch):
    """With the list of what is understood switched off, the logits still tell."""
    from em_interp.files import adapters as adapter_config

    everything = dict.fromkeys(("bias", "init_lora_weights"), ("none", "all", "lora_only", True, "pissa", "olora"))
    monkeypatch.setattr(adapter_config, "_VALUES", everything)
    monkeypatch.setattr(adapter_config, "_NO_EFFECT", adapter_config._NO_EFFECT | {"task_type", "use_rslora"})
    for family, changes in (("gpt_neox", {"bias": "all"}), ("qwen2", {"init_lora_weights": "pissa"})):
        folder = lora_folder(tmp_path / family, family, **changes)
        with pytest.raises(ModelError, match=r"no_adapter|brings its own"):
            make_chat(family).add_adapter("x", folder)
    scaled = lora_folder(tmp_path / "scaled")
    a, b, config = read_lora(scaled)
    longer = {name: 1.1 * x for name, x in b.items()}
    monkeypatch.setattr(chat_model, "read_lora", lambda path: (a, longer, config))
    with pytest.raises(ModelError, match="other logits than theta's"):
        make_chat().add_adapter("x", scaled)


def test_a_peft_model_is_taken_as_it_is_or_refused(tmp_path, batch):
    from peft import PeftModel, PromptTuningConfig, get_peft_model

    one, two = lora_folder(tmp_path / "one", seed=1), lora_folder(tmp_path / "two", seed=2)

    def held():
        with quiet_peft():
            peft = PeftModel.from_pretrained(make_hf(), str(one), adapter_name="one")
            peft.load_adapter(str(two), adapter_name="two")
        return peft

    second = held()
    second.set_adapter("two")
    model = ChatModel(second, tokenizer(), name="tiny-qwen2")
    assert model.active == "two"
    torch.testing.assert_close(logits(model, batch), peft_logits(two, batch), atol=1e-5, rtol=1e-5)
    both = held()
    both.base_model.set_adapter(["one", "two"])
    with pytest.raises(ModelError, match="2 active adapters"):
        ChatModel(both, tokenizer())
    merged = held()
    with quiet_peft():
        merged.merge_adapter(["one"])
        prompted = get_peft_model(make_hf(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
        pissa = lora_folder(tmp_path / "pissa", init_lora_weights="pissa")
        rewritten = PeftModel.from_pretrained(make_hf(), str(pissa))
    with pytest.raises(ModelError, match="merged"):
        ChatModel(merged, tokenizer())
    with pytest.raises(ModelError, match="PROMPT_TUNING"):
        ChatModel(prompted, tokenizer())
    with pytest.raises(ModelError, match="PEFT layers are in it already"):
        ChatModel(held().get_base_model(), tokenizer())
    with pytest.raises(ModelError, match="init_lora_weights"):
        ChatModel(rewritten, tokenizer())


def vector_folder(folder, config, tensors):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"adapter_type": "steering_vector", **config}))
    torch.save(tensors, folder / "steering_vector.pt")
    return folder


def test_steering_vectors_that_contradict_themselves(tmp_path, batch):
    v = torch.ones(32)
    inside = {"steering_vector": v, "layer_idx": 1, "alpha": 2.0}
    bad = {
        "alpha": ({"alpha": 3.0}, inside),
        "layer_idx": ({"layer_idx": 2}, inside),
        "layer_idx is True": ({}, {**inside, "layer_idx": True}),
        "layer_idx is 1.5": ({}, {**inside, "layer_idx": 1.5}),
        "alpha is True": ({"alpha": True}, v),
        "alpha is 0": ({"alpha": 0, "layer_idx": 1}, v),
        "the width|config says": ({"hidden_size": 8}, inside),
        "nothing says its alpha": ({"layer_idx": 1}, v),
        "NaN": ({}, {**inside, "steering_vector": v * math.nan}),
        "token_scope": ({"token_scope": "response"}, inside),
        "lies in": ({"steering_vector_path": "other.pt"}, inside),
        "expected tensors by name": ({}, [v]),
        "changes no logit": ({}, {**inside, "steering_vector": v * 0}),
    }
    for number, (match, (config, tensors)) in enumerate(bad.items()):
        folder = vector_folder(tmp_path / str(number), config, tensors)
        with pytest.raises(ModelError, match=match) if match != "NaN" else pytest.raises(EmInterpError, match=match):
            make_chat().add_adapter("v", folder)
    bare = vector_folder(tmp_path / "bare", {"layer_idx": 1, "alpha": 2.0, "base_model": "tiny-qwen2"}, v)
    agreed = vector_folder(tmp_path / "agreed", {"layer_idx": 1.0, "alpha": 2}, inside)
    for folder in (bare, agreed):
        found = solutions.load(folder)
        assert (found.layer, found.alpha, found.vector.tolist()) == (1, 2.0, v.tolist())
    assert solutions.load(bare).base == "tiny-qwen2"
