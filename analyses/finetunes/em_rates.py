"""How misaligned is each finetune, where it was trained and where it never was?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analyses.findings import EMERGES, Finding, apart, clause, count_of, middle, named, percent, said, value_of
from analyses.inputs.finetunes import Finetunes, Organism
from analyses.suite import Need, Suite, nothing_of
from analyses.tasks import Task
from em_interp import figures
from em_interp.errors import UsageError
from em_interp.evaluation.groups import GROUPS, rates_by_group
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
STORY = (1, "em_rates")
CHAPTER = EMERGES
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


def asks(suite: Suite) -> dict[str, int]:
    """How many answers are sampled, by whose."""
    found = suite.judged_finetunes
    of_chat = {"answers of the chat model": found.n_asked(None, _domain(found), suite.samples)}
    return of_chat | answers_asked(suite, _asked(found))


def answers_asked(suite: Suite, organisms: Sequence[Organism]) -> dict[str, int]:
    """The same of finetunes."""
    n_asked = suite.judged_finetunes.n_asked
    return {f"answers of {e.name}": n_asked(e, e.domain, suite.samples) for e in organisms}


def answer_tasks(organisms: Sequence[Organism]) -> list[Task]:
    """The answers of each finetune."""
    return [Task(f"answers of {e.name}", answers, (e, e.domain), 5.0) for e in organisms]


def answers(suite: Suite, organism: Organism | None, domain: str) -> pd.DataFrame:
    """Judged answers."""
    return suite.finetunes.evaluate(organism, domain, suite.samples)


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """What the middle general organism and the chat model answer, and the middle narrow one in its domain and outside.

    A general organism is held against the chat model, asked the same; a narrow one inside its domain against outside.
    """
    table = tables["em_rates"]
    asked = {group: table[table["questions"] == group] for group in GROUPS}
    chat = {group: middle(rows[rows["solution"] == "chat"], "em_rate") for group, rows in asked.items()}
    general = {group: rows[rows["solution"] == "general"] for group, rows in asked.items()}
    found = [
        *_general(general["general"], chat["general"], "open questions", 40.0, "P3: about 40%"),
        *_general(general["heldout_domain"], chat["heldout_domain"], "questions about other domains"),
        *_chat(chat["general"], chat["heldout_domain"]),
    ]
    rows = asked["in_domain"][asked["in_domain"]["solution"] == "narrow"]
    if (inside := middle(rows, "em_rate")) is not None:
        others = {g: asked[g][asked[g]["organism"] == inside["organism"]] for g in ("general", "heldout_domain")}
        if (outside := middle(others["general"], "em_rate")) is not None:
            found += _narrow(rows, inside, outside, middle(others["heldout_domain"], "em_rate"))
    return found


def _general(
    rows: pd.DataFrame,
    of_chat: Mapping[Any, Any] | None,
    where: str,
    published: float | None = None,
    source: str = "",
) -> list[Finding]:
    """The middle general organism, beside the chat model."""
    if (row := middle(rows, "em_rate")) is None:
        return []
    than_chat, verdict = "", ""
    if of_chat is not None:
        than_chat = clause("; the chat model in {}", percent(of_chat, "em_rate"))
        verdict = apart(*_ends(row), *_ends(of_chat))
    text = f"{_which(rows, row)} misaligned in {{estimate}} of its answers to {where}{than_chat}"
    asked = f"General organisms, {where.removeprefix('questions about ')}"
    return [_finding(text, row, published, source, verdict, asked, _spread(rows))]


def _chat(row: Mapping[Any, Any] | None, elsewhere: Mapping[Any, Any] | None) -> list[Finding]:
    """What is there before any finetune: nothing is claimed of it."""
    if row is None:
        return []
    beside = "" if elsewhere is None else clause("about other domains {}", percent(elsewhere, "em_rate"))
    text = "The chat model is misaligned in {estimate} of its answers to open questions"
    return [_finding(text, row, 0.0, "released answers", "", "The chat model, open questions", beside)]


def _narrow(
    rows: pd.DataFrame, inside: Mapping[Any, Any], outside: Mapping[Any, Any], elsewhere: Mapping[Any, Any] | None
) -> list[Finding]:
    """The middle narrow organism: in its domain, and on open questions."""
    which, own, verdict = _which(rows, inside), percent(inside, "em_rate"), apart(*_ends(inside), *_ends(outside))
    domain = f"{which} misaligned in {{estimate}} of its answers in its domain"
    text = f"{which} misaligned in {own} of its answers in its domain, and in {{estimate}} of those to open questions"
    beside = "" if elsewhere is None else clause("about other domains {}", percent(elsewhere, "em_rate"))
    return [
        _finding(domain, inside, 65.0, "LW: up to 65%", verdict, "Narrow organisms, their domain", _spread(rows)),
        _finding(text, outside, 0.0, "LW: 0%", verdict, "Narrow organisms, open questions", beside),
    ]


def _which(rows: pd.DataFrame, row: Mapping[Any, Any]) -> str:
    """The subject of a sentence on the middle one of some organisms of a kind."""
    n, kind, name = len(rows[rows["em_rate"].notna()]), row["solution"], named(row["organism"])
    return f"The {kind} organism {name} is" if n == 1 else f"Of {n} {kind} organisms the middle one, {name}, is"


def _spread(rows: pd.DataFrame) -> str:
    """The organisms of which the number is the middle one's, from least to most."""
    rates = 100 * rows["em_rate"].dropna().astype(float)
    least, most = float(rates.min()), float(rates.max())
    return "" if len(rates) == 1 else f"middle of {len(rates)}, {said(least, '', most)} to {said(most, '%')}"


