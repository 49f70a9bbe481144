"""How much do the two solutions matter on pre-training text, at equal norm?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

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


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """KL against norm, a panel an adapter, for the first seed."""
    table = tables["influence"]
    first = table[(table["seed"] == 0)].astype({"kl_nats_per_token": float, "low": float, "high": float})
    adapters = list(first["adapter"].unique())
    panels = figures.panels(adapters)
    for col, adapter in enumerate(adapters):
        rows = first[first["adapter"] == adapter]
        for index, kind in enumerate(("general", "narrow", "random")):
            found = rows[rows["kind"] == kind].groupby("norm")["kl_nats_per_token"]
            low, high = (found.min(), found.max()) if kind == "random" else (None, None)
            figures.line(
                panels,
                list(found.mean().index),
                found.mean(),
                kind,
                index,
                markers=True,
                low=low,
                high=high,
                row=col // 2 + 1,
                col=col % 2 + 1,
            )
    figures.style(panels, "norm of theta", "KL (nats per token)", height=640)
    caption = "KL on pre-training text at equal norm; band: all random directions."
    return {"influence": figures.captioned(panels, caption)}
