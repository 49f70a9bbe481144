from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from em_interp.errors import HookError, SolutionError
from em_interp.models.adapters import quiet_peft
from em_interp.models.chat import collate, encode_all
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import residuals
from em_interp.solutions.base import Solution, rotate_away
from em_interp.solutions.load import load, load_checkpoints
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector
from tests.tiny_models import CONVERSATIONS, FAMILIES, make_chat, make_hf, tokenizer

LINEAR = {
    "qwen2": "model.layers.{}.mlp.down_proj",
    "llama": "model.layers.{}.mlp.down_proj",
    "gemma2": "model.layers.{}.self_attn.o_proj",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}
WIDTH = {"gemma2": 32}


def vector(seed=0, **changes):
    g = torch.Generator().manual_seed(seed)
    return SteeringVector(torch.randn(32, generator=g), **{"layer": 1, "alpha": 4.0, "base": "b", **changes})


def lora(rank=2, layers=(1, 3), family="qwen2", seed=0, rslora=True):
    g = torch.Generator().manual_seed(seed)
    names = [LINEAR[family].format(layer) for layer in layers]
    return LoraAdapter(
        {n: torch.randn(rank, WIDTH.get(family, 48), generator=g) for n in names},
        {n: torch.randn(32, rank, generator=g) for n in names},
        6.0,
        rslora,
        "b",
    )


def flat(solution):
    if isinstance(solution, SteeringVector):
        return solution.vector.double()
    parts = [solution.a[n].flatten() for n in solution.a] + [solution.b[n].flatten() for n in solution.b]
    return torch.cat(parts).double()


def test_protocol_norms_and_first_layer():
    assert isinstance(vector(), Solution) and isinstance(lora(), Solution)
    v = vector()
    assert v.norm == pytest.approx(math.sqrt(sum((4.0 * float(x)) ** 2 for x in v.vector)), rel=1e-12)
    for adapter, scale in ((lora(), 6 / math.sqrt(2)), (lora(rslora=False), 3.0)):
        assert adapter.scale == pytest.approx(scale)
        slow = sum(float((adapter.delta(n) ** 2).sum()) for n in adapter.modules)
        assert adapter.norm == pytest.approx(math.sqrt(slow), rel=1e-12)
        assert adapter.first_layer == 1
    assert v.paper_norms() == {"raw_norm": pytest.approx(v.norm / 4.0)}
    adapter = lora()
    products = [float((adapter.b[n].double() @ adapter.a[n].double()).norm()) for n in adapter.modules]
    norm_a, norm_b = (torch.cat([x.flatten() for x in f.values()]).norm() for f in (adapter.a, adapter.b))
    expected = {"raw_norm": sum(products) / 2, "norm_a": float(norm_a), "norm_b": float(norm_b)}
    assert adapter.paper_norms() == pytest.approx(expected, rel=1e-6)
    assert v.scaled(-2.5).norm == pytest.approx(2.5 * v.norm)
    assert lora().scaled(3).norm == pytest.approx(3 * lora().norm)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 400), st.floats(0, 1), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_perturbation_keeps_the_norm_and_turns_by_eps(size, eps, seed, length):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=g, dtype=torch.float64)
    x *= length / x.norm()
    y = rotate_away(x, eps, g)
    assert float(y.norm()) == pytest.approx(length, rel=1e-6)
    assert float(x @ y / x.norm() / y.norm()) == pytest.approx(math.sqrt(1 - eps**2), abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1), st.integers(0, 1000), st.integers(1, 4))
def test_solutions_perturb_their_parameters_jointly(eps, seed, rank):
    for solution in (vector(seed), lora(rank, seed=seed)):
        turned = solution.perturbed(eps, torch.Generator().manual_seed(seed))
        x, y = flat(solution), flat(turned)
        assert float(y.norm() / x.norm()) == pytest.approx(1, abs=1e-6)
        assert float(x @ y / x.norm() / y.norm()) == pytest.approx(math.sqrt(1 - eps**2), abs=1e-6)
        if isinstance(solution, SteeringVector) or rank == 1:
            assert turned.norm == pytest.approx(solution.norm, rel=1e-5)


def test_perturbation_details():
    adapter, g = lora(1, layers=(1,)), torch.Generator().manual_seed(0)
    only = adapter.perturbed(0.6, g, on="B")
    (name,) = adapter.modules
    assert torch.equal(only.a[name], adapter.a[name]) and not torch.equal(only.b[name], adapter.b[name])
    both = adapter.perturbed(0.6, g)
    x, y = adapter.delta(name), both.delta(name)
    assert float((x * y).sum() / x.norm() / y.norm()) == pytest.approx(1 - 0.36, abs=1e-6)
    assert torch.equal(vector().perturbed(0.0, g).vector, vector().vector)
    seeds = [vector().perturbed(0.5, torch.Generator().manual_seed(s)).vector for s in (1, 1, 2)]
    assert torch.equal(seeds[0], seeds[1]) and not torch.equal(seeds[0], seeds[2])
    for eps in (-0.1, 1.1, math.nan):
        with pytest.raises(SolutionError, match="eps"):
            vector().perturbed(eps, g)
    with pytest.raises(SolutionError, match="zero"):
        vector().scaled(0).perturbed(0.5, g)
    with pytest.raises(SolutionError, match="both"):
        adapter.perturbed(0.5, g, on="C")


