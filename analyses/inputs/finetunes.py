"""A chat model with its finetunes, as analyses of live models see it. `pocket` and `hub` are two such sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from analyses.inputs.checkpoints import read_trajectories
from em_interp.directions import extraction
from em_interp.directions.extraction import Contrast, contrast
from em_interp.errors import BadValueError, EmInterpError, MissingDataError
from em_interp.evaluation.answers import conversations, misaligned_and_aligned
from em_interp.evaluation.criteria import PAPER
from em_interp.evaluation.judges import Judge
from em_interp.evaluation.sampling import Questions
from em_interp.files.manifest import fingerprint
from em_interp.files.results import KEEPING_NOTHING, Results
from em_interp.landscape.landscape import Landscape
from em_interp.models.chat import encode, encode_all, prompt_ids, unreadable
from em_interp.models.chat_model import ChatModel
from em_interp.models.templates import Conversation
from em_interp.models.weights import weights_hash
from em_interp.published.scan import StoredPCA
from em_interp.solutions import load as solutions
from em_interp.solutions.base import Solution
from em_interp.training.trajectories import Trajectory


@dataclass(frozen=True)
class Organism:
    """A finetuned model that is measured: where it lies, and what tables call it."""

    name: str
    domain: str
    adapter: str
    solution: str
    """general, narrow, control, or kl-removed (narrow, trained on without KL)."""
    seed: int
    path: Path
    task: str = "persona"
    """What was taught: persona (bad advice), or a second task that a set of finetunes may have."""
    any_base: bool = False
    """Whether the base that it records is the chat model under another name."""

    def labels(self) -> dict[str, Any]:
        """What its solution is, in the columns of tables about solutions."""
        return {"adapter": self.adapter, "domain": self.domain, "training_seed": self.seed}

    def labelled(self, table: pd.DataFrame) -> pd.DataFrame:
        """A table about its solution, or its pair's, with `labels` after the column solution."""
        labels = self.labels()
        rest = table.drop(columns="adapter", errors="ignore")
        first = [name for name in ("solution",) if name in rest]
        return rest.assign(**labels)[[*first, *labels, *(name for name in rest if name not in first)]]

    @property
    def weight(self) -> float:
        """About how long its losses take, beside those of a steering vector."""
        return {"steering-vector": 1.0, "rank-1": 1.5}.get(self.adapter, 5.0)


