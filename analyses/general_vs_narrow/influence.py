"""How much do the two solutions matter on pre-training text, at equal norm?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analyses.findings import Finding, clause, decided, named, said, value_of
from analyses.inputs.finetunes import Organism
from analyses.suite import Need, Suite, nothing_of
from analyses.tasks import Task
from em_interp import figures
from em_interp.files.manifest import fingerprint
from em_interp.landscape import influence
from em_interp.landscape.influence import Measured, at_equal_norms, document_kl, influence_ratio, influence_table

TITLE = "Influence on pre-training text"
TEXT = (
    "KL(chat || chat with the solution) in nats per token on documents that pre-training could have held, for the "
    "general and the narrow solution at the same norms (multiples of the general solution's), and for random "
    "directions of the same space at the general solution's own norm. P1's claim is that the general direction matters "
    "more. The ratio general / narrow has paired intervals over documents, one for every adapter and seed."
)
TABLES = ("influence", "influence_ratio")
NEEDS = (Need.TEXTS,)
DOCUMENTS = 60
RANDOM = 20
NORMS = (0.5, 1.0, 1.5)


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """`influence`: a row a direction and norm. `influence_ratio`: general over narrow and over random."""
    table, ratios = measured(suite, suite.finetunes.compared())
    if table.empty:
        raise nothing_of(suite, "general and narrow organism of one kind")
    return {"influence": table, "influence_ratio": ratios}


def tasks(suite: Suite) -> list[Task]:
    """The KLs of each pair."""
    return pair_tasks(suite.finetunes.pairs(suite.finetunes.compared()))


def pair_tasks(pairs: Sequence[tuple[Organism, Organism]]) -> list[Task]:
    """The KLs of each pair."""
    return [
        Task(f"influence of {p[0].name}", kls, p, (1 if p[0].seed or p[0].task == "register" else 8) * p[0].weight)
        for p in pairs
    ]


def kls(suite: Suite, general: Organism, narrow: Organism) -> pd.DataFrame:
    """`document_kl` of a pair, and of random directions where it is the first seed's of the first task."""
    finetunes = suite.finetunes
    first = general.seed == 0 and general.task == "persona"
    several = first and general.adapter != "all-modules"  # whose thetas take a pass of their own each
    norms, n_random = NORMS if several else (1.0,), RANDOM if first else 0
    texts = finetunes.texts(DOCUMENTS)

    def make(_parts: object) -> pd.DataFrame:
        trained = [Measured(e.name, e.solution, finetunes.solution(e)) for e in (general, narrow)]
        scaled = at_equal_norms(trained, norms, n_random=0)
        if n_random:
            drawn = at_equal_norms(trained, (1.0,), n_random=n_random)
            scaled += [c for c in drawn if c.kind == "random"]
        return document_kl(finetunes.chat, texts, scaled, progress=False)

    made_by = finetunes.made_of(general, narrow, texts=fingerprint(texts), norms=norms, n_random=n_random)
    return suite.results.table("losses", f"{general.name} influence", made_by, make, code=(influence.__name__,))


def measured(suite: Suite, domain: str, task: str = "persona") -> tuple[pd.DataFrame, pd.DataFrame]:
    """`influence_table` and `influence_ratio` of every pair of one domain; empty without pairs."""
    tables, ratios = [], []
    for general, narrow in suite.finetunes.pairs(domain, task):
        sums = kls(suite, general, narrow)
        identity: dict[str, Any] = {"adapter": general.adapter, "domain": general.domain, "seed": general.seed}
        tables.append(influence_table(sums).assign(**identity))
        ratios += [
            influence_ratio(sums, "general", other).assign(**identity)
            for other in ("narrow", "random")
            if other in set(sums["kind"])
        ]
    if not tables:
        return pd.DataFrame(), pd.DataFrame()
    return pd.concat(tables, ignore_index=True), pd.concat(ratios, ignore_index=True)


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """The ratio of each adapter's first seed at equal norm."""
    return ratio_findings(tables["influence_ratio"])


