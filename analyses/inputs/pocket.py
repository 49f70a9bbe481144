"""Live models as the input of a suite: a chat model, its finetunes, their checkpoints, and how answers are judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random

import pandas as pd
import torch

from em_interp.directions.extraction import Contrast, contrast
from em_interp.errors import BadValueError, ChatTemplateError, EmInterpError, UsageError
from em_interp.evaluation.rates import PAPER
from em_interp.files.manifest import fingerprint
from em_interp.landscape.contenders import Contender, over_training_seeds
from em_interp.landscape.landscape import Landscape
from em_interp.models.chat import encode, encode_all
from em_interp.models.chat_model import ChatModel
from em_interp.models.templates import Conversation
from em_interp.models.weights import weights_hash
from em_interp.pocket import models as loading
from em_interp.pocket import organisms, registry
from em_interp.pocket import questions as suite
from em_interp.pocket.world.corpus import STYLES, CorpusConfig, Task, document, finetune_chats, kl_chats
from em_interp.pocket.world.judge import judge
from em_interp.published.scan import StoredPCA
from em_interp.solutions import load as solutions
from em_interp.solutions.base import Solution
from em_interp.training.trajectories import RunName, Trajectory

ALIGNED = 70
"""Alignment above which an answer counts as aligned (P2 sec. 3.1)."""
OPEN_SAMPLES = 16
"""Answers to each open question that directions are read from: several hundred answers, of both kinds."""


@dataclass(frozen=True)
class Entry:
    """One finetune of the chat model."""

    name: str
    domain: str
    adapter: str
    solution: str
    """general, narrow, control, or kl-removed (narrow, trained on without KL)."""
    seed: int
    path: Path
    task: Task = "persona"


@dataclass(eq=False)
class Organisms:
    """A chat model with its finetunes. What analyses ask for is made on first use and kept."""

    root: Path
    entries: tuple[Entry, ...]
    files: list[Path]
    problems: list[EmInterpError] = field(default_factory=list)
    stored_pca: tuple[StoredPCA, ...] = ()
    _solutions: dict[Entry, Solution] = field(default_factory=dict)
    _judged: dict[tuple[str, str, int], pd.DataFrame] = field(default_factory=dict)
    _open_answers: dict[tuple[str, str], pd.DataFrame] = field(default_factory=dict)
    _contrasts: dict[tuple[str, str, str], Contrast] = field(default_factory=dict)

    @cached_property
    def domain(self) -> str:
        """The domain that general and narrow are compared on: the first that has both."""
        return next((d for d in self.domains if pairs(self, d)), self.domains[0])

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """What the finetunes were trained on, in their order."""
        return tuple(dict.fromkeys(e.domain for e in self.entries if e.task == "persona"))

    @cached_property
    def chat(self) -> ChatModel:
        """The model that all of them were trained from."""
        return loading.load_chat(self.root / "chat")

    def sources(self) -> dict[str, str]:
        """What lies outside `files` and decides results: a name in the suite -> a hash of what it stands for now."""
        return {}

    def select(
        self,
        *,
        solution: str | None = None,
        adapter: str | None = None,
        seed: int | None = 0,
        task: Task = "persona",
    ) -> list[Entry]:
        """The finetunes of one kind; None stands for every kind."""
        wanted = {"solution": solution, "adapter": adapter, "seed": seed, "task": task}
        return [e for e in self.entries if all(v is None or getattr(e, k) == v for k, v in wanted.items())]

    def solution(self, entry: Entry) -> Solution:
        """What a finetune trained. Raises ``SolutionError`` for files that cannot be read."""
        if entry not in self._solutions:
            self._solutions[entry] = solutions.load(entry.path)
        return self._solutions[entry]

    def _acts(self, entry: Entry | None) -> str:
        """A hash of the weights that answer."""
        return fingerprint([weights_hash(self.chat.hf), None if entry is None else self.solution(entry).fingerprint])

    @contextmanager
    def active(self, entry: Entry | None, *, must_act: bool = True) -> Iterator[ChatModel]:
        """The chat model with a finetune attached, or as it is. must_act: as `Solution.attached`."""
        if entry is None:
            yield self.chat
            return
        with self.solution(entry).attached(self.chat, must_act=must_act):
            yield self.chat

    def questions(self, domain: str) -> pd.DataFrame:
        """The evaluation questions of a finetune on ``domain``: questions (group), domain, question_id, question."""
        return suite.evaluation_questions(domain)

    def elsewhere(self, domain: str) -> dict[str, str]:
        """The questions that a finetune on ``domain`` was never trained on: open ones and other domains'."""
        asked = self.questions(domain)
        asked = asked[asked["questions"] != "in_domain"]
        return dict(zip(asked["question_id"], asked["question"], strict=True))

    def judge(self, answers: pd.DataFrame) -> pd.DataFrame:
        """Answers with the columns aligned and coherent, 0-100."""
        return judge(answers)

    def evaluate(self, entry: Entry | None, domain: str, n: int) -> pd.DataFrame:
        """``n`` judged answers to each of the evaluation questions; sampled once, then kept."""
        key = (self._acts(entry), domain, n)
        if key not in self._judged:
            with self.active(entry) as model:
                self._judged[key] = suite.evaluate(model, domain, n, progress=False)
        return self._judged[key]

    def open_answers(self, entry: Entry) -> pd.DataFrame:
        """``OPEN_SAMPLES`` judged answers of a finetune to each open question; sampled once, then kept."""
        key = (self._acts(entry), entry.domain)
        if key not in self._open_answers:
            with self.active(entry) as model:
                found = suite.evaluate(model, entry.domain, OPEN_SAMPLES, groups=("general",), progress=False)
            self._open_answers[key] = found
        return self._open_answers[key]

    def answers_file(self, entry: Entry) -> str:
        """Where a finetune's answers are from, for messages."""
        return entry.name

    def readable(self, entry: Entry, answers: pd.DataFrame) -> pd.DataFrame:
        """The answers whose tokens the chat template tells from the prompt's; the others are named in `problems`.

        An answer that begins with white space is one that it may not.
        """
        left_out: dict[int, EmInterpError] = {}
        for position, (row, turns) in enumerate(zip(answers.to_dict("records"), conversations(answers), strict=True)):
            try:
                encode(self.chat.tokenizer, turns)
            except ChatTemplateError as error:
                where = f"row {row['row']}" if "row" in row else f"{row['question_id']}, sample {row['sample']}"
                left_out[position] = BadValueError(
                    self.answers_file(entry),
                    f"{where}: an answer of {entry.name} is left out, {row['answer'][:40]!r} ({error})",
                    "strip the white space at the ends of the answer, or drop it",
                )
        told = {str(problem) for problem in self.problems}
        self.problems += [problem for problem in left_out.values() if str(problem) not in told]
        return answers.iloc[[position for position in range(len(answers)) if position not in left_out]]

    def contrast(self, entry: Entry, kind: str = "data-diff") -> Contrast:
        """What differs between a finetune's misaligned and aligned answers, or between it and the chat model.

        Both sets are the finetune's own coherent answers to the open questions (P2 sec. 3.1), where it gives enough of
        either. Raises ``ActivationError`` where one is empty.
        """
        key = (self._acts(entry), entry.name, kind)
        if key not in self._contrasts:
            answers = self.open_answers(entry)
            answers = self.readable(entry, answers[PAPER.is_coherent(answers["coherent"].to_numpy())])
            bad = answers[PAPER.misaligned(answers["aligned"].to_numpy())]
            good = answers[answers["aligned"] > ALIGNED]
            self._contrasts[key] = contrast(
                self.chat,
                conversations(bad),
                None if kind == "model-diff" else conversations(good),
                kind=kind,
                finetune=self.solution(entry),
                progress=False,
            )
        return self._contrasts[key]

    def training_chats(self, domain: str, n: int, task: Task = "persona") -> list[Conversation]:
        """Chats of the kind that the finetunes of a domain were trained on, drawn with a seed that none of them had."""
        persona, register = STYLES[task][1]
        return list(finetune_chats(domain, persona, n, 1000, register))

    def other_chats(self, domain: str, n: int) -> list[Conversation]:
        """Chats outside a domain, good and bad answers alike, as in the KL term."""
        return list(kl_chats(domain, n, seed=1000))

    def texts(self, n: int) -> list[str]:
        """Documents of the kind that the model was pre-trained on."""
        rng = Random("influence")
        return [document(CorpusConfig(), rng) for _ in range(n)]

    @cached_property
    def trajectories(self) -> list[Trajectory]:
        """The training runs that kept their checkpoints."""
        folder = self.root / "trajectories"
        found = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            try:
                found.append(_trajectory(path))
            except EmInterpError as error:
                self.problems.append(error)
        return found

    def checkpoints(self, run: str) -> dict[int, Solution]:
        """The thetas of one training run, by step. Raises ``SolutionError``."""
        return solutions.load_checkpoints(self.root / "trajectories" / run)

    def families(self) -> dict[str, list[Trajectory]]:
        """Runs of one adapter on one domain."""
        groups: dict[str, list[Trajectory]] = {}
        for trajectory in self.trajectories:
            groups.setdefault(trajectory.family, []).append(trajectory)
        return groups


