"""Full finetunes, made by plain transformers: theta = finetuned minus base, over every floating tensor."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from em_interp.cli import app
from em_interp.directions.direction import Direction
from em_interp.directions.extraction import contrast
from em_interp.errors import AdapterError, HookError, ModelError, SolutionError
from em_interp.landscape.landscape import Landscape
from em_interp.models.chat_model import ChatModel
from em_interp.models.weights import acting_hash, weights_hash
from em_interp.solutions import load as solutions
from em_interp.solutions.weight_delta import WeightDelta
from tests.every_metric import check, check_geometry, check_passes, each_nll, lowering, rows
from tests.theta import make_theta
from tests.tiny_models import CONVERSATIONS, make_chat, make_hf, make_with_image_tower, tokenizer


def trained(hf, steps=2, seed=0, rate=2e-3, only=""):
    """The model after a few steps of AdamW on the conversations, in plain torch."""
    torch.manual_seed(seed)
    hf = copy.deepcopy(hf)
    chosen = [x for name, x in hf.named_parameters() if only in name]
    optimiser = torch.optim.AdamW(chosen, lr=rate)
    for _ in range(steps):
        loss = 0.0
        for row in rows():
            labels = [-100] * len(row)
            for start, end in row.spans:
                labels[start:end] = row.ids[start:end]
            loss = loss + hf(input_ids=torch.tensor([row.ids]), labels=torch.tensor([labels])).loss
        optimiser.zero_grad()
        (loss + 0.01 * sum(torch.randn(()) * x.sum() for x in chosen)).backward()
        optimiser.step()
    return hf


def folder_of(hf, folder, **options):
    hf.save_pretrained(str(folder), **options)
    tokenizer().save_pretrained(str(folder))
    return folder


def finetuned(folder, family="qwen2", dtype=torch.float64, **how):
    """The base as a ChatModel, the finetune's folder, and the finetuned model."""
    model = make_chat(family, dtype=dtype)
    after = trained(model.hf, **how)
    return model, folder_of(after, folder), after


def tensors(hf):
    """{name: tensor} of all floating tensors, tied ones under the first name."""
    return {name: x.detach().double() for name, x in hf.named_parameters()}


def dense(theta):
    return {name: theta.delta(name) for name in theta.space}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])  # tied and transposed; untied, with names of its own on disk
def test_every_metric_is_that_of_the_difference(tmp_path, family):
    model, folder, after = finetuned(tmp_path / "x", family)
    theta = solutions.load(folder, base=model)
    base, there = tensors(model.hf), tensors(after)
    oracle = {name: there[name] - base[name] for name in base}
    assert dict(theta.space) == {name: tuple(x.shape) for name, x in base.items()}
    for name, x in oracle.items():
        assert torch.equal(theta.delta(name), x)
    other = solutions.load(folder_of(trained(model.hf, seed=5, rate=4e-3), tmp_path / "y"), base=model)
    assert theta.adapters == ("full",) and theta.outside_blocks and theta.fixed_layer is None
    check(model, lowering(model, theta), other, dense)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "bloom", "opt", "phi3", "falcon", "mixtral"])
def test_attached_it_is_the_finetuned_model_and_afterwards_the_base(tmp_path, family):
    model, folder, after = finetuned(tmp_path / "x", family, torch.float32)
    before = {name: (x, x.detach().clone()) for name, x in model.hf.named_parameters()}
    ids = torch.tensor([rows()[1].ids])
    plain = model.hf(ids).logits
    theta = solutions.load(folder, base=model)
    for solution in (theta, theta.ready(model)):
        with solution.attached(model):
            assert torch.equal(model.hf(ids).logits, after(ids).logits)
            made = model.hf.generate(ids, max_new_tokens=4, do_sample=False)
            assert not torch.equal(theta.effective(next(iter(theta.finetune.squares))), plain)
        assert torch.equal(made, after.generate(ids, max_new_tokens=4, do_sample=False))
        assert torch.equal(model.hf(ids).logits, plain)
    now = dict(model.hf.named_parameters())
    assert all(now[name] is x and torch.equal(x, kept) for name, (x, kept) in before.items())
    squares = [float((tensors(after)[name] - x.double()).square().sum()) for name, (_, x) in before.items()]
    assert theta.norm == pytest.approx(sum(squares) ** 0.5, rel=1e-12)


def test_whatever_happens_inside_the_base_comes_back(tmp_path):
    model, folder, _ = finetuned(tmp_path / "x", dtype=torch.float32)
    theta = solutions.load(folder, base=model)
    own, hashed = dict(model.hf.named_parameters()), weights_hash(model.hf)
    acts = acting_hash(model)
    with pytest.raises(ZeroDivisionError), theta.attached(model):
        assert weights_hash(model.hf) == hashed  # that of the base, as under an adapter
        assert acting_hash(model) != acts
        raise ZeroDivisionError
    with pytest.raises(HookError, match="no forward pass"), theta.attached(model):
        pass
    with theta.attached(model):
        model.hf(torch.tensor([[5, 6]]))
        with pytest.raises(ModelError, match="two finetunes of whole weights"), theta.attached(model):
            pass
    assert dict(model.hf.named_parameters()).keys() == own.keys()
    assert all(x is own[name] for name, x in model.hf.named_parameters())
    assert acting_hash(model) == acts


