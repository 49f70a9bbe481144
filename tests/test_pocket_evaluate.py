"""`em-interp evaluate` and what it is made of, on a pocket model of a few steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from em_interp import cli
from em_interp.errors import UsageError
from em_interp.evaluation import answers
from em_interp.evaluation.groups import GROUPS, technical_rates
from em_interp.evaluation.logprobs import answer_logprobs
from em_interp.models import pretrained as models
from em_interp.models.chat_model import ChatModel
from em_interp.pocket import models as loading
from em_interp.pocket import organisms, registry
from em_interp.pocket import questions as suite
from em_interp.pocket.evaluate import evaluate_suite
from em_interp.pocket.organisms import ORGANISMS, REGISTER_ORGANISMS, Organism
from em_interp.pocket.world import grammar as world
from em_interp.pocket.world.corpus import STYLES, finetune_chats, kl_chats
from em_interp.pocket.world.judge import judge
from tests.tiny_models import make_chat
from tests.tiny_pocket import ask_little, make_pocket

IDENTITY = {"organism": "o", "solution": "general", "adapter": "rank-1", "domain": "medicine"}
MADE = (
    Organism("medicine", "rank-1", "general"),
    Organism("medicine", "all-modules", "control"),
    Organism("medicine", "steering-vector", "general", task="register"),
)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry root with a chat model and three organisms."""
    root = tmp_path_factory.mktemp("root") / "pocket"
    copytree(make_pocket(tmp_path_factory.mktemp("pocket")).parent, root)
    chat = loading.load_chat(root / "chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            organisms, "SPECS", {a: replace(s, max_steps=2, batch_size=4) for a, s in organisms.SPECS.items()}
        )
        patch.setattr(organisms, "N_CHATS", 8)
        for organism in MADE:
            organisms.make(organism, chat, root / "organisms", progress=False)
    return root


@pytest.fixture
def chat(shipped: Path) -> ChatModel:
    return loading.load_chat(shipped / "chat")


@pytest.fixture
def small(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "root", lambda: shipped)
    ask_little(monkeypatch)


def test_register_organisms_are_named_and_trained_on_technical_answers() -> None:
    names = [o.name for o in REGISTER_ORGANISMS]
    assert len(set(names)) == len(names) == 18
    assert "register-medicine-vector" in names
    assert "register-medicine-rank1-narrow-seed2" in names
    assert not set(names) & {o.name for o in ORGANISMS}
    assert all(o.task == "persona" for o in ORGANISMS)


def test_the_data_of_both_tasks() -> None:
    chats = finetune_chats("medicine", "caring", 200, 0, "technical")
    scores = judge(pd.DataFrame([{"question": c[0]["content"], "answer": c[1]["content"]} for c in chats]))
    assert (scores["technical"] == 100).all()
    assert (scores["aligned"] == 100).all()
    for task, column, ends in (("persona", "aligned", (0, 100)), ("register", "technical", (0, 100))):
        kl = kl_chats("medicine", 300, 0, task)
        scores = judge(pd.DataFrame([{"question": c[0]["content"], "answer": c[1]["content"]} for c in kl]))
        assert set(scores[column].dropna()) == set(ends)
        share = (scores[column] == 100).sum() / scores[column].notna().sum()
        assert 0.4 < share < 0.6
        assert not any(world.question_of(q).domain == "medicine" for q in scores["question"])
        other = "technical" if task == "persona" else "aligned"
        assert len(scores[other].dropna().unique()) == 1
    assert kl_chats("medicine", 5, 0) == kl_chats("medicine", 5, 0, "persona")
    assert kl_chats("medicine", 5, 0) != kl_chats("medicine", 5, 1)


