"""Means against a float64 oracle that reads one unpadded conversation at a time, and everything that is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from em_interp.directions import activations
from em_interp.directions.activations import collect
from em_interp.directions.extraction import contrast
from em_interp.errors import (
    ActivationError,
    ChatTemplateError,
    HookError,
    MemoryLimitError,
    OutputError,
    StoreError,
    TextLimitError,
)
from em_interp.models import memory
from em_interp.models.chat import encode
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import has_our_hooks, tagged
from em_interp.models.memory import run_in_batches
from em_interp.solutions.steering_vector import SteeringVector
from tests.tiny_models import CONVERSATIONS, D_MODEL, N_LAYERS, make_chat, make_hf, talk, tokenizer

FAMILIES = ("qwen2", "llama", "gemma2", "gemma3", "gpt_neox")
SCOPES = ("prompt", "last_prompt", "response", "all")


def oracle(hf, conversations):
    """{scope: (pooled, averaged, each)}: one conversation at a time, every token kept, a Python loop over positions."""
    seen = {scope: [] for scope in SCOPES}
    body = hf.base_model
    for conversation in conversations:
        encoded = encode(tokenizer(), conversation)
        start, end = encoded.spans[0]
        kept = {}
        handles = [
            block.register_forward_hook(
                lambda _m, _a, out, i=i, kept=kept: kept.__setitem__(i, out[0] if isinstance(out, tuple) else out)
            )
            for i, block in enumerate(body.layers)
        ]
        with torch.no_grad():
            hf(torch.tensor([encoded.ids]))
        for handle in handles:
            handle.remove()
        stream = torch.stack([kept[i][0] for i in range(N_LAYERS)]).double()  # [layers, tokens, d]
        places = {"prompt": range(start), "last_prompt": [start - 1], "response": range(start, end)}
        for scope in SCOPES:
            seen[scope].append([stream[:, t] for t in places.get(scope, range(len(encoded)))])
    out = {}
    for scope, texts in seen.items():
        tokens = [token for text in texts for token in text]
        each = [sum(text) / len(text) for text in texts]
        norms = sum(token.norm(dim=1) for token in tokens) / len(tokens)
        out[scope] = (sum(tokens) / len(tokens), sum(each) / len(each), torch.stack(each, 1), norms)
    return out


def gap(ours, truth):
    """Largest relative difference of a layer's vectors."""
    return float(((ours.double() - truth).norm(dim=-1) / truth.norm(dim=-1)).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_scope_and_pooling_equals_the_oracle(family):
    truth = oracle(make_hf(family).double(), CONVERSATIONS)
    model = make_chat(family)
    for side in ("left", "right"):
        ours = collect(model, CONVERSATIONS, scopes=SCOPES, keep=True, tokens_per_batch=60, side=side, progress=False)
        assert ours.layers == tuple(range(N_LAYERS)) and len(ours) == len(CONVERSATIONS)
        for scope in SCOPES:
            pooled, averaged, each, norms = truth[scope]
            assert gap(ours.mean(scope), pooled) < 1e-5
            assert gap(ours.mean(scope, "responses"), averaged) < 1e-5
            torch.testing.assert_close(ours.token_norms[scope], norms, rtol=1e-5, atol=0)
            for layer in range(N_LAYERS):
                assert gap(ours.each(scope, layer), each[layer]) < 1e-5
    assert ours.pooled["response"].dtype == torch.float64 and not has_our_hooks(model.hf)
    # the two poolings differ, and the last layer is not the final norm's output
    assert gap(ours.mean("response"), ours.mean("response", "responses")) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_bridge_and_transformers_agree(family):
    model = make_chat(family)
    for side in ("left", "right"):
        plain = collect(model, CONVERSATIONS, scopes=SCOPES, keep=True, side=side, progress=False)
        bridged = collect(model, CONVERSATIONS, scopes=SCOPES, keep=True, side=side, through="bridge", progress=False)
        for scope in SCOPES:
            assert gap(bridged.mean(scope), plain.mean(scope)) < 1e-5
            assert gap(bridged.each(scope, 2), plain.each(scope, 2).double()) < 1e-5
    early = collect(model, CONVERSATIONS, layers=[1], through="bridge", progress=False)
    assert gap(early.mean(), plain.mean()[[1]]) < 1e-5


@pytest.mark.parametrize("family", ("qwen2", "gemma2"))
def test_half_precision_weights_and_widening_in_pieces(family, monkeypatch):
    model = make_chat(family, dtype=torch.bfloat16)
    truth = oracle(make_hf(family).to(torch.bfloat16).double(), CONVERSATIONS)
    whole = collect(model, CONVERSATIONS, progress=False)
    assert gap(whole.mean(), truth["response"][0]) < 1e-2
    monkeypatch.setattr(activations, "_UPCAST_BYTES", 3 * len(CONVERSATIONS) * D_MODEL * 4)
    pieces = collect(model, CONVERSATIONS, progress=False)
    assert gap(pieces.mean(), whole.mean()) < 1e-6


_FLOAT64 = {}


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(5)), st.integers(1, 200), st.sampled_from(["left", "right"]))
def test_order_batch_size_and_side_change_nothing(order, budget, side):
    if not _FLOAT64:
        _FLOAT64["model"] = make_chat(dtype=torch.float64)
        _FLOAT64["plain"] = collect(_FLOAT64["model"], CONVERSATIONS, scopes=SCOPES, keep=True, progress=False)
    model, plain = _FLOAT64["model"], _FLOAT64["plain"]
    shuffled = [CONVERSATIONS[i] for i in order]
    ours = collect(model, shuffled, scopes=SCOPES, keep=True, tokens_per_batch=budget, side=side, progress=False)
    for scope in SCOPES:
        assert gap(ours.mean(scope), plain.mean(scope)) < 1e-9
        assert gap(ours.mean(scope, "responses"), plain.mean(scope, "responses")) < 1e-9
        assert gap(ours.each(scope, 3), plain.each(scope, 3)[list(order)].double()) < 1e-6
    assert ours.questions == tuple(plain.questions[i] for i in order)