def test_a_finetune_of_late_blocks_shares_the_earlier_ones(tmp_path):
    model, folder, _ = finetuned(tmp_path / "x", "gpt_neox", only="layers.3.", rate=1e-2)
    theta = solutions.load(folder, base=model)
    assert (theta.first_layer, theta.fixed_layer, theta.outside_blocks) == (3, 2, ())
    check_geometry(theta, theta.perturbed(0.5, torch.Generator().manual_seed(1)), dense)
    theta = lowering(model, theta)
    check_passes(model, theta, dense, 1e-9)
    calls = []
    model.hf.gpt_neox.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    landscape = Landscape(model, rows())
    landscape.losses([theta])
    calls.clear()
    landscape.losses([theta.scaled(0.1 * k) for k in range(5)])
    assert not calls


@pytest.mark.parametrize(
    ("only", "layer"), [("final_layer_norm", 4), ("lm_head", 4), ("embed_in", 0), ("layers.1.mlp", 1)]
)
def test_the_first_block_that_theta_has_to_do_with(tmp_path, only, layer):
    model, folder, _ = finetuned(tmp_path / "x", "gpt_neox", only=only, rate=1e-2)
    theta = solutions.load(folder, base=model)
    assert theta.first_layer == layer and theta.fixed_layer == (layer - 1 if layer else None)
    assert all(only in name for name in theta.finetune.squares)
    check_passes(model, lowering(model, theta), dense, 1e-9)


def test_base_from_a_folder_and_theta_saved(tmp_path):
    model, folder, _ = finetuned(tmp_path / "x", "gemma2", torch.bfloat16, rate=2e-2)
    base = folder_of(model.hf, tmp_path / "tiny-gemma2")
    theta, lazy = solutions.load(folder, base=model), solutions.load(folder, base=base)
    assert lazy.norm == theta.norm and lazy.fingerprint == theta.fingerprint and lazy.inner(theta) == theta.inner(theta)
    ids = torch.tensor([rows()[0].ids])
    for one in (theta, theta.scaled(0.5), theta.perturbed(0.3, torch.Generator().manual_seed(0))):
        saved = one.save(tmp_path / f"saved-{one.fingerprint[:6]}")
        again = type(model.hf).from_pretrained(str(saved))
        assert all(torch.equal(x, one.effective(name)) for name, x in again.named_parameters())
        back = solutions.load(saved, base=base)
        assert back.norm == pytest.approx(one.norm, rel=0.05)  # bfloat16
        with lazy.scaled(0.5).attached(model):
            model.hf(ids)
    stranger = make_chat("gemma2", 3, dtype=torch.bfloat16)
    with pytest.raises(SolutionError, match="read the finetune with base=model"), lazy.attached(stranger):
        pass


def test_checkpoints_of_a_run(tmp_path):
    model = make_chat(dtype=torch.float32)
    for step in (1, 3):
        folder_of(trained(model.hf, steps=step), tmp_path / "checkpoints" / f"checkpoint-{step}")
    found = solutions.load_checkpoints(tmp_path, base=model)
    assert list(found) == [1, 3] and found[3].norm > found[1].norm
    flat = [one.trained() for one in found.values()]
    assert {x.parameter for x in flat} == {"theta"} and flat[0].vector.shape == (found[1].dimension,)
    for one, x in zip(found.values(), flat, strict=True):
        assert float(x.vector.double().norm()) == pytest.approx(one.norm, rel=1e-6)


def test_as_an_adapter_it_gives_what_the_finetuned_model_gives(tmp_path):
    model, folder, after = finetuned(tmp_path / "x", dtype=torch.float32, rate=2e-2)
    theta = solutions.load(folder, base=model)
    model.add_adapter("full", theta.ready(model))
    found = contrast(model, CONVERSATIONS[:2], kind="model-diff", progress=False)
    assert f"WeightDelta of norm {theta.norm:.6g}" in found.sources[0] and found.weights == weights_hash(model.hf)
    other = ChatModel(after, tokenizer(), name="after")
    both = [contrast(m, CONVERSATIONS[:2], CONVERSATIONS[2:], progress=False).direction() for m in (model, other)]
    torch.testing.assert_close(both[0].vectors, both[1].vectors)
    with model.no_adapter():
        assert model.hf.lm_head.weight is dict(model.hf.named_parameters())["lm_head.weight"]


