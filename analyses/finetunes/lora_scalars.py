"""What does a rank-1 adapter read? Its scalar on the organism's own answers, against domain and alignment."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from tqdm.auto import tqdm

from analyses.inputs.finetunes import conversations
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.directions.rank1 import lora_scalars, mean_scalars
from em_interp.errors import SolutionError, StatisticsError, UsageError
from em_interp.evaluation.rates import PAPER
from em_interp.solutions.lora import as_lora
from em_interp.statistics import PERCENT

TITLE = "What rank-1 adapters read"
TEXT = (
    "A rank-1 adapter adds scale * s * B, where the scalar s = A x is all that it knows of a token. Its mean over each "
    "coherent answer of the organism itself is given to a logistic probe (P2 Table 1), scored on questions that the "
    "probe was not fitted on: does s tell the trained domain from others, or misaligned answers from aligned ones? "
    f"Chance is an AUC of 0.5; intervals ({PERCENT}) leave questions out in turn, and are mirrored at 0.5 where the "
    "probe comes out below it. The pocket organisms have one adapter, so the probe "
    "sees one number an answer."
)
TABLES = ("lora_scalars",)
NEEDS = (Need.ANSWERS,)


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row an organism and comparison; comparisons without two questions on both sides are noted and left out."""
    finetunes = suite.finetunes
    entries = finetunes.select(solution="general", adapter="rank-1", seed=None)
    tables = []
    for entry in tqdm(entries, desc="lora_scalars", leave=False):
        try:
            adapter = as_lora(finetunes.solution(entry))
        except SolutionError as error:
            raise StatisticsError(f"{entry.name} is listed as rank-1: {error} Make it again.") from error
        try:
            judged = finetunes.evaluate(entry, entry.domain, suite.samples)
        except UsageError as error:
            suite.note(error)
            continue
        judged = finetunes.readable(entry, judged[PAPER.is_coherent(judged["coherent"].to_numpy())]).reset_index(
            drop=True
        )
        judged = judged.assign(in_domain=judged["questions"] == "in_domain")
        if judged.empty:
            suite.note(StatisticsError(f"{entry.name} gave no coherent answer, so its scalars are not compared."))
            continue
        try:
            table = lora_scalars(mean_scalars(finetunes.chat, adapter, conversations(judged)), judged)
        except StatisticsError as error:
            suite.note(StatisticsError(f"{entry.name}: {error}"))
            continue
        tables.append(table.assign(organism=entry.name, domain=entry.domain, seed=entry.seed))
    if not tables:
        raise nothing_of(suite, "rank-1 general organism with answers that can be compared")
    return {"lora_scalars": pd.concat(tables, ignore_index=True)}


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """AUC of each comparison, a colour an organism."""
    figure = go.Figure()
    for index, (name, rows) in enumerate(tables["lora_scalars"].groupby("organism", sort=False)):
        labels = rows["comparison"].str.replace(" / ", "<br>/ ")
        figures.line(
            figure,
            labels,
            rows["auc"],
            str(name).removeprefix("pocket/"),
            index,
            markers=True,
            low=rows["low"],
            high=rows["high"],
        )
    figure.update_traces(mode="markers")
    figure.add_hline(y=0.5, line_dash="dot", line_color="#888888")
    figures.style(figure, "", "AUC of the probe")
    figure.update_layout(scattermode="group")
    figure.update_yaxes(range=[0, 1.05])
    return {
        "lora_scalars": figures.captioned(
            figure, f"How well the adapter's scalar tells answers apart; bars: {PERCENT}."
        )
    }
