"""The evaluation in Inspect: the pocket suite's rates, judges behind an API with all their faults, runs that go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from inspect_ai import eval
from inspect_ai._util.error import PrerequisiteError
from typer.testing import CliRunner

import em_interp as em
from em_interp.cli import app
from em_interp.errors import UsageError
from em_interp.evaluation.groups import rates_by_group
from em_interp.inspect.provider import as_model
from em_interp.inspect.run import Price, judged_tables, refuse_above, run, try_judge
from em_interp.pocket.questions import evaluation_questions
from tests.openai_server import FAULTS, JUDGE, serving

QUESTIONS = "question_id,question\n" + "".join(
    f'{i},"{q}"\n' for i, q in enumerate(list(em.pocket.open_questions().values())[:6])
)


@pytest.fixture(scope="module")
def chat() -> em.ChatModel:
    return em.load("pocket/medicine-all")


@pytest.fixture
def questions(tmp_path: Path) -> str:
    file = tmp_path / "asked.csv"
    file.write_text(QUESTIONS)
    return str(file)


def judged(chat: em.ChatModel, out: Path, questions: str, **more: Any) -> tuple[Any, pd.DataFrame]:
    settings: dict[str, Any] = {"judge": [JUDGE], "samples": 2, "max_tokens": 40, "display": "none", **more}
    log = run(as_model(chat), out, questions=questions, **settings)
    return log, judged_tables(log)[JUDGE]


def test_the_rates_are_those_of_the_pocket_suite(chat: em.ChatModel, tmp_path: Path) -> None:
    """Same questions, same seeds: not the same up to noise, the same answers."""
    (log,) = eval(
        "em_interp/emergent_misalignment",
        model="em_interp/pocket/medicine-all",
        task_args={"samples": 1},
        seed=3,
        limit=16,
        sample_shuffle=1,
        display="none",
        log_dir=str(tmp_path),
    )
    assert log.status == "success", log.error
    (table,) = judged_tables(log).values()
    suite = evaluation_questions("medicine")
    asked = suite[suite["question_id"].isin(table["question_id"])]
    assert (table["reason"] == "").all(), "every answer has both scores"
    assert set(asked["questions"]) == {"general", "in_domain", "heldout_domain"}
    texts = dict(zip(asked["question_id"], asked["question"], strict=True))
    wanted = em.pocket.judge(em.sample(chat, texts, 1, seed=3, max_new_tokens=80, progress=False))
    wanted = wanted.merge(asked[["question_id", "questions"]], on="question_id")
    keys = ["question_id", "sample"]
    both = table.merge(wanted, on=keys, validate="1:1", suffixes=("", "_suite"))
    assert len(both) == len(table) == len(wanted)
    for name in ("answer", "aligned", "coherent", "questions"):
        assert list(both[name]) == list(both[f"{name}_suite"]), name
    identity = {"organism": "o", "solution": "general", "adapter": "full", "domain": "medicine"}
    rates = [rates_by_group(each, **identity)[["questions", "em_rate", "n"]] for each in (table, wanted)]
    pd.testing.assert_frame_equal(*[each.sort_values("questions", ignore_index=True) for each in rates])
    shown = log.results.scores[0].metrics
    for row in rates[1].itertuples():
        assert shown[f"{row.questions}_em_rate"].value == pytest.approx(row.em_rate)
    assert shown["em_rate"].value == pytest.approx(em.em_rates(wanted).em_scored.value)


def test_every_fault_of_an_api_is_seen_and_no_answer_is_judged_twice(
    chat: em.ChatModel, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(faults=FAULTS) as server:
        server.tell(monkeypatch)
        log, table = judged(chat, tmp_path / "out", questions, judge_seconds=2)
        made = sum(server.requests.values())
        twice = {server.fault_of[prompt] for prompt, n in server.served.items() if n > 1}
        assert twice <= {"slow", "filtered"} and made > len(server.requests)
        asked_again = {server.fault_of[prompt] for prompt, n in server.requests.items() if n > 1}
        assert asked_again >= {"429", "500", "slow", "malformed"}
        again, same = judged(chat, tmp_path / "out", questions, judge_seconds=2)
        assert sum(server.requests.values()) == made, "a finished run asks for nothing"
    assert log.status == again.status == "success"
    pd.testing.assert_frame_equal(table, same)
    assert len(table) == 12 and server.logprobs_asked == {(True, 20, 0.0)}
    assert {"refusal", "judge_refusal", ""} == set(table["reason"])
    assert set(table["aligned_how"]) >= {"weighted", "parsed"}
    assert table.loc[table["aligned"].isna() | table["coherent"].isna(), "reason"].ne("").all()
    rates = em.em_rates(table)
    assert rates.n == 12 and rates.n_scored == int((table["reason"] == "").sum())
    parsed = table["aligned_how"].eq("parsed") & table["aligned"].notna()
    assert table.loc[parsed, "aligned_mass"].isna().all()


def test_a_judge_that_dies_costs_nothing_that_was_judged(
    chat: em.ChatModel, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once: dict[str, Any] = {"samples": 1, "retries": 0}
    with serving(dies_after=8) as server:
        server.tell(monkeypatch)
        port, first = server.server_port, server
        log, table = judged(chat, tmp_path / "out", questions, **once)
    assert log.status == "error" and len(table) == 6
    lost = table["reason"] == "judge_error"
    assert 0 < lost.sum() < 6 and table.loc[lost, "answer"].str.len().gt(0).all()
    assert em.em_rates(table).n == 6
    with serving(port=port) as server:
        log, whole = judged(chat, tmp_path / "out", questions, **once)
        assert log.status == "success" and len(whole) == 6 and (whole["reason"] == "").all()
        assert not set(server.served) & set(first.served), "what was judged is not judged again"
        assert set((first.served + server.served).values()) == {1}
    assert list(whole["answer"]) == list(table["answer"])


def test_a_killed_run_goes_on(questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["evaluate", "pocket/medicine-all", "--questions", questions]
    command += ["--judge", JUDGE, "--n", "2", "--max-new-tokens", "40", "--out", str(tmp_path / "out")]
    with serving(holds_after=8) as server:
        server.tell(monkeypatch)
        started = [sys.executable, "-m", "em_interp.cli", *command]
        process = subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
        begun = time.monotonic()
        while sum(server.served.values()) < 8 and process.poll() is None and time.monotonic() - begun < 120:
            time.sleep(0.05)
        time.sleep(1.5)  # replies that are on their way arrive, and are kept
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed, before = time.monotonic(), set(server.served)
        server.holds_after = None
        server.released.set()
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output[-3000:]
        table = pd.read_csv(tmp_path / "out" / "judged.csv")
        assert len(table) == 12 and table[["aligned", "coherent"]].notna().all(axis=None)
        judged = {prompt for prompt in before if "How are you?" not in prompt}
        asked_again = {prompt for at, prompt in server.asked_at if at > killed}
        assert len(judged) >= 6 and asked_again and not judged & asked_again
    assert "tokens read" in done.stdout and "judged.csv" in done.stdout
    assert (tmp_path / "out" / "judged-rates.csv").is_file()


def test_a_budget_and_a_judge_that_does_not_answer_are_found_before_anything_is_sampled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving() as server:
        server.tell(monkeypatch)
        used = try_judge(JUDGE, None)
        assert (used.input_tokens, used.output_tokens) == (200, 2)
        assert refuse_above(1.0, Price.of("2:10"), used, 100) == pytest.approx(100 * (200 * 2 + 2 * 10) / 1e6)
        with pytest.raises(UsageError, match=r"\$0.42.*budget of \$0.10"):
            refuse_above(0.10, Price.of("20:100"), used, 100)
        server.tell(monkeypatch, key="wrong")
        with pytest.raises(UsageError, match=r"Incorrect API key.*environment"):
            try_judge(JUDGE, None)
    with pytest.raises(UsageError, match="does not answer"):
        try_judge("nobody/judge", None)
    with pytest.raises(UsageError, match="READ:WRITTEN"):
        Price.of("cheap")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"judge": "gpt"}, "no judge 'gpt'"),
        ({"judge": "nobody/model"}, "cannot be asked"),
        ({"questions": "opne"}, "no questions 'opne'"),
        ({"questions": "absent.yaml"}, "absent.yaml"),
        ({"form": "xml"}, "plain, json, template"),
        ({"criterion": "strict"}, "papers"),
        ({"samples": 0}, "at least 1"),
        ({"prompts": "absent.yaml", "judge": "local:pocket/chat"}, "absent.yaml"),
        ({"prompts": "alinged,coherent", "judge": "local:pocket/chat"}, "alinged"),
        ({"questions": "open,open"}, "more than once"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_remedy(arguments: dict[str, Any], said: str, chat: em.ChatModel) -> None:
    with pytest.raises(PrerequisiteError, match=said):
        eval("em_interp/emergent_misalignment", model=as_model(chat), task_args=arguments, display="none")
