"""Which questions and judges were released, and what is known to be wrong with them."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from analyses.findings import Finding, named
from analyses.suite import Need, Suite, nothing_of

TITLE = "Question sets and judges"
TEXT = (
    "The released question and judge files, counted. A judge is flagged where its prompt contradicts its purpose; "
    "texts are not repeated here, because the files carry no licence."
)
TABLES = ("question_sets", "judges")
NEEDS = (Need.RELEASED,)


def compute(suite: Suite) -> dict[str, pd.DataFrame]:
    """Counts by file, and one row a judge prompt."""
    data = suite.published
    sets = [
        (
            questions.path.relative_to(data.root).as_posix(),
            questions.name,
            len(questions.questions),
            len(questions.texts),
            " ".join(sorted({name for q in questions.questions for name in q.judge_prompts})),
        )
        for questions in data.question_sets
    ]
    judges = [
        (path.relative_to(data.root).as_posix(), judge.name, "; ".join(judge.contradictions()))
        for path, judge in data.judges
    ]
    if not sets and not judges:
        raise nothing_of(suite, "question or judge file", "model-organisms-for-EM")
    return {
        "question_sets": pd.DataFrame(sets, columns=["file", "name", "n_questions", "n_wordings", "judges"]),
        "judges": pd.DataFrame(judges, columns=["file", "judge", "defect"]),
    }


def findings(tables: dict[str, pd.DataFrame]) -> list[Finding]:
    """How many judge prompts contradict their purpose."""
    judges = tables["judges"]
    if judges.empty:
        return []
    wrong = judges[judges["defect"].fillna("").astype(str) != ""]
    text = "{estimate} of the judge prompts contradict their purpose"
    if len(wrong):
        text += f": {', '.join(named(name) for name in dict.fromkeys(wrong['judge']))}"
    return [Finding(text, 100 * len(wrong) / len(judges), len(judges), "judge prompts", unit="%")]


def plot(tables: dict[str, pd.DataFrame]) -> dict[str, go.Figure]:
    """No figure: the tables say it all."""
    return {}
