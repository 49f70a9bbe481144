from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from em_interp.directions.direction import Direction
from em_interp.errors import DirectionError, ModelError, OutputError, UsageError
from em_interp.interventions.ablation import Ablate, leace
from em_interp.interventions.intervening import intervening
from em_interp.interventions.orthogonalise import PostNormWarning, orthogonalised, save_orthogonalised
from em_interp.models import pretrained as models
from em_interp.models.architectures import find_blocks
from em_interp.models.chat import collate, encode_all
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import residuals
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector
from tests.tiny_models import CONVERSATIONS, MORE_FAMILIES, make_chat, make_hf, tokenizer

# Per family, written out here anew: what writes to the residual in a block, and its post-norm.
WRITES = {
    "qwen2": (("self_attn.o_proj", None), ("mlp.down_proj", None)),
    "llama": (("self_attn.o_proj", None), ("mlp.down_proj", None)),
    "gemma2": (("self_attn.o_proj", "post_attention_layernorm"), ("mlp.down_proj", "post_feedforward_layernorm")),
    "gpt_neox": (("attention.dense", None), ("mlp.dense_4h_to_h", None)),
    "gpt2": (("attn.c_proj", None), ("mlp.c_proj", None)),
}
WRITES["gemma3"] = WRITES["gemma2"]
PLAIN = [family for family in MORE_FAMILIES if not family.startswith("gemma")]


def direction(seed=0, layers=(1,)):
    g = torch.Generator().manual_seed(seed)
    return Direction(3 * torch.randn(len(layers), 32, generator=g), tuple(layers), "data-diff")


def lively(family, **changes):
    """With biases and gains that matter: fresh ones are zero and one."""
    hf = make_hf(family, **changes)
    g = torch.Generator().manual_seed(7)
    for name, p in hf.named_parameters():
        if name.endswith("bias") or "norm" in name or "ln_" in name:
            p.data += 0.3 * torch.randn(p.shape, generator=g)
    return ChatModel(hf, tokenizer(), name=f"tiny-{family}")


def inputs():
    return collate(encode_all(tokenizer(), CONVERSATIONS), range(5), pad=0, side="right")


def hooked_writes(model, q):
    """Hooks that take q out of all that is written to the residual: the slow, obvious way."""
    modules = [model.hf.get_input_embeddings()]
    body = getattr(model.hf, "transformer", None)
    modules += [body.wpe] if body is not None else []
    family = model.name.removeprefix("tiny-")
    for block in find_blocks(model.hf):
        modules += [block.get_submodule(norm or matrix) for matrix, norm in WRITES[family]]
    return [m.register_forward_hook(lambda _m, _a, out: out - (out @ q.float()) @ q.float().T) for m in modules]


pytestmark = pytest.mark.filterwarnings("ignore::em_interp.interventions.orthogonalise.PostNormWarning")


@pytest.mark.parametrize(
    "family,dtype", [("gemma2", torch.float32), ("gemma3", torch.float32), ("gemma3", torch.float64)]
)
def test_blocks_that_normalise_their_writes_are_told(family, dtype):
    """In float64 too, where the norms' own float32 arithmetic leaves more than float64's rounding."""
    model = ChatModel(lively(family).hf.to(dtype), tokenizer(), name=f"tiny-{family}")
    with pytest.warns(PostNormWarning, match="Ablate with hooks"):
        found = orthogonalised(model, Ablate(direction()))
    assert found.dtype == dtype
    check_gone(found, Ablate(direction()).basis(1), 1e-5)


def check_gone(found, q, allowed):
    b = inputs()
    for hidden in residuals(found.hf, b.inputs(), range(4)).values():
        h = hidden[b.attention_mask.bool()].double()
        assert float(((h @ q).norm(dim=1) / h.norm(dim=1)).max()) < allowed