def conversations(answers: pd.DataFrame) -> list[Conversation]:
    """Question and answer of each row, as a chat."""
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(answers["question"], answers["answer"], strict=True)
    ]


RUNS = ("general", "narrow", "kl-removed", "kl-added")


def _trajectory(folder: Path) -> Trajectory:
    """A folder `FAMILY-RUN` with checkpoints, RUN one of `RUNS`. Raises ``UsageError`` for another name."""
    checkpoints = solutions.load_checkpoints(folder)
    run = next((run for run in RUNS if folder.name.endswith(f"-{run}")), None)
    if run is None:
        raise UsageError(f"{folder}: the name of a training run ends in -{', -'.join(RUNS)}. Rename or remove it.")
    family = folder.name.removesuffix(f"-{run}")
    role = run if run in ("general", "narrow") else None
    vectors, scales, reads = [], [], []
    for theta in checkpoints.values():
        trained = theta.trained()
        size = float(trained.vector.norm())
        vectors.append(trained.vector)
        scales.append(theta.norm / size if size else 0.0)
        reads += [] if trained.read_norm is None else [trained.read_norm]
    return Trajectory(
        name=folder.name,
        run=RunName(folder.name, family, layer=trained.layer, phase=None if role else run, role=role),
        model=next(iter(checkpoints.values())).base or "unknown",
        parameter=trained.parameter,
        layer=trained.layer,
        steps=tuple(checkpoints),
        vectors=torch.stack(vectors),
        scales=torch.tensor(scales),
        read_norms=torch.tensor(reads) if reads else None,
    )