def ratio_findings(ratios: pd.DataFrame) -> list[Finding]:
    """General over narrow, and beside it over random directions where those were measured."""
    found = []
    equal = ratios[ratios["relative_norm"] == 1] if len(ratios) else ratios
    for adapter, rows in equal.groupby("adapter", sort=False) if len(equal) else []:
        first = rows[rows["seed"] == rows["seed"].min()]
        of = {str(row["denominator"]): row for row in first.to_dict("records")}
        row = of.get("narrow")
        if row is None or math.isnan(estimate := value_of(row, "ratio")):
            continue
        seeds = len(rows["seed"].unique())
        whose = named(adapter) if seeds == 1 else f"{named(adapter)}, first of {seeds} seeds"
        text = f"{whose}: at equal norm the general solution's KL on text is {{estimate}} the narrow one's"
        if "random" in of:
            text += clause(", and {} times that of random directions", said(value_of(of["random"], "ratio")))
        ends = value_of(row, "low"), value_of(row, "high")
        n, verdict = int(row["n_documents"]), decided(*ends, 1.0)
        found.append(Finding(text, estimate, n, "documents", *ends, unit="times", verdict=verdict))
    return found


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """KL at equal norm by adapter, and against the norm where several were measured, for the first seed."""
    table = tables["influence"]
    first = table[table["seed"] == 0].astype({"kl_nats_per_token": float, "low": float, "high": float})
    caption = "KL on pre-training text at the general solution's norm; intervals over documents."
    drawn = {"influence": figures.captioned(_at_equal_norm(first[first["relative_norm"] == 1]), caption)}
    trained = first[first["kind"] != "random"]
    by_adapter = {str(adapter): rows for adapter, rows in trained.groupby("adapter", sort=False)}
    several = [adapter for adapter, rows in by_adapter.items() if len(rows["relative_norm"].unique()) > 1]
    if several:
        caption = "KL on pre-training text against the norm; intervals over documents."
        drawn["influence_norms"] = figures.captioned(_by_norm(trained, several), caption)
    return drawn


def _at_equal_norm(table: pd.DataFrame) -> go.Figure:
    """A row an adapter: the solutions with their intervals, and a tick for each random direction."""
    trained = table[table["kind"] != "random"]
    columns = ["kl_nats_per_token", "low", "high"]
    wide, groups = figures.side_by_side(trained, "adapter", "kind", columns)
    random = table[table["kind"] == "random"]
    figure = go.Figure()
    figures.dots(figure, wide, "adapter", groups)
    figures.ticks(figure, random, "adapter", "kl_nats_per_token", "each random direction", 2)
    return figures.style(figure, "KL (nats per token)", "").update_xaxes(type="log", dtick=1)


def _by_norm(trained: pd.DataFrame, adapters: Sequence[str]) -> go.Figure:
    """A panel an adapter, a line a solution."""
    figure = figures.panels(list(adapters))
    for number, adapter in enumerate(adapters):
        for index, (kind, rows) in enumerate(trained[trained["adapter"] == adapter].groupby("kind", sort=False)):
            rows = rows.sort_values("norm")
            x, y, low, high = (rows[column] for column in ("norm", "kl_nats_per_token", "low", "high"))
            figures.line(figure, x, y, str(kind), index, markers=True, low=low, high=high, panel=number)
    return figures.style(figure, "norm of theta (Frobenius)", "KL (nats per token)").update_yaxes(rangemode="tozero")


def ratio_figure(ratios: pd.DataFrame) -> go.Figure:
    """KL of the general over that of the narrow solution at equal norm: a row an adapter, a colour a seed."""
    shown = ratios[(ratios["denominator"] == "narrow") & (ratios["relative_norm"] == 1)]
    shown = shown.assign(seed="seed " + shown["seed"].astype(str))
    wide, groups = figures.side_by_side(shown, "adapter", "seed", ["ratio", "low", "high"])
    figure = figures.dot_plot(wide, "adapter", groups, "KL of general / KL of narrow (ratio)")
    figures.null_line(figure, 1, "equal", axis="x")
    return figure.update_xaxes(type="log", dtick=1)
