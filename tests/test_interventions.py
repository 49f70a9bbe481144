from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

from em_interp.directions.direction import Direction
from em_interp.errors import DirectionError, HookError, UsageError
from em_interp.evaluation.sampling import sample
from em_interp.interventions.ablation import Ablate, Erase
from em_interp.interventions.ablation import arms as ablation_arms
from em_interp.interventions.intervening import answers_by_arm, intervening
from em_interp.interventions.steering import Steer
from em_interp.models.architectures import find_blocks
from em_interp.models.chat import collate, encode_all
from em_interp.models.hooks import has_our_hooks, residuals
from tests.tiny_models import CONVERSATIONS, FAMILIES, MORE_FAMILIES, make_chat, tokenizer

chat = cache(make_chat)  # every test leaves its model as it was
QUESTIONS = {"fox": "a fox", "cough": "what should I do about a cough"}


def direction(seed=0, d_model=32, layers=range(4), **changes):
    g = torch.Generator().manual_seed(seed)
    layers = tuple(layers)
    return Direction(3 * torch.randn(len(layers), d_model, generator=g), layers, "random", **changes)


def batch(side="left", rows=range(5)):
    return collate(encode_all(tokenizer(), CONVERSATIONS), rows, pad=0, side=side)


def generate(model, b, *, cache=True, steps=6):
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "use_cache": cache}
    return model.hf.generate(input_ids=b.input_ids, attention_mask=b.attention_mask, **options)[:, -steps:]


def kinds(scope):
    d = direction()
    rows = [0.0, 0.5, 1.0, -1.0, 2.0]
    return [
        [Steer(d, 1, 2.0, scope)],
        [Steer(d, 1, rows, scope), Steer(direction(1), 1, 0.5, scope), Ablate(direction(2), [1, 3], scope=scope)],
        [Ablate([d, direction(1)], from_layer=2, scope=scope)],
    ]


@pytest.mark.parametrize("family", MORE_FAMILIES)
@pytest.mark.parametrize("scope", ["all", "prompt", "response"])
def test_greedy_tokens_agree_with_and_without_cache(family, scope):
    model, b = chat(family), batch()
    plain = generate(model, b)
    for interventions in kinds(scope):
        with intervening(model, interventions):
            cached = generate(model, b)
        with intervening(model, interventions, response_mask=torch.zeros_like(b.answer_mask)):
            assert torch.equal(generate(model, b), cached)
            assert torch.equal(generate(model, b, cache=False), cached)
        assert not torch.equal(cached, plain)
    assert torch.equal(generate(model, b), plain) and not has_our_hooks(model.hf)


def slow(hf, ids, answer, interventions):
    """Float64, batch 1, no padding: the logits where each block's output is edited by the definition, by token."""

    def hook(layer):
        def edit(_module, _args, output):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for x in interventions:
                for t in range(hidden.shape[1]):
                    if (x.scope == "response" and not answer[t]) or (x.scope == "prompt" and answer[t]):
                        continue
                    h = hidden[0, t]
                    if isinstance(x, Steer) and layer == x.layer:
                        hidden[0, t] = h + x.coefficient * x.direction.at(layer).double()
                    if isinstance(x, Ablate) and layer in x.layers:
                        v = x.direction.at(layer if x.from_layer is None else x.from_layer).double()
                        hidden[0, t] = h - v * (v @ h) / (v @ v)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return edit

    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(find_blocks(hf))]
    with torch.no_grad():
        logits = hf(torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("family", MORE_FAMILIES)
@pytest.mark.parametrize("scope", ["all", "prompt", "response"])
def test_forward_equals_the_slow_definition_for_both_paddings(family, scope):
    model, encoded = chat(family), encode_all(tokenizer(), CONVERSATIONS)
    precise, d = copy.deepcopy(model.hf).double(), direction()
    interventions = [Steer(d, 1, 0.7, scope), Ablate(direction(1), [1, 2], scope=scope), Ablate(d, [3], 0, scope)]
    for side in ("left", "right"):
        b = batch(side)
        mask = None if scope == "all" else b.answer_mask
        with torch.no_grad(), intervening(model, interventions, response_mask=mask):
            logits = model.hf(**b.inputs(), use_cache=False).logits
        for row, one in enumerate(encoded):
            answer = [any(s <= t < e for s, e in one.spans) for t in range(len(one))]
            expected = slow(precise, one.ids, answer, interventions)
            found = logits[row][b.attention_mask[row].bool()].double()
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bridge_equals_transformers(family):
    model, b = chat(family), batch()
    real = b.attention_mask.bool()
    row = b.input_ids[1][real[1]][None]
    bridge = model.bridge
    for scope in ("all", "prompt", "response"):
        interventions = [Steer(direction(), 1, 1.5, scope), Ablate(direction(1), [2], scope=scope)]
        mask = None if scope == "all" else b.answer_mask
        with torch.no_grad(), intervening(model, interventions, response_mask=mask):
            ours = model.hf(**b.inputs(), use_cache=False).logits[real]
            theirs = bridge(b.input_ids, attention_mask=b.attention_mask)[real]
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
        with intervening(model, interventions):
            ours = model.hf.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=5, do_sample=False)
        with intervening(model, interventions):
            theirs = bridge.generate(
                row, max_new_tokens=5, do_sample=False, verbose=False, return_type="tokens", stop_at_eos=False
            )
        assert ours.shape[1] >= row.shape[1] + 2
        assert torch.equal(ours, theirs[:, : ours.shape[1]])  # ours stops at the end of turn


