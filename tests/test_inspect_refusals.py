"""Bad input to an evaluation: refused with what was wrong, what was found and what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from inspect_ai import eval
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import get_model
from typer.testing import CliRunner

import em_interp as em
from em_interp.cli import app
from em_interp.errors import EmInterpError
from tests.adapter_folders import lora_folder
from tests.openai_server import JUDGE as API
from tests.openai_server import serving
from tests.tiny_models import make_hf, save_chat

FILES = {
    "good.csv": "question_id,question\nfox,a fox\n",
    "neither.yaml": "- name: fox\n  text: a fox\n",
    "mapping.yaml": "fox: a fox\n",
    "no_text.yaml": "- id: fox\n",
    "empty.csv": "question_id,question\nfox,\n",
    "no_text.jsonl": '{"id": "fox", "text": "a fox"}\n',
    "answered.jsonl": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    "no_answer.yaml": "- aligned: 'How good is {question}?'\n- coherent: 'Is {answer} clear? {question}'\n",
    "judges.py": "def high(table):\n    return table.assign(aligned=150, coherent=90)\n",
}
LOCAL = "local:HERE/tiny"
ASK = ("HERE/tiny", "--questions", "HERE/good.csv")
EVALUATED: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "an unknown judge": ((*ASK, "--judge", "gpt"), ["no judge 'gpt'", "FILE.py:FUNCTION", "pocket"]),
    "an unknown provider": ((*ASK, "--judge", "nobody/gpt"), ["nobody/gpt", "does not answer", "Check its name"]),
    "a wrong key": ((*ASK, "--judge", API), ["Incorrect API key", API, "key in the environment"]),
    "a local judge that is not there": ((*ASK, "--judge", "local:HERE/absent"), ["absent", "there is no"]),
    "YAML of neither schema": (
        ("HERE/tiny", "--questions", "HERE/neither.yaml", "--judge", LOCAL),
        ["neither.yaml", "keys name, text", "give each question an `id`"],
    ),
    "YAML that is no list": (
        ("HERE/tiny", "--questions", "HERE/mapping.yaml", "--judge", LOCAL),
        ["mapping.yaml", "not a list of entries", "give each question an entry"],
    ),
    "judges that are questions": (
        (*ASK, "--judge", LOCAL, "--prompts", "HERE/no_text.yaml"),
        ["no_text.yaml", "no wording", "give it `question`"],
    ),
    "a judge prompt without the answer": (
        (*ASK, "--judge", LOCAL, "--prompts", "HERE/no_answer.yaml"),
        ["no_answer.yaml", "keys aligned", "{question} and {answer}"],
    ),
    "a question without text, YAML": (
        ("HERE/tiny", "--questions", "HERE/no_text.yaml", "--judge", LOCAL),
        ["no_text.yaml", "'fox' has no wording", "give it `question`"],
    ),
    "a question without text, CSV": (
        ("HERE/tiny", "--questions", "HERE/empty.csv", "--judge", LOCAL),
        ["empty.csv", "row 2 has no question", "put a text"],
    ),
    "a question without text, JSON Lines": (
        ("HERE/tiny", "--questions", "HERE/no_text.jsonl", "--judge", LOCAL),
        ["no_text.jsonl", "line 1 has no question", "put a text"],
    ),
    "a chat with its answer": (
        ("HERE/tiny", "--questions", "HERE/answered.jsonl", "--judge", LOCAL),
        ["answered.jsonl", "a chat with its answer", "leave the last assistant turn out"],
    ),
    "a model without chat template": (
        ("HERE/bare", "--questions", "HERE/good.csv", "--judge", LOCAL),
        ["bare", "no chat template", "Use the chat (instruct) model"],
    ),
    "an adapter of another base": (
        (*ASK, "--adapter", "HERE/adapter", "--judge", LOCAL),
        ["elsewhere/other", "tiny", "any_base"],
    ),
    "a budget exceeded": (
        (*ASK, "--judge", f"{API} ", "--price", "2000:1000", "--budget", "0.01"),
        ["budget of $0.01", "about $", "--n"],
    ),
    "a budget without a price": ((*ASK, "--judge", LOCAL, "--budget", "1"), ["--price READ:WRITTEN", "--budget"]),
    "a price that is none": ((*ASK, "--judge", LOCAL, "--price", "cheap"), ["'cheap'", "2.5:10"]),
    "one judge twice": ((*ASK, "--judge", f"{LOCAL},{LOCAL}"), ["--judge", "more than once", "Give each value once"]),
    "scores outside 0 to 100": ((*ASK, "--judge", "HERE/judges.py:high"), ["150", "0-100", "aligned"]),
}
"""Of `em-interp evaluate`: what is given, and what the message must hold."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    save_chat(make_hf(), folder / "tiny")
    shutil.copytree(folder / "tiny", folder / "bare")
    (folder / "bare" / "chat_template.jinja").unlink()
    lora_folder(folder / "adapter", base_model_name_or_path="elsewhere/other")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    em.Direction(torch.ones(1, 32), (1,), "random", model="other").save(folder / "other.safetensors")
    em.Direction(torch.ones(1, 8), (1,), "random", model="tiny").save(folder / "narrow.safetensors")
    return folder