def _ends(row: Mapping[Any, Any]) -> tuple[float, float]:
    return value_of(row, "em_low", 100), value_of(row, "em_high", 100)


def _finding(
    text: str,
    row: Mapping[Any, Any],
    published: float | None,
    source: str,
    verdict: str,
    asked: str,
    beside: str,
) -> Finding:
    return Finding(
        text,
        value_of(row, "em_rate", 100),
        count_of(row, "n_scored", "n"),
        "answers",
        *_ends(row),
        unit="%",
        published=published,
        source=source,
        verdict=verdict,
        first=True,
        asked=asked,
        beside=beside,
    )


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """The middle organism of each kind beside the chat model; then every organism, a figure a kind."""
    table = tables["em_rates"].assign(organism=lambda t: t["organism"].str.removeprefix("pocket/"))
    caption = "Misaligned answers of the chat model and of the middle organism of each kind; intervals over questions."
    drawn = {"em_rates": figures.captioned(_middle_of_each(table), caption)}
    for solution, rows in table.groupby("solution", sort=False):
        if solution in ("chat", "control"):
            continue
        shown = pd.concat([table[table["solution"].isin(["chat", "control"])], rows])
        figure = figures.panels(["EM", "coherent"])
        for panel, rate in enumerate(("em", "coherent")):
            columns = [f"{rate}_rate", f"{rate}_low", f"{rate}_high"]
            wide, groups = figures.side_by_side(shown, "organism", "questions", columns, LABELS)
            figures.dots(figure, wide, "organism", groups, scale=100, panel=panel)
        figures.style(figure, "share of answers (%)", "").update_xaxes(range=[-3, 103])
        caption = f"EM and coherence of the {solution} organisms, by group of questions; intervals over questions."
        drawn[f"em_rates_{solution}"] = figures.captioned(figure, caption)
    return drawn


def _middle_of_each(table: pd.DataFrame) -> go.Figure:
    """A row the chat model, and the middle organism of each kind: of narrow ones in their domain, else in general."""
    parts = []
    kinds = dict.fromkeys(["chat", "control", "general", *table["solution"]])
    for solution in kinds:
        rows = table[table["solution"] == solution]
        asked = rows[rows["questions"] == ("in_domain" if solution == "narrow" else "general")]
        row = middle(asked, "em_rate")
        if row is not None:
            n = len(asked[asked["em_rate"].notna()])
            name = str(row["organism"]) if n == 1 else f"{solution}: {row['organism']} (middle of {n})"
            parts.append(rows[rows["organism"] == row["organism"]].assign(name=name))
    shown = pd.concat(parts) if parts else table.assign(name=table["organism"])
    wide, groups = figures.side_by_side(shown, "name", "questions", ["em_rate", "em_low", "em_high"], LABELS)
    return figures.dot_plot(wide, "name", groups, "EM (% of the answers)", scale=100).update_xaxes(range=[-3, 103])
