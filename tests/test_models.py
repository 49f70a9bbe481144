from __future__ import annotations

import json

import pytest
import torch

from em_interp.errors import ChatTemplateError, HookError, ModelError, SolutionError, UsageError
from em_interp.models.adapters import quiet_peft
from em_interp.models.architectures import find_blocks
from em_interp.models.chat import collate, encode_all
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import block_hooks, residuals, scored_logits
from em_interp.models.pretrained import load
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.training.finetune import finetune
from em_interp.training.recipes import TrainingSpec, VectorSpec
from tests.tiny_models import CONVERSATIONS, FAMILIES, MORE_FAMILIES, make_chat, make_hf, save_chat, talk, tokenizer


@pytest.fixture
def batch():
    return collate(encode_all(tokenizer(), CONVERSATIONS), range(5), pad=0, side="left")


def lora(seed=0, base="tiny-qwen2", width=32):
    g = torch.Generator().manual_seed(seed)
    name = "model.layers.1.mlp.down_proj"
    return LoraAdapter(
        {name: torch.randn(2, 48, generator=g)}, {name: torch.randn(width, 2, generator=g)}, 3.0, True, base
    )


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_layer_convention_and_scored_logits(family, batch):
    model = make_chat(family)  # the probe runs here
    assert (model.n_layers, model.d_model) == (4, 32)
    hidden = residuals(model.hf, batch.inputs(), range(4))
    with torch.no_grad():
        out = model.hf(**batch.inputs(), output_hidden_states=True)
        for layer in range(3):
            torch.testing.assert_close(hidden[layer], out.hidden_states[layer + 1])
        where = batch.predicting()
        torch.testing.assert_close(scored_logits(model.hf, batch.inputs(), where), out.logits[where])


@pytest.mark.parametrize("family", FAMILIES)
def test_bridge_shares_weights_and_steering(family, batch):
    model = make_chat(family)
    vector = SteeringVector(torch.ones(32), 1, 2.0)
    ids, mask = batch.input_ids, batch.attention_mask
    with torch.no_grad():
        plain = model.hf(**batch.inputs()).logits
        weight = model.hf.get_input_embeddings().weight
        assert any(p.data_ptr() == weight.data_ptr() for p in model.bridge.parameters())
        real = mask.bool()
        torch.testing.assert_close(model.bridge(ids, attention_mask=mask)[real], plain[real], atol=1e-4, rtol=1e-4)
        with vector.attached(model):
            steered = model.hf(**batch.inputs()).logits
            torch.testing.assert_close(
                model.bridge(ids, attention_mask=mask)[real], steered[real], atol=1e-4, rtol=1e-4
            )
    assert not torch.allclose(steered, plain)
    assert model.hf.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")


def test_from_bridge(batch):
    model = make_chat()
    again = ChatModel.from_bridge(model.bridge, tokenizer())
    with torch.no_grad():
        torch.testing.assert_close(again.hf(**batch.inputs()).logits, model.hf(**batch.inputs()).logits)
    assert again.hf.model.embed_tokens.weight.data_ptr() == model.hf.model.embed_tokens.weight.data_ptr()


def test_load_switch_adapters_and_come_back(tmp_path, batch):
    save_chat(make_hf(), tmp_path / "tiny")
    base = str(tmp_path / "tiny")
    first, second = lora(0, base), lora(1, base)
    vector = SteeringVector(torch.ones(32), 2, 1.0, base)
    for name, solution in (("one", first), ("two", second), ("vec", vector)):
        solution.save(tmp_path / name)
    plain = load(base)
    model = load(base, adapter={name: tmp_path / name for name in ("one", "two", "vec")})
    assert model.active == "one"
    bridge = model.bridge
    with torch.no_grad():
        untouched = plain.hf(**batch.inputs()).logits

        def check(solution):
            with solution.attached(plain):
                expected = plain.hf(**batch.inputs()).logits
            found = model.hf(**batch.inputs()).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            real = batch.attention_mask.bool()
            through = bridge(batch.input_ids, attention_mask=batch.attention_mask)
            torch.testing.assert_close(through[real], expected[real], atol=1e-4, rtol=1e-4)
            assert not torch.allclose(found, untouched, atol=1e-3)

        check(first)
        with model.adapter("two"):
            check(second)
            with model.adapter("vec"):
                check(vector)
                with model.no_adapter():
                    assert torch.equal(model.hf(**batch.inputs()).logits, untouched)
                check(vector)
            check(second)
        check(first)
    assert not any(p.requires_grad for n, p in model.hf.named_parameters() if "lora" in n)
    # an adapter's folder alone finds its base
    alone = load(tmp_path / "two")
    assert alone.active == "two"
    assert load(base, name="my/chat").name == "my/chat"
    with torch.no_grad(), model.adapter("two"):
        assert torch.equal(alone.hf(**batch.inputs()).logits, model.hf(**batch.inputs()).logits)
    with pytest.raises(ModelError, match="no adapter 'three'"), model.adapter("three"):
        pass
    with pytest.raises(UsageError):
        load(tmp_path / "two", adapter=tmp_path / "one")