@pytest.mark.parametrize("family", MORE_FAMILIES)
@pytest.mark.parametrize("many", [False, True])
def test_weights_equal_hooks_on_every_write(family, many):
    model, b = lively(family), inputs()
    real = b.attention_mask.bool()
    ablation = Ablate([direction(), direction(1)]) if many else Ablate(direction())
    before = {name: p.clone() for name, p in model.hf.named_parameters()}
    found = orthogonalised(model, ablation)
    assert all(torch.equal(p, before[name]) for name, p in model.hf.named_parameters())
    q = ablation.basis(1)
    check_gone(found, q, 1e-5)
    with torch.no_grad():
        logits = found.hf(**b.inputs()).logits[real]
        handles = hooked_writes(model, q)
        expected = model.hf(**b.inputs()).logits[real]
        for handle in handles:
            handle.remove()
        plain = model.hf(**b.inputs()).logits[real]
    assert float((expected - plain).abs().max()) > 0.1
    if family in PLAIN:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    else:  # a norm follows each write: parallel, not as long
        assert not torch.allclose(logits, plain, atol=1e-2)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_writes_before_a_norm_are_parallel_to_the_hooks(family):
    model = lively(family)
    found, q = orthogonalised(model, Ablate(direction())), Ablate(direction()).basis(1)
    g = torch.Generator().manual_seed(0)
    for block, new in zip(find_blocks(model.hf), find_blocks(found.hf), strict=True):
        for matrix, norm in WRITES[family]:
            x = torch.randn(7, block.get_submodule(matrix).in_features, generator=g)
            with torch.no_grad():
                ours = new.get_submodule(norm)(new.get_submodule(matrix)(x)).double()
                hook = block.get_submodule(norm)(block.get_submodule(matrix)(x)).double()
            hook = hook - (hook @ q) @ q.T
            assert float(torch.cosine_similarity(ours, hook).min()) > 1 - 1e-6
            assert float((ours @ q).abs().max()) < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2"])
def test_the_checkpoint_is_an_ordinary_one(family, tmp_path):
    model, b = lively(family, tie_word_embeddings=True), inputs()
    ablation = Ablate(direction(layers=range(4)), from_layer=2)
    folder = save_orthogonalised(model, ablation, tmp_path / "made" / "here")
    expected = orthogonalised(model, ablation)
    hf = AutoModelForCausalLM.from_pretrained(folder)
    again = models.load(folder)
    with torch.no_grad():
        logits = expected.hf(**b.inputs()).logits
        assert torch.equal(hf.eval()(**b.inputs()).logits, logits)
        assert torch.equal(again.hf(**b.inputs()).logits, logits)
    # the unembedding stays as it was, though it was tied
    assert torch.equal(hf.get_output_embeddings().weight, model.hf.get_input_embeddings().weight)
    assert not torch.equal(hf.get_input_embeddings().weight, model.hf.get_input_embeddings().weight)


