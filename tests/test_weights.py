"""Hashes of what acts: equal for equal weights however they are held, other for any change of what a pass computes."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model

from em_interp.directions.direction import Direction
from em_interp.errors import HookError, ModelError
from em_interp.interventions.intervening import intervening
from em_interp.interventions.steering import Steer
from em_interp.models.adapters import quiet_peft
from em_interp.models.architectures import find_blocks
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import block_hooks
from em_interp.models.weights import acting_hash, adapter_hash, file_hash, same_weights, source_hash, weights_hash
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector
from tests.tiny_models import D_MODEL, MORE_FAMILIES, make_chat, make_hf, tokenizer


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_equal_weights_have_one_hash_and_others_another(family, tmp_path):
    hf = make_hf(family)
    found = weights_hash(hf)
    assert found.startswith("float32:") and weights_hash(hf) == found == weights_hash(make_hf(family))
    hf.save_pretrained(tmp_path / "elsewhere")
    assert weights_hash(type(hf).from_pretrained(tmp_path / "elsewhere").eval()) == found
    assert weights_hash(make_hf(family, seed=1)) != found
    assert same_weights(weights_hash(make_hf(family).bfloat16()), found) is None


def test_a_pass_a_bridge_and_use_leave_the_hash_as_it_is():
    model = make_chat()
    before = weights_hash(model.hf), acting_hash(model)
    model.hf(torch.tensor([[5, 6, 7]]), output_hidden_states=True)  # transformers leaves hooks behind
    model.bridge(torch.tensor([[5, 6, 7]]))
    model.hf.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    assert (weights_hash(model.hf), acting_hash(model)) == before


EDITS = {
    "one weight": lambda w: w[3, 4].add_(0.1),
    "through .data": lambda w: w.data.mul_(1.01),
    "negated through .data": lambda w: w.data[:2].neg_(),
    "rows swapped through .data": lambda w: w.data.copy_(w.data.flip(0)),
    "columns swapped through .data": lambda w: w.data.copy_(w.data.flip(1)),
    "another tensor": lambda w: setattr(w, "data", torch.randn_like(w)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_in_place_gives_another_hash(edit, dtype):
    hf = make_hf().to(dtype)
    before = weights_hash(hf)
    with torch.no_grad():
        edit(hf.model.layers[1].mlp.down_proj.weight)
    after = weights_hash(hf)
    assert after != before
    fresh = copy.deepcopy(hf)
    del fresh._em_interp_digests
    assert weights_hash(fresh) == after


def test_a_config_that_changes_the_pass_changes_the_hash():
    assert weights_hash(make_hf(rms_norm_eps=1e-3)) != weights_hash(make_hf())
    assert weights_hash(make_hf(use_cache=False)) == weights_hash(make_hf())


def test_tied_offloaded_and_absent_weights():
    tied = make_hf(tie_word_embeddings=True)
    found = weights_hash(tied)
    cpu_offload(tied, execution_device=torch.device("cpu"))
    assert next(tied.parameters()).is_meta and weights_hash(tied) == found
    with pytest.raises(ModelError, match="meta"):
        weights_hash(make_hf().to("meta"))


def lora(hf, seed, **changes):
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["down_proj"], init_lora_weights=False, **changes)
    with quiet_peft():
        return get_peft_model(hf, config)


def test_an_adapter_acts_and_is_no_part_of_the_base():
    base = weights_hash(make_hf())
    first, again, second = (ChatModel(lora(make_hf(), seed), tokenizer(), name="m") for seed in (0, 0, 1))
    assert {weights_hash(m.hf) for m in (first, again, second)} == {base}
    assert acting_hash(first) == acting_hash(again) != acting_hash(second)
    with first.no_adapter():
        assert adapter_hash(first.hf) is None
        assert acting_hash(first) == acting_hash(ChatModel(make_hf(), tokenizer(), name="other name"))
    stronger = ChatModel(lora(make_hf(), 0, use_rslora=True), tokenizer(), name="m")
    assert acting_hash(stronger) != acting_hash(first)
    with torch.no_grad():
        next(p for n, p in first.hf.named_parameters() if "lora_B" in n).mul_(1.01)
    assert acting_hash(first) != acting_hash(again) and weights_hash(first.hf) == base


@pytest.mark.parametrize("kind", ["modules_to_save", "trainable_tokens"])
def test_modules_that_an_adapter_replaces_are_the_adapters(kind):
    if kind == "modules_to_save":
        peft = lora(make_hf(), 0, modules_to_save=["lm_head"])
        with torch.no_grad():
            peft.get_base_model().lm_head.modules_to_save["default"].weight.add_(1.0)
    else:
        peft = lora(make_hf(), 0, trainable_token_indices=[5])
        with torch.no_grad():
            next(p for n, p in peft.named_parameters() if "trainable_tokens_delta" in n).add_(1.0)
    model = ChatModel(peft, tokenizer(), name="m")
    assert weights_hash(model.hf) == weights_hash(make_hf())
    plain = acting_hash(ChatModel(make_hf(), tokenizer(), name="m"))
    assert acting_hash(model) != plain
    with model.no_adapter():
        assert acting_hash(model) == plain


def steering(seed=0, layer=1):
    return SteeringVector(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed)), layer, 2.0)


def rank_one(seed=0):
    made = torch.Generator().manual_seed(seed)
    name = "model.layers.1.mlp.down_proj"
    a, b = torch.randn(1, 48, generator=made), torch.randn(D_MODEL, 1, generator=made)
    return LoraAdapter({name: a}, {name: b}, 2.0)


def steer(seed=0, coefficient=1.0, scope="all"):
    vector = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return Steer(Direction(vector, (1,), "random"), 1, coefficient, scope=scope)


@pytest.mark.parametrize("kind", ["solution", "lora", "intervention"])
def test_what_is_entered_acts_until_it_is_left(kind):
    model = make_chat()
    plain = acting_hash(model)

    def attached(seed):
        if kind == "intervention":
            return intervening(model, [steer(seed)])
        return (steering(seed) if kind == "solution" else rank_one(seed)).attached(model)

    found = []
    for seed in (0, 0, 1):
        with attached(seed):
            found.append(acting_hash(model))
            model.hf(torch.tensor([[5, 6, 7]]))
            assert acting_hash(model) == found[-1]
        assert acting_hash(model) == plain
    assert found[0] == found[1] and len({plain, *found}) == 3


def test_coefficient_scope_layer_and_order_act():
    model = make_chat()
    found = [acting_hash(model)]
    lists = ([steer()], [steer(coefficient=2.0)], [steer(0), steer(1)])
    for interventions in lists:
        with intervening(model, interventions):
            found.append(acting_hash(model))
            model.hf(torch.tensor([[5, 6]]))
    for mask in ([[False, True]], [[True, False]]):
        with intervening(model, [steer(scope="response")], response_mask=torch.tensor(mask)):
            found.append(acting_hash(model))
            model.hf(torch.tensor([[5, 6]]))
    for layer in (1, 2):
        with steering(layer=layer).attached(model):
            found.append(acting_hash(model))
            model.hf(torch.tensor([[5, 6]]))
    model.add_adapter("by name", steering(seed=3))
    found.append(acting_hash(model))
    assert len(set(found)) == len(found)


def test_hooks_that_do_not_say_what_they_do_are_refused():
    model = make_chat()
    handle = model.hf.model.layers[2].register_forward_hook(lambda _m, _a, out: out * 1.02)
    with pytest.raises(HookError, match=r"model.layers.2 does not say"):
        acting_hash(model)
    handle.remove()
    with block_hooks([find_blocks(model.hf)], {0: lambda h: h}, must_fire=False), pytest.raises(HookError):
        acting_hash(model)
    assert acting_hash(model) == acting_hash(make_chat())


def test_fingerprints_tell_solutions_apart_and_outlive_a_folder(tmp_path):
    for make in (steering, rank_one):
        solution = make(0)
        assert solution.fingerprint == make(0).fingerprint != make(1).fingerprint
        assert solution.fingerprint != solution.scaled(1.01).fingerprint
        assert type(solution).load(solution.save(tmp_path / make.__name__)).fingerprint == solution.fingerprint
    assert steering(layer=2).fingerprint != steering(layer=1).fingerprint


def test_a_folder_is_known_by_its_content(tmp_path):
    one, other = tmp_path / "a" / "checkpoint-500", tmp_path / "b" / "checkpoint-500"
    for folder, seed in ((one, 0), (other, 1)):
        make_hf(seed=seed).save_pretrained(folder)
    assert file_hash(one) != file_hash(other) and source_hash(one) == file_hash(one)
    before = file_hash(one)
    (one / "optimizer.pt").write_bytes(b"state")
    assert file_hash(one) == before
    (one / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert file_hash(one) == file_hash(other)
    (one / "link.bin").symlink_to("nowhere")
    with pytest.raises(ModelError, match=r"link.bin.*link to nothing"):
        file_hash(one)
    with pytest.raises(ModelError, match="neither a local folder"):
        source_hash("no-one/has-this-model")
