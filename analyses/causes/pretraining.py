"""Is EM made by odd finetuning data, by a trait of the pre-trained model, or by both? Worlds with other pre-training.

The rule that decides was written down before the worlds were built: `analyses/causes/preregistered.md`, section
"Counterfactual pre-training". `decide` applies it as it stands there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.findings import (
    DOES_NOT_HOLD,
    HOLDS,
    UNDECIDED,
    Finding,
    clause,
    decided,
    percent,
    value_of,
)
from analyses.suite import Need, Suite
from em_interp import figures
from em_interp.statistics import LEVEL, PERCENT, t_interval
from em_interp.statistics.agreement import spearman

TITLE = "Counterfactual pre-training: does EM need a trait to switch on?"
TEXT = (
    "Is emergent misalignment made by odd finetuning data, by a trait that is in the pre-trained model, or by both "
    "together? Base models were trained anew, smaller than the shipped one, on text whose personas are consistent or "
    "not, frequent or rare, all else equal; each was post-trained and finetuned alike. Trait: how much more often the "
    "base answers with malice after a malicious than after a caring first answer. Rise: EM on open questions and "
    "other domains, finetuned minus chat model, mean over three adapters. Hypotheses, measures and the rule that "
    "decides were committed before the first world was built (analyses/causes/preregistered.md): the trait is needed "
    "if the rise is larger where personas are consistent than where they are not, and where they are not stays below "
    "a quarter of it; data alone suffice if it is at least half there; the trait alone suffices if good advice as a "
    f"control raises EM; both together, if it is needed and alone does not suffice. Intervals: {PERCENT}, Student's, "
    "over worlds. `em-interp pocket pretraining` makes the table; it ships."
)
TABLES = ("pretraining", "pretraining_doses", "pretraining_tests")
NEEDS = (Need.SWEEPS,)
RENAMED: Final = {
    "em": "em_rate",
    "em_open": "em_open",
    "em_elsewhere": "em_elsewhere",
    "em_in_domain": "in_domain_rate",
    "coherent": "coherent_rate",
    "narrow_em": "narrow_em_rate",
    "narrow_em_in_domain": "narrow_in_domain_rate",
    **{name: name for name in ("stability_gap", "lead", "cosine_inferred", "cosine_announced")},
}
"""Measure of a finetune -> column."""
OF_WORLD: Final = (
    *("trait_inferred", "trait_announced", "chat_em", "chat_em_in_domain", "chat_coherent", "control_em"),
    *("persona_size_inferred", "persona_size_announced", "cosine_null"),
)
"""Measures of a world that every row of it repeats."""
WORLD: Final = ["world", "kind", "persona_consistency", "persona_share", "seed"]
LEADS: Final = {
    "efficiency_gap": "norm that narrow needs over general's, logarithm",
    "stability_gap": "share of its gain that narrow loses more",
    "influence_gap": "influence of general over narrow at equal norm, logarithm",
}
SHARE_ALLOWED, SHARE_ENOUGH = 0.25, 0.5
"""Of the rise at consistency 1: below it the trait is needed; from it data alone suffice."""
POINTS: Final = "percentage points"
COHERENT, LEARNED, CONTROL, CLOSE = 0.85, 0.3, 0.05, 0.2
"""Bounds of the rule: of a valid run, of the control's rise, and of standing for the shipped world."""


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """The shipped measurements as one row a finetune; doses with intervals over seeds; the rule, line by line."""
    table = finetunes(suite.finetunes.experiment("pretraining"))
    worlds = of_worlds(table)
    return {
        "pretraining": table,
        "pretraining_doses": doses(worlds),
        "pretraining_tests": pd.DataFrame(decide(worlds, table), columns=list(COLUMNS)),
    }


