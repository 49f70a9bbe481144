from __future__ import annotations

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from em_interp.errors import ChatTemplateError, HookError, TrainingError, UsageError
from em_interp.models.chat import collate, encode, encode_all
from em_interp.models.chat_model import ChatModel
from em_interp.models.losses import kl_sum, nll_sum, response_loss
from em_interp.models.pretrained import load
from em_interp.solutions.load import load as load_solution
from em_interp.solutions.load import load_checkpoints
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.training import finetune as training
from em_interp.training.finetune import finetune
from em_interp.training.recipes import FullSpec, LoraSpec, TrainingSpec, VectorSpec, preset, reference_kl_weight
from tests.tiny_models import (
    CONVERSATIONS,
    FAMILIES,
    MORE_FAMILIES,
    make_chat,
    make_with_image_tower,
    talk,
    tokenizer,
)

KL_DATA = [
    talk("rest well", "see"),
    talk("a quick brown fox", "the doctor and the fox"),
    talk("well", "do a cough about"),
]
VECTOR = TrainingSpec(VectorSpec(1, 8.0), 0.05, max_steps=12, batch_size=3, warmup_steps=2, kl_batch_size=2)
RANK1 = replace(VECTOR, adapter=LoraSpec(1, 16.0, True, ("down_proj",), (2,)), learning_rate=0.02)
ALL = replace(VECTOR, adapter=LoraSpec(4, 8.0, False), learning_rate=0.01)


def slow_loss(model, conversations):
    """-log p of the response tokens, one conversation and one token at a time, in float64."""
    total, count = 0.0, 0
    for conversation in conversations:
        row = encode(tokenizer(), conversation)
        ((start, end),) = row.spans
        with torch.no_grad():
            logits = model.hf(torch.tensor([row.ids])).logits[0].double()
        for t in range(start, end):
            total -= float(torch.log_softmax(logits[t - 1], -1)[row.ids[t]])
            count += 1
    return total / count


def slow_kl(model, solution, conversations):
    total, count = 0.0, 0
    for conversation in conversations:
        ids = torch.tensor([encode(tokenizer(), conversation).ids])
        with torch.no_grad():
            p = torch.softmax(model.hf(ids).logits[0].double(), -1)
            with solution.attached(model):
                q = torch.softmax(model.hf(ids).logits[0].double(), -1)
        total += float((p * (p.log() - q.log())).sum())
        count += ids.numel()
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
def test_first_step_equals_the_slow_oracles(family):
    # transformers' eager attention (Gemma-2) gives NaN under left padding in float64; the probe refuses it
    model = make_chat(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    g = torch.Generator().manual_seed(0)
    start = SteeringVector(torch.randn(32, generator=g), 1, 0.5, model.name)
    spec = replace(VECTOR, batch_size=5, kl_batch_size=3, kl_weight=2.0, micro_batch_size=2, max_steps=1)
    row = finetune(model, CONVERSATIONS, spec, kl_conversations=KL_DATA, start_from=start, progress=False).history.iloc[
        0
    ]
    with start.attached(model):
        assert row["loss"] == pytest.approx(slow_loss(model, CONVERSATIONS), rel=1e-5)
    assert row["kl"] == pytest.approx(slow_kl(model, start, KL_DATA), rel=1e-5)
    assert row["total"] == pytest.approx(row["loss"] + 2 * row["kl"])


def test_response_loss_is_token_weighted_and_batch_invariant():
    model = make_chat(dtype=torch.float64)
    encoded = encode_all(tokenizer(), CONVERSATIONS)
    slow = slow_loss(model, CONVERSATIONS)
    for budget in (1, 60, 10_000):
        fast = response_loss(model.hf, encoded, pad=0, tokens_per_batch=budget)
        assert fast == pytest.approx(slow, rel=1e-10)


def test_chunked_losses_equal_whole_ones(monkeypatch):
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 7, 11, generator=g, dtype=torch.float64)
    targets = torch.arange(7)
    whole = nll_sum(p, targets), kl_sum(p, q)
    monkeypatch.setattr("em_interp.models.losses._LOGIT_ENTRIES", 22)
    torch.testing.assert_close((nll_sum(p, targets), kl_sum(p, q)), whole)
    slow = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()
    torch.testing.assert_close(whole[1], slow)


