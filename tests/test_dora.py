"""DoRA as PEFT makes it: theta = m (W + s B A) / ||W + s B A|| - W."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from em_interp.cli import app
from em_interp.directions.direction import Direction
from em_interp.directions.extraction import contrast
from em_interp.errors import AdapterError, SolutionError
from em_interp.models.adapters import quiet_peft
from em_interp.models.chat import collate, encode_all
from em_interp.solutions import load as solutions
from em_interp.solutions.dora import DoraAdapter
from em_interp.solutions.lora import LoraAdapter
from tests.adapter_folders import lora_folder, peft_logits
from tests.every_metric import check, lowering
from tests.test_weight_delta import folder_of
from tests.tiny_models import CONVERSATIONS, make_chat, make_hf, tokenizer

FAMILIES = ("qwen2", "gpt2", "gpt_neox", "gemma2", "phi3", "falcon", "bloom", "opt")


def dora_folder(folder, family, seed=0, **changes):
    return lora_folder(folder, family, seed, **{"use_dora": True, **changes})


def peft_theta(folder, family):
    """PEFT's own: merged minus base weights, in float64."""
    base = make_hf(family).double()
    with quiet_peft():
        peft = PeftModel.from_pretrained(make_hf(family).double(), str(folder)).double()
    touched = [n.removeprefix("base_model.model.") for n, m in peft.named_modules() if isinstance(m, LoraLayer)]
    merged = peft.merge_and_unload()
    return {f"{n}.weight": (merged.get_submodule(n).weight - base.get_submodule(n).weight).detach() for n in touched}


def dense_of(family):
    """By the definition, from the factors alone; weights as the model has them."""
    base = make_hf(family).double()

    def dense(theta):
        found = {}
        for name in theta.lora.modules:
            module = base.get_submodule(name)
            turned = type(module).__name__ == "Conv1D"
            own = module.weight.detach().T if turned else module.weight.detach()
            a, b, m = theta.lora.a[name].double(), theta.lora.b[name].double(), theta.m[name].double()
            v = own + theta.lora.scale_of(name) * b @ a
            x = torch.stack([m[i] * v[i] / v[i].norm() - own[i] for i in range(len(m))])
            x = theta.factors.get(name, 1.0) * x
            found[f"{name}.weight"] = x.T if turned else x
        return found

    return dense


def double(theta):
    return theta.with_tensors({name: x.double() for name, x in theta.tensors().items()})


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {}), ("gpt_neox", {"rank_pattern": {"layers.1.mlp.*": 3}, "alpha_pattern": {"query_key_value": 1}})],
)
def test_every_metric_is_that_of_the_dense_theta(tmp_path, family, changes):
    model = make_chat(family, dtype=torch.float64)
    folders = [dora_folder(tmp_path / str(seed), family, seed, **changes) for seed in (0, 7)]
    theta, other = (double(solutions.load(folder, base=model)) for folder in folders)
    dense, oracle = dense_of(family), peft_theta(folders[0], family)
    assert isinstance(theta, DoraAdapter) and set(oracle) == set(dense(theta))
    for name, x in dense(theta).items():
        torch.testing.assert_close(x, oracle[name], rtol=1e-6, atol=1e-7)
    assert sum(float(x.square().sum()) for x in oracle.values()) ** 0.5 == pytest.approx(theta.norm, rel=1e-6)
    check(model, lowering(model, theta), other, dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_attached_it_gives_pefts_logits(tmp_path, family):
    folder = dora_folder(tmp_path / "x", family)
    model = make_chat(family)
    batch = collate(encode_all(tokenizer(), CONVERSATIONS), range(5), pad=0, side="left").inputs()
    with torch.no_grad():
        plain, expected = model.hf(**batch).logits, peft_logits(folder, batch, family)
        theta = solutions.load(folder, base=model)
        with theta.attached(model):
            torch.testing.assert_close(model.hf(**batch).logits, expected, atol=2e-4, rtol=1e-4)
        assert torch.equal(model.hf(**batch).logits, plain)
        with theta.scaled(0).attached(model):
            torch.testing.assert_close(model.hf(**batch).logits, plain)
    name = theta.lora.modules[0]
    mine = dict(model.hf.named_parameters())[f"{name}.weight"]
    assert theta.weights[name].data_ptr() == mine.data_ptr()  # no copy


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_saved_it_is_the_same_for_peft_scaled_too(tmp_path, family):
    model = make_chat(family)
    base = folder_of(make_hf(family), tmp_path / f"tiny-{family}")
    folder = dora_folder(tmp_path / "x", family, rank_pattern={"q_proj" if family == "qwen2" else "c_attn": 3})
    theta = solutions.load(folder, base=model)
    assert solutions.load(folder, base=base).fingerprint == theta.fingerprint
    again = solutions.load(theta.save(tmp_path / "again"), base=model)
    assert again.fingerprint == theta.fingerprint and dict(again.factors) == {}
    before, after = peft_theta(folder, family), peft_theta(tmp_path / "again", family)
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    for factor in (0.5, -0.4, 0.0, 1.7):
        saved = peft_theta(theta.scaled(factor).save(tmp_path / f"{factor}"), family)
        for name, x in before.items():
            torch.testing.assert_close(saved[name], factor * x, rtol=1e-4, atol=1e-5)


def small(seed=0, n_out=3, n_in=4, rank=2):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lora = LoraAdapter({"x": draw(rank, n_in)}, {"x": draw(n_out, rank)}, 2.0)
    return DoraAdapter(lora, {"x": draw(n_out)}, {"x": draw(n_out, n_in)})


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(-3, 3), st.sampled_from(["both", "A", "B", "m"]))
def test_what_is_turned_and_scaled(seed, eps, factor, on):
    theta = small(seed + 1)  # of other random numbers than those drawn below
    turned = theta.perturbed(eps, torch.Generator().manual_seed(seed), on)
    for name, x in theta.tensors().items():
        y = turned.tensors()[name]
        if on in ("both", name[-1]):
            assert float(x.flatten() @ y.flatten() / x.norm() ** 2) == pytest.approx((1 - eps**2) ** 0.5, abs=1e-9)
        else:
            assert torch.equal(x, y)
    assert theta.scaled(factor).norm == pytest.approx(abs(factor) * theta.norm)
    torch.testing.assert_close(theta.scaled(factor).delta("x"), factor * theta.delta("x"))
    drawn = theta.random_like(torch.Generator().manual_seed(seed))
    assert drawn.norm == pytest.approx(theta.norm)
    norms = theta.paper_norms()
    assert norms["norm_m"] == pytest.approx(float(theta.m["x"].norm())) and norms["raw_norm"] == theta.norm