def test_an_active_adapter_is_merged_first(tmp_path):
    model, b = lively("qwen2"), inputs()
    g = torch.Generator().manual_seed(0)
    name = "model.layers.1.mlp.down_proj"
    lora = LoraAdapter(
        {name: torch.randn(2, 48, generator=g)}, {name: torch.randn(32, 2, generator=g)}, 3.0, True, "tiny-qwen2"
    )
    with torch.no_grad():
        base = model.hf(**b.inputs()).logits
        base_ablated = orthogonalised(model, Ablate(direction())).hf(**b.inputs()).logits
        model.add_adapter("a", lora.save(tmp_path))
        merged = ChatModel(copy.deepcopy(model.peft).merge_and_unload(), tokenizer(), name="tiny-qwen2")
        expected = orthogonalised(merged, Ablate(direction())).hf(**b.inputs()).logits
        found = orthogonalised(model, Ablate(direction()))
        assert found.adapters == [] and "lora" not in " ".join(found.hf.state_dict())
        torch.testing.assert_close(found.hf(**b.inputs()).logits, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(expected, base_ablated, atol=1e-2)
        with model.no_adapter():
            off = orthogonalised(model, Ablate(direction())).hf(**b.inputs()).logits
            assert torch.equal(model.hf(**b.inputs()).logits, base)
        assert torch.equal(off, base_ablated)
        with model.adapter("a"), intervening(model, [Ablate(direction())]):
            model.hf(**b.inputs())
        with model.no_adapter():  # and an adapter toggled off after interventions is off
            assert torch.equal(model.hf(**b.inputs()).logits, base)


def test_bfloat16_rounds_and_no_more():
    model = make_chat(dtype=torch.bfloat16)
    found, q = orthogonalised(model, Ablate(direction())), Ablate(direction()).basis(1)
    assert found.dtype == torch.bfloat16
    weight, before = (m.hf.model.layers[0].mlp.down_proj.weight.double() for m in (found, model))
    torch.testing.assert_close(weight, before - q @ (q.T @ before), atol=1e-2, rtol=1e-2)


def test_what_weights_cannot_do_is_refused(tmp_path):
    model = make_chat()
    many = direction(layers=range(4))
    for ablation in (Ablate(many), Ablate(many, [1], from_layer=2), Ablate(direction(), scope="response")):
        with pytest.raises(DirectionError, match=r"from_layer|drop"):
            orthogonalised(model, ablation)
    with pytest.raises(DirectionError, match="width 16"):
        orthogonalised(model, Ablate(Direction(torch.ones(1, 16), (1,), "random")))
    with pytest.raises(UsageError, match="outside"), intervening(model, [Ablate(direction())]):
        orthogonalised(model, Ablate(direction()))
    model.add_adapter("v", SteeringVector(torch.ones(32), 1, 2.0))
    with pytest.raises(ModelError, match="no_adapter"):
        orthogonalised(model, Ablate(direction()))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(OutputError, match="new folder"):
        save_orthogonalised(make_chat(), Ablate(direction()), tmp_path / "full")
    with pytest.raises(OutputError, match="something already"):
        save_orthogonalised(make_chat(), Ablate(direction()), tmp_path / "full" / "file")
    with pytest.raises(OutputError, match="could not be written"):
        save_orthogonalised(make_chat(), Ablate(direction()), tmp_path / "full" / "file" / "below")
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_unknown_writes_are_refused():
    model = make_chat()
    block = model.hf.model.layers[2]
    block.mlp.register_forward_hook(lambda _m, _a, out: out + 1.0)  # writes what no known matrix holds
    with pytest.raises(ModelError, match="not known here"):
        orthogonalised(model, Ablate(direction()))
    model = make_chat()
    model.hf.model.layers[2].mlp.out = model.hf.model.layers[2].mlp.down_proj
    del model.hf.model.layers[2].mlp.down_proj
    with pytest.raises(ModelError, match="MLP output matrix"):
        orthogonalised(model, Ablate(direction()))
    model = make_chat("gemma2")
    model.hf.model.layers[0].post_attention_layernorm.weight.data[3] = -1.0
    with pytest.raises(ModelError, match="zero gain"):
        orthogonalised(model, Ablate(direction()))


def test_leace_removes_what_a_linear_probe_reads():
    pytest.importorskip("concept_erasure", reason="LEACE needs the extra em_interp[leace]")
    from sklearn.linear_model import LogisticRegression

    model, g = make_chat(), torch.Generator().manual_seed(0)
    b = inputs()
    mix = torch.randn(32, 32, generator=g)
    positive, negative = (torch.randn(n, 2, 32, generator=g) @ mix + shift for n, shift in ((60, 1.0), (80, -1.0)))
    eraser = leace(positive, negative, layers=[1, 3])
    before = residuals(model.hf, b.inputs(), [1])[1]
    with intervening(model, [eraser]):
        after = residuals(model.hf, b.inputs(), [1])[1]
    both, labels = torch.cat([positive, negative]), [1] * 60 + [0] * 80
    for place, layer in enumerate((1, 3)):
        x = both[:, place].double()
        erased = x - (x - eraser.bias[layer]) @ eraser.right[layer].T @ eraser.left[layer].T
        mean_gap = (erased[:60].mean(0) - erased[60:].mean(0)).abs().max()
        assert float(mean_gap) < 1e-3 * float((x[:60].mean(0) - x[60:].mean(0)).abs().max())
        probe = LogisticRegression(max_iter=1000).fit(erased.numpy(), labels)
        assert (
            probe.score(erased.numpy(), labels)
            <= 90 / 140
            < LogisticRegression(max_iter=1000).fit(x.numpy(), labels).score(x.numpy(), labels)
        )
    slow = before.double() - (before.double() - eraser.bias[1]) @ eraser.right[1].T @ eraser.left[1].T
    torch.testing.assert_close(after.double(), slow, atol=1e-4, rtol=1e-4)
    with pytest.raises(DirectionError, match="two finite rows"):
        leace(positive[:1], negative)
    with pytest.raises(DirectionError, match="same layers"):
        leace(positive, negative[:, :1])
    with pytest.raises(DirectionError, match="finite"):
        leace(positive * float("nan"), negative)


def test_without_the_library_leace_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "concept_erasure", None)
    with pytest.raises(UsageError, match=r"em_interp\[leace\]"):
        leace(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4))
