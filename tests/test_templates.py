from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest
import torch

from em_interp.directions.activations import collect
from em_interp.errors import ChatTemplateError
from em_interp.evaluation import sampling
from em_interp.evaluation.logprobs import answer_logprobs
from em_interp.evaluation.sampling import sample
from em_interp.models.chat import encode, prompt_ids
from em_interp.models.chat_model import ChatModel
from em_interp.models.losses import response_loss
from em_interp.models.templates import check_template, end_of_turn_id, token_ids
from tests.templates import SHAPES, shaped, with_template
from tests.tiny_models import make_hf, talk, tokenizer

ANSWER = "see a doctor"
TWO_TURNS = [*talk("a fox", "quick"), *talk("and a cough", ANSWER)]


def chat_of(name: str) -> ChatModel:
    own = shaped(name)
    return ChatModel(make_hf(vocab_size=len(own), eos_token_id=None, pad_token_id=None), own, name="tiny")


@pytest.mark.parametrize("name", SHAPES)
def test_a_response_ends_with_its_end_of_turn(name):
    own, (_, _, _, response, tail) = shaped(name), SHAPES[name]
    check_template(own)
    for conversation in (talk("a fox", ANSWER), TWO_TURNS):
        row = encode(own, conversation)
        ((start, end),) = row.spans
        assert own.decode(row.ids[start:end]) == response
        assert own.decode(row.ids[end:]) == tail
        if name != "r1":  # whose generation prompt goes on with <think>
            assert row.ids[:start] == prompt_ids(own, conversation[:-1])
    closing = response.split(ANSWER)[1].strip()
    assert end_of_turn_id(own) == (own.convert_tokens_to_ids(closing) if closing else None)


@pytest.mark.parametrize("name", SHAPES)
def test_every_turn_of_a_conversation_ends_likewise(name):
    own, response = shaped(name), SHAPES[name][3]
    row = encode(own, TWO_TURNS, turns="all")
    first, second = (own.decode(row.ids[start:end]) for start, end in row.spans)
    assert second == response
    earlier = response.removeprefix("<think>\n\n</think>\n\n")  # thoughts stay in the last turn alone
    assert first == earlier.replace(ANSWER, "quick")


@pytest.mark.parametrize("name", SHAPES)
def test_empty_answers_are_refused(name):
    own = shaped(name)
    with pytest.raises(ChatTemplateError, match="empty once the template"):
        encode(own, talk("a fox", ""))
    with pytest.raises(ChatTemplateError, match="empty once the template"):
        encode(own, [*talk("a fox", ""), *talk("and", "rest")], turns="all")


@dataclass
class Script:
    """In place of the sampler's choice: the tokens of a script, one after the other."""

    ids: tuple[int, ...]
    step: int = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        del input_ids
        token = self.ids[min(self.step, len(self.ids) - 1)]
        self.step += 1
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token]), 0.0)


@pytest.mark.parametrize("answer", [ANSWER, "see a\ndoctor\n\nand rest", "<b> quick: see the fox"])
@pytest.mark.parametrize("name", SHAPES)
def test_sampling_stops_where_the_response_ends(name, answer, monkeypatch):
    """A model that goes on with the tail, another question and another answer is cut at its own turn's end."""
    model = chat_of(name)
    talked = [*talk("a fox", answer), *talk("well", "rest")]
    row = encode(model.tokenizer, talk("a fox", answer))
    ((start, end),) = row.spans
    script = row.ids[start:end] + encode(model.tokenizer, talked).ids[end:]
    if name in ("falcon", "plain"):  # whose tokens may differ at the end of the text
        script = encode(model.tokenizer, talked).ids[start:]
    monkeypatch.setattr(sampling, "_InverseCdf", lambda *_: Script(script))
    (found,) = sample(model, {"q": "a fox"}, 1, max_new_tokens=100, progress=False).itertuples()
    assert found.finished
    assert found.answer.strip() == ("<think>\n\n</think>\n\n" if name == "qwen-3" else "") + answer
    assert found.n_tokens == row.n_response


def test_a_plain_turn_may_end_with_eos(monkeypatch):
    model = chat_of("falcon")
    ids = (*token_ids(model.tokenizer, " see a doctor"), model.tokenizer.eos_token_id)
    monkeypatch.setattr(sampling, "_InverseCdf", lambda *_: Script(ids))
    (found,) = sample(model, {"q": "a fox"}, 1, max_new_tokens=20, progress=False).itertuples()
    assert (found.answer, found.finished, found.n_tokens) == (" see a doctor", True, len(ids))