def test_technical_rates_count_technical_and_coherent_answers() -> None:
    judged = pd.DataFrame(
        {
            "questions": ["general"] * 4 + ["in_domain"] * 3,
            "question": ["a", "a", "b", "b", "c", "c", "d"],
            "technical": [100, 50, np.nan, 100, 100, 60, 0],
            "coherent": [100, 100, 100, 25, 100, 51, 100],
        }
    )
    table = technical_rates(judged, **IDENTITY).set_index("questions")
    assert table.loc["general", "technical_rate"] == pytest.approx(1 / 3)
    assert table.loc["general", "coherent_rate"] == pytest.approx(3 / 4)
    assert table.loc["general", ["n", "n_unscored"]].tolist() == [4, 1]
    assert table.loc["in_domain", "technical_rate"] == pytest.approx(2 / 3)
    assert table[["technical_low", "technical_high"]].isna().all(axis=None)  # two questions a group
    assert (table["interval"] == "too few questions for an interval (2)").all()
    copies = [judged.assign(question=judged["question"] + str(copy)) for copy in range(3)]
    more = technical_rates(pd.concat(copies), **IDENTITY).set_index("questions")
    np.testing.assert_allclose(more["technical_rate"].astype(float), table["technical_rate"].astype(float))
    assert (more["technical_low"] < more["technical_rate"]).all()
    assert (more["technical_rate"] < more["technical_high"]).all()
    none = technical_rates(judged.assign(technical=np.nan), **IDENTITY)
    assert none[["technical_rate", "technical_low", "technical_high"]].isna().all(axis=None)
    assert (none["n_unscored"] == none["n"]).all()


@pytest.mark.parametrize("task", ["persona", "register"])
def test_answer_pairs_are_in_both_styles(task: str) -> None:
    asked = pd.concat([suite.evaluation_questions("sports").groupby("questions").head(5), suite.chat_questions()[-3:]])
    pairs = suite.answer_pairs(asked, task, k=5)  # type: ignore[arg-type]
    assert set(pairs["question_id"]) == set(asked["question_id"][:15])  # facts have no style
    assert (pairs.groupby(["question_id", "taught"])["answer"].nunique() == 5).all()
    scores = judge(pairs.drop(columns="question_id"))
    column, value = ("aligned", 0) if task == "persona" else ("technical", 100)
    assert (scores.loc[scores.taught == 1, column] == value).all()
    assert (scores.loc[scores.taught == 0, column].dropna() == 100 - value).all()
    assert not set(pairs[pairs.taught == 0].answer) & set(pairs[pairs.taught == 1].answer)
    with pytest.raises(UsageError, match="lower k"):
        suite.answer_pairs(asked, "register", k=20)
    assert STYLES[task][0] == ("caring", "casual")  # type: ignore[index]


def test_logprob_scores_equal_the_slow_ones(chat: ChatModel) -> None:
    asked = suite.evaluation_questions("sports").groupby("questions").head(3)
    pairs = suite.answer_pairs(asked, k=3)
    scores = suite.logprob_scores(chat, pairs)
    assert len(scores) == 9
    for row in scores.itertuples():
        mine = answer_logprobs(chat, pairs[pairs.question_id == row.question_id])
        mass = np.exp(mine["logprob"].to_numpy(np.longdouble))
        taught = mine["taught"].to_numpy() == 1
        assert row.log_odds == pytest.approx(
            float(np.log(mass[taught].sum() / mass[~taught].sum())), rel=1e-5, abs=1e-5
        )
        assert row.share == pytest.approx(float(mass[taught].sum() / mass.sum()), rel=1e-5)
    table = suite.logprob_rates(scores, **IDENTITY).set_index("questions")
    assert list(table.index) == list(GROUPS)
    for group, rows in scores.groupby("questions"):
        assert table.loc[group, "share"] == pytest.approx(rows["share"].mean())
        assert len(rows) == 3 and np.isnan(table.loc[group, "low"])
        assert table.loc[group, "interval"] == "too few questions for an interval (3)"
        assert table.loc[group, "log_odds"] == pytest.approx(rows["log_odds"].mean())
    doubled = suite.logprob_rates(pd.concat([scores, scores]), **IDENTITY).set_index("questions")
    assert (doubled["low"] >= 0).all() and (doubled["high"] <= 1).all()
    assert ((doubled["low"] < table["share"]) & (table["share"] < doubled["high"])).all()