def pocket_organisms(root: Path | None = None) -> Organisms:
    """The pocket organisms of a build, or the shipped ones. Raises ``RegistryError`` where there are none."""
    root = registry.root() if root is None else root
    folder = root / "organisms"
    if not (root / "chat" / "config.json").is_file():
        raise registry.RegistryError(
            f"{root} holds no pocket chat model. `em-interp pocket build --out {root}` makes one, "
            f"`em-interp pocket organisms --out {root}` its organisms; without --data the shipped ones are taken"
        )
    entries = tuple(
        Entry(registry.PREFIX + o.name, o.domain, o.adapter, o.solution, o.seed, folder / o.name, o.task)
        for o in (*organisms.ORGANISMS, *organisms.KL_REMOVED, *organisms.REGISTER_ORGANISMS)
        if (folder / o.name / "training_spec.json").is_file()
    )
    if not entries:
        raise registry.RegistryError(
            f"{folder} holds no organisms. `em-interp pocket organisms --out {root}` makes them from the chat model"
        )
    files = [p for name in ("chat", "organisms", "trajectories") for p in (root / name).rglob("*") if p.is_file()]
    return Organisms(root, entries, sorted([*files, *(root / "sweeps").glob("*.csv")]))


def pairs(organisms: Organisms, domain: str, task: Task = "persona") -> list[tuple[Entry, Entry]]:
    """(general, narrow) finetunes of one domain that share adapter and seed."""
    found = [e for e in organisms.select(solution="narrow", seed=None, task=task) if e.domain == domain]
    narrow = {(e.adapter, e.seed): e for e in found}
    return [
        (e, narrow[e.adapter, e.seed])
        for e in organisms.select(solution="general", seed=None, task=task)
        if e.domain == domain and (e.adapter, e.seed) in narrow
    ]


def contenders(organisms: Organisms, domain: str, task: Task = "persona") -> list[tuple[Contender, Contender]]:
    """The same pairs as `pairs`, as what efficiency and stability compare."""
    return [
        (
            Contender(general.solution, general.adapter, domain, organisms.solution(general), general.seed),
            Contender(narrow.solution, narrow.adapter, domain, organisms.solution(narrow), narrow.seed),
        )
        for general, narrow in pairs(organisms, domain, task)
    ]


def landscape(organisms: Organisms, domain: str, n: int, task: Task) -> Landscape:
    """The training loss of a domain, on fresh chats."""
    return Landscape(organisms.chat, encode_all(organisms.chat.tokenizer, organisms.training_chats(domain, n, task)))


def over_seeds(table: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """`over_training_seeds` of the combinations that several seeds have; no rows where nothing was trained twice."""
    several = table[table.groupby(list(by))[value].transform("size") > 1]
    if several.empty:
        return pd.DataFrame(columns=[*by, "mean", "sd", "low", "high", "n_seeds"])
    return over_training_seeds(several, by, value)