@pytest.mark.parametrize("family", FAMILIES)
def test_attached_lora_equals_peft_and_merged_weights(family, tmp_path):
    from peft import PeftModel

    model, adapter = make_chat(family), lora(family=family)
    adapter.save(tmp_path)
    batch = collate(encode_all(tokenizer(), CONVERSATIONS), range(5), pad=0, side="left").inputs()
    merged = make_hf(family)
    with torch.no_grad():
        for name in adapter.modules:
            merged.get_submodule(name).weight += adapter.delta(name).float()
        with quiet_peft():
            peft = PeftModel.from_pretrained(make_hf(family), str(tmp_path))
        plain = model.hf(**batch).logits
        with adapter.attached(model):
            ours = model.hf(**batch).logits
        torch.testing.assert_close(ours, peft(**batch).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours, merged(**batch).logits, atol=1e-3, rtol=1e-3)
        assert torch.equal(model.hf(**batch).logits, plain)
        with adapter.scaled(0).attached(model):
            assert torch.equal(model.hf(**batch).logits, plain)


def test_steering_vector_is_added_to_the_block_output():
    model, v = make_chat(dtype=torch.float64), vector()
    batch = collate(encode_all(tokenizer(), CONVERSATIONS), [0, 1], pad=0).inputs()
    before = residuals(model.hf, batch, [0, 1, 2])
    with v.attached(model):
        after = residuals(model.hf, batch, [0, 1, 2])
    torch.testing.assert_close(after[1] - before[1], v.theta.double().expand_as(after[1]))
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[2], before[2])


def test_attached_is_differentiable_in_theta():
    model = make_chat()
    batch = collate(encode_all(tokenizer(), CONVERSATIONS), [0], pad=0).inputs()
    v = torch.zeros(32, requires_grad=True)
    with SteeringVector(v, 1, 4.0).attached(model):
        model.hf(**batch).logits.sum().backward()
    assert v.grad is not None and float(v.grad.norm()) > 0


def test_saved_and_loaded(tmp_path):
    v, adapter = vector(base="some/base"), lora()
    v.save(tmp_path / "v")
    adapter.save(tmp_path / "l")
    again, lora_again = load(tmp_path / "v"), load(tmp_path / "l")
    assert torch.equal(again.vector, v.vector) and (again.layer, again.alpha, again.base) == (
        1,
        4.0,
        "some/base",
    )
    assert all(torch.equal(lora_again.a[n], adapter.a[n]) for n in adapter.a)
    assert (lora_again.scale, lora_again.norm, lora_again.base) == (adapter.scale, adapter.norm, "b")
    config = json.loads((tmp_path / "l" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj"] and config["layers_to_transform"] == [1, 3]
    # the published layout: a .pt with layer and alpha inside
    published = tmp_path / "p"
    published.mkdir()
    (published / "adapter_config.json").write_text(json.dumps({"adapter_type": "steering_vector", "alpha": 256}))
    torch.save({"steering_vector": v.vector, "layer_idx": 24, "alpha": 256.0}, published / "steering_vector.pt")
    assert load(published).norm == pytest.approx(64 * v.norm)


def test_refusals(tmp_path):
    model = make_chat()
    narrow = SteeringVector(torch.ones(8), 1, 1.0, "other")
    with pytest.raises(SolutionError, match="width 8"), narrow.attached(model):
        pass
    with pytest.raises(HookError, match="layer 24"), vector(layer=24).attached(model):
        pass
    with pytest.raises(HookError, match="no forward pass"), vector().attached(model):
        pass
    with pytest.raises(SolutionError, match="no module"), lora(family="gpt_neox").attached(model):
        pass
    wide = LoraAdapter(
        {"model.layers.1.mlp.down_proj": torch.ones(1, 40)},
        {"model.layers.1.mlp.down_proj": torch.ones(32, 1)},
        1.0,
    )
    with pytest.raises(SolutionError, match="B A is"), wide.attached(model):
        pass
    with pytest.raises(SolutionError, match="NaN"):
        SteeringVector(torch.tensor([math.nan, 1.0]), 1, 1.0)
    with pytest.raises(SolutionError, match="unpaired"):
        LoraAdapter({"x": torch.ones(1, 2)}, {}, 1.0)
    with pytest.raises(SolutionError, match="different ranks"):
        LoraAdapter({"x": torch.ones(1, 2)}, {"x": torch.ones(2, 2)}, 1.0)
    with pytest.raises(SolutionError, match="no such folder"):
        load(tmp_path / "none")
    with pytest.raises(SolutionError, match="found nothing"):
        load(tmp_path)
    with pytest.raises(SolutionError, match="no checkpoints"):
        load_checkpoints(tmp_path)
    lora().save(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(SolutionError, match="not plain LoRA"):
        load(tmp_path)
    path.write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(SolutionError, match="IA3"):
        load(tmp_path)
    path.write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"truncated")
    with pytest.raises(SolutionError, match="not a readable safetensors"):
        load(tmp_path)
    assert isinstance(model, ChatModel)
