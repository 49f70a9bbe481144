from __future__ import annotations

import pandas as pd
import pytest
import torch

from em_interp import cli
from em_interp.cli.options import questions_asked
from em_interp.directions.direction import Direction
from em_interp.errors import UsageError
from em_interp.evaluation.sampling import sample
from em_interp.interventions.intervening import intervening
from em_interp.interventions.steering import Steer, residual_norms
from em_interp.models import pretrained as models
from tests.tiny_models import make_hf, save_chat


@pytest.fixture
def given(tmp_path):
    """A model's folder, a direction's file and a file of questions."""
    save_chat(make_hf(), tmp_path / "tiny")
    vectors = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    Direction(vectors, (0, 1, 2, 3), "data-diff", model="tiny").save(tmp_path / "mean.safetensors")
    (tmp_path / "asked.csv").write_text("question_id,question\nfox,a fox\ncough,a cough\n")
    return tmp_path


def run(monkeypatch, *arguments):
    """The command's exit status."""
    monkeypatch.setattr("sys.argv", ["em-interp", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_steer(given, monkeypatch):
    out = given / "made" / "answers.csv"
    common = [given / "tiny", given / "mean.safetensors", "--layer", 1, "--layer", 2, "--coefficient", 0]
    more = ["--coefficient", 0.5, "--questions", given / "asked.csv", "--prompt", "see", "-n", 2, "--seed", 4]
    ends = ["--random", 1, "--max-new-tokens", 4, "--residual", "--out", out]
    assert run(monkeypatch, "steer", *common, *more, *ends) == 0
    table = pd.read_csv(out, keep_default_na=False)
    assert len(table) == 2 * 2 * 2 * 3 * 2 and set(table["direction"]) == {"mean", "random 0"}
    model = models.load(given / "tiny")
    questions = {"fox": "a fox", "cough": "a cough", "prompt_0": "see"}
    direction = Direction.load(given / "mean.safetensors")
    steer = Steer.of_residual(direction, 2, 0.5, residual_norms(model, questions)[2])
    with intervening(model, [steer]):
        alone = sample(model, questions, 2, seed=4, max_new_tokens=4, progress=False)
    cell = table[(table["direction"] == "mean") & (table["layer"] == 2) & (table["coefficient"] > 0)]
    assert list(cell["answer"]) == list(alone["answer"]) and list(cell["question_id"]) == list(alone["question_id"])


def test_ablate(given, monkeypatch):
    out = given / "answers.csv"
    common = ["ablate", given / "tiny", given / "mean.safetensors"]
    asked = ["--prompt", "a fox", "-n", 2, "--random", 1, "--max-new-tokens", 4]
    assert run(monkeypatch, *common, *asked, "--from-layer", 1, "--out", out) == 0
    table = pd.read_csv(out, keep_default_na=False)
    assert list(table["arm"]) == ["none"] * 2 + ["single"] * 2 + ["random 0"] * 2
    assert run(monkeypatch, *common, "--from-layer", 1, "--save", given / "without") == 0
    assert models.load(given / "without").n_layers == 4


@pytest.mark.parametrize(
    "change,says",
    [
        (["--layer", "9"], "layer 9"),
        (["--scope", "answer"], "prompt, response"),
        (["--coefficient", "nan"], "finite"),
        (["--prompt", ""], "empty"),
        (["--out", "/proc/none/answers.csv"], "could not be written"),
    ],
)
def test_bad_input_is_one_message(given, monkeypatch, capsys, change, says):
    arguments = {"--layer": "1", "--coefficient": "1", "--prompt": "a fox", "--out": str(given / "a.csv")}
    arguments |= {"--max-new-tokens": "2", "--samples": "1", change[0]: change[1]}
    flat = [x for pair in arguments.items() for x in pair]
    status = run(monkeypatch, "steer", given / "tiny", given / "mean.safetensors", *flat)
    assert status == 2
    assert says in capsys.readouterr().err
    assert not (given / "a.csv").exists()


def test_directions_of_other_models(given, monkeypatch, capsys):
    direction = Direction.load(given / "mean.safetensors")
    direction.for_model("Qwen2.5-14B").save(given / "other.safetensors")
    Direction(torch.ones(2, 16), (0, 1), "random").save(given / "narrow.safetensors")
    ends = ["--layer", 1, "--coefficient", 1, "--prompt", "see", "-n", 1, "--max-new-tokens", 2]
    ends += ["--out", given / "a.csv", "--random", 0]
    assert run(monkeypatch, "steer", given / "tiny", given / "other.safetensors", *ends) == 2
    assert "Qwen2.5-14B" in capsys.readouterr().err
    assert run(monkeypatch, "steer", given / "tiny", given / "narrow.safetensors", *ends) == 2
    assert "width 16" in capsys.readouterr().err
    assert run(monkeypatch, "steer", given / "tiny", given / "other.safetensors", *ends, "--any-model") == 0
    for wrong in (["--out", given / "b.csv"], [], ["--save", given / "s", "--prompt", "see"], ["--save", given / "s"]):
        assert run(monkeypatch, "ablate", given / "tiny", given / "mean.safetensors", *wrong) == 2
    assert not (given / "b.csv").exists()


def test_prompts_join_the_questions_of_a_file(tmp_path, capsys):
    text = tmp_path / "mine.txt"
    text.write_text("one\n\n two \n")
    asked = questions_asked(text, ["three"])
    assert {key: turns[-1]["content"] for key, turns in asked.items()} == {
        "mine_0": "one",
        "mine_1": "two",
        "prompt_0": "three",
    }
    assert "mine.txt: 2 questions, 2 ids, 1 wording each" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("question_id,question\nprompt_0,x\n")
    for path, prompts, told in (
        (None, [], "--prompt"),
        (None, [" "], "empty"),
        (tmp_path / "t.csv", ["y"], "prompt_0"),
    ):
        with pytest.raises(UsageError, match=told):
            questions_asked(path, prompts)