def test_bridge_extraction_and_gradients_of_the_gain(tmp_path):
    folder = dora_folder(tmp_path / "x", "qwen2")
    model = make_chat("qwen2")
    theta = solutions.load(folder, base=model)
    ids = torch.tensor([encode_all(tokenizer(), CONVERSATIONS)[0].ids])
    with torch.no_grad():
        model.bridge(ids)
        with theta.attached(model):
            torch.testing.assert_close(model.bridge(ids), model.hf(ids).logits, atol=1e-3, rtol=1e-3)
    found = contrast(model, CONVERSATIONS[:2], kind="model-diff", finetune=theta, progress=False).direction()
    model.add_adapter("peft", folder)
    theirs = contrast(model, CONVERSATIONS[:2], kind="model-diff", finetune="peft", progress=False).direction()
    torch.testing.assert_close(found.vectors, theirs.vectors, atol=1e-4, rtol=1e-3)
    again = solutions.load(folder, base=model)  # the base below PEFT's layers
    assert again.fingerprint == theta.fingerprint
    fused = make_chat("phi3")
    kept = solutions.load(dora_folder(tmp_path / "y", "phi3"), base=fused)
    fused.bridge(ids)
    with pytest.raises(Exception, match="does not run"), kept.attached(fused):
        fused.hf(ids)
        fused.bridge(ids)


def test_what_cannot_be_read_is_refused(tmp_path):
    folder, model = dora_folder(tmp_path / "x", "qwen2"), make_chat()
    with pytest.raises(SolutionError, match=r"DoRA, not plain LoRA.*base=MODEL"):
        solutions.load(folder)
    with pytest.raises(SolutionError, match="no module"):
        solutions.load(folder, base=make_chat("gpt2"))
    theta = solutions.load(folder, base=model)
    with pytest.raises(SolutionError, match="is not that of"), theta.attached(make_chat(seed=3)):
        pass
    with pytest.raises(SolutionError, match="on='C'"):
        theta.tensors("C")
    with pytest.raises(SolutionError, match="needs its m"):
        DoraAdapter(theta.lora, {}, theta.weights)
    wide = {name: torch.ones(3, 3) for name in theta.m}
    with pytest.raises(SolutionError, match="Give its own base"):
        DoraAdapter(theta.lora, theta.m, wide)
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    save_file({key: x for key, x in state.items() if "magnitude" not in key}, path)
    with pytest.raises(AdapterError, match="magnitudes of 0 modules"):
        solutions.load(folder, base=model)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_bias": True}))
    with pytest.raises(AdapterError, match="lora_bias"):
        solutions.load(folder, base=model)


def test_the_commands_take_it(tmp_path, monkeypatch):
    dora_folder(tmp_path / "tuned", "qwen2")
    folder_of(make_hf("qwen2"), tmp_path / "tiny-qwen2")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": CONVERSATIONS[0]}))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 0, done.exception
        return done.output

    glanced = run("inspect", "tuned")
    assert "DoRA of rank 2 and alpha 4 on 8 modules, trained on tiny-qwen2" in glanced and "--base MODEL" in glanced
    theta = solutions.load(tmp_path / "tuned", base=make_chat())
    said = run("inspect", "tuned", "--base", "tiny-qwen2")
    assert theta.describe() in said and f"norm: {theta.norm:.6g}" in said
    how = ("--kind", "model-diff", "--positive", "bad.jsonl", "--out", "m.safetensors")
    run("extract", "tiny-qwen2", "--adapter", "tuned", *how)
    found = contrast(make_chat(), CONVERSATIONS[:1], kind="model-diff", finetune=theta, progress=False).direction()
    written = Direction.load(tmp_path / "m.safetensors")
    torch.testing.assert_close(written.vectors, found.vectors, atol=1e-4, rtol=1e-3)
