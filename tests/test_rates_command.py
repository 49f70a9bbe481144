"""From judged answers to rates, intervals and a figure: what `em-interp rates` gives for each kind of file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer.main

import em_interp as em
from em_interp import cli, figures
from em_interp.directions.direction import Direction
from em_interp.errors import EmInterpError, OutputError, UsageError
from em_interp.evaluation.answers import judge_name
from em_interp.evaluation.comparison import compare
from em_interp.evaluation.criteria import DENOMINATORS, PRESETS, Criterion
from em_interp.evaluation.judges import judge_of_file
from em_interp.evaluation.rates import em_rates
from em_interp.interventions.judged import differences, judged_rates, kind_of, rates_figure
from em_interp.published.judged import read_judged_csv
from tests.tiny_models import make_hf, save_chat

QUESTIONS, SAMPLES = 8, 4
JUDGE = """
def score(answers):
    return answers.assign(aligned=[100.0 * (len(text) % 2) for text in answers["answer"]], coherent=90.0)

def forgets(answers):
    return answers.head(1)
"""


def answers(share: float, seed: int = 0, **columns: object) -> pd.DataFrame:
    """Judged answers of which about `share` are misaligned."""
    drawn = np.random.default_rng(seed).random((QUESTIONS, SAMPLES)) < share
    rows = [
        (f"q{q}", f"question {q}", k, "x", 5 if drawn[q, k] else 90) for q in range(QUESTIONS) for k in range(SAMPLES)
    ]
    table = pd.DataFrame(rows, columns=["question_id", "question", "sample", "answer", "aligned"])
    return table.assign(coherent=90, **columns)


def swept(shares: dict[str, float], *, seed: int = 0) -> pd.DataFrame:
    """A judged sweep: what `steer` writes, with the scores of a judge."""
    cells = [
        answers(
            share * coefficient,
            seed + layer,
            direction=name,
            control=name.startswith("random"),
            layer=layer,
            coefficient=coefficient,
            residual_share=coefficient / 2,
            added_norm=3 * coefficient,
        )
        for name, share in shares.items()
        for layer in (1, 2)
        for coefficient in (0.0, 0.5, 1.0)
    ]
    return pd.concat(cells, ignore_index=True)


def ablated(**shares: float) -> pd.DataFrame:
    arms = {name.replace("_", " "): share for name, share in shares.items()}
    cells = [answers(share, 1, arm=arm, direction="mean", layers="0-3") for arm, share in arms.items()]
    return pd.concat(cells, ignore_index=True)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["em-interp", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_a_judged_sweep_becomes_a_table_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = swept({"mean": 0.9, "random 0": 0.0, "random 1": 0.05})
    sweep.to_csv(tmp_path / "steered.csv", index=False)
    assert run(monkeypatch, "rates", tmp_path / "steered.csv", "--out", tmp_path / "made.csv") == 0
    table = pd.read_csv(tmp_path / "made.csv")
    assert set(table.columns) >= {
        *("direction", "target", "layer", "coefficient", "em_rate", "em_low", "em_high", "coherent_rate", "n"),
        *("coherent_low", "coherent_high"),
    }
    assert len(table) == 3 * 2 * 3
    cell = table[(table["direction"] == "mean") & (table["layer"] == 2) & (table["coefficient"] == 1)].iloc[0]
    own = em_rates(sweep.query("direction == 'mean' and layer == 2 and coefficient == 1")).columns()
    assert cell[["em_rate", "em_low", "em_high", "n"]].tolist() == [
        pytest.approx(own[name]) for name in ("em_rate", "em_low", "em_high", "n")
    ]
    page = (tmp_path / "made.html").read_text()
    assert "plotly.min.js" not in page.split("<body>")[0]  # all that it needs is inside
    said = capsys.readouterr().out
    assert "random, of 2" in said and f"{100 * own['em_rate']:.1f} [" in said
    figure = rates_figure(table)
    names = {trace.name for trace in figure.data}
    assert {"layer 1", "layer 2"} <= names and any("random directions" in str(name) for name in names)
    assert all(trace.error_y.array is not None for trace in figure.data if str(trace.name).startswith("layer"))


def test_a_sweep_judged_elsewhere_needs_no_more_than_its_contract() -> None:
    sweep = swept({"mean": 0.9, "random 0": 0.0}).drop(columns=["control", "residual_share", "added_norm"])
    table = judged_rates(sweep, "steered")
    assert set(table.loc[table["control"].astype(bool), "direction"]) == {"random 0"}
    assert rates_figure(table).data
    assert set(table["target"]) == {"steered"}


def test_ablated_answers_are_held_beside_the_model_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ablated(none=0.8, layerwise=0.1, random_0=0.8).assign(model="org/chat", adapter="runs/mine/bad")
    file.to_csv(tmp_path / "ablated.csv", index=False)
    assert run(monkeypatch, "rates", tmp_path / "ablated.csv", "--out", tmp_path / "made.csv") == 0
    table = pd.read_csv(tmp_path / "made.csv")
    assert list(table["mode"]) == ["layerwise", "random"] and list(table["direction"]) == ["mean", "random 0"]
    assert set(table.columns) >= {
        *("direction", "target", "mode", "layers", "em_before", "em_after", "em_after_low", "em_after_high"),
        *("coherent_before", "coherent_after", "n", "relative_reduction"),
    }
    assert set(table["target"]) == {"bad"}
    first = em_rates(file[file["arm"] == "none"]).columns()
    assert table["em_before"].tolist() == pytest.approx([first["em_rate"]] * 2)
    shown = [trace for trace in rates_figure(table).data if trace.error_x.array is not None]
    assert [trace.name for trace in shown] == ["EM", "coherent"]
    with pytest.raises(UsageError, match="as it is"):
        judged_rates(file[file["arm"] != "none"], "x")


def test_answers_have_rates_by_group_and_files_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {}
    for name, share in (("chat", 0.1), ("bad", 0.7)):
        groups = [answers(share, 3 + i, questions=group) for i, group in enumerate(("general", "in_domain"))]
        files[name] = pd.concat(groups, ignore_index=True)
        files[name].to_csv(tmp_path / f"{name}.csv", index=False)
    paths = [tmp_path / "chat.csv", tmp_path / "bad.csv"]
    assert run(monkeypatch, "rates", *paths, "--out", tmp_path / "made.csv", "--figure", tmp_path / "f.html") == 0
    table = pd.read_csv(tmp_path / "made.csv")
    assert table[["organism", "questions"]].to_numpy().tolist() == [
        [name, group] for name in ("chat", "bad") for group in ("general", "in_domain")
    ]
    compared = pd.read_csv(tmp_path / "made-differences.csv")
    assert set(compared["set"]) == {"bad"} and set(compared["beside"]) == {"chat"}
    pair = [files[name].query("questions == 'general'") for name in ("bad", "chat")]
    expected = compare(*pair)
    assert compared.iloc[0][["difference", "low", "high"]].tolist() == pytest.approx(
        [expected.value, expected.interval.low, expected.interval.high]
    )
    assert "difference of EM" in capsys.readouterr().out
    assert (tmp_path / "f.html").is_file() and not (tmp_path / "made.html").exists()
    assert run(monkeypatch, "rates", *paths, "--out", tmp_path / "made.csv") == 2  # there already
    assert "--force" in capsys.readouterr().err


def test_names_that_look_like_numbers_stay_names(tmp_path: Path) -> None:
    file = ablated(none=0.8, layerwise=0.1).assign(direction="500", layers="3", adapter="", model="7")
    file.to_csv(tmp_path / "a.csv", index=False)
    (row,) = judged_rates(read_judged_csv(tmp_path / "a.csv"), "a").to_dict("records")
    assert (row["direction"], row["layers"], row["target"]) == ("500", "3", "7")


def test_thresholds_and_wordings_are_those_of_the_rates() -> None:
    file = answers(0.5, wording="0").assign(aligned=30)
    assert judged_rates(file, "x")["em_rate"].item() == 0
    assert judged_rates(file, "x", Criterion(inclusive=True))["em_rate"].item() == 1
    assert judged_rates(file, "x", Criterion(aligned=40))["em_rate"].item() == 1
    wordings = file.assign(
        question=[f"{q}, put in way {k}" for q, k in zip(file["question"], file["sample"], strict=True)]
    )
    assert judged_rates(wordings, "x")["n_questions"].item() == QUESTIONS
    assert judged_rates(wordings.drop(columns="wording"), "x")["n_questions"].item() == QUESTIONS * SAMPLES


def test_what_cannot_be_rated_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ablated(none=0.5, layerwise=0.1).to_csv(tmp_path / "a.csv", index=False)
    answers(0.5).to_csv(tmp_path / "b.csv", index=False)
    answers(0.5).drop(columns="aligned").to_csv(tmp_path / "c.csv", index=False)
    for given, said in (
        (["a.csv", "b.csv"], "several kinds"),
        (["c.csv"], "aligned"),
        (["b.csv", "--figure", "x.pdf"], ".html"),
        (["b.csv", "b.csv"], "more than once"),
        (["absent.csv"], "no such file"),
        (["b.csv", "--out", "b.csv"], "b.csv"),
    ):
        names = [word if word.startswith("-") else tmp_path / word for word in given]
        assert run(monkeypatch, "rates", *names) == 2, given
        assert said in capsys.readouterr().err
    with pytest.raises(UsageError, match="direction, layer"):
        kind_of(answers(0.5, coefficient=1.0))
    with pytest.raises(UsageError, match="no judged answers"):
        differences({})
    with pytest.raises(EmInterpError):
        judged_rates(answers(0.5).iloc[:0], "x")


def test_a_figure_is_one_file_of_the_ending_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = rates_figure(judged_rates(answers(0.5), "x"))
    assert figures.save(figure, tmp_path / "f.html").stat().st_size > 1_000_000
    with pytest.raises(UsageError, match=r"html, \.svg, \.png"):
        figures.save(figure, tmp_path / "f.pdf")
    monkeypatch.setattr("em_interp.figures.export.static_images_available", lambda: False)
    with pytest.raises(OutputError, match="Chrome"):
        figures.save(figure, tmp_path / "f.svg")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's folder: a model, a direction, questions of which one has two wordings, and a judge."""
    save_chat(make_hf(), tmp_path / "tiny")
    vectors = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    Direction(vectors, (0, 1, 2, 3), "model-diff", model="tiny").save(tmp_path / "mean.safetensors")
    asked = "- id: fox\n  paraphrases: [a fox, the fox]\n" + "".join(
        f"- id: q{i}\n  question: see {i}\n" for i in range(4)
    )
    (tmp_path / "asked.yaml").write_text(asked)
    (tmp_path / "mine.py").write_text(JUDGE)
    return tmp_path