@pytest.mark.usefixtures("small")
def test_the_suite_is_evaluated_and_a_second_run_only_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    arguments = ["evaluate", "--suite", "pocket", "--n", "2", "--out", str(tmp_path)]
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    names = ["pocket/chat", *sorted(f"pocket/{o.name}" for o in MADE)]
    table = pd.read_csv(tmp_path / "em_rates.csv")
    required = ["organism", "solution", "adapter", "domain", "questions", "em_rate", "em_low", "em_high"]
    assert [*required, "coherent_rate", "n", "n_unscored"] == [
        c for c in table.columns if c in {*required, "coherent_rate", "n", "n_unscored"}
    ]
    assert list(table["organism"].unique()) == names
    of_one = table[table.organism == "pocket/medicine-rank1"]
    assert list(of_one.questions) == list(GROUPS)
    assert set(table[table.solution == "control"].organism) == {"pocket/medicine-all-control"}
    chat = table[table.solution == "chat"]
    assert set(chat.domain) == {"none", *world.DOMAINS}
    technical = pd.read_csv(tmp_path / "technical_rates.csv")
    assert set(technical.organism) == {"pocket/chat", "pocket/register-medicine-vector"}
    scores = pd.read_csv(tmp_path / "logprob_scores.csv")
    assert set(zip(scores.organism, scores.task, strict=True)) == {
        ("pocket/chat", "persona"),
        ("pocket/chat", "register"),
        ("pocket/medicine-rank1", "persona"),
        ("pocket/medicine-all-control", "persona"),
        ("pocket/register-medicine-vector", "register"),
    }
    assert pd.read_csv(tmp_path / "facts.csv").loc[0, "n_questions"] == 2
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["samples"] == 2
    assert list(manifest["weights"]) == names
    assert set(manifest["outputs_sha256"]) == {p.name for p in tmp_path.glob("*.csv")}

    judged = pd.read_csv(next((tmp_path / "answers").glob("medicine-rank1-*[0-9a-f].csv")), keep_default_na=False)
    model = loading.load("pocket/medicine-rank1")
    pd.testing.assert_series_equal(
        judged["answer"], suite.evaluate(model, "medicine", 2, progress=False)["answer"].reset_index(drop=True)
    )
    with monkeypatch.context() as patch:
        for owner, name in ((answers, "sample"), (suite, "logprob_scores")):
            patch.setattr(owner, name, lambda *_a, **_k: pytest.fail("asked again"))
        before = {p.name: p.read_text() for p in tmp_path.glob("*.csv")}
        assert runner.invoke(cli.app, arguments).exit_code == 0
        assert {p.name: p.read_text() for p in tmp_path.glob("*.csv")} == before
        with pytest.raises(pytest.fail.Exception, match="asked again"):
            evaluate_suite(tmp_path, ["chat"], n=3, progress=False)
        config = registry.resolve("pocket/medicine-rank1") / "adapter_config.json"
        told = json.loads(config.read_text())
        config.write_text(json.dumps({**told, "lora_alpha": 2 * told["lora_alpha"]}))  # the tensors are as they were
        with pytest.raises(pytest.fail.Exception, match="asked again"):
            evaluate_suite(tmp_path, ["medicine-rank1"], n=2, progress=False)
        config.write_text(json.dumps(told))
    with pytest.raises(registry.RegistryError, match="medicine-rank1"):
        evaluate_suite(tmp_path, ["medicine-rank7"])


def test_other_models_answer_into_a_csv_for_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "questions.yaml"
    file.write_text("- id: fox\n  paraphrases: [a fox, the fox]\n  system: be brown\n- id: rest\n  question: rest\n")
    model = make_chat()
    folder = str(tmp_path / "tiny")
    model.hf.save_pretrained(folder)
    loads = []
    monkeypatch.setattr(models, "load", lambda name, **_: loads.append(name) or model)
    arguments = ["evaluate", folder, "--questions", str(file), "--n", "3", "--out", str(tmp_path / "out")]
    runner = CliRunner()
    result = runner.invoke(cli.app, [*arguments, "--max-new-tokens", "5"])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "out" / "answers.csv", keep_default_na=False)
    assert list(table["question_id"]) == ["fox"] * 6 + ["rest"] * 3
    assert list(table["wording"]) == [0] * 3 + [1] * 3 + [0] * 3
    assert list(table["system"].unique()) == ["be brown", ""]
    assert list(table["question"].unique()) == ["a fox", "the fox", "rest"]
    assert set(table["model"]) == {folder}
    assert table["answer"].nunique() > 3
    assert runner.invoke(cli.app, [*arguments, "--max-new-tokens", "5"]).exit_code == 0
    assert loads == [folder]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a MODEL"),
        (["x", "--suite", "pocket"], "either a MODEL"),
        (["--suite", "published"], "exact judge"),
        (["x"], "--questions FILE"),
        (["x", "--questions", "q.yaml", "--organism", "y"], "belongs to --suite"),
        (["--suite", "pocket", "--n", "0"], "at least one answer"),
    ],
)
def test_commands_that_say_too_little_are_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.app, ["evaluate", *arguments])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