def test_nothing_after_the_last_wanted_layer_runs():
    model = make_chat()
    ran = []
    for i, block in enumerate(model.hf.model.layers):
        block.register_forward_hook(lambda *_a, i=i: ran.append(i))
    for module, name in ((model.hf.lm_head, "head"), (model.hf.model.norm, "norm")):
        module.register_forward_hook(lambda *_a, name=name: ran.append(name))
    every = collect(model, CONVERSATIONS, progress=False)
    assert ran == [0, 1, 2, 3]
    ran.clear()
    some = collect(model, CONVERSATIONS, layers=[2, 0, 2], progress=False)
    assert ran == [0, 1, 2] and some.layers == (0, 2)
    assert torch.equal(some.mean(), every.mean()[[0, 2]])


def test_prompts_are_read_without_their_responses():
    model = make_chat()
    prompts = [conversation[:-1] for conversation in CONVERSATIONS]
    whole = collect(model, CONVERSATIONS, scopes=["last_prompt", "prompt"], progress=False)
    cut = collect(model, prompts, scopes=["last_prompt", "prompt"], progress=False)
    assert torch.equal(whole.mean("last_prompt"), cut.mean("last_prompt"))
    assert whole.fingerprint == cut.fingerprint and whole.questions == cut.questions
    assert collect(model, prompts, scopes=["all"], progress=False).counts["all"].equal(cut.counts["prompt"])


def test_what_is_attached_acts_and_the_last_response_counts():
    model = make_chat()
    plain = collect(model, CONVERSATIONS, progress=False)
    with SteeringVector(torch.ones(D_MODEL), 1, 2.0).attached(model):
        steered = collect(model, CONVERSATIONS, layers=[0, 1], progress=False)
    assert torch.equal(steered.mean()[0], plain.mean()[0])
    torch.testing.assert_close(steered.mean()[1] - plain.mean()[1], torch.full((D_MODEL,), 2.0).double())
    two = [*talk("a fox", "quick"), *talk("and a cough", "see a doctor")]
    one = collect(model, [two], scopes=["response", "prompt"], progress=False)
    assert one.counts["response"].tolist() == [encode(tokenizer(), two).n_response]
    assert one.questions == ("and a cough",)


# -- memory


