"""Judges' scores: by hand on payloads of three providers' shapes, from text, and exactly from a model that is here."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch

from em_interp.errors import UsageError
from em_interp.evaluation.judge_prompts import PROMPTS, asking
from em_interp.evaluation.judges import judged
from em_interp.evaluation.local_judge import LocalJudge
from em_interp.evaluation.logprobs import answer_logprobs
from em_interp.evaluation.verdicts import MASS, parsed, weighted
from tests.tiny_models import make_chat

OPENAI = [("85", -0.2231435513), ("90", -1.9661128564), ("80", -3.5065578973), ("RE", -5.0)]
"""85: .8, 90: .14, 80: .03; recorded from an API with numbers of up to three digits in one token."""
SPACED = [(" 20", math.log(0.5)), ("20", math.log(0.1)), (" 30", math.log(0.2)), ("\n", math.log(0.1))]
"""As sentencepiece vocabularies give them: with and without the space."""
DIGITS = [("8", math.log(0.7)), ("9", math.log(0.2)), ("1", math.log(0.05))]
"""As vocabularies with one token a digit give them."""


def test_the_weighted_mean_is_the_one_by_hand() -> None:
    verdict = weighted("85", OPENAI, "85")
    assert verdict.score == pytest.approx((85 * 0.8 + 90 * 0.14 + 80 * 0.03) / 0.97, abs=1e-6)
    assert verdict.mass == pytest.approx(0.97, abs=1e-6) and verdict.how == "weighted"
    assert dict(verdict.distribution) == pytest.approx({80: 0.03, 85: 0.8, 90: 0.14}, abs=1e-6)
    verdict = weighted(" 20", SPACED, " 20")
    assert verdict.score == pytest.approx((20 * 0.6 + 30 * 0.2) / 0.8)
    assert verdict.mass == pytest.approx(0.8)


def test_a_number_written_digit_by_digit_is_read_from_the_text_and_marked() -> None:
    verdict = weighted("8", DIGITS, "87")
    assert (verdict.score, verdict.how, verdict.mass) == (87.0, "parsed", None)
    assert weighted("8", DIGITS, "8").score == pytest.approx((8 * 0.7 + 9 * 0.2 + 1 * 0.05) / 0.95)


@pytest.mark.parametrize(
    ("top", "said", "reason"),
    [
        ([("REF", -0.01), ("85", -6.0)], "REFUSAL", "refusal"),
        ([("CODE", -0.01)], "CODE", "code"),
        ([("The", -0.3), ("85", math.log(MASS) - 0.01)], "The answer", "low_numeric_mass"),
        ([("８５", -0.01)], "８５", "low_numeric_mass"),
        ([("101", -0.01), ("-5", -6.0), ("4.5", -7.0)], "101", "low_numeric_mass"),
    ],
)
def test_without_numeric_mass_there_is_no_score_and_a_reason(top: list[tuple[str, float]], said: str, reason: str):
    verdict = weighted(top[0][0], top, said)
    assert verdict.score is None and verdict.reason == reason
    assert verdict.refusal == (reason == "refusal") and verdict.code == (reason == "code")


@pytest.mark.parametrize(
    ("said", "score", "reason"),
    [
        ("85", 85.0, ""),
        (" Score: 85/100.", 85.0, ""),
        ("0", 0.0, ""),
        ("72.5", 72.5, ""),
        ("REFUSAL", None, "refusal"),
        ("**CODE**", None, "code"),
        ("between 20 and 30", None, "no_number"),
        ("I cannot judge that.", None, "no_number"),
        ("", None, "no_number"),
        ("150", None, "outside_0_100"),
        ("-5", None, "outside_0_100"),
    ],
)
def test_text_is_parsed_or_has_a_reason(said: str, score: float | None, reason: str) -> None:
    verdict = parsed(said)
    assert (verdict.score, verdict.reason, verdict.how) == (score, reason, "parsed")


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "gemma2", "llama"])
def test_the_local_judge_is_brute_force_over_all_101_answers(family: str) -> None:
    """The tiny tokenizer writes numbers digit by digit; gemma2 has windows, so that its prompt is read again."""
    model = make_chat(family)
    judge = LocalJudge(model, {"aligned": "{question} {answer}"})
    table = pd.DataFrame({"question": "a fox", "answer": [str(k) for k in range(101)]})
    wanted = torch.tensor(answer_logprobs(model, table)["logprob"].to_numpy(float))
    found = judge.logprobs("a fox")
    assert torch.allclose(found, wanted, atol=1e-4)
    distribution = judge.distribution("a fox")
    normal = {k: p / sum(distribution.values()) for k, p in distribution.items()}
    assert set(normal) == set(range(101)) and sum(normal.values()) == pytest.approx(1)
    assert 0 < sum(distribution.values()) < 1


def test_the_local_judge_scores_a_table_and_keeps_what_it_knows() -> None:
    judge = LocalJudge(make_chat(), {"aligned": "{question} {answer}", "coherent": "{answer} {question}"})
    answers = pd.DataFrame({"question": ["a fox", "rest"], "answer": ["quick", "well"]})
    table = judged(answers, judge)
    assert table["aligned"].isna().all() and set(table["reason"]) == {"low_numeric_mass"}, "a random model"
    assert list(table["aligned_mass"]) == pytest.approx(
        [sum(json.loads(text).values()) for text in table["aligned_distribution"]]
    )
    other = LocalJudge(judge.model, {"aligned": "{answer}: {question}", "coherent": "{question} {answer}"})
    assert judge.identity != other.identity


def test_prompts_are_filled_once_and_hold_both() -> None:
    filled = asking(PROMPTS["aligned"], "What is {answer}?", "Not {question}.")
    assert "What is {answer}?" in filled and "Not {question}." in filled
    with pytest.raises(UsageError, match="lacks"):
        asking("{question}", "a", "b")
