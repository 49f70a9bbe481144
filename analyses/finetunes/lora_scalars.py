"""What does a rank-1 adapter read? Its scalar on the organism's own answers, against domain and alignment."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analyses.findings import Finding, decided, middle, named, value_of
from analyses.finetunes.em_rates import answer_tasks, answers_asked
from analyses.inputs.finetunes import Organism
from analyses.suite import Need, Suite, nothing_of
from analyses.tasks import Task
from em_interp import figures
from em_interp.directions import rank1
from em_interp.directions.rank1 import lora_scalars, mean_scalars
from em_interp.errors import SolutionError, StatisticsError, UsageError
from em_interp.evaluation.answers import conversations
from em_interp.evaluation.criteria import PAPER
from em_interp.files.manifest import fingerprint
from em_interp.solutions.lora import as_lora
from em_interp.statistics import PERCENT

TITLE = "What rank-1 adapters read"
TEXT = (
    "A rank-1 adapter adds scale * s * B, where the scalar s = A x is all that it knows of a token. Its mean over "
    "each coherent answer of the organism itself is given to a logistic probe (P2 Table 1), scored on questions "
    "that the probe was not fitted on: does s tell the trained domain from others, or misaligned answers from "
    f"aligned ones? Chance is an AUC of 0.5; intervals ({PERCENT}) leave questions out in turn, and are mirrored "
    "at 0.5 where the probe comes out below it. The probe sees as many numbers an answer as the finetune has "
    "adapted modules."
)
ALSO = {
    "pocket": "Here that is one.",
}
TABLES = ("lora_scalars",)
NEEDS = (Need.ANSWERS,)
PUBLISHED = {
    "out-of-domain aligned / in-domain aligned": 0.71,
    "out-of-domain misaligned / in-domain misaligned": 0.66,
    "out-of-domain aligned / out-of-domain misaligned": 0.74,
    "in-domain aligned / in-domain misaligned": 0.75,
}
"""AUCs of P2, whose probe reads nine adapters."""


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row an organism and comparison; comparisons without two questions on both sides are noted and left out."""
    tables = []
    for organism in _read(suite):
        try:
            table = scalars(suite, organism)
        except UsageError as error:
            suite.note(error)
            continue
        except StatisticsError as error:
            suite.note(StatisticsError(f"{organism.name}: {error}"))
            continue
        tables.append(table.assign(organism=organism.name, domain=organism.domain, seed=organism.seed))
    if not tables:
        raise nothing_of(suite, "rank-1 general organism with answers that can be compared")
    return {"lora_scalars": pd.concat(tables, ignore_index=True)}


def tasks(suite: Suite) -> list[Task]:
    """The answers of each organism, and its scalars."""
    organisms = _read(suite)
    found = [Task(f"scalars of {e.name}", scalars, (e,), 2.0, stage=1) for e in organisms]
    return [*answer_tasks(organisms), *found]


def asks(suite: Suite) -> dict[str, int]:
    """How many answers are sampled, by whose."""
    return answers_asked(suite, _read(suite))


def _read(suite: Suite) -> list[Organism]:
    return suite.finetunes.select(solution="general", adapter="rank-1", seed=None)


def scalars(suite: Suite, organism: Organism) -> pd.DataFrame:
    """`lora_scalars` of an organism's coherent answers. Raises `UsageError` and `StatisticsError`."""
    finetunes = suite.finetunes
    try:
        adapter = as_lora(finetunes.solution(organism))
    except SolutionError as error:
        raise SolutionError(f"{organism.name} is listed as rank-1: {error} Make it again.") from error
    judged = finetunes.evaluate(organism, organism.domain, suite.samples).dropna(subset=["aligned", "coherent"])
    judged = finetunes.readable(organism, judged[PAPER.is_coherent(judged["coherent"].to_numpy())])
    judged = judged.reset_index(drop=True).assign(in_domain=judged["questions"].to_numpy() == "in_domain")
    if judged.empty:
        raise StatisticsError("it gave no coherent answer, so its scalars are not compared.")
    said = judged[["question", "aligned", "in_domain"]].to_dict("list")
    made_by = finetunes.made_of(organism, answers=finetunes.texts_hash(conversations(judged)), of=fingerprint(said))
    return suite.results.table(
        "tables",
        f"{organism.name} scalars",
        made_by,
        lambda _: lora_scalars(mean_scalars(finetunes.chat, adapter, conversations(judged)), judged),
        code=(rank1.__name__,),
    )


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """How well the middle organism's scalar tells the answers of each comparison apart."""
    found = []
    for comparison, rows in tables["lora_scalars"].groupby("comparison", sort=False):
        row = middle(rows, "auc")
        if row is None:
            continue
        n, name = int(rows["auc"].notna().sum()), named(row["organism"])
        whose = f"{name}'s scalar" if n == 1 else f"the middle of {n} rank-1 scalars, {name}'s,"
        one, _, other = named(comparison).partition(" / ")
        text = f"A probe of {whose} has an AUC of {{estimate}} for {other} against {one} answers, where chance is .5"
        ends = value_of(row, "low"), value_of(row, "high")
        published = PUBLISHED.get(str(comparison))
        source = "" if published is None else "P2, Table 1"
        given: dict[str, Any] = {"published": published, "source": source, "verdict": decided(*ends, 0.5)}
        found.append(Finding(text, value_of(row, "auc"), int(row["n"]), "answers", *ends, **given))
    return found


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """AUC of each comparison, a row a comparison, a colour an organism."""
    table = tables["lora_scalars"].assign(organism=lambda t: t["organism"].str.removeprefix("pocket/"))
    wide, groups = figures.side_by_side(table, "comparison", "organism", ["auc", "low", "high"])
    figure = figures.dot_plot(wide, "comparison", groups, "AUC of the probe (0 to 1)")
    figures.null_line(figure, 0.5, "chance", axis="x")
    figure.update_xaxes(range=[-0.02, 1.05])
    caption = "How well the adapter's scalar tells answers apart; intervals over questions."
    return {"lora_scalars": figures.captioned(figure, caption)}