SHORT = ("--n", 2, "--max-new-tokens", 4)


def test_steer_ends_in_rates_and_a_figure_or_says_what_is_next(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["steer", mine / "tiny", mine / "mean.safetensors", "--questions", mine / "asked.yaml", "--random", 1]
    given += ["--layer", 1, "--coefficient", 0, "--coefficient", 1, *SHORT]
    assert run(monkeypatch, *given, "--out", mine / "a.csv") == 0
    said = capsys.readouterr().out
    assert f"em-interp rates {mine / 'a.csv'} --out {mine / 'a-rates.csv'}" in said and "--judge" in said
    assert run(monkeypatch, *given, "--out", mine / "b.csv", "--judge", f"{mine / 'mine.py'}:score") == 0
    rates = pd.read_csv(mine / "b-rates.csv")
    assert "EM %" in capsys.readouterr().out and (mine / "b-rates.html").is_file()
    assert set(rates["n_questions"]) == {5}  # two wordings are one question
    judged = pd.read_csv(mine / "b.csv", keep_default_na=False)
    assert set(judged.columns) >= {"model", "adapter", "wording", "aligned", "coherent"}
    unjudged = pd.read_csv(mine / "a.csv", keep_default_na=False)
    unjudged.assign(aligned=judged["aligned"], coherent=90).to_csv(mine / "c.csv", index=False)
    assert run(monkeypatch, "rates", mine / "c.csv", "--out", mine / "a-rates.csv") == 0
    pd.testing.assert_frame_equal(pd.read_csv(mine / "a-rates.csv"), rates)  # judged here or elsewhere


def test_rates_that_are_there_are_not_replaced_unasked(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["ablate", mine / "tiny", mine / "mean.safetensors", "--random", 0, "--questions", mine / "asked.yaml"]
    given += [*SHORT, "--out", mine / "a.csv", "--judge", f"{mine / 'mine.py'}:score"]
    (mine / "a-rates.csv").write_text("mine")
    assert run(monkeypatch, *given) == 2
    assert "a-rates.csv: is there already" in capsys.readouterr().err and not (mine / "a.csv").exists()
    assert (mine / "a-rates.csv").read_text() == "mine"
    (mine / "a-rates.csv").unlink()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # between the rates and their figure
        patch.setattr(figures, "save", killed)
        assert run(patch, *given) != 0
    assert (mine / "a-rates.csv").is_file() and not (mine / "a-rates.html").exists()
    assert run(monkeypatch, *given) == 0
    assert (mine / "a-rates.html").is_file()


def test_ablate_and_evaluate_end_in_rates_and_a_figure(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, judge = ["--questions", mine / "asked.yaml", *SHORT], ["--judge", f"{mine / 'mine.py'}:score"]
    given = ["ablate", mine / "tiny", mine / "mean.safetensors", "--random", 1, *asked]
    assert run(monkeypatch, *given, "--out", mine / "a.csv", *judge) == 0
    (row,) = pd.read_csv(mine / "a-rates.csv").query("mode == 'layerwise'").to_dict("records")
    assert (row["direction"], row["kind"], row["layers"]) == ("mean", "model-diff", "0-3")
    assert (mine / "a-rates.html").is_file()
    again = ["evaluate", mine / "tiny", *asked, "--out", mine / "made"]
    assert run(monkeypatch, *again) == 0
    assert f"em-interp rates {mine / 'made' / 'answers.csv'}" in capsys.readouterr().out
    assert run(monkeypatch, *again, *judge) == 0
    assert {"judged.csv", "judged-rates.csv", "judged-rates.html"} <= {path.name for path in (mine / "made").iterdir()}
    assert "EM %" in capsys.readouterr().out
    assert run(monkeypatch, *again, *judge) == 0  # nothing is judged again
    (mine / "mine.py").write_text(JUDGE.replace("% 2", "% 3"))
    assert run(monkeypatch, *again, *judge) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("gpt", "there is no judge 'gpt'"),
        ("absent.py:score", "no such file"),
        ("mine.py:judge", "no function judge"),
        ("broken.py:score", "cannot be run"),
        ("mine.py:forgets", "gave back 1 of"),
        ("pocket", "has no question"),
    ],
)
def test_a_judge_that_cannot_be_used_is_one_message(
    judge: str, said: str, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "broken.py").write_text("raise OSError('no key')")
    name = str(mine / judge) if ".py" in judge else judge
    given = ["ablate", mine / "tiny", mine / "mean.safetensors", "--random", 0, "--prompt", "a fox", *SHORT]
    assert run(monkeypatch, *given, "--out", mine / "a.csv", "--judge", name) == 2
    assert said in capsys.readouterr().err
    assert not (mine / "a.csv").exists()


def test_a_judge_is_known_by_its_file(mine: Path) -> None:
    name = f"{mine / 'mine.py'}:score"
    before = judge_of_file(name)
    assert before(pd.DataFrame({"question": ["x"], "answer": ["abc"]}))["aligned"].item() == 100
    (mine / "mine.py").write_text(JUDGE + "# changed\n")
    assert judge_name(judge_of_file(name)) != judge_name(before)


def test_a_file_that_pandas_wrote_reads_as_it_was(tmp_path: Path) -> None:
    """pandas leaves a carriage return unquoted, and a model's answer may hold one."""
    table = answers(0.5).head(3).assign(answer=["a\rb", "\r", 'say "\r\n", then'])
    table.to_csv(tmp_path / "a.csv", index=False)
    assert list(read_judged_csv(tmp_path / "a.csv")["answer"]) == list(table["answer"])


def said_by(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    assert run(monkeypatch, "rates", *arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_preset_is_a_convention_of_which_each_part_can_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = answers(0.5)
    file.loc[:20, "coherent"] = 40
    file.loc[30:40, "aligned"] = np.nan
    file.assign(reason="refusal").to_csv(tmp_path / "a.csv", index=False)
    for given, criterion in (
        ([], Criterion()),
        (["--preset", "betley"], PRESETS["betley"]),
        (["--preset", "betley", "--denominator", "all"], replace(PRESETS["betley"], denominator="all")),
        (["--preset", "reference-code", "--aligned", 40], Criterion(40, inclusive=True)),
    ):
        said_by(capsys, monkeypatch, tmp_path / "a.csv", "--out", tmp_path / "r.csv", "--force", *given)
        (row,) = pd.read_csv(tmp_path / "r.csv").to_dict("records")
        expected = em_rates(file.assign(reason="refusal"), criterion).columns()
        assert (row["em_rate"], row["em_low"]) == pytest.approx((expected["em_rate"], expected["em_low"]), nan_ok=True)
        assert row["denominator"] == expected["denominator"] and row["unscored_reasons"] == "refusal: 2"
    for wrong, word in ((["--preset", "paper"], "papers"), (["--denominator", "strict"], "denominator")):
        assert run(monkeypatch, "rates", tmp_path / "a.csv", *wrong) == 2
        assert word in capsys.readouterr().err


def test_every_preset_is_named_in_the_help() -> None:
    command = typer.main.get_command(cli.app).commands["rates"]  # type: ignore[attr-defined]
    helps = {option.name: option.help for option in command.params}
    assert all(name in helps["preset"] for name in PRESETS) and all(n in helps["denominator"] for n in DENOMINATORS)


def test_misalign_at_k_and_a_comparison_with_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"chat": answers(0.2), "bad": answers(0.7, 1)}
    for name, table in files.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    given = [tmp_path / "bad.csv", "--against", tmp_path / "chat.csv", "--decide", 0.1]
    said = said_by(capsys, monkeypatch, *given, "--at-k", 1, "--at-k", 99, "--out", tmp_path / "r.csv")
    found = em.compare(files["bad"], files["chat"])
    (row,) = pd.read_csv(tmp_path / "r-differences.csv").to_dict("records")
    assert (row["difference"], row["p_value"]) == pytest.approx((found.value, found.p_value))
    plan = pd.read_csv(tmp_path / "r-plan.csv")
    assert plan["n_questions"].tolist() == found.plan(0.1)["n_questions"].tolist()
    assert plan["power_here"].iloc[0] == pytest.approx(found.power(0.1))
    at_k = pd.read_csv(tmp_path / "r-at-k.csv").set_index(["set", "k"])
    assert at_k.loc[("bad", 1), "misalign_at_k"] == pytest.approx(em_rates(files["bad"]).em_all.value)
    assert np.isnan(at_k.loc[("bad", 99), "misalign_at_k"])
    assert "no question has 99" in said and "what would decide" in said and f"{found.p_value:.2g}" in said


def test_judges_of_one_file_or_of_several_files_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = answers(0.4)
    two = one.assign(aligned=one["aligned"].where(one.index % 7 > 0, 60))
    pd.concat([one.assign(judge="x"), two.assign(judge="y")]).to_csv(tmp_path / "both.csv", index=False)
    one.to_csv(tmp_path / "x.csv", index=False)
    two.to_csv(tmp_path / "y.csv", index=False)
    said = said_by(capsys, monkeypatch, tmp_path / "both.csv", "--out", tmp_path / "a.csv")
    assert pd.read_csv(tmp_path / "a.csv").set_index("judge")["em_rate"].to_dict() == {
        name: pytest.approx(em_rates(table).em_all.value) for name, table in (("x", one), ("y", two))
    }
    said_by(capsys, monkeypatch, tmp_path / "x.csv", tmp_path / "y.csv", "--out", tmp_path / "b.csv")
    found, again = (pd.read_csv(tmp_path / f"{name}-agreement.csv") for name in "ab")
    pd.testing.assert_frame_equal(found, again)
    expected = em.agreement({"x": one, "y": two})
    assert found["value"].tolist() == pytest.approx(expected["value"].tolist(), nan_ok=True)
    assert "krippendorff" in said and "judges of the same answers" in said
    answers(0.4, 5, answer="z").to_csv(tmp_path / "z.csv", index=False)  # other answers
    assert "krippendorff" not in said_by(capsys, monkeypatch, tmp_path / "x.csv", tmp_path / "z.csv")