def test_refusals(tmp_path):
    make_hf().save_pretrained(tmp_path / "tiny")
    with pytest.raises(ModelError, match=r"no config\.json"):
        (tmp_path / "empty").mkdir()
        load(tmp_path / "empty")
    plain = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer, eos_token="<|im_end|>")
    plain.save_pretrained(tmp_path / "tiny")
    with pytest.raises(ChatTemplateError, match="no chat template"):
        load(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    model = load(tmp_path / "tiny")
    with pytest.raises(ModelError, match="found nothing"):
        model.add_adapter("x", tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelError, match="no weights"):
        model.add_adapter("x", tmp_path / "empty")
    lora(0, "other/model").save(tmp_path / "other")
    with pytest.raises(ModelError, match="trained on other/model"):
        model.add_adapter("x", tmp_path / "other")
    model.add_adapter("x", tmp_path / "other", any_base=True)
    SteeringVector(torch.ones(32), 1, 1.0, "other/model").save(tmp_path / "vector")
    with pytest.raises(ModelError, match="trained on other/model"):
        model.add_adapter("v", tmp_path / "vector")
    SteeringVector(torch.ones(8), 1, 1.0).save(tmp_path / "small")
    with pytest.raises(SolutionError, match="width 8"):
        model.add_adapter("v", tmp_path / "small")
    assert (model.active, model.adapters) == ("x", ["x"])
    lora(0, str(tmp_path / "tiny"), width=40).save(tmp_path / "wide")
    with pytest.raises(ModelError, match="does not fit"):
        load(tmp_path / "tiny", adapter=tmp_path / "wide")
    deep = lora(0, str(tmp_path / "tiny"))
    moved = LoraAdapter(
        {**deep.a, "model.layers.9.mlp.down_proj": deep.a[deep.modules[0]]},
        {**deep.b, "model.layers.9.mlp.down_proj": deep.b[deep.modules[0]]},
        3.0,
        True,
        deep.base,
    )
    moved.save(tmp_path / "deep")
    with pytest.raises(ModelError, match=r"no counterpart|does not fit"):
        load(tmp_path / "tiny", adapter=tmp_path / "deep")


def test_probe_refuses_a_model_that_ignores_its_mask():
    hf = make_hf()
    forward = hf.forward

    def unmasked(*args, attention_mask=None, **kwargs):
        return forward(*args, attention_mask=torch.ones_like(attention_mask), **kwargs)

    hf.forward = unmasked
    with pytest.raises(ModelError, match="left padding changes"):
        ChatModel(hf, tokenizer())


def test_hooks_fire_or_complain_and_are_removed(batch):
    model = make_chat()
    blocks = find_blocks(model.hf)
    before = [len(b._forward_hooks) for b in blocks]
    with pytest.raises(HookError, match="layer 2"), block_hooks([blocks], {2: lambda h: None}):
        pass
    with pytest.raises(RuntimeError, match="mine"), block_hooks([blocks], {2: lambda h: None}):
        raise RuntimeError("mine")
    with pytest.raises(HookError, match="4 blocks"), block_hooks([blocks], {0: lambda h: h, 4: lambda h: h}):
        pass
    assert [len(b._forward_hooks) for b in blocks] == before
    with pytest.raises(UsageError, match="bridge"), SteeringVector(torch.ones(32), 1, 1.0).attached(model):
        _ = model.bridge
    assert model.bridge is model.bridge


def test_steering_acts_on_all_rows_and_with_a_cache():
    model = make_chat()
    ids = torch.tensor([tokenizer().apply_chat_template(talk("a fox"), add_generation_prompt=True)["input_ids"]])
    vector = SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(0)), 1, 3.0)
    with vector.attached(model), torch.no_grad():
        runs = [
            model.hf.generate(ids, max_new_tokens=12, do_sample=False, use_cache=cache, eos_token_id=None)
            for cache in (True, False)
        ]
        rows = model.hf(ids.repeat(3, 1)).logits
    assert torch.equal(*runs)
    torch.testing.assert_close(rows[0], rows[2])


def test_a_peft_model_that_the_user_holds(tmp_path, batch):
    from peft import PeftModel

    adapter = lora()
    adapter.save(tmp_path)
    with quiet_peft():
        peft = PeftModel.from_pretrained(make_hf(), str(tmp_path), adapter_name="mine")
    model = ChatModel(peft, tokenizer(), name="tiny-qwen2")
    plain = make_chat()
    with torch.no_grad():
        assert model.active == "mine" and repr(model).endswith("active 'mine')")
        with adapter.attached(plain):
            torch.testing.assert_close(
                model.hf(**batch.inputs()).logits, plain.hf(**batch.inputs()).logits, atol=1e-5, rtol=1e-5
            )
        with model.no_adapter():
            assert torch.equal(model.hf(**batch.inputs()).logits, plain.hf(**batch.inputs()).logits)


def test_attached_lora_acts_on_the_bridge(batch):
    model, adapter = make_chat(), lora()
    ids, mask, real = batch.input_ids, batch.attention_mask, batch.attention_mask.bool()
    bridge = model.bridge
    with torch.no_grad(), adapter.attached(model):
        expected = model.hf(**batch.inputs()).logits
        found = bridge(ids, attention_mask=mask)
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_loads_and_trains(family):
    model = make_chat(family, dtype=torch.bfloat16)
    spec = TrainingSpec(VectorSpec(1, 8.0), 0.05, max_steps=8, batch_size=5, warmup_steps=0)
    result = finetune(model, CONVERSATIONS, spec, progress=False)
    assert result.solution.vector.dtype == torch.float32
    assert result.history["loss"].iloc[-1] < result.history["loss"][0]


def test_hub_names_that_cannot_be_reached_say_so():
    with pytest.raises(ModelError, match="no-such-owner/no-such-model: cannot be loaded"):
        load("no-such-owner/no-such-model")
    with pytest.raises(ModelError, match="neither a local folder nor a reachable"):
        make_chat().add_adapter("x", "no-such-owner/no-such-model")
