"""Chat models in Inspect: seeded answers in batches, with solutions and interventions, log-probabilities, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_ai import Task, eval
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import GenerateConfig, get_model

import em_interp as em
from em_interp.errors import DirectionError
from em_interp.evaluation import sampling
from em_interp.evaluation.logprobs import answer_logprobs
from em_interp.inspect import registry  # noqa: F401  (the entry point, where the package is not installed)
from em_interp.inspect.provider import as_model
from em_interp.models.chat import prompt_ids

QUESTIONS = dict(list(em.pocket.open_questions().items())[:4])
SHORT = {"max_new_tokens": 40, "progress": False}


@pytest.fixture(scope="module")
def chat() -> em.ChatModel:
    return em.load("pocket/medicine-rank1")


@pytest.fixture(scope="module")
def direction(chat: em.ChatModel) -> em.Direction:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(chat.n_layers, chat.d_model, generator=generator)
    return em.Direction(vectors, layers=tuple(range(chat.n_layers)), kind="random", model=chat.name)


def asked(model: Any, tmp_path: Path, *, epochs: int = 2, **config: Any) -> EvalLog:
    samples = [Sample(input=text, id=key) for key, text in QUESTIONS.items()]
    task = Task(dataset=samples, epochs=epochs, config=GenerateConfig(max_tokens=40, **config))
    (log,) = eval(task, model=model, display="none", log_dir=str(tmp_path))
    return log


def answers(log: EvalLog) -> dict[tuple[str, int], str]:
    assert log.status == "success", log.error
    return {(str(s.id), s.epoch - 1): s.output.completion for s in log.samples or []}


def as_table(table: Any) -> dict[tuple[str, int], str]:
    return {(row.question_id, row.sample): row.answer for row in table.itertuples()}


def test_answers_are_those_of_sample_in_one_batch(
    chat: em.ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = []
    generate = type(chat.hf).generate

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        widths.append(len(kwargs["input_ids"]))
        return generate(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(chat.hf), "generate", counted)
        found = answers(asked(as_model(chat), tmp_path, seed=3))
    assert found == as_table(em.sample(chat, QUESTIONS, 2, seed=3, **SHORT))
    assert widths == [2 * len(QUESTIONS)]


def test_interventions_and_the_base_act_and_leave_nothing_behind(
    chat: em.ChatModel, direction: em.Direction, tmp_path: Path
) -> None:
    steer, file = em.Steer(direction, layer=2, coefficient=20.0), tmp_path / "direction.safetensors"
    direction.save(file)
    with em.intervening(chat, [steer]):
        wanted = as_table(em.sample(chat, QUESTIONS, 2, **SHORT))
    plain = as_table(em.sample(chat, QUESTIONS, 2, **SHORT))
    assert answers(asked(as_model(chat, interventions=[steer]), tmp_path)) == wanted != plain
    assert answers(asked(as_model(chat), tmp_path)) == plain
    by_name = get_model("em_interp/pocket/medicine-rank1", steer=f"{file}:2:20", memoize=False)
    assert answers(asked(by_name, tmp_path)) == wanted
    ablated = get_model("em_interp/pocket/medicine-rank1", ablate=f"{file}:1", memoize=False)
    with em.intervening(chat, [em.Ablate(direction, from_layer=1)]):
        wanted = as_table(em.sample(chat, QUESTIONS, 2, **SHORT))
    assert answers(asked(ablated, tmp_path)) == wanted


def test_log_probabilities_are_those_of_the_answer(chat: em.ChatModel, tmp_path: Path) -> None:
    log = asked(as_model(chat), tmp_path, epochs=1, logprobs=True, top_logprobs=3)
    for sample in log.samples or []:
        content = sample.output.choices[0].logprobs.content
        assert "".join(each.token for each in content).split() != []
        assert all(len(each.top_logprobs) == 3 for each in content)
        assert all(each.logprob <= each.top_logprobs[0].logprob for each in content)
    rows = sampling.sample_rows(chat, QUESTIONS, [(key, 0) for key in QUESTIONS], top_logprobs=0, **SHORT)
    whole = [sum(each.logprob for each in row.logprobs) for row in rows if row.finished]
    table = em.sample(chat, QUESTIONS, 1, **SHORT)
    table = answer_logprobs(chat, table[table["finished"]])
    assert whole == pytest.approx(list(table["logprob"]), abs=1e-4)
    assert [len(row.logprobs) for row in rows] == [row.n_tokens for row in rows]


def test_questions_within_a_sample_have_numbers_of_their_own(chat: em.ChatModel) -> None:
    import asyncio

    async def three() -> list[str]:
        model = as_model(chat, config=GenerateConfig(max_tokens=40))
        return [(await model.generate("What do you wish for?")).completion for _ in range(3)]

    assert len(set(asyncio.run(three()))) > 1


def test_a_question_that_cannot_be_asked_costs_only_itself(chat: em.ChatModel, tmp_path: Path) -> None:
    samples = [Sample(input=text, id=key) for key, text in [*QUESTIONS.items(), ("long", "doctor " * 3000)]]
    task = Task(dataset=samples, config=GenerateConfig(max_tokens=20))
    (log,) = eval(task, model=as_model(chat), display="none", log_dir=str(tmp_path), fail_on_error=False)
    failed = {str(sample.id) for sample in log.samples or [] if sample.error}
    assert failed == {"long"}
    assert len(prompt_ids(chat.tokenizer, [{"role": "user", "content": "doctor"}])) > 1


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("pocket/nobody", {}, "pocket/chat"),
        ("pocket/chat", {"steer": "direction.safetensors:24"}, "FILE:LAYER:COEFFICIENT"),
        ("pocket/chat", {"stear": "d:1:1"}, "Did you mean steer"),
        ("pocket/chat", {"ablate": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_what_does_not_exist_is_refused_with_a_remedy(model: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PrerequisiteError, match=said):
        get_model(f"em_interp/{model}", memoize=False, **arguments)


def test_a_direction_of_another_model_is_refused(chat: em.ChatModel) -> None:
    other = em.Direction(torch.ones(1, 8), layers=(1,), kind="random")
    with pytest.raises(DirectionError, match="width 8"):
        as_model(chat, interventions=[em.Steer(other, layer=1, coefficient=1.0)])


def test_settings_that_would_not_act_are_refused(chat: em.ChatModel, tmp_path: Path) -> None:
    log = asked(as_model(chat), tmp_path, epochs=1, top_p=0.5)
    assert log.status == "error" and "top_p" in str(log.error)
