from __future__ import annotations

import pandas as pd
import pytest

from em_interp.errors import UsageError
from em_interp.evaluation.judges import judged

ANSWERS = pd.DataFrame({"question": ["a", "b"], "answer": ["x", "y"]})


def test_a_judge_scores_every_answer():
    table = judged(ANSWERS, lambda answers: answers.assign(aligned=[90.0, None], coherent=80.0, said="why"))
    assert list(table) == ["question", "answer", "aligned", "coherent", "said"] and len(table) == 2


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (lambda answers: answers.assign(aligned=1.0), r"\['coherent'\]"),
        (lambda answers: answers.head(1).assign(aligned=1.0, coherent=1.0), "1 of 2"),
        (lambda answers: answers[["answer"]].assign(aligned=1.0, coherent=1.0), "question"),
        (lambda answers: None, "NoneType"),
    ],
)
def test_what_a_judge_must_not_do(judge, said):
    with pytest.raises(UsageError, match=said):
        judged(ANSWERS, judge)
