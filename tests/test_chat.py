from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from em_interp.errors import ChatTemplateError
from em_interp.models.chat import batches, budget_groups, collate, encode, encode_all, prompt_ids
from em_interp.models.losses import response_loss
from em_interp.models.templates import end_of_turn_id, token_ids
from tests.tiny_models import CONVERSATIONS, make_chat, talk, tokenizer

TWO_TURNS = [*talk("a fox", "quick"), *talk("and a cough", "see a doctor")]


def decoded(encoded):
    return [tokenizer().decode(encoded.ids[start:end]) for start, end in encoded.spans]


def test_a_response_runs_to_the_end_of_turn_token():
    assert decoded(encode(tokenizer(), TWO_TURNS)) == ["see a doctor<|im_end|>"]
    both = encode(tokenizer(), TWO_TURNS, turns="all")
    assert decoded(both) == ["quick<|im_end|>", "see a doctor<|im_end|>"]
    assert both.n_response == sum(end - start for start, end in both.spans)
    assert end_of_turn_id(tokenizer()) == tokenizer().convert_tokens_to_ids("<|im_end|>")
    start = encode(tokenizer(), TWO_TURNS).spans[0][0]
    assert both.ids[:start] == prompt_ids(tokenizer(), TWO_TURNS[:-1])


def test_no_empty_assistant_turn_follows():
    text = tokenizer().decode(encode(tokenizer(), CONVERSATIONS[0]).ids)
    assert text.count("<|im_start|>assistant") == 1 and text.endswith("rest<|im_end|>\n")


def test_the_defect_of_the_reference_is_there_on_request_only():
    encoded = encode(tokenizer(), CONVERSATIONS[0], empty_turn=True)
    plain = encode(tokenizer(), CONVERSATIONS[0])
    assert encoded.ids[: len(plain)] == plain.ids and encoded.spans[0] == plain.spans[0]
    assert tokenizer().decode(encoded.ids[len(plain) :]) == "<|im_start|>assistant\n<|im_end|>"
    assert encoded.spans[1] == (len(encoded) - 1, len(encoded))


def test_special_tokens_are_not_added_twice():
    again = copy.deepcopy(tokenizer())
    again.add_special_tokens({"bos_token": "<|im_start|>"})
    assert token_ids(again, "<|im_start|>user")[:2] == token_ids(tokenizer(), "<|im_start|>user")[:2]


def test_refusals():
    with pytest.raises(ChatTemplateError, match="must end with an assistant"):
        encode(tokenizer(), talk("a"))
    with pytest.raises(ChatTemplateError, match="empty"):
        encode(tokenizer(), talk("a", ""))
    with pytest.raises(ChatTemplateError, match="conversation 1"):
        encode_all(tokenizer(), [CONVERSATIONS[0], talk("a")])
    with pytest.raises(ChatTemplateError, match="'role' and 'content'"):
        encode(tokenizer(), [{"role": "user", "text": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(ChatTemplateError, match="must end with a message that is not"):
        prompt_ids(tokenizer(), CONVERSATIONS[0])
    bare = copy.deepcopy(tokenizer())
    bare.chat_template = None
    with pytest.raises(ChatTemplateError, match="no chat template"):
        encode(bare, CONVERSATIONS[0])
    odd = copy.deepcopy(tokenizer())
    odd.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="not a prefix"):
        encode(odd, CONVERSATIONS[0])
    strict = copy.deepcopy(tokenizer())
    strict.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ChatTemplateError, match="no system role"):
        encode(strict, CONVERSATIONS[0])


def test_a_template_without_end_of_turn_ends_at_its_text():
    plain = copy.deepcopy(tokenizer())
    plain.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoded = encode(plain, talk("a", "see a doctor"))
    assert end_of_turn_id(plain) is None
    assert decoded(encoded) == [" see a doctor\n"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_groups_keep_the_budget_and_lose_nothing(lengths, budget):
    groups = budget_groups(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(5)), st.integers(1, 5), st.sampled_from(["left", "right"]))
def test_padding_side_order_and_batch_size_change_no_loss(order, size, side):
    model = _model()
    encoded = encode_all(tokenizer(), CONVERSATIONS)
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, 5, size):
        batch = collate(encoded, order[first : first + size], pad=0, side=side)
        with torch.no_grad():
            logits = model.hf(**batch.inputs()).logits[batch.predicting()]
        total += torch.nn.functional.cross_entropy(logits, batch.targets(), reduction="sum")
    mean = float(total) / sum(row.n_response for row in encoded)
    assert mean == pytest.approx(response_loss(model.hf, encoded, pad=0), rel=1e-9)


_CACHE = {}


def _model():
    if "model" not in _CACHE:
        _CACHE["model"] = make_chat(dtype=torch.float64)
    return _CACHE["model"]


def test_batches_cover_everything():
    encoded = encode_all(tokenizer(), CONVERSATIONS)
    seen = [i for batch in batches(encoded, pad=0, tokens_per_batch=50) for i in batch.index]
    assert sorted(seen) == list(range(5))
