"""The bridge gives the model's logits with and without adapters, or refuses the pass."""

from __future__ import annotations

import pytest
import torch

from em_interp.directions.activations import collect
from em_interp.errors import ModelError
from em_interp.models.chat import collate, encode_all
from em_interp.models.chat_model import ChatModel
from em_interp.solutions.steering_vector import SteeringVector
from tests.adapter_folders import lora_folder, untrained
from tests.theta import make_theta
from tests.tiny_models import CONVERSATIONS, make_chat, make_hf, tokenizer

FUSED = {
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gpt_neox": ["query_key_value"],
    "gpt2": ["c_attn"],
    "falcon": ["query_key_value"],
    "bloom": ["query_key_value"],
}
APART = {
    "phi3": ["o_proj", "down_proj"],
    "gpt_neox": ["dense_4h_to_h"],
    "gpt2": ["mlp.c_proj"],
    "falcon": ["dense"],
    "bloom": ["dense_h_to_4h"],
    "qwen2": ["q_proj", "v_proj", "up_proj"],
    "opt": ["fc1", "out_proj"],
    "mixtral": ["q_proj"],
}


@pytest.fixture(scope="module")
def batch():
    return collate(encode_all(tokenizer(), CONVERSATIONS), range(5), pad=0, side="left")


@torch.no_grad()
def check_equal(model, batch, bridge):
    real = batch.attention_mask.bool()
    expected = model.hf(**batch.inputs()).logits[real]
    found = bridge(batch.input_ids, attention_mask=batch.attention_mask)[real]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    return expected


@pytest.mark.parametrize("family", FUSED)
def test_a_pass_that_would_leave_out_the_adapter_is_refused(tmp_path, batch, family):
    folder = lora_folder(tmp_path / "x", family, target_modules=FUSED[family])
    model = make_chat(family)
    theta = make_theta(model, "all-modules")
    model.add_adapter("peft", folder)
    model.add_adapter("theta", theta, activate=False)
    bridge = model.bridge  # made while the adapter is active
    for name in ("peft", "theta"):
        with model.adapter(name):
            with torch.no_grad():
                model.hf(**batch.inputs())  # a plain pass before must not hide it
            with pytest.raises(ModelError, match="leave out"):
                collect(model, CONVERSATIONS, through="bridge", progress=False)
            for run in (bridge, bridge.run_with_cache):
                with pytest.raises(ModelError, match=r"does not run .*Pass the tokens through model\.hf"):
                    run(batch.input_ids, attention_mask=batch.attention_mask)
    with model.no_adapter():
        base = check_equal(model, batch, bridge)
        with pytest.raises(ModelError, match="leave out"), theta.attached(model):
            model.hf(**batch.inputs())
            bridge(batch.input_ids, attention_mask=batch.attention_mask)
        torch.testing.assert_close(check_equal(model, batch, bridge), base)
        with SteeringVector(torch.linspace(-1, 1, model.d_model), 1, 2.0).attached(model):
            assert not torch.allclose(check_equal(model, batch, bridge), base, atol=1e-2)


@pytest.mark.parametrize("family", APART)
def test_adapters_on_modules_that_the_bridge_runs_act_through_it(tmp_path, batch, family):
    model = make_chat(family)
    before = model.bridge
    base = check_equal(model, batch, before)
    with pytest.raises(ModelError, match="changes no logit"):
        model.add_adapter("zero", untrained(lora_folder(tmp_path / "zero", family)))
    check_equal(model, batch, before)
    model.add_adapter("peft", lora_folder(tmp_path / "x", family, target_modules=APART[family]))
    with pytest.raises(ModelError, match=r"Read model\.bridge again"):
        before(batch.input_ids)
    assert not torch.allclose(check_equal(model, batch, model.bridge), base, atol=1e-2)
    with model.no_adapter():
        torch.testing.assert_close(check_equal(model, batch, model.bridge), base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"use_dora": True}),
        ("qwen2", {"lora_bias": True}),
        ("qwen2", {"modules_to_save": ["lm_head", "norm"]}),
        ("qwen2", {"trainable_token_indices": [3, 40]}),
        ("mixtral", {"target_parameters": ["experts.down_proj"]}),
    ],
    ids=str,
)
def test_what_is_more_than_lora_acts_through_the_bridge(tmp_path, batch, family, changes):
    model = make_chat(family)
    base = check_equal(model, batch, model.bridge)
    model.add_adapter("x", lora_folder(tmp_path / "x", family, **changes))
    assert not torch.allclose(check_equal(model, batch, model.bridge), base, atol=1e-2)


@pytest.mark.parametrize("family", ["gemma2", "bloom", "phi3"])
def test_a_model_over_a_held_bridge_answers_as_the_first(batch, family):
    model = make_chat(family)
    again = ChatModel.from_bridge(model.bridge, tokenizer())
    with torch.no_grad():
        torch.testing.assert_close(again.hf(**batch.inputs()).logits, model.hf(**batch.inputs()).logits)


def test_a_bridge_with_other_weights_is_refused():
    model = make_chat()
    bridge = model.bridge
    with torch.no_grad():
        bridge.blocks[1].register_forward_hook(
            lambda _m, _a, out: (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2
        )
    with pytest.raises(ModelError, match="other logits than the model that it was booted from"):
        ChatModel.from_bridge(bridge, tokenizer())


def test_low_precision_does_not_hide_a_dropped_module():
    model = ChatModel(make_hf("gpt_neox").to(torch.bfloat16), tokenizer(), name="tiny")
    theta = make_theta(model, "all-modules", size=1e-3)
    bridge, ids = model.bridge, torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ModelError, match="query_key_value"), theta.attached(model):
        bridge(ids)