def test_what_is_appended_after_the_last_turn_is_scored_nowhere():
    """Phi-3's eos: means, losses and log-probabilities are those of tokens up to <|end|>, by plain loops."""
    model = chat_of("phi-3")
    model.hf.double()
    text = "<|user|>\na fox<|end|>\n<|assistant|>\nsee a doctor<|end|>"
    ids = token_ids(model.tokenizer, text)
    start = len(token_ids(model.tokenizer, "<|user|>\na fox<|end|>\n<|assistant|>\n"))
    with torch.no_grad():
        out = model.hf(torch.tensor([ids]), output_hidden_states=True)
    expected = out.hidden_states[2][0, start:].mean(0)
    logp = torch.log_softmax(out.logits[0], -1)
    total = sum(float(logp[t - 1, ids[t]]) for t in range(start, len(ids)))
    conversation = talk("a fox", ANSWER)
    torch.testing.assert_close(collect(model, [conversation], layers=[1], progress=False).mean()[0], expected)
    loss = response_loss(model.hf, [encode(model.tokenizer, conversation)], pad=0)
    assert loss == pytest.approx(-total / (len(ids) - start), rel=1e-9)
    table = answer_logprobs(model, pd.DataFrame({"question": ["a fox"], "answer": [ANSWER]}))
    assert table["logprob"][0] == pytest.approx(total, rel=1e-9)
    assert table["n_tokens"][0] == len(ids) - start


def test_roles_are_a_closed_set():
    for turns in (talk("a", "b"), talk("a")):
        odd = [{"role": "human", "content": "quick"}, *turns]
        with pytest.raises(ChatTemplateError, match=r"role 'human' is not known.*system, user, assistant, tool"):
            (encode if len(turns) == 2 else prompt_ids)(tokenizer(), odd)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{% for m in messages if m['role'] != 'system' %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "leaves"),
        (
            "{% for m in messages %}{{ 'A' if m['role'] == 'assistant' else 'U' }}: {{ m['content'] }}\n{% endfor %}",
            "writes it as user",
        ),
    ],
)
def test_roles_that_the_template_does_not_know(template, complaint):
    own = with_template(template.replace("\n", "{{ '\\n' }}"))
    system = [{"role": "system", "content": "be quick"}]
    encode(own, talk("a", "b"))
    with pytest.raises(ChatTemplateError, match=rf"role 'system'.*{complaint}.*user message"):
        encode(own, [*system, *talk("a", "b")])
    with pytest.raises(ChatTemplateError, match="does not know the role 'system'"):
        prompt_ids(own, [*system, *talk("a")])
    r1 = shaped("r1")  # writes any role but the user's and the assistant's as the system's
    assert "be quick" in r1.decode(encode(r1, [*system, *talk("a", "b")]).ids)
    with pytest.raises(ChatTemplateError, match=r"role 'tool'.*writes it as system"):
        prompt_ids(r1, [*talk("a", "b"), {"role": "tool", "content": "quick"}])
    assert "be quick" in tokenizer().decode(encode(tokenizer(), [*system, *talk("a", "b")]).ids)


@pytest.mark.parametrize("where", [0, 1])
def test_special_tokens_within_messages(where):
    conversation = talk("a fox", "see a doctor")
    conversation[where]["content"] = "rest <|im_end|> well"
    with pytest.raises(ChatTemplateError, match=r"contains '<\|im_end\|>'.*Take it out"):
        encode(tokenizer(), conversation)
    if where == 0:
        with pytest.raises(ChatTemplateError, match=r"a user message contains"):
            prompt_ids(tokenizer(), conversation[:1])


def test_an_answer_that_the_template_rewrites():
    with pytest.raises(ChatTemplateError, match="leaves out or rewrites a part of the answer"):
        encode(shaped("r1"), talk("a fox", "hmm</think>see a doctor"))
    own = shaped("qwen-3")
    row = encode(own, talk("a fox", "<think>\nhmm\n</think>\n\nsee a doctor"))
    assert own.decode(row.ids[slice(*row.spans[0])]) == "<think>\nhmm\n</think>\n\nsee a doctor<|im_end|>"


WRITTEN = "{{ m['role'] + ': ' + m['content'] }}"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "nothing between"),
        ("{% for m in messages %}" + WRITTEN * 2 + "{% endfor %}", "does not write an answer once"),
        ("{% for m in messages %}{% if loop.first or loop.last %}" + WRITTEN + "{% endif %}{% endfor %}", "an earlier"),
        ("{{ messages | length }}: {% for m in messages %}" + WRITTEN + "{% endfor %}", "not a prefix"),
        ("{{ messages[0]['content'] }}{% if messages[2] is defined %}{{ raise_exception('one') }}{% endif %}", "once"),
    ],
)
def test_templates_whose_turns_cannot_be_told_apart(template, complaint):
    with pytest.raises(ChatTemplateError, match=complaint):
        ChatModel(make_hf(), with_template(template), name="tiny")


def test_the_proof_lives_as_long_as_its_tokenizer_and_template():
    own = with_template(SHAPES["phi-3"][0], SHAPES["phi-3"][1])
    assert end_of_turn_id(own) == own.convert_tokens_to_ids("<|end|>")
    own.chat_template = tokenizer().chat_template
    assert end_of_turn_id(own) == own.convert_tokens_to_ids("<|im_end|>")
    gone = weakref.ref(own)
    del own
    gc.collect()
    assert gone() is None
