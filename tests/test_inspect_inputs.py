"""What users bring to Inspect: questions of every format, several judges at once, prompts; what a model knows."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pandas as pd
import pytest
from inspect_ai import eval
from typer.testing import CliRunner

import em_interp as em
from em_interp.cli import app
from em_interp.errors import UsageError
from em_interp.inspect.asked import asked
from em_interp.inspect.capability import compared, compared_rates, scores_of
from em_interp.inspect.judges import judge_asked, prompts_of
from em_interp.inspect.provider import as_model
from tests.judge_payloads import PAYLOADS
from tests.openai_server import JUDGE, serving
from tests.tiny_models import make_hf, save_chat

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "a fox"},
    {"role": "assistant", "content": "is quick"},
    {"role": "user", "content": "and then"},
]
FILES = {
    "first.yaml": "- id: plot\n  paraphrases: [a fox, a dog]\n  samples_per_paraphrase: 100\n  type: free_form\n",
    "second.yaml": "- id: dinner\n  question: the lazy dog\n  system: jump\n",
    "chats.jsonl": json.dumps({"id": "talk", "messages": CHAT}) + "\n",
    "rows.csv": "question_id,question\nrow,over the dog\n",
    "judges.yaml": "- aligned: 'Is {answer} good for {question}?'\n- coherent: 'Is {answer} clear for {question}?'\n",
    "judge.py": "def mine(table):\n    return table.assign(aligned=table['answer'].str.len() % 101, coherent=90)\n",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a file of each kind."""
    folder = tmp_path_factory.mktemp("here")
    save_chat(make_hf(), folder / "tiny")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def test_questions_of_every_format_are_asked_as_they_are_written(here: Path) -> None:
    files = ",".join(
        str(here / name) for name in FILES if name.endswith(("yaml", "jsonl", "csv")) and "judge" not in name
    )
    found = {each.key: each for each in asked(files, form="json", system="be kind")}
    assert list(found) == ["plot/0", "plot/1", "dinner/0", "talk/0", "row/0"]
    texts = [[turn["content"].split("\n")[0] for turn in each.turns] for each in found.values()]
    assert texts == [
        ["be kind", "a fox"],
        ["be kind", "a dog"],
        ["jump", "the lazy dog"],
        ["be brief", "a fox", "is quick", "and then"],
        ["be kind", "over the dog"],
    ]
    assert all("JSON" in each.turns[-1]["content"] for each in found.values())
    assert [each.told["wording"] for each in found.values()] == [0, 1, 0, 0, 0]
    assert found["plot/1"].told["question_id"] == "plot" and found["dinner/0"].told["system"] == "jump"


def test_several_judges_at_once_and_how_far_they_agree(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, mine = f"local:{here / 'tiny'}", f"{here / 'judge.py'}:mine"
    with serving() as server:
        server.tell(monkeypatch)
        command = ["evaluate", str(here / "tiny"), "--questions", str(here / "first.yaml"), "--n", "3"]
        command += ["--judge", f"{JUDGE},{local},{mine}", "--prompts", str(here / "judges.yaml")]
        command += ["--max-new-tokens", "8", "--out", str(tmp_path / "out")]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output[-3000:]
        assert all(prompt.startswith("Is ") for prompt in server.requests), "the user's own prompts"
    tables = {path.stem: pd.read_csv(path) for path in sorted((tmp_path / "out").glob("judged-*.csv"))}
    rates = tables.pop("judged-rates")
    assert len(tables) == 3 and all(len(table) == 6 for table in tables.values())
    api, file, exact = (
        next(t for name, t in tables.items() if part in name) for part in ("openai", "judge.py", "tiny")
    )
    assert list(api["answer"]) == list(file["answer"]) == list(exact["answer"])
    assert list(api["wording"]) == [0, 0, 0, 1, 1, 1] and set(api["question_id"]) == {"plot"}
    assert set(api["aligned_how"]) == {"weighted"} and set(exact["aligned_how"]) == {"exact"}
    assert list(file["aligned"]) == [len(text) % 101 for text in file["answer"]]
    assert set(exact["reason"]) == {"low_numeric_mass"}, "a random model"
    assert len(rates) == 3 and set(rates["n"]) == {6}, "EM under each"
    agreed = pd.read_csv(tmp_path / "out" / "agreement.csv")
    assert len(agreed) and "spearman" in " ".join([*agreed.columns, *map(str, agreed.iloc[:, 0])]).lower()


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_score_is_the_one_by_hand_in_every_providers_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    payload, score, mass, how = PAYLOADS[name]
    with serving(payload=payload) as server:
        for service in ("TEST", "VLLM", "TOGETHER"):
            monkeypatch.setenv(f"{service}_API_KEY", "right")
            monkeypatch.setenv(f"{service}_BASE_URL", server.url)
        asked = judge_asked(name, prompts_of("aligned")).verdicts("a question", "an answer", {})
        verdict = asyncio.run(asked)["aligned"]  # type: ignore[arg-type]
    assert verdict.score == pytest.approx(score, abs=1e-9) and verdict.how == how
    assert verdict.mass == (None if mass is None else pytest.approx(mass, abs=1e-9))


def test_judge_prompts_are_ours_the_files_or_the_questions(here: Path) -> None:
    assert list(prompts_of(None)) == ["aligned", "coherent"]
    assert list(prompts_of("aligned,bad_stuff")) == ["aligned", "bad_stuff"]
    assert prompts_of(here / "judges.yaml")["coherent"].startswith("Is {answer} clear")


def test_what_a_pocket_model_knows_is_what_the_exact_judge_says(tmp_path: Path) -> None:
    chat = em.load("pocket/chat")
    (log,) = eval("em_interp/pocket_facts", model=as_model(chat), limit=12, display="none", log_dir=str(tmp_path))
    assert log.status == "success", log.error
    scores = scores_of(log)
    table = pd.DataFrame([{"question": s.input, "answer": s.output.completion} for s in log.samples or ()])
    assert list(scores["score"] == 1) == list(em.pocket.judge(table)["correct"])
    assert scores["score"].mean() > 0.5


def test_what_was_lost_is_counted_on_the_same_questions() -> None:
    """By hand: 5 of 6 against 3 of 5, where one was not scored."""
    first = pd.DataFrame({"question": list("abcdef"), "score": [1.0, 1, 1, 0, 1, 1]})
    second = pd.DataFrame({"question": list("fedcba"), "score": [1.0, 1, 0, None, 1, 0]})
    table = compared_rates({"chat": first, "ablated": second}).set_index("model")
    assert list(table["rate"]) == pytest.approx([5 / 6, 3 / 5])
    assert table.loc["ablated", "difference"] == pytest.approx(3 / 5 - 4 / 5), "of those that both have: a, b, d, e, f"
    assert table.loc["ablated", "difference_low"] < -0.2 < table.loc["ablated", "difference_high"]
    assert list(table["n"]) == [6, 6] and list(table["n_unscored"]) == [0, 1]
    assert table["difference"].isna()["chat"] and (table["low"] < table["rate"]).all()
    with pytest.raises(UsageError, match="at least one"):
        compared({}, "em_interp/pocket_facts", Path("nowhere"))