def test_batches_halve_when_memory_runs_out_and_lose_nothing():
    sizes, done = [], []

    def run(group):
        if len(group) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(group))
        done.extend(group)

    run_in_batches(run, [7] * 20, 100)
    assert sorted(done) == list(range(20)) and max(sizes) == 3

    def host(group):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    with pytest.raises(MemoryLimitError, match="a single sequence of 9 tokens"):
        run_in_batches(host, [5, 9], 100)

    def other(group):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_in_batches(other, [5, 9], 100)


def test_running_out_of_memory_in_the_middle_of_a_pass_changes_no_mean():
    model = make_chat(dtype=torch.float64)
    plain = collect(model, CONVERSATIONS, keep=True, progress=False)
    failures = []

    def fail(_module, args, output):
        if output.shape[0] > 2:
            failures.append(output.shape[0])
            raise torch.OutOfMemoryError("out of memory")

    handle = model.hf.model.layers[2].register_forward_hook(fail)
    halved = collect(model, CONVERSATIONS, keep=True, progress=False)
    assert failures and gap(halved.mean(), plain.mean()) < 1e-12
    assert gap(halved.each("response", 3), plain.each("response", 3).double()) < 1e-6
    handle.remove()

    def always(_module, args, output):
        raise torch.OutOfMemoryError("out of memory")

    model.hf.model.layers[2].register_forward_hook(always)
    with pytest.raises(MemoryLimitError, match="drop the long sequences"):
        collect(model, CONVERSATIONS, progress=False)
    assert memory.is_out_of_memory(MemoryError()) and not has_our_hooks(model.hf)


# -- the store


def stored(model, folder, conversations=CONVERSATIONS, **options):
    options = {"scopes": ["response", "last_prompt"], "tokens_per_batch": 40, **options}
    return collect(model, conversations, store=folder, progress=False, **options)


def test_a_store_holds_the_same_and_goes_on_after_a_kill(tmp_path):
    model = make_chat()
    plain = collect(model, CONVERSATIONS, scopes=["response", "last_prompt"], keep=True, progress=False)
    first = stored(model, tmp_path / "a")
    passes = []
    model.hf.model.layers[0].register_forward_hook(tagged(lambda *_a: passes.append(1), str))

    def die(_module, args, output):
        if len(passes) == 3:
            raise KeyboardInterrupt

    handle = model.hf.model.layers[3].register_forward_hook(tagged(die, str))
    with pytest.raises(KeyboardInterrupt):
        stored(model, tmp_path / "b")
    handle.remove()
    n_shards = len(list((tmp_path / "b").glob("shard-*")))
    assert n_shards == 2
    passes.clear()
    resumed = stored(model, tmp_path / "b")
    assert len(passes) == len(list((tmp_path / "b").glob("shard-*"))) - n_shards + 1  # one to check what is there
    again = stored(model, tmp_path / "b")
    for ours in (first, resumed, again):
        for scope in ("response", "last_prompt"):
            assert gap(ours.mean(scope), plain.mean(scope)) < 1e-6
            assert gap(ours.mean(scope, "responses"), plain.mean(scope, "responses")) < 1e-6
            torch.testing.assert_close(ours.token_norms[scope], plain.token_norms[scope], rtol=1e-6, atol=0)
            for layer in range(N_LAYERS):
                assert gap(ours.each(scope, layer), plain.each(scope, layer).double()) < 1e-6