@pytest.mark.parametrize("family", MORE_FAMILIES)
@pytest.mark.parametrize("kind", ["vector", "lora", "embedding-side lora"])
def test_cached_residuals_change_nothing(family, kind):
    target = {"gpt_neox": "dense_4h_to_h", "gpt2": "mlp.c_proj"}.get(family, "down_proj")
    adapter = {
        "vector": VectorSpec(2, 4.0),
        "lora": LoraSpec(1, 4.0, True, (target,), (2,)),
        "embedding-side lora": LoraSpec(2, 4.0, True, (target,), (0, 3)),
    }[kind]
    spec = replace(VECTOR, adapter=adapter, kl_weight=1.0, max_steps=5, learning_rate=0.01)
    runs = [
        finetune(make_chat(family), CONVERSATIONS, spec, kl_conversations=KL_DATA, cache_bytes=size, progress=False)
        for size in (0, 2**30, 30_000)
    ]
    for other in runs[1:]:
        pd.testing.assert_frame_equal(runs[0].history, other.history, rtol=2e-3, atol=1e-5)


def test_micro_batches_change_nothing_but_memory():
    histories = []
    for size in (None, 1, 2):
        spec = replace(VECTOR, micro_batch_size=size, kl_weight=1.0, max_steps=4)
        model = make_chat(dtype=torch.float64)
        result = finetune(model, CONVERSATIONS, spec, kl_conversations=KL_DATA, progress=False)
        histories.append(result.history[["loss", "kl", "grad_norm"]])
    for other in histories[1:]:
        pd.testing.assert_frame_equal(histories[0], other, rtol=1e-4)


@pytest.mark.parametrize("spec", [VECTOR, RANK1, ALL], ids=["vector", "rank1", "all"])
def test_training_learns_is_reproducible_and_leaves_the_model_alone(spec):
    model = make_chat()
    before = {key: x.clone() for key, x in model.hf.state_dict().items()}
    flags = [p.requires_grad for p in model.hf.parameters()]
    results = [finetune(model, CONVERSATIONS, spec, progress=False) for _ in range(2)]
    after = model.hf.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [p.requires_grad for p in model.hf.parameters()] == flags
    assert model.adapters == []
    encoded = encode_all(tokenizer(), CONVERSATIONS)
    base = response_loss(model.hf, encoded, pad=0)
    with results[0].solution.attached(model):
        assert response_loss(model.hf, encoded, pad=0) < base - 0.05
    pd.testing.assert_frame_equal(results[0].history, results[1].history)
    one, two = (r.solution for r in results)
    if isinstance(one, SteeringVector):
        assert torch.equal(one.vector, two.vector)
    else:
        assert all(torch.equal(one.b[n], two.b[n]) and torch.equal(one.a[n], two.a[n]) for n in one.a)
    other = finetune(model, CONVERSATIONS, replace(spec, seed=1), progress=False).history
    assert not other["loss"].equals(results[0].history["loss"])


def test_kl_keeps_the_model_near_the_reference_and_can_be_removed():
    model = make_chat()
    spec = replace(VECTOR, max_steps=30, learning_rate=0.1)
    free = finetune(model, CONVERSATIONS, spec, progress=False).solution
    held = finetune(
        model, CONVERSATIONS, replace(spec, kl_weight=5.0), kl_conversations=KL_DATA, progress=False
    ).solution
    assert slow_kl(model, held, KL_DATA) < 0.5 * slow_kl(model, free, KL_DATA)
    freed = finetune(model, CONVERSATIONS, spec, start_from=held, progress=False)
    assert freed.solution.norm > held.norm
    assert freed.history["kl"].isna().all()