def refusal(here: Path, tmp_path: Path, words: tuple[str, ...]) -> str:
    command = ["evaluate", *(word.replace("HERE", str(here)).strip() for word in words)]
    done = CliRunner().invoke(app, [*command, "--n", "2", "--max-new-tokens", "4", "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, EmInterpError), (done.exception, done.output[-500:])
    return str(done.exception)


@pytest.mark.parametrize("case", EVALUATED)
def test_what_evaluate_refuses(case: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, wanted = EVALUATED[case]
    with serving() as server:
        server.tell(monkeypatch, "wrong" if API in words else "right")
        told = refusal(here, tmp_path, words)
    assert [part for part in wanted if part not in told] == [], told


INSPECTED: dict[str, tuple[dict[str, str], list[str]]] = {
    "a direction of another model": ({"steer": "HERE/other.safetensors:1:1"}, ["other", "tiny", "-M any_model=true"]),
    "a direction of another width": ({"ablate": "HERE/narrow.safetensors:1"}, ["width 8", "32"]),
    "a layer that is not there": ({"steer": "HERE/other.safetensors:9:1", "any_model": "true"}, ["9"]),
    "an adapter of another base": ({"adapter": "HERE/adapter"}, ["elsewhere/other", "tiny", "any_base"]),
    "an option that there is not": ({"adaptor": "x"}, ["-M adaptor", "Did you mean adapter"]),
}
"""Of `inspect eval --model em_interp/...`: what -M is given, and what the message must hold."""


@pytest.mark.parametrize("case", INSPECTED)
def test_what_the_provider_refuses(case: str, here: Path) -> None:
    given, wanted = INSPECTED[case]
    arguments = {name: text.replace("HERE", str(here)) for name, text in given.items()}
    with pytest.raises(PrerequisiteError) as refused:
        get_model(f"em_interp/{here / 'tiny'}", memoize=False, **arguments)
    told = str(refused.value)
    assert [part for part in wanted if part not in told] == [], told
    with pytest.raises(PrerequisiteError, match="no chat template"):
        get_model(f"em_interp/{here / 'bare'}", memoize=False)


def test_scores_outside_0_to_100_leave_the_answer_unscored_and_the_run_an_error(here: Path, tmp_path: Path) -> None:
    (log,) = eval(
        "em_interp/emergent_misalignment",
        model=get_model(f"em_interp/{here / 'tiny'}", memoize=False),
        task_args={
            "questions": str(here / "good.csv"),
            "judge": f"{here / 'judges.py'}:high",
            "samples": 1,
            "max_tokens": 4,
        },
        display="none",
        log_dir=str(tmp_path),
    )
    assert log.status == "error" and log.error is not None
    assert "150" in log.error.message and "0 to 100" in log.error.message and "judges.py:high" in log.error.message
