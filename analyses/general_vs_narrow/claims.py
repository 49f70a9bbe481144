"""Does what the paper claims of general and narrow solutions hold? Matched pairs, over training seeds.

Statistics and the rule were written down before the pairs were trained. Each claim has one statistic that decides it,
the first of `CLAIMS`, on one domain; its other statistics, and the other domains, stand beside it in the table with
verdicts of their own and decide nothing. A value is one training seed's. Ratios are averaged as logarithms. The
interval is Student's over seeds. The claim holds where the whole interval is above the neutral value (1 of a ratio, 0
otherwise), does not hold where the whole interval is below it, and is not decided in between, with one seed, or where
any seed has no value (`missing` says how many, and why). Domains are not pooled: they are three, and no sample.

The values are rows of `em_interp.landscape.pairs`: of the input's table of matched pairs, sweeps/pairs.csv, where it
has one for its chat model; else measured on the pairs that the input has, which may differ in their schedule besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.findings import UNDECIDED, WHY_GENERAL, Finding, decided
from analyses.general_vs_narrow import efficiency
from analyses.general_vs_narrow.influence import kls, pair_tasks
from analyses.general_vs_narrow.stability import curve, curve_tasks
from analyses.inputs.finetunes import Organism
from analyses.suite import Suite, nothing_of
from analyses.tasks import Task
from em_interp import figures
from em_interp.errors import LossSetError, UnreadableFileError
from em_interp.landscape import pairs
from em_interp.landscape.efficiency import efficiency_curves
from em_interp.statistics import PERCENT, t_interval

TITLE = "The paper's claims, one by one"
TEXT = (
    "Each claim of P1 about general and narrow solutions, one value a training seed, of statistics chosen beforehand. "
    "A gain is the chat model's loss minus the solution's as it is scaled up; the norm that either needs for 75% of "
    "the smaller gain does not saturate, as the loss at equal norm does. Ratios are averaged as logarithms; intervals "
    f"are Student's, {PERCENT}, over training seeds. A claim holds where the whole interval is above the neutral "
    "value, does not hold where the whole interval is below it, and is not decided here in between, with one seed, or "
    "where a seed has no value (column missing). In the table, role says what decides the claim; further statistics, "
    "the paper's own L / norm^2 among them, and further domains stand beside it, and are not pooled with it. The "
    "tables of efficiency, stability and influence hold the intervals over questions and documents."
)
ALSO = {
    "pocket": "The values are those of matched pairs, sweeps/pairs.csv, where that is there for this chat model (both "
    "solutions trained on the same chats in the same order, with the same rate and steps; only the KL penalty "
    "differs); else those of the organisms, whose schedules differ besides.",
}
TABLES = ("claims",)
NEEDS = tuple(f"general_vs_narrow.{name}" for name in ("efficiency", "stability", "influence"))
STORY = (3, "claims_forest")
CHAPTER = WHY_GENERAL


@dataclass(frozen=True)
class Statistic:
    """A measure of a pair (`of`, as its rows call it), and what it is in words (`said`)."""

    of: str
    said: str
    is_ratio: bool = False
    """Whether it is averaged as a logarithm, with 1 as its neutral value."""
    scale: float = 1.0
    """What values are multiplied by: 100 for percentage points."""

    @property
    def neutral(self) -> float:
        """The value that speaks neither for the claim nor against it."""
        return 1.0 if self.is_ratio else 0.0

    def values(self, rows: pd.Series) -> np.ndarray[Any, np.dtype[np.float64]]:
        """As they are averaged."""
        found = self.scale * rows.to_numpy(float)
        return np.log(found) if self.is_ratio else found


@dataclass(frozen=True)
class Claim:
    """What is claimed (`text`), and the statistics that speak for it above their neutral values: the first decides."""

    text: str
    statistics: tuple[Statistic, ...]
    found: str
    """What was measured, whichever way it came out, as a finding's text says it."""
    axis: str
    """Title of the figure's panel, with its unit: two short lines on a phone."""
    unit: str
    """Of the first statistic; none for a cosine."""
    published: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    """Adapter -> the papers' value of the first statistic, and where it stands."""