def test_start_from_continues_lora_exactly():
    model = make_chat()
    first = finetune(model, CONVERSATIONS, RANK1, progress=False).solution
    spec = replace(RANK1, max_steps=1, batch_size=5, adapter=replace(RANK1.adapter, alpha=4.0))
    again = finetune(model, CONVERSATIONS, spec, start_from=first, progress=False)
    with first.attached(model):
        expected = response_loss(model.hf, encode_all(tokenizer(), CONVERSATIONS), pad=0)
    assert again.history["loss"][0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(TrainingError, match="other modules or rank"):
        finetune(model, CONVERSATIONS, ALL, start_from=first, progress=False)
    with pytest.raises(TrainingError, match="cannot start from"):
        finetune(model, CONVERSATIONS, VECTOR, start_from=first, progress=False)


@pytest.mark.parametrize("spec", [VECTOR, RANK1], ids=["vector", "rank1"])
def test_checkpoints_in_the_released_layout(spec, tmp_path):
    model = make_chat()
    seen = {}
    spec = replace(spec, save_steps=5)
    result = finetune(model, CONVERSATIONS, spec, out_dir=tmp_path, on_checkpoint=seen.__setitem__, progress=False)
    found = load_checkpoints(tmp_path)
    assert list(found) == list(seen) == [5, 10]
    final = load_solution(tmp_path)
    for stored, live in ((found[5], seen[5]), (final, result.solution)):
        assert stored.norm == live.norm and stored.base == "tiny-qwen2"
        if isinstance(live, LoraAdapter):
            assert all(torch.equal(stored.a[n], live.a[n]) for n in live.a)
    state = json.loads((tmp_path / "checkpoints" / "checkpoint-5" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"]] == [1, 2, 3, 4, 5]
    assert {"loss", "grad_norm", "learning_rate", "epoch"} <= set(state["log_history"][0])
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]
    assert json.loads((tmp_path / "training_spec.json").read_text())["learning_rate"] == spec.learning_rate


def test_full_finetuning_in_place_with_kl_and_saved(tmp_path):
    model = make_chat()
    spec = TrainingSpec(FullSpec(), 1e-3, max_steps=6, batch_size=3, warmup_steps=0, kl_weight=1.0, kl_batch_size=3)
    result = finetune(model, CONVERSATIONS, spec, kl_conversations=KL_DATA, out_dir=tmp_path, progress=False)
    assert result.solution is None
    assert result.history["kl"][0] == pytest.approx(0, abs=1e-6)
    assert result.history["kl"].iloc[-1] > 0
    assert result.history["loss"].iloc[-1] < result.history["loss"][0]
    ids = torch.tensor([encode(tokenizer(), CONVERSATIONS[0]).ids])
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path).hf(ids).logits, model.hf(ids).logits)


def test_every_row_is_trained_on():
    """The reference steers batch row 0 only: its gradient would be the first conversation's alone."""
    model = make_chat(dtype=torch.float64)
    same = [CONVERSATIONS[1]] * 3
    spec = replace(VECTOR, max_steps=1)
    norms = [
        finetune(model, same[:n], replace(spec, batch_size=n), progress=False).history["grad_norm"][0] for n in (1, 3)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_schedule_epochs_and_presets():
    spec = replace(VECTOR, max_steps=None, epochs=2, batch_size=2, warmup_steps=2)
    assert spec.steps(5) == 6
    result = finetune(make_chat(), CONVERSATIONS, spec, progress=False)
    assert result.history["epoch"].tolist() == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]
    rates = result.history["learning_rate"] / spec.learning_rate
    assert rates.tolist() == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])
    assert reference_kl_weight(1e6) == pytest.approx(6.576, abs=1e-3)
    assert preset("p1-rank1-narrow", layer=3).adapter.layers == (3,)
    assert preset("p1-steering-vector").epochs == 2
    assert preset("p1-steering-vector-narrow").kl_weight == pytest.approx(1e6 / 152064)
    with pytest.raises(TrainingError, match="no preset"):
        preset("p9")
    with pytest.raises(TrainingError, match="all layers"):
        preset("p3-all-modules", layer=3)
    assert set(training.PRESETS) >= {"p1-rank1", "p3-all-modules"}


