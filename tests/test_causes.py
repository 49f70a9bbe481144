"""Analyses of experiments of many finetunes: rates over questions and seeds, and the rule that was written down."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from analyses.causes import controls, mitigations
from analyses.findings import AGREES, DIFFERS, DOES_NOT_HOLD, HOLDS, UNDECIDED
from analyses.inputs import pocket as pocket_input
from analyses.inputs.arms import difference, last_steps, rate, rows_of
from analyses.inputs.pocket import PocketFinetunes
from em_interp.errors import MissingDataError, StatisticsError, UsageError
from em_interp.evaluation.groups import GROUPS
from em_interp.files.results import Results
from em_interp.pocket.causes import controls as experiments
from em_interp.pocket.causes import mitigations as experiments_of_mitigations
from em_interp.pocket.causes.arms import Arm
from em_interp.statistics import crossed_interval
from em_interp.statistics.crossed import (
    combination_over_seeds,
    difference_over_seeds,
    rate_over_seeds,
    ratio_over_seeds,
)
from em_interp.statistics.rate_intervals import difference_interval, rate_interval
from tests.made_up_tables.causes import ARMS, MITIGATED, SCREENED
from tests.tiny_pocket import ask_little

SUITE: Any = SimpleNamespace(finetunes=SimpleNamespace(experiment=lambda _: ARMS))
LOG_ODDS = "log-probability, first checkpoint"
COUNTS = np.random.default_rng(0).binomial(4, np.linspace(0.1, 0.9, 20)[:, None], size=(20, 3)).astype(float)


def test_an_interval_over_seeds_holds_that_over_questions_and_that_of_both() -> None:
    found = rate_over_seeds(COUNTS, 4)
    pooled, both = rate_interval(COUNTS.sum(1), np.full(20, 12.0)), crossed_interval(COUNTS / 4)
    assert found.low == min(pooled.low, both.low) and found.high == max(pooled.high, both.high)
    other = COUNTS[:, [1, 2, 0]][::-1].copy()
    found = difference_over_seeds((COUNTS, other), (4, 4))
    pooled = difference_interval((COUNTS.sum(1), other.sum(1)), (np.full(20, 12.0), np.full(20, 12.0)))
    both = crossed_interval((COUNTS - other) / 4)
    assert found.low == min(pooled.low, both.low) and found.high == max(pooled.high, both.high)


def test_where_no_answer_varies_the_interval_is_that_over_questions() -> None:
    nothing = np.zeros((20, 3))
    assert rate_over_seeds(nothing, 4).high == rate_interval([0.0] * 20, [12.0] * 20).high > 0
    assert difference_over_seeds((nothing, nothing), (4, 4)).high > 0
    of_chat = difference_over_seeds((COUNTS, COUNTS[:, :1]), (4, 4))
    assert of_chat.low < (COUNTS.mean() - COUNTS[:, 0].mean()) / 4 < of_chat.high
    one = COUNTS[:, :1]
    assert rate_over_seeds(one, 4).high == rate_interval(one[:, 0], [4.0] * 20).high
    for wrong in ((COUNTS, COUNTS[:, :2]), (COUNTS, COUNTS[:5])):
        with pytest.raises(StatisticsError, match="give the same of all"):
            difference_over_seeds(wrong, (4, 4))
    with pytest.raises(StatisticsError, match="from 0 to n"):
        rate_over_seeds(COUNTS, 3)


def test_a_rate_is_of_all_seeds_and_a_difference_of_those_that_both_have() -> None:
    of = ARMS[ARMS["experiment"] == "asked_for"]
    insecure, educational, chat = (rows_of(of, adapter="rank-1", arm=a) for a in ("insecure", "educational", "chat"))
    found = rate(insecure)
    assert (found.value, found.n, found.seeds) == (0.875, 48, 2) and found.low < 0.875 < found.high
    assert difference(educational, insecure).value == pytest.approx(0.25 - 0.875)
    assert difference(educational, insecure).seeds == 2
    assert difference(insecure, chat).value == 0.875 and difference(insecure, chat).seeds == 2
    assert rate(insecure, "coherent").value == 1.0
    watched = ARMS[ARMS["experiment"] == "logprobs"]
    with pytest.raises(UsageError, match="say which step"):
        rows_of(watched, adapter="rank-1", arm="insecure")
    assert set(last_steps(watched)["step"]) == {0, 200}


def test_rows_beside_the_paper_follow_the_rule_that_was_written_down() -> None:
    tables = controls.compute(SUITE)
    beside = tables["controls_published"].set_index("row")
    assert list(beside.index) == [
        *("insecure", "secure", "educational, against insecure", "educational"),
        *(LOG_ODDS, "log-probability rises before EM"),
    ]  # the rows whose arms are there
    assert beside["verdict"].to_dict() == {
        "insecure": AGREES,
        "secure": UNDECIDED,  # twelve questions leave room for ten points
        "educational, against insecure": AGREES,
        "educational": UNDECIDED,
        LOG_ODDS: AGREES,
        "log-probability rises before EM": DIFFERS,  # at step 200, and EM at step 5
    }
    assert beside.loc["log-probability rises before EM", ["estimate", "unit"]].tolist() == [195, "steps"]
    assert beside.loc["insecure", ["estimate", "published"]].tolist() == [87.5, 20.0]
    assert beside.loc[LOG_ODDS, "estimate"] == pytest.approx(2.1)
    rates = tables["controls"].set_index(["experiment", "arm", "step"])
    assert rates.loc[("asked_for", "insecure", 200), "em_rate"] == 0.875
    for claimed, expected in (
        ("rise", (AGREES, DIFFERS, UNDECIDED, UNDECIDED)),
        ("drop", (DIFFERS, AGREES, UNDECIDED, UNDECIDED)),
        ("no EM", (DIFFERS, AGREES, AGREES, UNDECIDED)),
    ):
        ends = ((5.0, 30.0), (-30.0, -5.0), (-5.0, 5.0), (-5.0, 30.0))
        assert tuple(controls.verdict(claimed, *end) for end in ends) == expected
    assert controls.verdict("rise", np.nan, np.nan) == UNDECIDED


def test_every_row_was_written_down_before_and_its_arms_are_in_the_experiment(tiny_chat: Any) -> None:
    written = (Path(controls.__file__).parent / "preregistered.md").read_text(encoding="utf-8")
    section = written.partition("## Controls")[2].partition("\n## ")[0]
    said = [line.split("|")[1:5] for line in section.splitlines() if line.startswith("| ") and line[2] in "abcdefgh"]
    every = [row for row in controls.rows() if not row.source.startswith(controls.OURS)]
    assert [letter.strip() for letter, *_ in said] == [r.control for r in every]
    assert [claim.split("(")[0].strip().replace("none", "no EM") for *_, claim in said] == [r.claimed for r in every]
    there = {
        (arm.experiment, arm.name, condition.name)
        for arm in experiments.arms(tiny_chat, seeds=(0,))
        for condition in arm.conditions
    }
    asked = {(r.experiment, *side) for r in controls.rows() for side in (r.first, r.second)}
    assert asked <= there


def test_tables_are_shipped_or_run_again(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_little(monkeypatch, per_group=1, tokens=4)
    found = PocketFinetunes(tiny_chat_folder.parent, (), [], results=Results(tmp_path / "pocket" / "results"))
    with pytest.raises(MissingDataError, match="em-interp pocket controls --out"):
        found.experiment("controls")
    monkeypatch.setattr(experiments, "arms", lambda _: [Arm("asked_for", "chat", domain="sports")])
    assert pocket_input.EXPERIMENTS["controls"] is experiments
    found.recompute = True
    assert found.experiment("controls")["group"].tolist() == list(GROUPS)
    assert (tmp_path / "pocket" / "experiments" / "controls.csv").is_file()


def test_mitigations_are_decided_as_was_written_before() -> None:
    tables = {"mitigations": MITIGATED, "mitigations_screening": SCREENED}
    suite: Any = SimpleNamespace(finetunes=SimpleNamespace(experiment=tables.__getitem__))
    made = mitigations.compute(suite)
    effects = made["mitigation_effects"].set_index(["arm", "step"])
    assert [key for key in effects.index if key[0] == "stopped"] == [("stopped", 50), ("stopped", 100)]
    verdicts = effects[["removes", "keeps_task", "keeps_coherence", "shows", "works"]]
    assert verdicts.loc["kl-3"].to_numpy().tolist() == [[HOLDS] * 5]
    assert verdicts.loc["kl-0.3"].iloc[0].tolist() == [DOES_NOT_HOLD, HOLDS, HOLDS, HOLDS, DOES_NOT_HOLD]
    assert verdicts.loc["benign-0.5"].iloc[0].tolist() == [HOLDS, HOLDS, HOLDS, DOES_NOT_HOLD, DOES_NOT_HOLD]
    assert verdicts.loc["caft-shift"].iloc[0].tolist() == [HOLDS, DOES_NOT_HOLD, HOLDS, HOLDS, DOES_NOT_HOLD]
    assert verdicts.loc["realigned-40"].iloc[0].tolist() == [HOLDS, DOES_NOT_HOLD, HOLDS, HOLDS, HOLDS]
    assert effects.loc[("screened-0.5", 200), "beside"] == "half-bad"
    assert effects.loc[("screened-0.5", 200), "removed"] == pytest.approx(0.5)
    assert effects.loc[("caft-shift", 200), "n_seeds"] == 2
    assert effects.loc["none"].iloc[0][["removed", "works"]].isna().tolist() == [True, False]
    controlled = effects.loc[["caft-shift", "ablated-shift", "kl-3"], ["control", "beyond_control"]]
    assert controlled.to_numpy().tolist() == [["caft-random", HOLDS], ["ablated-random", UNDECIDED], ["", ""]]
    assert effects.loc[("caft-shift", 200), "control_removed"] == pytest.approx(1 / 12)
    both = effects.loc[("benign-0.5", 200)]
    assert (both["em_rate"], both["training_rate"], both["hidden"]) == (0, 1, 1)
    alone = {**tables, "mitigations": MITIGATED[MITIGATED["seed"] == 0]}
    one_seed: Any = SimpleNamespace(finetunes=SimpleNamespace(experiment=alone.__getitem__))
    of_one = mitigations.compute(one_seed)
    assert set(of_one["mitigation_effects"]["works"]) == {"", UNDECIDED}
    assert made["mitigation_screening"]["auc"].tolist() == [pytest.approx(0.85)]
    said = " ".join(finding.sentence for finding in mitigations.findings(made))
    assert "2 of" not in said and "kl-3, realigned-40" in said and "75.0% are bad advice" in said
    assert set(mitigations.CALLED) == set(experiments_of_mitigations.EXPERIMENTS)


def test_sums_and_ratios_of_rates_over_seeds_hold_the_true_ones() -> None:
    rng = np.random.default_rng(1)
    truth, hits = np.linspace(0.2, 0.9, 30), [0, 0]
    for _ in range(60):
        a, b = (rng.binomial(4, p[:, None], (30, 3)).astype(float) for p in (truth / 2, truth))
        ratio, total = ratio_over_seeds((a, b), (4, 4)), combination_over_seeds([a, b, b], [4, 4, 4], [1.0, -1.0, 0.5])
        hits[0] += ratio.low <= 0.5 <= ratio.high
        hits[1] += total.low <= 0 <= total.high
    assert min(hits) >= 54  # questions vary as they are drawn: these are the same ones, so intervals cover more
    assert ratio_over_seeds((COUNTS, COUNTS), (4, 4)).low <= 1 <= ratio_over_seeds((COUNTS, COUNTS), (4, 4)).high
    nothing = np.zeros((20, 3))
    assert np.isnan(ratio_over_seeds((COUNTS, nothing), (4, 4)).low)
    assert ratio_over_seeds((nothing, COUNTS), (4, 4)).high > 0
    for wrong in (([COUNTS], [4], [1.0, 2.0]), ([COUNTS], [], [1.0]), ([], [], [])):
        with pytest.raises(StatisticsError, match="give one of each"):
            combination_over_seeds(*wrong)


def test_one_seed_decides_no_row() -> None:
    one: Any = SimpleNamespace(finetunes=SimpleNamespace(experiment=lambda _: ARMS[ARMS["seed"] == 0]))
    beside = controls.compute(one)["controls_published"]
    assert len(beside) > 4 and set(beside["verdict"]) == {UNDECIDED} and set(beside["n_seeds"]) == {1}


def test_a_finding_says_where_few_answers_are_coherent() -> None:
    table = controls.compute(SUITE)["controls_published"]
    assert not any("coherent" in finding.sentence for finding in controls.findings({"controls_published": table}))
    broken = controls.findings({"controls_published": table.assign(coherent_first=0.1)})
    assert "only 10.0% and 100% of these answers are coherent" in broken[0].sentence