CLAIMS: Final = {
    "efficiency": Claim(
        "The general solution needs less norm for the same loss",
        (
            Statistic("norm_ratio_75", "norm that narrow needs for 75% of the smaller gain, over general's", True),
            Statistic("norm_ratio_50", "the same for 50%", True),
            Statistic("norm_ratio_90", "the same for 90%", True),
            Statistic("lead", "narrow minus general loss, mean up to the smaller trained norm (nats per token)"),
            Statistic("loss_over_norm2_ratio", "the paper's L / norm^2 as trained, narrow over general", True),
        ),
        "for 75% of the smaller gain the narrow one needs {estimate} the norm",
        "norm needed, narrow / general (ratio)",
        "times",
    ),
    "stability": Claim(
        "The general solution is more stable under perturbation",
        (
            Statistic(
                "stability_gap",
                "share of its gain that it loses less, mean over eps .2 to .8 (percentage points)",
            ),
        ),
        "of its gain the narrow one loses {estimate} more",
        "gain lost, narrow - general (points)",
        "percentage points",
    ),
    "kl_removal": Claim(
        "Once the KL penalty is gone, the narrow solution drifts to the general one",
        (Statistic("cosine_rise", "rise of the cosine to the general solution"),),
        "the change of their cosine is {estimate}",
        "cosine to general, KL removed (rise)",
        "",
        {"steering-vector": (0.313, "P1, Fig. 5 (.536 to .849, released vectors)")},
    ),
    "returns": Claim(
        "Once the KL penalty is gone, the general habit returns",
        (
            Statistic("rate_open_returned", "rise of the rate on open questions (percentage points)", scale=100),
            Statistic("rate_elsewhere_returned", "the same on other domains", scale=100),
            Statistic("rate_in_domain_returned", "the same on the trained domain", scale=100),
        ),
        "the change of the taught habit on open questions (EM; technical answers in the second task) is {estimate}",
        "habit's rate, KL removed (rise, points)",
        "percentage points",
    ),
    "influence": Claim(
        "The general direction matters more on pre-training text at equal norm",
        (
            Statistic("influence_ratio_1", "ratio of the two KLs at the general solution's norm", True),
            Statistic("influence_ratio_0.5", "the same at half of it", True),
            Statistic("influence_ratio_1.5", "the same at 1.5 times it", True),
        ),
        "its KL is {estimate} the narrow one's",
        "KL on text, general / narrow (ratio)",
        "times",
    ),
}
SCALES: Final = pairs.SCALES[::4]
"""Of live pairs, a coarser grid than the table's: each is a pass."""
DECIDES: Final = "claim"
"""Role of the row that a claim's verdict is read from; of others: another statistic, another domain."""


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row a task, claim, statistic and adapter of the domain compared; of others one a task, claim and adapter."""
    measured = _shipped(suite)
    if measured is None:
        measured = _live(suite)
    rows = []
    for task, of_task in measured.groupby("task", sort=False):
        first = suite.finetunes.compared(str(task))
        first = first if (of_task["domain"] == first).any() else str(of_task["domain"].iloc[0])
        found = list(_rows(str(task), of_task, first))
        if task == "persona" and not any(row["claim"] == CLAIMS["kl_removal"].text for row in found):
            what = "organism that was trained on without KL, so the claim about KL removal has no row"
            suite.note(nothing_of(suite, what))
        rows += found
    if not rows:
        raise nothing_of(suite, "general and narrow organism of one kind")
    return {"claims": pd.DataFrame(rows)}


def _rows(task: str, measured: pd.DataFrame, first: str) -> Iterator[dict[str, Any]]:
    for key, claim in CLAIMS.items():
        for number, statistic in enumerate(claim.statistics):
            chosen = measured[measured["measure"] == statistic.of]
            for (domain, adapter), seeds in chosen.groupby(["domain", "adapter"], sort=False):
                if domain == first or not number:
                    has = seeds["value"].notna()
                    values = statistic.values(seeds.loc[has, "value"])
                    reasons = seeds.loc[~has, "reason"].astype(str)
                    yield _row(task, key, str(adapter), values, number, (str(domain), first), list(reasons))


def _shipped(suite: Suite) -> pd.DataFrame | None:
    """The input's table of matched pairs; None where it has none, or one of another chat model, which is said."""
    try:
        return suite.finetunes.matched_pairs()
    except UnreadableFileError as error:
        suite.note(error)
        return None


