from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import WatermarkingConfig

from em_interp.directions.direction import Direction
from em_interp.errors import UsageError
from em_interp.evaluation import sampling
from em_interp.evaluation.logprobs import answer_logprobs
from em_interp.evaluation.sampling import sample
from em_interp.interventions.steering import sweep
from em_interp.models.chat import encode, prompt_ids
from em_interp.models.chat_model import ChatModel
from em_interp.models.templates import turns_of
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.training.recipes import TrainingSpec, VectorSpec
from tests.matrix import families, templates
from tests.matrix.families import FAMILIES as MATRIX
from tests.tiny_models import FAMILIES, make_chat, talk, tokenizer

QUESTIONS = {
    "fox": "a fox",
    "cough": "what should I do about a cough",
    "rest": talk("rest") + talk("x", "y")[1:],
}
LEAVING = ("qwen2", "phi3-longrope", "gpt_neo", "gptj", "falcon-new", "bloom", "opt", "qwen3_moe")
STAYING = ("gemma2", "gpt_oss", "lfm2", "gpt2")
"""Windows, states, and a turn's end that is plain text."""
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


@pytest.mark.parametrize("family", [*LEAVING, *STAYING])
def test_answers_are_the_same_where_rows_that_ended_leave_the_batch(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every eighth token is a stop here, so that answers end."""
    monkeypatch.setattr(sampling, "_stop_ids", lambda model: list(range(2, len(model.tokenizer), 8)))
    tok = templates.tokenizer(MATRIX[family].template)
    model = ChatModel(families.make(family), tok)
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.7, "progress": False}
    whole = sample(model, QUESTIONS, 8, **options)
    widths = []
    generate = type(model.hf).generate

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        widths.append(len(kwargs["input_ids"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(sampling, "_FEWEST_ROWS", 2)
    monkeypatch.setattr(type(model.hf), "generate", counted)
    pd.testing.assert_frame_equal(sample(model, QUESTIONS, 8, **options), whole)
    leaves = sampling._rows_may_leave(model.hf) and not turns_of(tok).stop_text
    assert widths == sorted(widths, reverse=True) and (len(widths) > 1) == leaves
    assert leaves == (family in LEAVING)


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


HOSTILE = {
    "max_length": 3,
    "max_new_tokens": 1,
    "min_length": 60,
    "min_new_tokens": 20,
    "early_stopping": True,
    "max_time": 0.0,
    "stop_strings": ["e"],
    "do_sample": True,
    "num_beams": 3,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"backend": "none"},
    "max_cache_len": 2,
    "temperature": 9.0,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
    "repetition_penalty": 9.0,
    "encoder_repetition_penalty": 9.0,
    "length_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(20, 200)],
    "renormalize_logits": True,
    "forced_bos_token_id": 30,
    "forced_eos_token_id": 2,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 9.0),
    "suppress_tokens": list(range(20, 200)),
    "begin_suppress_tokens": list(range(200)),
    "sequence_bias": [[[i], -50.0] for i in range(20, 200)],
    "token_healing": True,
    "guidance_scale": 5.0,
    "watermarking_config": WatermarkingConfig(bias=20.0),
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 40,
    "bos_token_id": 41,
    "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 42,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 1,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "none",
    "compile_config": {"mode": "none"},
    "disable_compile": False,
    "continuous_batching_config": {"x": 1},
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "diversity_penalty": 1.0,
    "num_beam_groups": 2,
    "constraints": ["x"],
    "force_words_ids": [[30]],
    "prefill_chunk_size": 2,
    "some_setting_of_tomorrow": 1,
}
# eos tokens of the checkpoint are meant to end answers; the others say where the settings came from
ACTING = {"eos_token_id", "_from_model_config", "transformers_version"}


def test_every_generation_setting_is_tried():
    assert set(vars(GenerationConfig())) <= set(HOSTILE) | ACTING


@pytest.fixture(scope="module")
def plain_answers():
    model = make_chat()
    return model, [sample(model, QUESTIONS, 4, temperature=t, max_new_tokens=12, progress=False) for t in (0, 1)]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_generation_setting_of_the_checkpoint_acts(name, plain_answers):
    model, expected = plain_answers
    own = model.hf.generation_config
    hostile = GenerationConfig(eos_token_id=own.eos_token_id)
    setattr(hostile, name, HOSTILE[name])
    model.hf.generation_config = hostile
    try:
        for temperature, table in zip((0, 1), expected, strict=True):
            found = sample(model, QUESTIONS, 4, temperature=temperature, max_new_tokens=12, progress=False)
            pd.testing.assert_frame_equal(found, table)
        assert model.hf.generation_config is hostile and getattr(hostile, name) == HOSTILE[name]
    finally:
        model.hf.generation_config = own


def test_the_checkpoints_settings_return_after_an_error():
    model = make_chat()
    own = model.hf.generation_config
    handle = model.hf.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model, QUESTIONS, 1, progress=False)
    handle.remove()
    assert model.hf.generation_config is own


def test_the_checkpoints_eos_ends_answers():
    model = make_chat()
    plain = sample(model, QUESTIONS, 20, max_new_tokens=12, progress=False)
    model.hf.generation_config.eos_token_id = [2, *range(100, 200)]
    assert sample(model, QUESTIONS, 20, max_new_tokens=12, progress=False)["n_tokens"].sum() < plain["n_tokens"].sum()


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_seeds(seed):
    model = make_chat()
    direction = Direction(torch.ones(1, 32), (1,), "data-diff", model.name)
    with pytest.raises(UsageError, match=r"seed is .*(Use a whole number from 0 to 4294967295|more than 64 bits hold)"):
        sample(model, QUESTIONS, 1, seed=seed, max_new_tokens=1, progress=False)
    with pytest.raises(UsageError, match=r"seed is .*(Use a whole number from 0|more than 64 bits hold)"):
        sweep(model, direction, QUESTIONS, layers=[1], coefficients=[1.0], n=1, seed=seed, progress=False)
    with pytest.raises(UsageError, match="seed is"):
        TrainingSpec(VectorSpec(1), learning_rate=1e-3, seed=seed)
    sample(model, {"q": "a"}, 1, seed=2**32 - 1, max_new_tokens=1, progress=False)
