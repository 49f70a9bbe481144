"""What every analysis says it found: a sentence never claims what its interval does not show, and never says nan."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest

from analyses.findings import DOES_NOT_HOLD, HOLDS, UNDECIDED, Finding, findings_of
from analyses.suite import ANALYSES
from tests.made_up_tables import MADE, SEEDED, Tables, without_intervals

NEEDED = {
    "ablation": "direction target mode layers em_before em_after em_after_low em_after_high coherent_before "
    "coherent_after n",
    "claims": "claim adapter estimate low high n_seeds verdict task",
    "cosines": "direction_a direction_b layer cosine low high null_sd p_value comparison",
    "dilution": "adapter domain bad_share em_rate",
    "direction_norms": "direction split kind layer norm",
    "efficiency": "solution adapter domain norm scale loss loss_reduction_per_norm2 loss_over_norm2",
    "efficiency_lead": "adapter domain training_seed relative_norm lead",
    "em_rates": "organism solution adapter domain questions em_rate em_low em_high coherent_rate n n_unscored",
    "gradients": "step cos_general cos_narrow null_sd n_conversations run family",
    "influence": "direction kind norm kl_nats_per_token low high n_tokens",
    "influence_ratio": "relative_norm denominator ratio adapter seed n_documents",
    "judges": "file judge defect",
    "kl_sweep": "adapter domain kl_weight em_rate in_domain_rate scaled_em_rate norm",
    "lora_scalars": "comparison accuracy auc low high n organism",
    "stability": "solution adapter domain epsilon seed loss relative_increase_percent",
    "stability_gap": "adapter epsilon gap",
    "steering": "direction target layer coefficient em_rate em_low em_high coherent_rate n control",
    "technical_rates": "organism solution questions technical_rate n n_unscored",
    "threshold_sweep": "file source em_rate n",
    "trajectory": "run step norm cos_general cos_narrow local_cosine pc1 pc2 pc3 family general_run narrow_run",
    "transfer": "direction_from organism em_before em_after relative_reduction kind n",
    "wordings": "file source wording em_rate n",
}
"""Columns of tables that are promised; every other one may be missing."""
ALL_ROWS = "em_rate_all_rows experiment"
"""Of released sweeps besides."""
CLAIMED = re.compile(r"^(?!Claim: ).*\b(removes|adds to|rises by|falls by|is more stable|lower loss|matters more)\b")
VERDICT = {1: HOLDS, 0: UNDECIDED, -1: DOES_NOT_HOLD}
DECIDED = {  # what has a verdict of its own, and of which the opposite of the claim can be shown
    "finetunes.em_rates",
    "finetunes.steering",
    "finetunes.cosines",
    "finetunes.lora_scalars",
    "released.em_rates",
    "released.steering",
    *SEEDED,
}


def honest(finding: Finding) -> None:
    """What must hold of every finding, whatever the tables."""
    said = f"{finding.sentence} {finding.evidence}"
    assert not re.search(r"\b(nan|none|inf|null)\b", said, re.I), said
    assert math.isfinite(finding.estimate), said
    assert finding.n >= 1, said
    assert finding.sentence.count("{") == 0 and finding.estimate_said in finding.sentence, said
    if finding.has_interval:
        assert finding.low <= finding.estimate <= finding.high, said
    else:
        assert finding.verdict not in (HOLDS, DOES_NOT_HOLD), said
    if finding.verdict not in (HOLDS, DOES_NOT_HOLD):
        assert not CLAIMED.search(finding.sentence), said


def found(name: str, tables: Tables) -> list[Finding]:
    made = findings_of(name, tables)
    for finding in made:
        honest(finding)
    return made


def test_every_analysis_has_made_up_tables() -> None:
    assert set(MADE) == set(ANALYSES)


@pytest.mark.parametrize("effect", [1, 0, -1])
@pytest.mark.parametrize("name", ANALYSES)
def test_what_is_said_is_what_the_tables_show(name: str, effect: int) -> None:
    made = found(name, MADE[name](effect))
    assert made
    verdicts = {finding.verdict for finding in made}
    if name in DECIDED:
        assert VERDICT[effect] in verdicts, made
        assert not verdicts & {VERDICT[other] for other in VERDICT if other not in (effect, 0)}, made
    if effect == 0:
        assert HOLDS not in verdicts, made


@pytest.mark.parametrize("name", ANALYSES)
def test_without_intervals_nothing_is_decided(name: str) -> None:
    for effect in (1, -1):
        assert len(found(name, without_intervals(MADE[name](effect)))) == len(found(name, MADE[name](effect)))


@pytest.mark.parametrize("name", ANALYSES)
def test_empty_tables_find_nothing(name: str) -> None:
    assert found(name, {key: table.iloc[:0] for key, table in MADE[name](1).items()}) == []


@pytest.mark.parametrize("name", ANALYSES)
def test_empty_cells_are_no_numbers(name: str) -> None:
    """Each column of numbers in turn is empty, in every row and in the first."""
    tables = MADE[name](1)
    for key, table in tables.items():
        for column in table.select_dtypes("float").columns:
            found(name, {**tables, key: table.assign(**{column: np.nan})})
            found(name, {**tables, key: table.assign(**{column: [np.nan, *table[column].iloc[1:]]})})


@pytest.mark.parametrize("name", ANALYSES)
def test_columns_that_are_not_promised_may_be_missing(name: str) -> None:
    tables = MADE[name](1)
    needed = {key: NEEDED.get(key, " ".join(table.columns)).split() for key, table in tables.items()}
    if name == "released.steering":
        needed["steering"] += ALL_ROWS.split()
    found(name, {key: table.filter(needed[key]) for key, table in tables.items()})
    for key, table in tables.items():
        for column in table.columns.difference(needed[key]):
            assert found(name, {**tables, key: table.drop(columns=column)})


@pytest.mark.parametrize("name", SEEDED)
def test_one_seed_has_the_interval_over_questions_or_none(name: str) -> None:
    for effect in (1, 0, -1):
        made = found(name, SEEDED[name](effect, [0]))
        assert made
        if name.endswith("claims"):
            assert {finding.verdict for finding in made} == {UNDECIDED}
            assert all("one seed" in finding.evidence for finding in made)


def test_where_coherence_goes_an_ablation_decides_nothing() -> None:
    tables = MADE["finetunes.ablation"](1)
    babbling = {key: table.assign(coherent_after=0.2) for key, table in tables.items()}
    assert {finding.verdict for finding in found("finetunes.ablation", tables)} == {HOLDS}
    assert {finding.verdict for finding in found("finetunes.ablation", babbling)} == {UNDECIDED}


def test_random_directions_that_do_as_much_take_the_verdict_away() -> None:
    tables = MADE["finetunes.steering"](1)
    table = tables["steering"].copy()
    table.loc[table["control"] & (table["coefficient"] > 0), ["em_rate", "em_low", "em_high"]] = [0.7, 0.66, 0.74]
    (finding,) = found("finetunes.steering", {"steering": table})
    assert finding.verdict == UNDECIDED and "random directions there, at most 70.0%" in finding.sentence


def test_of_one_organism_no_middle_is_said() -> None:
    rates = MADE["finetunes.em_rates"](1)["em_rates"]
    alone = rates[rates["organism"].isin(["pocket/chat0", "pocket/general0"])]
    *of_it, of_chat = found("finetunes.em_rates", {"em_rates": pd.DataFrame(alone)})
    assert len(of_it) == 2 and of_chat.sentence.startswith("The chat model is") and not of_chat.verdict
    for finding in of_it:
        assert "middle" not in finding.sentence + finding.beside
        assert finding.sentence.startswith("The general organism general0 is")