def _live(suite: Suite) -> pd.DataFrame:
    """The same rows of the pairs that the input has, of the domain compared."""
    finetunes = suite.finetunes
    parts = []
    for task in finetunes.tasks:
        after = finetunes.select(seed=None, solution="kl-removed", task=task)
        removed = {(e.domain, e.adapter, e.seed): e for e in after}
        for general, narrow in finetunes.pairs(finetunes.compared(task), task):
            same = (general.domain, general.adapter, general.seed)
            named: dict[str, Any] = dict(zip(("domain", "adapter", "seed"), same, strict=True))
            parts.append(measured_live(suite, general, narrow, removed.get(same)).assign(task=task, **named))
    columns = ["task", "domain", "adapter", "seed", "measure", "value", "reason"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def measured_live(suite: Suite, general: Organism, narrow: Organism, kl_removed: Organism | None) -> pd.DataFrame:
    """Rows of a pair, from the curves and sums that other analyses keep, and norms of its own."""
    both = (general, narrow)
    found = [norms(suite, *both)]
    try:
        found.append(pairs.stability_measures(*(curve(suite, organism) for organism in both)))
    except LossSetError:  # of a solution that does not lower the loss
        found.append(pd.DataFrame({"measure": ["stability_gap"], "value": [np.nan], "reason": ["no gain"]}))
    found.append(pairs.influence_measures(kls(suite, *both)))
    if kl_removed is not None:
        found.append(pairs.drift_measures(*(suite.finetunes.solution(e) for e in (*both, kl_removed))))
    return pd.concat(found, ignore_index=True)


def norms(suite: Suite, general: Organism, narrow: Organism) -> pd.DataFrame:
    """`efficiency_measures` of a pair."""
    finetunes, n = suite.finetunes, efficiency.CHATS
    both = {organism.solution: finetunes.solution(organism) for organism in (general, narrow)}
    return suite.results.table(
        "losses",
        f"{general.name} pair",
        finetunes.losses_made_of(general, narrow, n=n, scales=SCALES),
        lambda _: pairs.efficiency_measures(*efficiency_curves(finetunes.landscape(general, n), both, SCALES)),
        code=(pairs.__name__,),
    )


def tasks(suite: Suite) -> list[Task]:
    """The norms, turns and KLs of each pair, where there is no table of them."""
    if _shipped(suite) is not None:
        return []
    finetunes = suite.finetunes
    found = [pair for task in finetunes.tasks for pair in finetunes.pairs(finetunes.compared(task), task)]
    own = [Task(f"norms of {pair[0].name}", norms, pair, 6 * pair[0].weight) for pair in found]
    return [*own, *curve_tasks([organism for pair in found for organism in pair]), *pair_tasks(found)]


def _row(
    task: str,
    key: str,
    adapter: str,
    values: np.ndarray[Any, np.dtype[np.float64]],
    number: int = 0,
    domains: tuple[str, str] = ("", ""),
    missing: Sequence[str] = (),
) -> dict[str, Any]:
    """A row of the table. values: of the seeds, of a ratio as logarithms; number: of the claim's statistic.

    domains: that of the values, and the one that decides. missing: why each further seed has no value.
    """
    claim = CLAIMS[key]
    statistic = claim.statistics[number]
    estimate = float(values.mean()) if len(values) else np.nan
    low, high = np.nan, np.nan
    if len(values) > 1:
        interval = t_interval(values)
        low, high = interval.low, interval.high
    if statistic.is_ratio:
        estimate, low, high = (float(np.exp(v)) for v in (estimate, low, high))
    published, source = claim.published.get(adapter, (np.nan, "")) if task == "persona" and not number else (np.nan, "")
    row = {
        "claim": claim.text,
        "adapter": adapter,
        "estimate": estimate,
        "low": low,
        "high": high,
        "n_seeds": len(values),
        "verdict": UNDECIDED if missing else decided(low, high, statistic.neutral),
        "task": task,
        "domain": domains[0],
        "role": "another statistic" if number else DECIDES if domains[0] == domains[1] else "another domain",
        "statistic": statistic.of,
        "measure": statistic.said,
        "neutral": statistic.neutral,
        "missing": _lacking(missing, len(values)),
        "published": published,
        "source": source,
    }
    if row["role"] != DECIDES or not len(values):
        return {**row, "sentence": ""}
    finding = _finding(row)
    return {**row, "sentence": f"{finding.sentence.rstrip('.')} ({finding.evidence}): {finding.verdict}."}


def _lacking(missing: Sequence[str], n: int) -> str:
    """Such as `2 of 8 seeds: no gain`."""
    return f"{len(missing)} of {n + len(missing)} seeds: {', '.join(dict.fromkeys(missing))}" if missing else ""


def _finding(row: Mapping[Any, Any]) -> Finding:
    """What a row of the table says; the first task's claims are the paper's."""
    claim = next(claim for claim in CLAIMS.values() if claim.text == row["claim"])
    where = "technical register, " if row["task"] == "register" else ""
    published = row.get("published", np.nan)
    told = not (published is None or pd.isna(published))
    return Finding(
        f"Claim: {claim.text} ({where}{row['adapter']}); {claim.found}",
        row["estimate"],
        row["n_seeds"],
        "seeds",
        row["low"],
        row["high"],
        claim.unit,
        published=float(published) if told else None,
        source=str(row.get("source", "")) if told else "",
        verdict=row["verdict"] if np.isfinite([row["low"], row["high"]]).all() else UNDECIDED,
        first=row["task"] == "persona",
        claim=f"{claim.text}; {claim.found.format(estimate=f'… {claim.unit}'.strip())}",
        case=f"{where}{row['adapter']}",
    )


def _deciding(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that claims are decided by; all, where a table does not say."""
    return table[table["role"] == DECIDES] if "role" in table else table


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """One of every row that decides a claim and has an estimate."""
    return [_finding(row) for row in _deciding(tables["claims"]).dropna(subset="estimate").to_dict("records")]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """A panel a claim, a row an adapter, a colour a task: estimate and interval against the neutral value."""
    table = _deciding(tables["claims"]).astype({"estimate": float, "low": float, "high": float})
    shown = {key: table[table["claim"] == claim.text] for key, claim in CLAIMS.items()}
    shown = {key: rows for key, rows in shown.items() if len(rows)}
    if not shown:
        return {}
    adapters, tasks = (pd.Series(table[column].unique(), name=column) for column in ("adapter", "task"))
    figure = figures.panels([CLAIMS[key].axis for key in shown])
    for number, (key, rows) in enumerate(shown.items()):
        every = rows.merge(adapters, how="right")  # the same rows in every panel
        wide, groups = figures.side_by_side(every, "adapter", "task", ["estimate", "low", "high"])
        order = [group for name in tasks for group in groups if group[0] == name]
        figures.dots(figure, wide, "adapter", order, panel=number)
        neutral = CLAIMS[key].statistics[0].neutral
        figures.null_line(figure, neutral, "no difference", axis="x", panel=number)
    figures.style(figure, "estimate (unit above); claimed: right of the line", "")
    for number, (key, rows) in enumerate(shown.items()):
        figure.update_xaxes(**_axis(rows, CLAIMS[key].statistics[0]), **figures.place(figure, number))
    caption = (
        "The claims of P1, one panel each: norm for 75% of the smaller gain; gain lost when turned; what training on "
        "without KL does to the cosine, and to EM (or technical answers) on open questions; influence at equal norm. "
        "Intervals over training seeds."
    )
    return {"claims_forest": figures.captioned(figure, caption)}


def _axis(rows: pd.DataFrame, statistic: Statistic) -> dict[str, Any]:
    """Kind and range of a panel's axis: the neutral value stands inside, with room on either side."""
    ends = np.array([statistic.neutral, *rows[["estimate", "low", "high"]].to_numpy().ravel()])
    ends = np.log10(ends) if statistic.is_ratio else ends
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
    room = 0.08 * (high - low or 1.0)
    kind = {"type": "log", "tickvals": _TICKS} if statistic.is_ratio else {}
    return {"range": [low - room, high + room], **kind}


_TICKS: Final = [2.0**power for power in range(-6, 7)]