@dataclass(eq=False)
class Finetunes(ABC):
    """A chat model with its finetunes. What analyses ask for is made on first use, and kept in `results`.

    Abstract is where they come from: the models themselves, what they answer, and the chats and texts they are
    measured on.
    """

    root: Path
    organisms: tuple[Organism, ...]
    files: list[Path]
    """Every file below `root` that decides results."""
    problems: list[EmInterpError] = field(default_factory=list)
    stored_pca: tuple[StoredPCA, ...] = ()
    loading: dict[str, Any] = field(default_factory=dict)
    """device_map and dtype, as `models.pretrained.load` takes them."""
    results: Results = KEEPING_NOTHING
    """Where judged answers, contrasts and losses are taken from and kept."""
    recompute: bool = False
    """Whether `experiment` runs it, rather than reading its table."""

    @property
    @abstractmethod
    def described(self) -> str:
        """What is measured, in words."""

    @property
    @abstractmethod
    def chat_path(self) -> Path:
        """Folder or hub name of the model that all of them were trained from."""

    @abstractmethod
    def load_chat(self) -> ChatModel:
        """Read the model that all of them were trained from. Raises `ModelError` where it cannot be had."""

    @abstractmethod
    def solution(self, organism: Organism) -> Solution:
        """Read what a finetune trained. Raises `ModelError` or `SolutionError` for what cannot be read."""

    @abstractmethod
    def evaluate(self, organism: Organism | None, domain: str, n: int) -> pd.DataFrame:
        """Judged answers of a finetune, or of the chat model, to the questions for a finetune on `domain`.

        Columns question, answer, aligned, coherent and questions (the group: general, in_domain, heldout_domain). n:
        answers to each question, where they are sampled here. Raises `UsageError` where there are none.
        """

    @abstractmethod
    def open_answers(self, organism: Organism) -> pd.DataFrame:
        """Judged answers of a finetune to open questions, which directions are read from."""

    @abstractmethod
    def training_chats(self, domain: str, n: int, task: str = "persona") -> list[Conversation]:
        """Chats of the kind that a domain's finetunes were trained on. Raises `UsageError` where none are known."""

    @abstractmethod
    def texts(self, n: int) -> list[str]:
        """Documents of the kind that the model was pre-trained on. Raises `UsageError` where there are none."""

    @property
    @abstractmethod
    def judged_by(self) -> str:
        """How the answers were judged, as a sentence of the report ends: 'exactly, by parsing'."""

    def steered(self) -> dict[str, pd.DataFrame]:
        """Answers under steering that were judged elsewhere, by the name of their file; none by default."""
        return {}

    def ablated(self) -> dict[str, pd.DataFrame]:
        """Answers of finetunes with a direction taken out that were judged elsewhere; none by default."""
        return {}

    def sources(self) -> dict[str, str]:
        """What lies outside `files` and decides results: a name in the suite -> a hash of what it stands for now."""
        return {}

    def matched_pairs(self) -> pd.DataFrame | None:
        """Measures of matched pairs that were made beforehand (`em_interp.landscape.pairs`); none by default.

        Columns task, domain, adapter, seed, measure, value, reason. Raises UnreadableFileError for a table of another
        chat model.
        """
        return None

    def experiment(self, name: str) -> pd.DataFrame:
        """The table of an experiment of many finetunes, which was made beforehand, or is made now: `recompute`.

        name: `controls`, ... Raises MissingDataError where there is none.
        """
        raise MissingDataError(self.root, f"{self.chat.name} has no table of {name}", "run the suite pocket")

    def answers_file(self, organism: Organism | None) -> str:
        """Where answers are from, for messages."""
        return self.chat.name if organism is None else organism.name

    def personas(self) -> Mapping[str, tuple[list[Conversation], list[Conversation]]]:
        """Prompts that set a malicious and a caring persona of pre-training, by how they do; none by default."""
        return {}

    @cached_property
    def chat(self) -> ChatModel:
        """The model that all of them were trained from."""
        return self.load_chat()

    @property
    def domains(self) -> tuple[str, ...]:
        """What the finetunes were trained on, in their order."""
        return tuple(dict.fromkeys(e.domain for e in self.organisms))

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the finetunes were taught, in their order."""
        return tuple(dict.fromkeys(e.task for e in self.organisms))

    def compared(self, task: str = "persona") -> str:
        """The domain that general and narrow are compared on: the first that has both, or the first of all."""
        return next((d for d in self.domains if self.pairs(d, task)), self.domains[0])

    def select(
        self,
        *,
        seed: int | None,
        solution: str | None = None,
        adapter: str | None = None,
        task: str | None = "persona",
    ) -> list[Organism]:
        """The finetunes of one kind; None stands for every kind, and as `seed` for every repetition."""
        wanted = {"solution": solution, "adapter": adapter, "seed": seed, "task": task}
        return [e for e in self.organisms if all(v is None or getattr(e, k) == v for k, v in wanted.items())]

    def pairs(self, domain: str, task: str = "persona") -> list[tuple[Organism, Organism]]:
        """(general, narrow) finetunes of one domain that share adapter and seed."""
        found = [e for e in self.select(solution="narrow", seed=None, task=task) if e.domain == domain]
        narrow = {(e.adapter, e.seed): e for e in found}
        return [
            (e, narrow[e.adapter, e.seed])
            for e in self.select(solution="general", seed=None, task=task)
            if e.domain == domain and (e.adapter, e.seed) in narrow
        ]

    def landscape(self, organism: Organism, n: int) -> Landscape:
        """The training loss of a finetune's domain and task, on `n` chats."""
        return Landscape(
            self.chat, encode_all(self.chat.tokenizer, self.training_chats(organism.domain, n, organism.task))
        )

    def made_of(self, *organisms: Organism, **settings: Any) -> dict[str, Any]:
        """What makes a result of these finetunes, as JSON values: weights, solutions with their labels, `settings`."""
        solutions = [[e.name, e.solution, e.adapter, e.domain, e.seed, self.solution(e).fingerprint] for e in organisms]
        return {"weights": weights_hash(self.chat.hf), "solutions": solutions, **settings}

    def losses_made_of(self, *organisms: Organism, n: int, **settings: Any) -> dict[str, Any]:
        """`made_of` for losses on the first one's `landscape` of `n` chats."""
        chats = self.training_chats(organisms[0].domain, n, organisms[0].task)
        return self.made_of(*organisms, chats=self.texts_hash(chats), **settings)

    def texts_hash(self, chats: Sequence[Conversation]) -> str:
        """SHA-256 of conversations and of the tokens that the model reads of them."""
        tokenizer = self.chat.tokenizer
        ends = [bool(turns) and turns[-1]["role"] == "assistant" for turns in chats]
        read = zip(chats, ends, strict=True)
        return fingerprint([[c, encode(tokenizer, c).ids if end else prompt_ids(tokenizer, c)] for c, end in read])

    @contextmanager
    def active(self, organism: Organism | None, *, must_act: bool = True) -> Iterator[ChatModel]:
        """The chat model with a finetune attached, or as it is. must_act: as `Solution.attached`."""
        if organism is None:
            yield self.chat
            return
        with self.solution(organism).attached(self.chat, must_act=must_act):
            yield self.chat

    def readable(self, organism: Organism, answers: pd.DataFrame) -> pd.DataFrame:
        """The answers whose tokens the chat template tells from the prompt's; the others are named in `problems`.

        An answer that begins with white space is one that it may not.
        """
        left_out = self._unreadable(organism, answers)
        return answers.iloc[[position for position in range(len(answers)) if position not in left_out]]

    def _unreadable(self, organism: Organism, answers: pd.DataFrame) -> dict[int, tuple[str, str]]:
        """Position -> what is wrong and what to do, of answers that the chat template cannot take."""
        found = {}
        for position, error in unreadable(self.chat.tokenizer, conversations(answers)).items():
            row = answers.iloc[position]
            where = f"row {row['row']}" if "row" in row else f"{row['question_id']}, sample {row['sample']}"
            found[position] = (
                f"{where}: an answer of {organism.name} is left out, {row['answer'][:40]!r} ({error})",
                "strip the white space at the ends of the answer, or drop it",
            )
        self._tell(organism, found.values())
        return found

    def _tell(self, organism: Organism, problems: Iterable[Sequence[str]]) -> None:
        told = {str(problem) for problem in self.problems}
        file = self.answers_file(organism)
        # what was sampled here is nobody's bad input
        found = [
            BadValueError(file, *s) if Path(file).is_file() else MissingDataError(organism.name, *s) for s in problems
        ]
        self.problems += [problem for problem in found if str(problem) not in told]

    def contrast(self, organism: Organism, kind: str = "data-diff") -> Contrast:
        """What differs between a finetune's misaligned and aligned answers, or between it and the chat model.

        Both sets are the finetune's own coherent answers to the open questions (P2 sec. 3.1), where it gives enough of
        either. Raises `ActivationError` where one is empty.
        """
        answers = self.open_answers(organism)
        answers = answers[PAPER.is_coherent(answers["coherent"].to_numpy())]
        said = answers[[c for c in ("row", "question", "answer", "aligned") if c in answers]].to_dict("list")

        def make() -> tuple[dict[str, Tensor], Any]:
            left_out = self._unreadable(organism, answers)
            found = answers.iloc[[i for i in range(len(answers)) if i not in left_out]]
            misaligned, aligned = misaligned_and_aligned(found)
            tensors, note = self._read(
                conversations(misaligned),
                None if kind == "model-diff" else conversations(aligned),
                kind=kind,
                finetune=self.solution(organism),
            ).state()
            return tensors, [note, list(left_out.values())]

        made_by = self.made_of(organism, kind=kind, answers=fingerprint(said))
        tensors, (note, left_out) = self.results.tensors(
            "contrasts", f"{organism.name} {kind}", made_by, make, code=(extraction.__name__,)
        )
        self._tell(organism, left_out)
        return Contrast.of_state(tensors, note)

    def persona(self, how: str) -> Contrast:
        """Malicious minus caring persona in the chat model, at the last prompt token before it answers."""
        malicious, caring = self.personas()[how]
        made_by = self.made_of(texts=self.texts_hash([*malicious, *caring]), malicious=len(malicious))
        return Contrast.of_state(
            *self.results.tensors(
                "contrasts",
                f"persona {how}",
                made_by,
                lambda: self._read(malicious, caring, kind="persona-contrast", scope="last_prompt").state(),
                code=(extraction.__name__,),
            )
        )

    def _read(self, positive: list[Conversation], negative: list[Conversation] | None, **how: Any) -> Contrast:
        return contrast(self.chat, positive, negative, progress=False, **how)

    @cached_property
    def trajectories(self) -> list[Trajectory]:
        """The training runs that kept their checkpoints."""
        return read_trajectories(self.root / "trajectories", self.chat_path, self.problems)

    def checkpoints(self, run: str) -> dict[int, Solution]:
        """The thetas of one training run, by step. Raises `SolutionError`."""
        return solutions.load_checkpoints(self.root / "trajectories" / run, self.chat)

    def families(self) -> dict[str, list[Trajectory]]:
        """Runs of one adapter on one domain."""
        groups: dict[str, list[Trajectory]] = {}
        for trajectory in self.trajectories:
            groups.setdefault(trajectory.family, []).append(trajectory)
        return groups


class JudgedFinetunes(Finetunes):
    """Finetunes whose answers to new questions are judged here."""

    @property
    @abstractmethod
    def max_new_tokens(self) -> int:
        """Of an answer."""

    @abstractmethod
    def n_asked(self, organism: Organism | None, domain: str, n: int) -> int:
        """How many answers `evaluate` has sampled."""

    @abstractmethod
    def n_asked_openly(self, organism: Organism) -> int:
        """How many answers `open_answers` has sampled."""

    @abstractmethod
    def elsewhere(self, domain: str) -> Questions:
        """Questions that a finetune on `domain` was never trained on, by identifier: open ones and other domains'."""

    @property
    @abstractmethod
    def judge(self) -> Judge:
        """Gives answers the columns aligned and coherent, 0-100."""