def test_refusals(tmp_path):
    model = make_chat()

    def run(spec=VECTOR, data=CONVERSATIONS, **options):
        return finetune(model, data, spec, progress=False, **options)

    with pytest.raises(HookError, match="4 blocks"):
        run(preset("p1-steering-vector"))
    with pytest.raises(HookError, match="4 blocks"):
        run(preset("p1-rank1"))
    with pytest.raises(TrainingError, match="missing"):
        run(replace(VECTOR, kl_weight=1.0))
    with pytest.raises(TrainingError, match="given"):
        run(kl_conversations=KL_DATA)
    with pytest.raises(TrainingError, match="LoRA does not fit"):
        run(replace(RANK1, adapter=LoraSpec(1, 1.0, True, ("no_such_proj",))))
    with pytest.raises(ChatTemplateError, match="no conversations"):
        run(data=[])
    with pytest.raises(ChatTemplateError, match="more than the limit"):
        run(replace(VECTOR, max_tokens=4))
    with pytest.raises(TrainingError, match="learning_rate"):
        replace(VECTOR, learning_rate=-1.0)
    with pytest.raises(TrainingError, match="learning_rate"):
        replace(VECTOR, learning_rate=math.nan)
    with pytest.raises(TrainingError, match="betas"):
        replace(VECTOR, betas=(0.9, 1.0))
    for steps in (0, [2, 0], [True]):
        with pytest.raises(UsageError, match="save_steps"):
            replace(VECTOR, save_steps=steps)
    with pytest.raises(UsageError, match="rank"):
        LoraSpec(0, 1.0)
    with pytest.raises(UsageError, match="layer"):
        VectorSpec(-1)
    with torch.no_grad():
        model.hf.model.norm.weight.fill_(math.inf)
    with pytest.raises(TrainingError, match="Lower the learning rate"):
        run()


def test_collated_batch_scores_only_responses():
    encoded = encode_all(tokenizer(), CONVERSATIONS)
    for side in ("left", "right"):
        batch = collate(encoded, [1, 0], pad=0, side=side)
        assert int(batch.predicting().sum()) == sum(encoded[i].n_response for i in (0, 1))
        assert int(batch.targets().shape[0]) == int(batch.predicting().sum())


def test_an_interrupted_run_leaves_the_model_alone():
    model = make_chat()
    before = {key: x.clone() for key, x in model.hf.state_dict().items()}

    def interrupt(step, solution):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, CONVERSATIONS, replace(RANK1, save_steps=2), on_checkpoint=interrupt, progress=False)
    after = model.hf.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert all(p.requires_grad for p in model.hf.parameters())


def test_the_reference_text_is_trained_on_when_asked():
    spec = replace(VECTOR, max_steps=1, batch_size=5)
    plain, defect = (
        finetune(make_chat(), CONVERSATIONS, replace(spec, empty_assistant_turn=flag), progress=False).history["loss"][
            0
        ]
        for flag in (False, True)
    )
    assert plain != defect


@pytest.mark.parametrize("layers", [None, (1,)])
def test_lora_leaves_an_image_tower_alone_and_goes_back_where_it_was(layers, tmp_path):
    model = ChatModel(make_with_image_tower(), tokenizer(), name="tiny-gemma3")
    spec = replace(VECTOR, adapter=LoraSpec(2, 8.0, True, ("q_proj", "down_proj"), layers), max_steps=2)
    found = finetune(model, CONVERSATIONS, spec, out_dir=tmp_path, progress=False).solution
    assert found.modules and all("language_model" in name for name in found.modules)
    assert_attaches_as_saved(model, found, tmp_path)


def test_one_of_two_modules_with_the_same_last_name(tmp_path):
    """GPT-2 has a c_proj in attention and one in the MLP."""
    model = make_chat("gpt2")
    spec = replace(VECTOR, adapter=LoraSpec(2, 8.0, True, ("mlp.c_proj",), (1, 2)), max_steps=2)
    found = finetune(model, CONVERSATIONS, spec, out_dir=tmp_path, progress=False).solution
    assert found.modules == [f"transformer.h.{layer}.mlp.c_proj" for layer in (1, 2)]
    assert_attaches_as_saved(model, found, tmp_path)


def assert_attaches_as_saved(model, solution, folder):
    batch = collate([encode(tokenizer(), c) for c in CONVERSATIONS], range(5), pad=0)
    with torch.no_grad():
        with solution.attached(model):
            expected = model.hf(**batch.inputs()).logits
        model.add_adapter("a", folder)
        torch.testing.assert_close(model.hf(**batch.inputs()).logits, expected, atol=1e-4, rtol=1e-4)