def test_per_row_coefficients_equal_separate_runs():
    model, b = chat(), batch()
    coefficients = [0.0, 1.0, -2.0, 0.5, 3.0]
    with intervening(model, [Steer(direction(), 2, coefficients)]), torch.no_grad():
        together = model.hf(**b.inputs(), use_cache=False).logits
        tokens = generate(model, b)
    for row, coefficient in enumerate(coefficients):
        one = batch(rows=[row])
        with intervening(model, [Steer(direction(), 2, coefficient)]), torch.no_grad():
            alone = model.hf(**one.inputs(), use_cache=False).logits[0]
            assert torch.equal(generate(model, one)[0], tokens[row])
        torch.testing.assert_close(together[row][b.attention_mask[row].bool()], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_nothing_is_left_after_ablation(family):
    check_nothing_left(chat(family), 1e-5)


def test_nothing_but_rounding_is_left_in_bfloat16():
    check_nothing_left(make_chat(dtype=torch.bfloat16), 2e-2)


def check_nothing_left(model, allowed):
    b = batch()
    real = b.attention_mask.bool()
    d, e = direction(), direction(1)
    for ablation in (Ablate(d), Ablate(d, from_layer=1), Ablate([d, e]), Ablate([d, e], from_layer=3)):
        with intervening(model, [ablation]):
            hidden = residuals(model.hf, b.inputs(), range(4))
        for layer in range(4):
            basis = ablation.basis(layer if ablation.from_layer is None else ablation.from_layer)
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
            h = hidden[layer][real].double()
            assert float(((h @ basis).norm(dim=1) / h.norm(dim=1)).max()) < allowed
            for one in ablation.directions:
                v = one.unit().at(layer if ablation.from_layer is None else ablation.from_layer).double()
                assert float(((h @ v).abs() / h.norm(dim=1)).max()) < allowed


def test_the_order_given_is_the_order_done():
    model, b, d = chat(), batch(), direction()
    steer, ablate = Steer(d, 2, 1.0), Ablate(d, [2])
    with intervening(model, [steer, ablate]):
        nothing = residuals(model.hf, b.inputs(), [2])[2]
    with intervening(model, [ablate]):
        torch.testing.assert_close(residuals(model.hf, b.inputs(), [2])[2], nothing, atol=1e-5, rtol=1e-4)
    with intervening(model, [ablate, steer]):
        added = residuals(model.hf, b.inputs(), [2])[2]
    torch.testing.assert_close(added, nothing + d.at(2), atol=1e-5, rtol=1e-4)
    with intervening(model, []):  # the arm of the model as it is
        assert torch.equal(generate(model, b), generate(model, b))


def test_an_eraser_is_affine():
    model, b = chat(), batch()
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(32, 2, generator=g), torch.randn(2, 32, generator=g)
    bias = torch.randn(32, generator=g)
    before = residuals(model.hf, b.inputs(), [2])[2]
    with intervening(model, [Erase({2: left}, {2: right}, {2: bias})]):
        after = residuals(model.hf, b.inputs(), [2])[2]
    torch.testing.assert_close(after, before - (before - bias) @ right.T @ left.T, atol=1e-3, rtol=1e-4)
    with (
        pytest.raises(DirectionError, match="width 16"),
        intervening(model, [Erase({2: left[:16]}, {2: right[:, :16]}, {2: bias[:16]})]),
    ):
        pass


def test_arms_share_their_random_numbers():
    model = chat()
    arms = ablation_arms(direction(), from_layer=1, random_arms=2)
    assert list(arms) == ["none", "single", "random 0", "random 1"]
    assert list(ablation_arms(direction(), random_arms=0)) == ["none", "layerwise"]
    table = answers_by_arm(model, arms, QUESTIONS, 2, seed=3, max_new_tokens=5, progress=False)
    assert list(table.columns[:2]) == ["arm", "question_id"] and len(table) == 4 * 2 * 2
    plain = sample(model, QUESTIONS, 2, seed=3, max_new_tokens=5, progress=False)
    assert list(table[table["arm"] == "none"]["answer"]) == list(plain["answer"])
    with intervening(model, [Ablate(direction(), from_layer=1)]):
        ablated = sample(model, QUESTIONS, 2, seed=3, max_new_tokens=5, progress=False)
    assert list(table[table["arm"] == "single"]["answer"]) == list(ablated["answer"]) != list(plain["answer"])
    with pytest.raises(UsageError, match="no arms"):
        answers_by_arm(model, {}, QUESTIONS, 1)


def zero():
    vectors = torch.randn(4, 32)
    vectors[1] = 0
    return Direction(vectors, range_layers(), "random")


def range_layers():
    return (0, 1, 2, 3)


@pytest.mark.parametrize(
    "make,error,match",
    [
        (lambda: [Steer(direction(d_model=16), 1, 1.0)], DirectionError, "width 16"),
        (lambda: [Ablate(direction(d_model=16))], DirectionError, "Load the model"),
        (lambda: [Steer(direction(model="Qwen2.5-14B"), 1, 1.0)], DirectionError, "for_model"),
        (lambda: [Ablate(direction(model="Qwen2.5-14B"))], DirectionError, "Qwen2.5-14B"),
        (lambda: [Steer(direction(layers=range(9)), 7, 1.0)], HookError, "layer from 0 to 3"),
        (lambda: [Steer(direction(), 7, 1.0)], DirectionError, "no layer 7"),
        (lambda: [Ablate(direction(), [5])], DirectionError, "no layer 5"),
        (lambda: [Ablate(direction(layers=range(9)))], HookError, "layer from 0 to 3"),
        (lambda: [Ablate(direction(), [9], from_layer=1)], HookError, "layer from 0 to 3"),
        (lambda: [Steer(zero(), 1, 1.0)], DirectionError, "zero vector"),
        (lambda: [Ablate(zero())], DirectionError, "zero vector"),
        (lambda: [Ablate([direction(), 2 * direction()])], DirectionError, "linearly dependent"),
        (lambda: [Ablate([direction(layers=[0]), direction(layers=[1])])], DirectionError, "in common"),
        (lambda: [Ablate([])], DirectionError, "at least one"),
        (lambda: [Ablate(direction(), [])], DirectionError, "at least one"),
        (lambda: [Steer(direction(), 1, float("nan"))], UsageError, "finite"),
        (lambda: [Steer(direction(), 1, [])], UsageError, "finite"),
        (lambda: [Steer(direction(), 1, 1.0, "answer")], UsageError, "prompt"),
        (lambda: [Ablate(direction(), scope="last_prompt")], UsageError, "prompt"),
        (lambda: [Steer(direction() * float("nan"), 1, 1.0)], DirectionError, "NaN"),
        (lambda: [Steer.of_residual(direction(), 1, 0.5, 0.0)], UsageError, "residual_norms"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(make, error, match):
    model = chat()
    with pytest.raises(error, match=match), intervening(model, make()):
        pytest.fail("the context was entered")
    assert not has_our_hooks(model.hf)


def test_what_cannot_act_is_refused():
    model, b, d = chat(), batch(), direction()
    with pytest.raises(HookError, match="no forward pass"), intervening(model, [Steer(d, 1, 1.0)]):
        pass
    with pytest.raises(HookError, match="5 rows"), intervening(model, [Steer(d, 1, [1.0, 2.0])]):
        generate(model, b)
    for scope in ("prompt", "response"):
        with pytest.raises(HookError, match="response_mask"), intervening(model, [Steer(d, 1, 1.0, scope)]):
            model.hf(**b.inputs())
        with pytest.raises(HookError, match="response_mask"), intervening(model, [Steer(d, 1, 1.0, scope)]):
            generate(model, b, cache=False)
    with pytest.raises(HookError, match="at least two"), intervening(model, [Steer(d, 1, 1.0, "response")]):
        generate(model, b, steps=1)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(HookError, match="2 rows"), intervening(model, [Steer(d, 1, 1.0, "prompt")], response_mask=mask):
        model.hf(**b.inputs())
    out = model.hf(**b.inputs(), use_cache=True)
    more = torch.cat([b.attention_mask, torch.ones(5, 2, dtype=torch.long)], dim=1)
    with pytest.raises(HookError, match="in pieces"), intervening(model, [Steer(d, 1, 1.0, "response")]):
        model.hf(b.input_ids[:, :2], attention_mask=more, past_key_values=out.past_key_values)
    assert not has_our_hooks(model.hf) and not model.hf.model._forward_pre_hooks
    with pytest.raises(RuntimeError, match="mine"), intervening(model, [Steer(d, 1, 1.0)]):
        raise RuntimeError("mine")
    assert not has_our_hooks(model.hf)
    with intervening(model, [Steer(direction(model="elsewhere/Tiny-Qwen2"), 1, 1.0)]):
        generate(model, b)  # the same short name in another place


@pytest.mark.parametrize("scope", ["prompt", "response"])
@pytest.mark.parametrize("pieces", [1, 3, "all but one"])
def test_a_prompt_read_in_pieces_is_a_prompt(scope, pieces):
    """Also where the last piece is a single token, as long as a step of the response."""
    model = chat()
    row = batch(rows=[1]).input_ids
    size = row.shape[1] - 1 if pieces == "all but one" else pieces
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    options |= {"attention_mask": torch.ones_like(row), "output_logits": True}
    interventions = [Steer(direction(), 1, 0.5, scope), Ablate(direction(1), [2], scope=scope)]
    with intervening(model, interventions):
        whole = model.hf.generate(row, **options)
    with intervening(model, interventions):
        parts = model.hf.generate(row, prefill_chunk_size=size, **options)
    assert torch.equal(whole.sequences, parts.sequences)
    torch.testing.assert_close(torch.stack(whole.logits), torch.stack(parts.logits), atol=1e-4, rtol=1e-4)
    assert "generate" not in vars(model.hf)


def test_passes_of_ones_own_need_to_be_told_where_the_response_begins():
    model = chat()
    row = batch(rows=[1]).input_ids
    steer = [Steer(direction(), 1, 0.5, "prompt")]
    for use_cache in (True, False):
        with pytest.raises(HookError, match="response_mask"), intervening(model, steer):
            model.hf(row, use_cache=use_cache)
    with intervening(model, steer):
        expected = model.hf.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=4, do_sample=False)
    with torch.no_grad(), intervening(model, steer, response_mask=torch.zeros_like(row, dtype=torch.bool)):
        first = model.hf(row[:, :-1], use_cache=True)
        ids, cache = row, first.past_key_values
        for _ in range(4):
            ids = torch.cat([ids, model.hf(ids[:, -1:], past_key_values=cache).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, expected)


def test_steers_for_batches_of_different_sizes_do_not_merge():
    model, b, d = chat(), batch(), direction()
    for other in ([1.0], [1.0, 2.0]):
        together = [Steer(d, 1, [0.1] * 5), Steer(direction(1), 1, other)]
        with pytest.raises(HookError, match=rf"5 coefficients and {len(other)}"), intervening(model, together):
            model.hf(**b.inputs())
    with intervening(model, [Steer(d, 1, [0.1] * 5), Steer(direction(1), 1, 2.0)]):
        model.hf(**b.inputs())
