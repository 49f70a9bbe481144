"""Finetunes of any chat model, asked and judged here: the suite file names a judge, and the questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analyses.inputs.finetunes import JudgedFinetunes, Organism
from analyses.inputs.hub import HubFinetunes, scored
from analyses.inputs.pocket import EXACTLY, OPEN_SAMPLES, judge_called, questions_for
from em_interp.errors import UsageError
from em_interp.evaluation.answers import judge_name, judged_answers
from em_interp.evaluation.judges import Judge, is_a_model
from em_interp.evaluation.sampling import Questions
from em_interp.files.texts import read_questions
from em_interp.inspect.asked import FOLDER
from em_interp.inspect.asked import SETS as OWN

GENERAL = "general"
NEW_TOKENS = 600
"""The length at which an answer is cut."""


@dataclass(eq=False, kw_only=True)
class AskedFinetunes(HubFinetunes, JudgedFinetunes):
    """As `HubFinetunes`; answers that no file holds are sampled here, and judged.

    Of questions in several wordings the first is asked.
    """

    named_judge: str
    """pocket, FILE.py:FUNCTION with the file's whole path, or a model (`pocket.judge_called`)."""
    questions: dict[str, Path]
    """general -> file of open questions, and a domain -> file of its questions; empty for the judge's own."""
    prompts: Path | None = None
    """What a model is asked as the judge, a judges.yaml; None for this project's own."""
    price: str | None = None
    """Of a judge behind an API, READ:WRITTEN in dollars for a million tokens."""

    @classmethod
    def _questions(cls, path: Path) -> Path:
        """The file, or one of this project's own sets."""
        return FOLDER / f"{path.name}.yaml" if not path.exists() and path.name in OWN else path

    @classmethod
    def _asking(
        cls, root: Path, content: dict[str, Any], questions: dict[str, Path], prompts: Path | None
    ) -> dict[str, Any]:
        judge = str(content["judge"])
        if judge != "pocket":
            judge = judge if is_a_model(judge) else str(root / judge)
            if GENERAL not in questions:
                raise UsageError(
                    f"the judge {judge} is given nothing to judge: name files of questions, as in [models.questions] "
                    f'general = "open.yaml", and beside it one for each domain, medicine = "medical.yaml"; or our own '
                    f"sets, {', '.join(OWN)}."
                )
        judge_called(judge)  # one that there is not is said before anything is read
        return {"named_judge": judge, "questions": questions, "prompts": prompts, "price": content.get("price")}

    @cached_property
    def judge(self) -> Judge:
        kept = self.results.folder
        replies = None if kept is None else kept / "replies"
        prompts = None if self.prompts is None else str(self.prompts)
        return judge_called(self.named_judge, prompts, replies, self.price)

    @property
    def judged_by(self) -> str:
        if self.named_judge == "pocket":
            return EXACTLY
        return f"by {self.named_judge if is_a_model(self.named_judge) else Path(self.named_judge).name}"

    @property
    def max_new_tokens(self) -> int:
        return NEW_TOKENS

    def sources(self) -> dict[str, str]:
        """With the judge."""
        return super().sources() | {"judge": judge_name(self.judge)}

    def elsewhere(self, domain: str) -> Questions:
        return {key: turns for key, (group, turns) in self._asked(domain).items() if group != "in_domain"}

    def evaluate(self, organism: Organism | None, domain: str, n: int) -> pd.DataFrame:
        """The judged answers of a file, where there is one; else `n` to each question."""
        if Path(self.answers_file(organism)).is_file():
            return super().evaluate(organism, domain, n)
        return self._sampled(organism, self._asked(domain), n)

    def open_answers(self, organism: Organism) -> pd.DataFrame:
        if Path(self.answers_file(organism)).is_file():
            return super().open_answers(organism)
        asked = {key: pair for key, pair in self._asked(organism.domain).items() if pair[0] == GENERAL}
        return scored(self._sampled(organism, asked, OPEN_SAMPLES))

    def n_asked(self, organism: Organism | None, domain: str, n: int) -> int:
        """How many answers `evaluate` samples: none where a file holds them."""
        return 0 if Path(self.answers_file(organism)).is_file() else n * len(self._asked(domain))

    def n_asked_openly(self, organism: Organism) -> int:
        """How many answers `open_answers` samples."""
        groups = [group for group, _ in self._asked(organism.domain).values()]
        return 0 if Path(self.answers_file(organism)).is_file() else OPEN_SAMPLES * groups.count(GENERAL)

    def _asked(self, domain: str) -> dict[str, tuple[str, Any]]:
        """Id -> group and question. Raises UsageError for an id that two files have."""
        if not self.questions:
            rows = questions_for(domain).to_dict("records")
            return {row["question_id"]: (row["questions"], row["question"]) for row in rows}
        found: dict[str, tuple[str, Any]] = {}
        for of, path in self.questions.items():
            group = GENERAL if of == GENERAL else "in_domain" if of == domain else "heldout_domain"
            for question in read_questions(path).questions:
                if question.id in found:
                    raise UsageError(f"{path}: a question of another file has the id {question.id!r} too. Rename it.")
                found[question.id] = (group, question.turns())
        return found

    def _sampled(self, organism: Organism | None, asked: Mapping[str, tuple[str, Any]], n: int) -> pd.DataFrame:
        """`n` judged answers to each question; sampled once, then kept."""
        with self.active(organism, must_act=False) as model:  # all of its answers may be kept
            table = judged_answers(
                self.results,
                "chat" if organism is None else organism.name,
                model,
                {key: turns for key, (_, turns) in asked.items()},
                n,
                self.judge,
                max_new_tokens=self.max_new_tokens,
                progress=False,
            )
        told = {"question_id": list(asked), "questions": [group for group, _ in asked.values()]}
        return table.assign(**{name: np.repeat(values, n) for name, values in told.items()})
