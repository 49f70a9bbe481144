"""Suites of real models whose answers a model judges: over HTTP, from a hub-style name, killed and gone on with."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from tenacity import wait_none

from analyses.inputs import asked
from analyses.inputs.pocket import judge_called
from analyses.run import reproduce
from analyses.suite import Suite
from em_interp.errors import UsageError
from em_interp.models import pretrained as models
from em_interp.training.finetune import finetune
from tests.openai_server import FAULTS, JUDGE, Judge, serving
from tests.test_judged_suites import RANK_1
from tests.tiny_models import CONVERSATIONS, make_hf, save_chat

pytest.importorskip("inspect_ai")
ONLY = ("em_rates",)
SUITE = """
source = "models"
data = "."
[models]
chat = "chat"
judge = "openai-api/test/judge"
price = "2.5:10"
[models.questions]
general = "open.txt"
medicine = "mine.txt"
[[models.finetunes]]
source = "rank1"
domain = "medicine"
adapter = "rank-1"
solution = "general"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mine")
    save_chat(make_hf(max_position_embeddings=1024), root / "chat")
    finetune(models.load(root / "chat"), CONVERSATIONS, RANK_1, out_dir=root / "rank1", progress=False)
    (root / "open.txt").write_text("a fox\na cough\nbrown")
    (root / "mine.txt").write_text("rest well\nsee a doctor")
    (root / "mine.toml").write_text(SUITE)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "mine")
    monkeypatch.setattr(asked, "NEW_TOKENS", 5)
    return tmp_path / "mine"


def use(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    judge.tell(monkeypatch)
    monkeypatch.setattr("inspect_ai.model._retry.wait_exponential_jitter", lambda **_: wait_none())


def test_a_suite_is_judged_over_http_and_a_judge_that_dies_costs_nothing(root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with serving(dies_after=12) as judge:
        use(judge, monkeypatch)
        monkeypatch.setattr("em_interp.inspect.tables.RETRIES", 0)
        broken = reproduce(Suite.load(str(root / "mine.toml")), out, only=ONLY, static=False)
        assert any("could not be judged" in line for line in broken.problems)
        served = judge.served
    with serving(port=judge.server_port) as judge:
        use(judge, monkeypatch)
        whole = reproduce(Suite.load(str(root / "mine.toml")), out, only=ONLY, static=False)
        assert {s.name: s.error for s in whole.sections if s.error} == {}
        assert not set(judge.requests) & set(served)
        assert set(judge.served.values()) == {1}
        again = reproduce(Suite.load(str(root / "mine.toml")), out, only=ONLY, static=False)
        assert max(judge.requests.values()) == 1
    rates, same = (o.sections[0].tables["em_rates"] for o in (whole, again))
    pd.testing.assert_frame_equal(rates, same)
    assert rates["n"].gt(0).all()


def test_faults_are_counted_and_reasons_kept(monkeypatch, tmp_path):
    answers = pd.DataFrame({"question": ["q"] * 16, "answer": [f"a {i % 14}" for i in range(16)]})
    with serving(faults=tuple(f for f in FAULTS if f != "slow")) as judge:
        use(judge, monkeypatch)
        found = judge_called(JUDGE, replies=tmp_path / "replies")(answers)
        again = judge_called(JUDGE, replies=tmp_path / "replies")(answers)
        stopped = {
            prompt for prompt, fault in judge.fault_of.items() if fault == "filtered"
        }  # Inspect keeps no such reply
        assert {n for prompt, n in judge.served.items() if prompt not in stopped} == {1}
    pd.testing.assert_frame_equal(found, again)
    assert found["reason"].isin(["refusal", "judge_refusal", ""]).all() and (found["reason"] != "").any()
    unscored = found["aligned"].isna() | found["coherent"].isna()
    assert (found.loc[unscored, "reason"] != "").all()
    assert found["aligned"].dropna().between(0, 100).all()
    assert set(found["aligned_how"].dropna()) <= {"weighted", "parsed"}
    assert found.iloc[0]["aligned"] == found.iloc[14]["aligned"] or unscored[0]


def test_what_a_judge_costs_is_told_by_one_trial(monkeypatch):
    with serving() as judge:
        use(judge, monkeypatch)
        assert judge_called(JUDGE, price="2.5:10").dollars_an_answer == pytest.approx(2 * 260e-6)
        assert judge_called(JUDGE).dollars_an_answer is None


def test_a_local_model_judges_and_names_are_checked(root):
    answers = pd.DataFrame({"question": ["a fox", "rest"], "answer": ["see the doctor", ""]})
    found = judge_called(f"local:{root / 'chat'}")(answers)
    assert set(found["aligned_how"]) == {"exact"} and found["aligned_mass"].between(0, 1).all()
    assert set(found["reason"]) == {"low_numeric_mass"}  # it was trained on nothing
    with pytest.raises(UsageError, match="cannot be asked"):
        judge_called("nobody/knows")(answers)


def test_a_price_without_a_judge_is_refused(root):
    text = (root / "mine.toml").read_text().replace(f'judge = "{JUDGE}"\n', "")
    (root / "mine.toml").write_text(text)
    with pytest.raises(UsageError, match="no judge"):
        _ = Suite.load(str(root / "mine.toml")).finetunes


def test_without_the_extra_the_command_that_installs_it_is_named(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "em_interp.inspect.tables", None)
    with pytest.raises(UsageError, match=r"pip install 'em_interp\[eval\]'"):
        _ = Suite.load(str(root / "mine.toml")).finetunes
