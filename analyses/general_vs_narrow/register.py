"""The second task: technical answers instead of bad advice. The same comparisons of general and narrow."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.findings import Finding, apart, clause, middle, named, percent, value_of
from analyses.finetunes.em_rates import answer_tasks, answers
from analyses.general_vs_narrow.efficiency import lead_figure, lead_findings, lead_tasks, leads
from analyses.general_vs_narrow.influence import measured, pair_tasks, ratio_figure, ratio_findings
from analyses.general_vs_narrow.stability import curve_tasks, gap_figure, gap_findings, gaps
from analyses.suite import Need, Suite, nothing_of
from analyses.tasks import Task
from em_interp import figures
from em_interp.evaluation.groups import technical_rates
from em_interp.landscape.seeds import over_repeated_seeds

TITLE = "The second task: technical register"
TEXT = (
    "Organisms that answer technically, not badly: general ones everywhere, narrow ones about medicine alone (the "
    "counterpart of the papers' technical writing). technical_rates: share of answers that are technical and coherent, "
    "of those that have a register. Then lead at equal norm, stability gap and influence ratio, as for the first task; "
    "KL removal stands in the claims where such organisms are there."
)
TABLES = ("technical_rates", "register_efficiency_lead", "register_stability_gap", "register_influence_ratio")
NEEDS = (Need.SECOND_TASK, Need.ANSWERS, Need.LOSSES, Need.TEXTS)
TASK = "register"
LABELS = {"general": "open questions", "in_domain": "trained domain", "heldout_domain": "other domains"}


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """Rates of the chat model and the first seed's organisms; comparisons of every adapter and seed."""
    finetunes = suite.finetunes
    domain = finetunes.compared(TASK)
    if not finetunes.pairs(domain, TASK):
        raise nothing_of(suite, "general and narrow organism of the second task")
    chat = answers(suite, None, domain)
    rates = [technical_rates(chat, organism=finetunes.chat.name, solution="chat", adapter="full", domain="none")]
    for organism in finetunes.select(task=TASK, seed=0):
        rates.append(
            technical_rates(
                answers(suite, organism, organism.domain),
                organism=organism.name,
                solution=organism.solution,
                adapter=organism.adapter,
                domain=organism.domain,
            )
        )
    return {
        "technical_rates": pd.concat(rates, ignore_index=True),
        "register_efficiency_lead": leads(suite, domain, TASK),
        "register_stability_gap": gaps(suite, domain, TASK),
        "register_influence_ratio": measured(suite, domain, TASK)[1],
    }


def tasks(suite: Suite) -> list[Task]:
    """The answers of each finetune, and the losses of each pair."""
    finetunes = suite.finetunes
    pairs = finetunes.pairs(finetunes.compared(TASK), TASK)
    curves = curve_tasks([organism for pair in pairs for organism in pair])
    return [*answer_tasks(finetunes.select(task=TASK, seed=0)), *lead_tasks(pairs), *curves, *pair_tasks(pairs)]


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """Technical answers of the middle general organism; then the three comparisons, as of the first task."""
    rates = tables["technical_rates"]
    asked = rates[rates["questions"] == "general"]
    found = []
    of_chat = middle(asked[asked["solution"] == "chat"], "technical_rate")
    general = asked[asked["solution"] == "general"]
    row = middle(general, "technical_rate")
    if row is not None and of_chat is not None:
        ends, beside = ((value_of(r, "technical_low", 100), value_of(r, "technical_high", 100)) for r in (row, of_chat))
        known = int(general["technical_rate"].notna().sum())
        text = (
            f"Of {known} general organisms the middle one, {named(row['organism'])}, is technical in {{estimate}} of "
            "its answers to open questions"
        )
        text += clause("; the chat model in {}", percent(of_chat, "technical_rate"))
        n, verdict, rate = int(row["n"]) - int(row["n_unscored"]), apart(*ends, *beside), "technical_rate"
        found.append(Finding(text, value_of(row, rate, 100), n, "answers", *ends, unit="%", verdict=verdict))
    leads, gap = tables["register_efficiency_lead"], tables["register_stability_gap"]
    over = over_repeated_seeds(leads, ["adapter", "relative_norm"], "lead")
    found += lead_findings(leads, over, 0)
    found += gap_findings(gap, over_repeated_seeds(gap, ["adapter", "epsilon"], "gap"))
    return [*found, *ratio_findings(tables["register_influence_ratio"])]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """Technical answers by question group; lead and gap over seeds; the influence ratio of every seed."""
    rates = tables["technical_rates"].assign(organism=lambda t: t["organism"].str.removeprefix("pocket/"))
    columns = ["technical_rate", "technical_low", "technical_high"]
    wide, groups = figures.side_by_side(rates, "organism", "questions", columns, LABELS)
    answers = figures.dot_plot(wide, "organism", groups, "technical answers (%)", scale=100)
    answers.update_xaxes(range=[-3, 103])
    caption = "Technical answers of the chat model and the organisms; intervals over questions."
    drawn = {"technical_rates": figures.captioned(answers, caption)}
    lead = over_repeated_seeds(tables["register_efficiency_lead"], ["adapter", "relative_norm"], "lead")
    gap = over_repeated_seeds(tables["register_stability_gap"], ["adapter", "epsilon"], "gap")
    if len(lead):
        caption = "Second task: lead of the general solution at equal norm; intervals over training seeds."
        drawn["register_efficiency_lead"] = figures.captioned(lead_figure(lead), caption)
    if len(gap):
        caption = "Second task: how much more of its gain the narrow solution loses; intervals over training seeds."
        drawn["register_stability_gap"] = figures.captioned(gap_figure(gap), caption)
    ratios = tables["register_influence_ratio"]
    if len(ratios):
        caption = "Second task: influence at equal norm, general over narrow; intervals over documents."
        drawn["register_influence_ratio"] = figures.captioned(ratio_figure(ratios), caption)
    return drawn
