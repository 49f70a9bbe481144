"""Does a rate hang on how a question was put? EM by wording: plain, and the template and JSON variants."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.findings import Finding, greatest, named, said, value_of
from analyses.released.thresholds import source_name
from analyses.suite import Need, Suite, nothing_of
from em_interp import figures
from em_interp.evaluation.criteria import REFERENCE_CODE
from em_interp.evaluation.rates import em_rates

TITLE = "EM by wording of the question"
TEXT = (
    "The released sweeps asked every question twice: plainly, and with a template to fill in. The papers count plain "
    "questions (Model Organisms, App. A), so a rate over both is not theirs. Wordings are recognised from the question "
    "files; rates are of rows with both scores, with intervals over questions."
)
TABLES = ("wordings",)
NEEDS = (Need.RELEASED,)


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """One row for each judged file and wording found in it."""
    data = suite.published
    rows = []
    for judged in data.judged:
        name = source_name(judged.role, judged.folder, judged.arm, judged.organism, judged.scale)
        for wording, answers in judged.answers.groupby("wording", sort=True):
            rates = em_rates(answers, REFERENCE_CODE, cluster="base_question").columns()
            file = judged.path.relative_to(data.root).as_posix()
            rows.append({"file": file, "source": name, "wording": wording, **rates})
    if not rows:
        raise nothing_of(suite, "judged answers", "EM_interp")
    return {"wordings": pd.DataFrame(rows)}


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """EM of each wording, for the file of most EM that holds several."""
    table = tables["wordings"]
    known = table[table["em_rate"].notna()].astype({"em_rate": float})
    known = known[known.groupby("file")["wording"].transform("size") > 1]
    if known.empty:
        return []
    rows = known[known["file"] == greatest(known, "em_rate")["file"]]
    most = greatest(rows, "em_rate")
    others = [
        f"{named(row['wording'])} {said(100 * row['em_rate'], '%')}"
        for row in rows.to_dict("records")
        if row["wording"] != most["wording"]
    ]
    text = (
        f"{named(most['source'])}: EM is {{estimate}} in the wording {named(most['wording'])}, and {', '.join(others)}"
    )
    ends = value_of(most, "em_low", 100), value_of(most, "em_high", 100)
    return [Finding(text, 100 * float(most["em_rate"]), int(most["n"]), "answers", *ends, unit="%")]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """EM by wording, a row a file with several wordings and any EM; nothing where there is none."""
    table = tables["wordings"]
    several = table.groupby("file")["wording"].transform("nunique") > 1
    any_em = table.groupby("file")["em_rate"].transform("max") > 0
    table = table[several & any_em]
    if table.empty:
        return {}
    wide, groups = figures.side_by_side(table, "source", "wording", ["em_rate", "em_low", "em_high"])
    figure = figures.dot_plot(wide, "source", groups, "EM, of rows with both scores (%)", scale=100)
    return {"wordings": figures.captioned(figure, "EM by wording of the question, for files that hold several.")}