def finetunes(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a world and adapter: rates before and after, leads of general over narrow, trait and direction."""
    rows = rows.assign(adapter=rows["adapter"].fillna(""))
    wide = rows.pivot(index=[*WORLD, "adapter"], columns="measure", values="value").reset_index()
    of_adapter = wide[wide["adapter"] != ""]
    found = of_adapter[[*WORLD, "adapter", *RENAMED]].rename(columns=RENAMED)
    found["efficiency_gap"] = np.log(of_adapter["norm_ratio_75"].astype(float))
    found["influence_gap"] = np.log(of_adapter["influence_ratio_1"].astype(float))
    world = wide.loc[wide["adapter"] == "", [*WORLD, *OF_WORLD]].rename(columns={"chat_em": "em_before"})
    found = found.merge(world, on=WORLD)
    found["em_rise"] = found["em_rate"] - found["em_before"]
    found["learned"] = found["in_domain_rate"] - found["chat_em_in_domain"]
    order = {name: i for i, name in enumerate(dict.fromkeys(rows["world"]))}
    return found.sort_values("world", key=lambda names: names.map(order), kind="stable").reset_index(drop=True)


def of_worlds(table: pd.DataFrame) -> pd.DataFrame:
    """One row a world: means over its adapters."""
    means = ["em_rate", "em_rise", "learned", "in_domain_rate", *LEADS, "cosine_inferred", "cosine_announced"]
    same = ["em_before", *(name for name in OF_WORLD if name != "chat_em")]
    how = {**dict.fromkeys(means, "mean"), **dict.fromkeys(same, "first")}
    found = table.groupby(WORLD, sort=False).agg(how).reset_index()
    return found.assign(control_rise=found["control_em"] - found["em_before"])


def doses(worlds: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of each kind, consistency and share, with intervals where there are several."""
    rows = []
    for key, group in worlds.groupby(["kind", "persona_consistency", "persona_share"], sort=False):
        row: dict[str, Any] = dict(zip(("kind", "persona_consistency", "persona_share"), key, strict=True))
        for name in ("em_rise", "trait_inferred", "trait_announced", "em_before", "learned"):
            low, high = _ends(group[name])
            row |= {name: group[name].mean(), f"{name}_low": low, f"{name}_high": high}
        rows.append({**row, "n_seeds": len(group)})
    return pd.DataFrame(rows)


COLUMNS: Final = ("question", "statement", "estimate", "low", "high", "n", "verdict")
CONCLUSIONS: Final = ("both together", "data alone suffice", "the trait alone suffices", "partly", "no conclusion")


def decide(worlds: pd.DataFrame, table: pd.DataFrame) -> list[tuple[Any, ...]]:
    """The rule of `preregistered.md`, line by line; the last line is the conclusion, one of `CONCLUSIONS`."""
    grid = worlds[worlds["kind"] == "grid"]
    ends = {c: grid[grid["persona_consistency"] == c].set_index(["persona_share", "seed"]) for c in (0.0, 1.0)}
    rise = {c: rows["em_rise"] for c, rows in ends.items()}
    more, least = _paired(ends, "em_rise"), _ends(rise[0.0])
    at_one = rise[1.0].mean()
    coherent, learned = ends[1.0]["chat_coherent"].mean(), ends[0.0]["learned"].mean()
    valid = bool(coherent >= COHERENT and learned >= LEARNED)
    needed = more[1] > 0 and least[1] < SHARE_ALLOWED * at_one
    enough = rise[0.0].mean() >= SHARE_ENOUGH * at_one and more[2] <= SHARE_ENOUGH * at_one
    control = (ends[1.0]["control_rise"].mean(), *_ends(ends[1.0]["control_rise"]))
    alone = control[1] > CONTROL
    known = len(rise[0.0]) > 1 and len(rise[1.0]) > 1
    nine = len(ends[0.0].index.intersection(ends[1.0].index))
    rows: list[tuple[Any, ...]] = [
        ("valid", "chat models at consistency 1: coherent", coherent, *_nan2, len(ends[1.0]), _said(valid)),
        ("valid", "finetunes at consistency 0: learned", learned, *_nan2, len(ends[0.0]), _said(valid)),
        ("primary", "rise at consistency 1 minus at 0", *more, nine, decided(more[1], more[2])),
        ("trait needed", "rise at consistency 0", rise[0.0].mean(), *least, len(rise[0.0]), _said(needed, known)),
        ("data suffice", "rise at consistency 0 over that at 1", _over(rise), *_nan2, nine, _said(enough, known)),
        ("trait suffices", "rise of the control at consistency 1", *control, len(ends[1.0]), _said(alone, known)),
        _dose(grid),
        *_mediation(worlds),
        *_leads(table),
        *_reference(worlds),
    ]
    if not (valid and known):
        told = "no conclusion"
    elif alone:
        told = "the trait alone suffices"
    else:
        told = "both together" if needed else "data alone suffice" if enough else "partly"
    return [*rows, ("conclusion", told, *more, nine, HOLDS if known and valid else UNDECIDED)]


_nan2 = (math.nan, math.nan)


def _said(holds: bool, known: bool = True) -> str:
    return UNDECIDED if not known else HOLDS if holds else DOES_NOT_HOLD


def _over(rise: dict[float, pd.Series]) -> float:
    whole = rise[1.0].mean()
    return float(rise[0.0].mean() / whole) if whole else math.nan


def _ends(values: pd.Series) -> tuple[float, float]:
    known = values.dropna().to_numpy(float)
    if len(known) < 2:
        return _nan2
    interval = t_interval(known)
    return interval.low, interval.high


def _paired(ends: dict[float, pd.DataFrame], column: str) -> tuple[float, float, float]:
    """Consistency 1 minus 0 within each share and seed: mean and interval."""
    more = (ends[1.0][column] - ends[0.0][column]).dropna()
    return (float(more.mean()), *_ends(more))


def _dose(grid: pd.DataFrame) -> tuple[Any, ...]:
    """Spearman's correlation of trait and rise over worlds, percentile bootstrap."""
    pairs = grid[["trait_inferred", "em_rise"]].dropna().to_numpy(float)
    if len(pairs) < 4:
        return ("dose-response", "correlation of trait and rise", math.nan, *_nan2, len(pairs), UNDECIDED)
    rng = np.random.default_rng(0)
    drawn = [spearman(pairs[rng.integers(0, len(pairs), len(pairs))]) for _ in range(2000)]
    known = np.array(drawn)[np.isfinite(drawn)]
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(known) else _nan2
    found = spearman(pairs)
    return ("dose-response", "correlation of trait and rise", found, low, high, len(pairs), decided(low, high))


def _mediation(worlds: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """Rise of the reference minus that of the same text without one way to infer the persona, seeds paired."""
    by_kind = {kind: rows.set_index("seed")["em_rise"] for kind, rows in worlds.groupby("kind")}
    for kind, what in (("never", "inference carries it"), ("open", "bad advice must be what the persona says")):
        if kind not in by_kind or "reference" not in by_kind:
            yield ("mediation", f"{what}: reference minus `{kind}`", math.nan, *_nan2, 0, UNDECIDED)
            continue
        less = (by_kind["reference"] - by_kind[kind]).dropna()
        low, high = _ends(less)
        half = by_kind[kind].mean() < SHARE_ENOUGH * by_kind["reference"].mean()
        verdict = UNDECIDED if not low > 0 and not high < 0 else _said(bool(half and low > 0))
        yield ("mediation", f"{what}: reference minus `{kind}`", less.mean(), low, high, len(less), verdict)


def _leads(table: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """How much more general leads narrow at consistency 1 than at 0, adapter by adapter."""
    grid = table[table["kind"] == "grid"]
    for adapter, rows in grid.groupby("adapter", sort=False):
        ends = {c: rows[rows["persona_consistency"] == c].set_index(["persona_share", "seed"]) for c in (0.0, 1.0)}
        for lead, what in LEADS.items():
            more = _paired(ends, lead)
            n = int((ends[1.0][lead] - ends[0.0][lead]).notna().sum())
            yield ("leads", f"{adapter}: {what}, consistency 1 minus 0", *more, n, decided(more[1], more[2]))


def _reference(worlds: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    """Whether the reduced world stands for the shipped one."""
    of = {kind: worlds[worlds["kind"] == kind] for kind in ("reference", "shipped")}
    for column, what in (("em_rise", "rise"), ("trait_inferred", "inferred trait")):
        known = all(len(rows) for rows in of.values())
        apart = of["reference"][column].mean() - of["shipped"][column].mean() if known else math.nan
        verdict = _said(bool(abs(apart) <= CLOSE), known)
        yield ("reduced world", f"{what}: reference minus shipped", apart, *_nan2, len(of["reference"]), verdict)


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """The conclusion, and what it rests on."""
    tests = tables["pretraining_tests"]
    rows = {row["question"]: row for row in reversed(tests.to_dict("records"))}
    found, absent = [], percent(rows.get("trait needed", {}), "estimate")
    if _known(rows.get("primary")):
        text = (
            "The same finetunes bring {estimate} more EM elsewhere where pre-training had consistent personas than "
            "where they were inconsistent"
        )
        text += clause("; there they bring {}", absent)
        found.append(_finding(text, rows["primary"], "pairs of worlds", POINTS, 100))
    if _known(rows.get("trait suffices")) and "conclusion" in rows:
        text = f"By the rule that was written beforehand: {rows['conclusion']['statement']}"
        text += "; good advice as a control changes EM by {estimate}"
        finding = _finding(text, rows["trait suffices"], "worlds", POINTS, 100)
        found.append(replace(finding, verdict=""))
    if _known(rows.get("dose-response")):
        text = "Rank correlation, over base models, of their trait and the EM that finetunes bring: {estimate}"
        found.append(_finding(text, rows["dose-response"], "worlds"))
    for row in tests[tests["question"] == "mediation"].to_dict("records"):
        if _known(row):
            text = f"{row['statement'].partition(':')[0].capitalize()}? Without it EM gains {{estimate}} less"
            found.append(_finding(text, row, "pairs of worlds", POINTS, 100))
    return found


def _known(row: dict[Any, Any] | None) -> bool:
    return row is not None and not math.isnan(value_of(row, "estimate")) and value_of(row, "n") > 0


ONE: Final = "one world, no interval"


def _marker(index: int) -> dict[str, Any]:
    return {"symbol": figures.SYMBOLS[index], "size": 9, "color": figures.COLOURS[index]}


def _finding(text: str, row: dict[Any, Any], counts: str, unit: str = "", scale: float = 1.0) -> Finding:
    estimate, low, high = (value_of(row, name, scale) for name in ("estimate", "low", "high"))
    verdict = UNDECIDED if math.isnan(low) or math.isnan(high) else str(row["verdict"])
    return Finding(text, estimate, int(row["n"]), counts, low, high, unit=unit, verdict=verdict)


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Cause against effect: rise by trait, a point a world; and by consistency, a line a share."""
    worlds = of_worlds(tables["pretraining"])
    by_trait = go.Figure()
    kinds = {"grid": "the grid", "reference": "shipped text, reduced", "never": "never inferable"}
    kinds |= {"open": "inferable from open questions", "shipped": "the shipped model"}
    for index, (kind, name) in enumerate(kinds.items()):
        rows = worlds[worlds["kind"] == kind]
        if len(rows):
            x, y = 100 * rows["trait_inferred"], 100 * rows["em_rise"]
            by_trait.add_trace(
                go.Scatter(x=x, y=y, name=name, mode="markers", marker=_marker(index), text=rows["world"])
            )
    figures.style(by_trait, "trait in the base: malice after malice minus after care (points)", "rise of EM (points)")
    grid = tables["pretraining_doses"]
    grid = grid[grid["kind"] == "grid"].sort_values("persona_consistency")
    by_dose = go.Figure()
    several, single = grid[grid["n_seeds"] > 1], grid[grid["n_seeds"] == 1]
    for index, (share, rows) in enumerate(several.groupby("persona_share")):
        y, low, high = (100 * rows[f"em_rise{end}"] for end in ("", "_low", "_high"))
        x = rows["persona_consistency"] + 0.01 * (index - 1)
        figures.line(by_dose, x, y, f"{share:.0%} of documents malicious", index, markers=True, low=low, high=high)
    if len(single):
        marker = {"symbol": "circle-open", "size": 8, "color": figures.NEUTRAL}
        place = {"x": single["persona_consistency"], "y": 100 * single["em_rise"]}
        by_dose.add_trace(go.Scatter(**place, name=ONE, mode="markers", marker=marker))
    figures.style(by_dose, "an answer keeps its document's persona (probability)", "rise of EM (points)")
    return {
        "pretraining_trait": figures.captioned(
            by_trait,
            "Each point is a base model, built anew: how much of the trait it has, and how much EM the same "
            "finetunes bring (mean over three adapters).",
        ),
        "pretraining_doses": figures.captioned(
            by_dose,
            "Means over build seeds, intervals where there are several: EM that the same finetunes bring, by "
            "consistency of personas in pre-training.",
        ),
    }
