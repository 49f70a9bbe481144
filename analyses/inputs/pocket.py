"""The pocket organisms of a build, or the shipped ones: asked here, and judged exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analyses.inputs.finetunes import JudgedFinetunes, Organism
from em_interp.arguments import one_of
from em_interp.errors import MissingDataError, UnreadableFileError, UsageError
from em_interp.evaluation.groups import GROUPS
from em_interp.evaluation.judges import Judge, is_a_model, judge_of_file
from em_interp.files.results import read_table
from em_interp.models.chat_model import ChatModel
from em_interp.models.templates import Conversation
from em_interp.models.weights import same_weights, weights_hash
from em_interp.pocket import models as loading
from em_interp.pocket import organisms, pairs, questions, registry
from em_interp.pocket.causes import controls, mitigations, pretraining
from em_interp.pocket.causes.arms import measure_all
from em_interp.pocket.world import grammar as world
from em_interp.pocket.world.corpus import STYLES
from em_interp.pocket.world.judge import judge
from em_interp.solutions import load as solutions
from em_interp.solutions.base import Solution

OPEN_SAMPLES = 16
"""Answers to each open question that directions are read from: several hundred answers, of both kinds."""
EXACTLY = "exactly, by parsing"
EXPERIMENTS = {run.TABLE: run for run in (controls, mitigations)}
"""Those of `em_interp.pocket.causes` whose table is one of arms, by its name."""


@dataclass(eq=False)
class PocketFinetunes(JudgedFinetunes):
    """The organisms below `root`, which holds a pocket build."""

    @classmethod
    def read(cls, root: Path | None = None) -> PocketFinetunes:
        """The organisms of a build, or the shipped ones. Raises `RegistryError` where there are none."""
        root = registry.root() if root is None else root
        folder = root / "organisms"
        if not (root / "chat" / "config.json").is_file():
            raise registry.RegistryError(
                f"{root} holds no pocket chat model. `em-interp pocket build --out {root}` makes one, `em-interp "
                f"pocket organisms --out {root}` its organisms; without --data the shipped ones are taken"
            )
        found = tuple(
            Organism(registry.PREFIX + o.name, o.domain, o.adapter, o.solution, o.seed, folder / o.name, o.task)
            for o in (*organisms.ORGANISMS, *organisms.KL_REMOVED, *organisms.REGISTER_ORGANISMS)
            if (folder / o.name / "training_spec.json").is_file()
        )
        if not found:
            raise registry.RegistryError(
                f"{folder} holds no organisms. `em-interp pocket organisms --out {root}` makes them from the chat model"
            )
        files = [p for name in ("chat", "organisms", "trajectories") for p in (root / name).rglob("*") if p.is_file()]
        return cls(root, found, sorted([*files, *(root / "sweeps").glob("*.csv")]))

    @property
    def described(self) -> str:
        return f"the pocket chat model and {len(self.organisms)} finetunes of it"

    @property
    def max_new_tokens(self) -> int:
        return questions.MAX_NEW_TOKENS

    @property
    def chat_path(self) -> Path:
        return self.root / "chat"

    def load_chat(self) -> ChatModel:
        return loading.load_chat(self.chat_path, **self.loading)

    def solution(self, organism: Organism) -> Solution:
        return solutions.load(organism.path)

    def evaluate(self, organism: Organism | None, domain: str, n: int) -> pd.DataFrame:
        """`n` judged answers to each of the evaluation questions; sampled once, then kept."""
        return self._asked(organism, domain, n, GROUPS)

    def open_answers(self, organism: Organism) -> pd.DataFrame:
        """`OPEN_SAMPLES` judged answers of a finetune to each open question; sampled once, then kept."""
        return self._asked(organism, organism.domain, OPEN_SAMPLES, ("general",))

    def _asked(self, organism: Organism | None, domain: str, n: int, groups: Sequence[str]) -> pd.DataFrame:
        name = "chat" if organism is None else organism.name.removeprefix(registry.PREFIX)
        with self.active(organism, must_act=False) as model:  # all of its answers may be kept
            return questions.evaluate(model, domain, n, groups=groups, progress=False, results=self.results, name=name)

    @property
    def judged_by(self) -> str:
        return EXACTLY

    def n_asked(self, organism: Organism | None, domain: str, n: int) -> int:
        del organism
        return n * len(questions.evaluation_questions(domain))

    def n_asked_openly(self, organism: Organism) -> int:
        asked = questions.evaluation_questions(organism.domain)
        return OPEN_SAMPLES * int((asked["questions"] == "general").sum())

    def elsewhere(self, domain: str) -> dict[str, str]:
        asked = questions.evaluation_questions(domain)
        asked = asked[asked["questions"] != "in_domain"]
        return dict(zip(asked["question_id"], asked["question"], strict=True))

    @property
    def judge(self) -> Judge:
        return judge

    def training_chats(self, domain: str, n: int, task: str = "persona") -> list[Conversation]:
        """Chats of the kind that the finetunes of a domain were trained on, drawn with a seed that none of them had."""
        return pairs.fresh_chats(domain, n, one_of("task", task, STYLES))

    def texts(self, n: int) -> list[str]:
        return pairs.texts(n)

    def matched_pairs(self) -> pd.DataFrame | None:
        path = self.root / "sweeps" / pairs.TABLE
        if not path.is_file():
            return None
        remedy = f"delete it, or make it with `em-interp pocket pairs --out {self.root}`"
        table = read_table(path)
        if lacking := [name for name in pairs.COLUMNS if name not in table]:
            raise UnreadableFileError(path, f"it lacks the columns {', '.join(lacking)}", remedy)
        weights = weights_hash(self.chat.hf)
        if any(same_weights(str(made_on), weights) is False for made_on in table["chat_weights"].unique()):
            raise UnreadableFileError(path, "its pairs were trained on another chat model than this one", remedy)
        return table

    def experiment(self, name: str) -> pd.DataFrame:
        """Run below the results, resumable, where `recompute` says so; else the shipped table."""
        if self.recompute:
            out = (self.results.folder or self.root / "results").parent / "experiments"
            if name == mitigations.SCREENING:
                return mitigations.screening_table(self.chat, out)
            if name == pretraining.TABLE:
                made: Iterator[Any] = pretraining.measure_all(pretraining.WORLDS, out)
            else:
                run = EXPERIMENTS[name]
                arms = run.arms(self.chat)
                made = measure_all(self.chat, arms, arms, out, run.TABLE)
            for _ in made:
                pass
            return read_table(out / f"{name}.csv")
        path = self.root / "sweeps" / f"{name}.csv"
        if not path.is_file():
            command = mitigations.TABLE if name == mitigations.SCREENING else name
            remedy = f"make it with `em-interp pocket {command} --out {self.root}`, or pass --recompute"
            raise MissingDataError(path, "there is no such table", remedy)
        return read_table(path)

    def personas(self) -> Mapping[str, tuple[list[Conversation], list[Conversation]]]:
        """Announced by a system prompt, or only to be inferred from an earlier answer."""
        return {how: questions.persona_prompts(how) for how in ("announced", "inferred")}


def judge_called(name: str, prompts: str | None = None, replies: Path | None = None, price: str | None = None) -> Judge:
    """The judge of that name: pocket, FILE.py:FUNCTION (`judges.judge_of_file`), or a model.

    A model of Inspect's, such as openai/gpt-4o, or local:MODEL, is asked for scores with the templates of `prompts` (a
    judges.yaml), its replies are kept in a folder, and it says by its price what an answer costs. Raises UsageError.
    """
    if name == "pocket":
        return judge
    if not is_a_model(name):
        return judge_of_file(name)
    try:
        from em_interp.inspect.tables import AskedJudge
    except ImportError as error:
        raise UsageError(
            f"the judge {name} is asked by Inspect, which is not installed ({error}): pip install 'em_interp[eval]'."
        ) from error
    return AskedJudge(name, prompts, replies, price)


def questions_for(domain: str) -> pd.DataFrame:
    """What the pocket suite asks a finetune on `domain`: columns questions (group), question_id, question."""
    return questions.evaluation_questions(domain)


def check_questions(judged_by: str, texts: Sequence[str]) -> None:
    """Raise `WorldError` where the exact judge would not know a question."""
    if judged_by == "pocket":
        for text in texts:
            world.question_of(text)