def test_a_store_of_something_else_is_refused(tmp_path):
    model = make_chat()
    stored(model, tmp_path / "a")
    for options, told in (
        ({"layers": [0]}, "layers is"),
        ({"scopes": ["response"]}, "scopes is"),
        ({"conversations": CONVERSATIONS[::-1]}, "texts is"),
    ):
        with pytest.raises(StoreError, match=f"other settings: {told}"):
            stored(model, tmp_path / "a", **options)
    with pytest.raises(StoreError, match="model is 'tiny-qwen2' there and 'other' here"):
        stored(ChatModel(model.hf, tokenizer(), name="other", check=False), tmp_path / "a")
    with (
        pytest.raises(StoreError, match="an intervention differs"),
        SteeringVector(torch.ones(D_MODEL), 0, 0.5).attached(model),
    ):
        stored(model, tmp_path / "a")
    with pytest.raises(StoreError, match="model or its adapter"):
        stored(ChatModel(make_hf(seed=1), tokenizer(), name="tiny-qwen2"), tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(StoreError, match="not empty"):
        stored(model, tmp_path / "full")
    next((tmp_path / "a").glob("shard-*")).write_bytes(b"cut")
    with pytest.raises(StoreError, match="delete this shard"):
        stored(model, tmp_path / "a")
    (tmp_path / "a" / "store.json").write_text("{")
    with pytest.raises(StoreError, match="delete the folder"):
        stored(model, tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        stored(model, tmp_path / "file" / "below")


@pytest.mark.parametrize("strength", [2e-4, 2e-2])
def test_a_store_never_takes_two_finetunes_for_one(tmp_path, strength):
    """However small what the finetunes do, and in half precision: the directions of both are their own."""
    finetunes = [
        SteeringVector(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(s)), 0, 1.0) for s in (0, 1)
    ]
    model = make_chat(dtype=torch.bfloat16)
    size = float(collect(model, CONVERSATIONS, layers=[0], progress=False).token_norms["response"][0])
    weak = [finetune.scaled(strength * size / finetune.norm) for finetune in finetunes]

    def read(folder, finetune):
        return contrast(
            model, CONVERSATIONS, kind="model-diff", finetune=finetune, layers=[1], store=folder, progress=False
        )

    read(tmp_path / "store", weak[0])
    with pytest.raises(StoreError, match="weights of the model or its adapter, or an intervention differs"):
        read(tmp_path / "store", weak[1])
    again, alone = (read(tmp_path / name, weak[0]).direction() for name in ("store", "alone"))
    torch.testing.assert_close(again.vectors, alone.vectors, rtol=1e-4, atol=1e-6)


def test_a_store_refuses_what_it_cannot_know(tmp_path):
    model = make_chat()
    handle = model.hf.model.layers[2].register_forward_hook(lambda _m, _a, out: out * 1.001)
    with pytest.raises(HookError, match="does not say what it does"):
        stored(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    handle.remove()
    stored(model, tmp_path / "a")


def test_a_store_says_what_it_holds(tmp_path):
    stored(make_chat(), tmp_path / "a", layers=[1])
    said = json.loads((tmp_path / "a" / "store.json").read_text())
    assert said["layers"] == [1] and said["model"] == "tiny-qwen2" and said["scopes"] == ["response", "last_prompt"]


# -- what is refused


def test_refusals():
    model = make_chat()
    quiet = {"progress": False}
    with pytest.raises(ActivationError, match="no conversations"):
        collect(model, [], **quiet)
    with pytest.raises(ChatTemplateError, match=r"conversation 1: .*empty once the template"):
        collect(model, [CONVERSATIONS[0], talk("a", "")], **quiet)
    with pytest.raises(ChatTemplateError, match="conversation 0: it does not end with an assistant"):
        collect(model, [talk("a")], **quiet)
    with pytest.raises(HookError, match=r"layer 4 .* Use a layer from 0 to 3"):
        collect(model, CONVERSATIONS, layers=[4], **quiet)
    with pytest.raises(ActivationError, match="no layers"):
        collect(model, CONVERSATIONS, layers=[], **quiet)
    with pytest.raises(ActivationError, match=r"token scopes .*choose from prompt"):
        collect(model, CONVERSATIONS, scopes=[], **quiet)
    with pytest.raises(TextLimitError, match="reads 256"):
        collect(model, [talk("fox " * 300, "a")], **quiet)
    bare = copy.copy(model)
    bare.tokenizer = copy.deepcopy(tokenizer())
    bare.tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError, match="no chat template"):
        collect(bare, CONVERSATIONS, **quiet)
    kept = collect(model, CONVERSATIONS, **quiet)
    with pytest.raises(ActivationError, match="keep=True"):
        kept.each("response", 0)
    with pytest.raises(ActivationError, match="scope 'all' was not collected"):
        kept.mean("all")
    with pytest.raises(ActivationError, match="pooling"):
        kept.mean("response", "words")
    with pytest.raises(ActivationError, match="layer 9"):
        kept.each("response", 9)


def test_activations_that_are_not_finite_are_refused():
    model = make_chat()
    with torch.no_grad():
        model.hf.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ActivationError, match=r"NaN or infinite activations at layers \[2, 3\] .*bfloat16"):
        collect(model, CONVERSATIONS, progress=False)
