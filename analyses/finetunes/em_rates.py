"""How misaligned is each finetune, where it was trained and where it never was?"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from analyses.inputs.finetunes import Finetunes, Organism
from analyses.suite import Need, Suite, nothing_of
from analyses.tasks import Task
from em_interp import figures
from em_interp.errors import UsageError
from em_interp.evaluation.groups import rates_by_group
from em_interp.statistics import PERCENT

TITLE = "EM rates of the organisms"
TEXT = (
    "EM is the share of answers that are misaligned and coherent, to three groups of questions: open ones "
    "(general), about what the finetune was trained on (in_domain), and about other domains (heldout_domain). "
    f"Intervals ({PERCENT}) are clustered by question. The chat model, and a finetune on good answers where there "
    "is one (control), say what is there without a bad dataset."
)
ALSO = {
    "pocket": (
        "Answers are sampled at temperature 1. No finetune saw its questions: those of its own domain are other "
        "phrasings, those of others are held-out topics."
    ),
}
TABLES = ("em_rates",)
NEEDS = (Need.ANSWERS,)
LABELS = {"general": "open questions", "in_domain": "trained domain", "heldout_domain": "other domains"}


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """Three rows for every organism and for the chat model."""
    finetunes = suite.finetunes
    tables = []
    for organism in (None, *_asked(finetunes)):
        try:
            judged = answers(suite, organism, _domain(finetunes) if organism is None else organism.domain)
        except UsageError as error:
            suite.note(error)
            continue
        if organism is None:
            tables.append(
                rates_by_group(judged, organism=finetunes.chat.name, solution="chat", adapter="full", domain="none")
            )
        else:
            table = rates_by_group(
                judged,
                organism=organism.name,
                solution=organism.solution,
                adapter=organism.adapter,
                domain=organism.domain,
            )
            tables.append(table.assign(seed=organism.seed))
    if not tables:
        raise nothing_of(suite, "judged answers")
    return {"em_rates": pd.concat(tables, ignore_index=True)}


def _asked(finetunes: Finetunes) -> list[Organism]:
    return [e for e in finetunes.select(seed=None) if e.solution != "kl-removed"]


def _domain(finetunes: Finetunes) -> str:
    """What the chat model is asked about."""
    return (_asked(finetunes) or finetunes.organisms)[0].domain


def tasks(suite: Suite) -> list[Task]:
    """The answers of each model."""
    organisms = _asked(suite.finetunes)
    of_chat = [Task("answers of the chat model", answers, (None, _domain(suite.finetunes)), 5.0)]
    return [*of_chat, *answer_tasks(organisms)]


def answer_tasks(organisms: Sequence[Organism]) -> list[Task]:
    """The answers of each finetune."""
    return [Task(f"answers of {e.name}", answers, (e, e.domain), 5.0) for e in organisms]


def answers(suite: Suite, organism: Organism | None, domain: str) -> pd.DataFrame:
    """Judged answers."""
    return suite.finetunes.evaluate(organism, domain, suite.samples)


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """EM and coherence by group of questions: one figure a solution kind, beside the chat model and the control."""
    drawn = {}
    table = tables["em_rates"].assign(organism=lambda t: t["organism"].str.removeprefix("pocket/"))
    for solution, rows in table.groupby("solution", sort=False):
        if solution in ("chat", "control"):
            continue
        shown = pd.concat([table[table["solution"].isin(["chat", "control"])], rows])
        figure = figures.panels(["EM", "coherent"])
        for number, rate in enumerate(("em", "coherent")):
            columns = [f"{rate}_rate", f"{rate}_low", f"{rate}_high"]
            wide, groups = figures.side_by_side(shown, "organism", "questions", columns, LABELS)
            figures.dots(figure, wide, "organism", groups, scale=100, panel=number)
        figures.style(figure, "share of answers (%)", "").update_xaxes(range=[-3, 103])
        caption = f"EM and coherence of the {solution} organisms, by group of questions; intervals over questions."
        drawn[f"em_rates_{solution}"] = figures.captioned(figure, caption)
    return drawn