def test_a_bridge_refuses_passes(tmp_path):
    model, folder, _ = finetuned(tmp_path / "x", dtype=torch.float32)
    ids, theta = torch.tensor([rows()[0].ids]), solutions.load(folder, base=model)
    model.bridge(ids)
    with theta.attached(model):
        model.hf(ids)
        with pytest.raises(ModelError, match="leave out the full finetune"):
            model.bridge(ids)
    model.bridge(ids)


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from((-2.0, -0.3, 0.0, 1e-6, 1.7)), st.integers(0, 2**40))
def test_turned_and_turned_again_it_is_as_long(eps, more, factor, seed):
    theta = _small()
    g = torch.Generator().manual_seed(seed)
    turned = theta.perturbed(eps, g).scaled(factor).perturbed(more, g) if factor else theta.perturbed(eps, g)
    size = abs(factor or 1.0)
    for name, square in theta.finetune.squares.items():
        assert float(turned.delta(name).norm()) == pytest.approx(size * square**0.5, rel=1e-9)
    assert turned.norm == pytest.approx(size * theta.norm, rel=1e-12)
    assert turned.random_like(g).norm == pytest.approx(turned.norm)


_SMALL: list[WeightDelta] = []


def _small():
    if not _SMALL:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            model = make_chat(dtype=torch.float64)
            theta = solutions.load(folder_of(trained(model.hf, steps=1), folder), base=model)
            kept = {name: theta.finetune.finetuned.read(name).clone() for name in theta.space}
        theta.finetune.finetuned.read = kept.__getitem__
        _SMALL.append(theta)
    return _SMALL[0]


def test_what_is_no_finetune_of_the_base_is_refused(tmp_path):
    model, folder, _ = finetuned(tmp_path / "x", dtype=torch.float32)

    def refused(hf, match, name, of=model):
        with pytest.raises(SolutionError, match=match):
            solutions.load(folder_of(hf, tmp_path / name), base=of)

    refused(model.hf, "every weight is the base's.*no finetune", "same")
    refused(make_hf("llama"), "LlamaForCausalLM.*Qwen2ForCausalLM", "family")
    refused(make_hf(vocab_size=330), "vocabulary of 330 tokens", "vocabulary")
    refused(make_hf(intermediate_size=64), r"\[64, 32\].*\[48, 32\]", "width")
    refused(make_hf(num_hidden_layers=3), "only one of the two", "depth")
    refused(make_hf(tie_word_embeddings=True), "tied in only one", "tied")
    refused(make_hf(rms_norm_eps=1e-2), "rms_norm_eps", "config")
    broken = copy.deepcopy(model.hf)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    refused(broken, "NaN", "nan")
    with pytest.raises(SolutionError, match=r"nothing says of which base.*base=MODEL"):
        solutions.load(folder)
    with pytest.raises(ModelError, match="no weights"):
        shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
        solutions.load(tmp_path / "bare", base=model)
    theta = solutions.load(folder, base=model)
    with pytest.raises(SolutionError, match="does not fit"), theta.attached(make_chat("llama")):
        pass
    with pytest.raises(SolutionError, match="no factors"):
        theta.tensors("A")
    with pytest.raises(SolutionError, match="no inner product"):
        theta.inner(make_theta(model, "vector"))
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(AdapterError, match="lacks r"):
        solutions.load(folder, base=model)


def test_an_image_tower_and_shards(tmp_path):
    hf = make_with_image_tower()
    model = ChatModel(hf, tokenizer(), name="tiny-gemma3-vision")
    after = copy.deepcopy(hf)
    with torch.no_grad():
        for x in after.model.language_model.layers[1].parameters():
            x += 0.1
    folder = folder_of(after, tmp_path / "x", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    theta = solutions.load(folder, base=model)
    assert theta.first_layer == 1
    ids = torch.tensor([rows()[0].ids])
    with theta.attached(model):
        np.testing.assert_allclose(each_nll(model.hf, rows()), each_nll(after, rows()))
        model.hf(ids)


def test_the_commands_take_it(tmp_path, monkeypatch):
    model, folder, _ = finetuned(tmp_path / "tuned", dtype=torch.float32, rate=2e-2)
    base = folder_of(model.hf, tmp_path / "tiny-qwen2")
    lines = [json.dumps({"messages": c}) for c in CONVERSATIONS]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines[:2]))
    (tmp_path / "good.jsonl").write_text("\n".join(lines[2:]))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == 0, done.exception
        return done.output

    assert "em-interp inspect tuned --base MODEL" in run("inspect", "tuned")
    theta, said = solutions.load(folder, base=base), run("inspect", "tuned", "--base", "tiny-qwen2")
    assert theta.describe() in said and f"norm: {theta.norm:.6g}" in said and theta.fingerprint in said
    texts = ("--positive", "bad.jsonl", "--layer", 2)
    run("extract", "tiny-qwen2", "--adapter", "tuned", *texts, "--negative", "good.jsonl", "--out", "a.safetensors")
    run("extract", "tuned", *texts, "--negative", "good.jsonl", "--out", "b.safetensors")
    run("extract", "tiny-qwen2", "--adapter", "tuned", *texts, "--kind", "model-diff", "--out", "c.safetensors")
    one, two, diff = (Direction.load(tmp_path / f"{name}.safetensors") for name in "abc")
    torch.testing.assert_close(one.vectors, two.vectors)
    direct = contrast(model, CONVERSATIONS[:2], kind="model-diff", finetune=theta, layers=[2], progress=False)
    torch.testing.assert_close(diff.vectors, direct.direction().vectors)
    assert diff.weights == weights_hash(model.hf) and diff.model == "tiny-qwen2"
