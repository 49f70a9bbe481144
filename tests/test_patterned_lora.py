"""LoRA whose rank and alpha differ by module (PEFT's rank_pattern and alpha_pattern)."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key

from em_interp.errors import AdapterError, SolutionError
from em_interp.files.adapters import LoraConfig
from em_interp.models.adapters import quiet_peft
from em_interp.solutions import load as solutions
from em_interp.solutions.lora import LoraAdapter
from tests.adapter_folders import lora_folder
from tests.every_metric import check, lowering
from tests.tiny_models import make_chat, make_hf

PATTERNS = {
    "gpt2": {"rank_pattern": {"1.mlp.c_proj": 5, "c_attn": 1}, "alpha_pattern": {"h.2.attn.c_attn": 9, "c_proj": 1.5}},
    "gpt_neox": {"rank_pattern": {r"layers\.[23]\.mlp\.dense_4h_to_h": 3}, "alpha_pattern": {"query_key_value": -2}},
    "qwen2": {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {}},
}


def peft_theta(folder, family):
    """PEFT's own theta of each module, as the module's weight is laid out."""
    with quiet_peft():
        peft = PeftModel.from_pretrained(make_hf(family).double(), str(folder)).double()
    layers = {n.removeprefix("base_model.model."): m for n, m in peft.named_modules() if isinstance(m, LoraLayer)}
    return {f"{name}.weight": layer.get_delta_weight("default").double().detach() for name, layer in layers.items()}


def scales(folder, modules):
    """By PEFT's rule, from the config alone."""
    config = json.loads((folder / "adapter_config.json").read_text())

    def of(name, usual):
        pattern = config[f"{'rank' if usual == 'r' else 'alpha'}_pattern"]
        return pattern.get(get_pattern_key(pattern.keys(), name), config[usual])

    root = math.sqrt if config["use_rslora"] else float
    return {name: of(name, "lora_alpha") / root(of(name, "r")) for name in modules}


def dense_of(folder, family):
    model = make_hf(family)

    def dense(theta):
        found = {}
        for name, scale in scales(folder, theta.modules).items():
            x = scale * theta.b[name].double() @ theta.a[name].double()
            found[f"{name}.weight"] = x.T if type(model.get_submodule(name)).__name__ == "Conv1D" else x
        return found

    return dense


def double(theta):
    return theta.with_tensors({name: 0.5 * x.double() for name, x in theta.tensors().items()})


@pytest.mark.parametrize(("family", "rslora"), [("gpt2", False), ("gpt_neox", True)])
def test_every_metric_is_that_of_the_dense_theta(tmp_path, family, rslora):
    folder = lora_folder(tmp_path / "x", family, use_rslora=rslora, **PATTERNS[family])
    theta, dense = solutions.load(folder), dense_of(folder, family)
    assert len({x.shape[0] for x in theta.a.values()}) > 1
    assert len({theta.scale_of(name) for name in theta.modules}) > 1
    oracle = peft_theta(folder, family)
    assert set(dense(theta)) == set(oracle)
    for name, x in dense(theta).items():
        torch.testing.assert_close(x, oracle[name], rtol=1e-5, atol=1e-6)
    other = solutions.load(lora_folder(tmp_path / "y", family, 7, use_rslora=rslora, **PATTERNS[family]))
    model = make_chat(family, dtype=torch.float64)
    check(model, lowering(model, double(theta)), double(other), dense)


@pytest.mark.parametrize("family", list(PATTERNS))
def test_saved_it_is_the_same_for_peft(tmp_path, family):
    folder = lora_folder(tmp_path / "x", family, **PATTERNS[family])
    theta = solutions.load(folder)
    again = theta.save(tmp_path / "again")
    assert solutions.load(again).fingerprint == theta.fingerprint
    first, second = peft_theta(folder, family), peft_theta(again, family)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert theta.adapters == ("all-modules",)


_PATTERN = st.lists(st.sampled_from(["q", "a.q", "b.a.q", r"\d+\.q", "[ab].q", "layers.1.*", "k"]), unique=True)


@settings(deadline=None, max_examples=100)
@given(_PATTERN, st.sampled_from(["layers.1.a.q", "layers.12.b.a.q", "q", "x.k", "layers.1.k", "qq"]))
def test_a_module_has_the_rank_that_peft_gives_it(keys, module):
    ranks = {key: 10 + i for i, key in enumerate(keys)}
    config = LoraConfig(None, 3, 4.0, False, {}, ranks, {key: 0.5 * r for key, r in ranks.items()})
    assert config.rank_of(module) == ranks.get(get_pattern_key(ranks.keys(), module), 3)
    assert config.alpha_of(module) == {k: 0.5 * r for k, r in ranks.items()}.get(
        get_pattern_key(ranks.keys(), module), 4.0
    )


def test_what_is_no_pattern_is_refused(tmp_path):
    folder = lora_folder(tmp_path / "x")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for changes, match in (
        ({"rank_pattern": {"(": 2}}, "regular expression"),
        ({"rank_pattern": ["q_proj"]}, "table of modules"),
        ({"rank_pattern": {"q_proj": 0}}, "says 0"),
        ({"rank_pattern": {"q_proj": 1.5}}, "whole number"),
        ({"alpha_pattern": {"q_proj": "4"}}, "'4'"),
        ({"alpha_pattern": {"q_proj": None}}, "says None"),
        ({"rank_pattern": {"q_proj": 3}}, "says rank 3"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(AdapterError, match=match):
            solutions.load(folder)


def test_different_scales_are_told():
    one = {n: torch.ones(r, 3) for n, r in (("a", 1), ("b", 2))}
    two = {n: torch.ones(2, r) for n, r in (("a", 1), ("b", 2))}
    theta = LoraAdapter(one, two, 2.0)
    assert (theta.scale_of("a"), theta.scale_of("b"), theta.rank) == (2.0, 1.0, 2)
    with pytest.raises(SolutionError, match="different scales"):
        _ = theta.scale
    assert LoraAdapter(one, two, 2.0, alphas={"b": 4.0}).scale == 2.0
    with pytest.raises(SolutionError, match="nan"):
        LoraAdapter(one, two, 2.0, alphas={"b": math.nan})
