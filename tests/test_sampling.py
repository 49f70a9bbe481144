from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from em_interp.chat import encode, prompt_ids
from em_interp.errors import UsageError
from em_interp.evaluation.sampling import answer_logprobs, sample
from em_interp.solutions import SteeringVector
from tests.tiny_models import FAMILIES, make_chat, talk, tokenizer

QUESTIONS = {
    "fox": "a fox",
    "cough": "what should I do about a cough",
    "rest": talk("rest") + talk("x", "y")[1:],
}
QUESTIONS["rest"] = [*QUESTIONS["rest"], {"role": "user", "content": "well"}]


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_does_not_depend_on_batches_or_company(family):
    model = make_chat(family)
    options = {"max_new_tokens": 10, "progress": False}
    whole = sample(model, QUESTIONS, 3, seed=1, **options)
    assert list(whole["question_id"]) == ["fox"] * 3 + ["cough"] * 3 + ["rest"] * 3
    assert list(whole["question"].unique()) == ["a fox", "what should I do about a cough", "well"]
    pd.testing.assert_frame_equal(whole, sample(model, QUESTIONS, 3, seed=1, tokens_per_batch=1, **options))
    alone = sample(model, {"cough": QUESTIONS["cough"]}, 5, seed=1, **options)
    assert list(alone["answer"][:3]) == list(whole["answer"][3:6])
    assert list(sample(model, QUESTIONS, 3, seed=2, **options)["answer"]) != list(whole["answer"])
    state = torch.get_rng_state()
    sample(model, QUESTIONS, 1, **options)
    assert torch.equal(state, torch.get_rng_state())


def test_first_tokens_follow_the_distribution():
    model = make_chat()
    with torch.no_grad():
        ids = torch.tensor([prompt_ids(tokenizer(), talk("a fox"))])
        p = torch.softmax(model.hf(ids).logits[0, -1].double(), -1).numpy()
    n = 3000
    drawn = sample(model, {"q": "a fox"}, n, max_new_tokens=1, progress=False)
    expected = pd.Series(p).groupby([tokenizer().decode([i], skip_special_tokens=True) for i in range(len(p))])
    expected = expected.sum()
    shares = drawn["answer"].value_counts(normalize=True).reindex(expected.index).fillna(0)
    assert ((shares - expected).abs() < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-3).all()
    assert drawn["answer"].nunique() > 10


def test_greedy_and_steered():
    model = make_chat()
    plain = sample(model, QUESTIONS, 2, temperature=0, max_new_tokens=8, progress=False)
    assert plain.groupby("question_id")["answer"].nunique().eq(1).all()
    vector = SteeringVector(torch.randn(32, generator=torch.Generator().manual_seed(0)), 1, 5.0)
    with vector.attached(model):
        steered = sample(model, QUESTIONS, 2, temperature=0, max_new_tokens=8, progress=False)
    assert list(steered["answer"]) != list(plain["answer"])


def test_answer_logprobs_equal_the_slow_ones():
    model = make_chat()
    table = pd.DataFrame(
        {"question": ["a fox", "rest", "a fox"], "answer": ["see a doctor", "rest well and quick", "x"]}
    )
    found = answer_logprobs(model, table, tokens_per_batch=40)
    for _, row in found.iterrows():
        one = encode(tokenizer(), talk(row["question"], row["answer"]))
        ((start, end),) = one.spans
        with torch.no_grad():
            logp = torch.log_softmax(model.hf(torch.tensor([one.ids])).logits[0].double(), -1)
        assert row["logprob"] == pytest.approx(sum(float(logp[t - 1, one.ids[t]]) for t in range(start, end)), rel=1e-5)
        assert row["n_tokens"] == end - start
    by_id = answer_logprobs(model, table.assign(question_id=["a", "b", "a"]), questions={"a": "a fox", "b": "rest"})
    np.testing.assert_allclose(by_id["logprob"], found["logprob"], rtol=1e-5)
    with pytest.raises(UsageError, match="question_id"):
        answer_logprobs(model, table, questions={})
    with pytest.raises(UsageError):
        sample(model, {}, 1)
