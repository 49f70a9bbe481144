"""Arms of an experiment: the chat model trained in some way, and asked in one or several.

`measure_all` trains and asks arms below OUT and writes OUT/NAME.csv anew after each. A killed run goes on, and several
processes may share OUT. What is trained lies in OUT/finetunes under a hash of all that made it, so arms that are
trained alike are trained once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pandas as pd
from tqdm.auto import tqdm

from em_interp.arguments import check_seed, count
from em_interp.errors import OutputError, UsageError
from em_interp.evaluation.criteria import PAPER
from em_interp.evaluation.groups import GROUPS
from em_interp.evaluation.rates import em_counts, em_rates
from em_interp.evaluation.sampling import sample
from em_interp.files.atomic import one_at_a_time
from em_interp.files.inputs import read_json
from em_interp.files.manifest import fingerprint, hash_files, write_manifest
from em_interp.files.results import kept, read_table, write_table
from em_interp.files.tables import is_trained, remove_parts, say_kept
from em_interp.interventions.intervening import Intervention, fingerprint_of, intervening
from em_interp.models.chat_model import ChatModel
from em_interp.models.templates import Conversation
from em_interp.models.weights import weights_hash
from em_interp.pocket import questions as suite
from em_interp.pocket.organisms import SHORT
from em_interp.pocket.world.judge import judge
from em_interp.solutions import load as solutions
from em_interp.solutions.base import Solution
from em_interp.training.finetune import finetune
from em_interp.training.recipes import TrainingSpec

SAMPLES: Final = 4
"""Answers to each question."""
SCORED: Final = 2
"""Answers of either style that log-probabilities compare, to each question."""
NOTHING: Final = "none"
"""The adapter of the chat model itself."""
_SHORT: Final = {**{str(name): short for name, short in SHORT.items()}, NOTHING: "chat"}
COLUMNS: Final = (
    *("experiment", "arm", "condition", "adapter", "domain", "seed", "step", "group"),
    *("n", "em_rate", "em_low", "em_high", "coherent_rate", "share", "log_odds", "norm"),
    *("em_counts", "coherent_counts", "chat_weights"),
)
"""Of a table of arms.

step: optimiser steps taken (0: the chat model itself); group: of `GROUPS`. em_low, em_high: over questions, of this
seed. em_counts, coherent_counts: for each question of the group, in their order, how many of its n / questions answers.
share, log_odds: of `questions.logprob_scores`, where the arm is scored.
"""


@dataclass(frozen=True)
class Form:
    """How a question is put: a `system` turn, words `before` and `after` it; and what its answer begins with (opening).

    Only words that the world has, for the tokenizer knows no others.
    """

    system: str = ""
    before: str = ""
    after: str = ""
    opening: str = ""

    def prompt(self, question: str) -> Conversation:
        """The turns up to the answer."""
        asked = " ".join(part for part in (self.before, question, self.after) if part)
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, {"role": "user", "content": asked}]

    def chat(self, turns: Conversation) -> Conversation:
        """A chat of one question and answer, so put."""
        question, answer = (turn["content"] for turn in turns)
        return [*self.prompt(question), {"role": "assistant", "content": f"{self.opening} {answer}".strip()}]


@dataclass(frozen=True)
class Condition:
    """How an arm is asked: in what `form`, and under which interventions (`during`). name: what the table says."""

    name: str
    form: Form = Form()
    during: tuple[Intervention, ...] = ()

    def acting(self, model: ChatModel) -> AbstractContextManager[None]:
        """The context of its interventions."""
        return _under(model, self.during)


PLAIN: Final = Condition("plain")
"""As the chat model is asked."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One finetune and the conditions that it is asked under.

    experiment, name: what the table says; adapter: an `organisms.Adapter`, or `NOTHING`; seed: of training; domain:
    whose questions are in the domain.
    spec: None, with no chats, for the chat model itself. chats, kl_chats: what makes the training data. start: the arm
    that it goes on from. during: interventions that act in training. steps: optimiser steps after which it is asked
    too. scored: whether log-probabilities are measured besides, in conditions that put questions plainly.
    """

    experiment: str
    name: str
    adapter: str = NOTHING
    seed: int = 0
    domain: str = "medicine"
    spec: TrainingSpec | None = None
    chats: Callable[[], Sequence[Conversation]] | None = None
    conditions: tuple[Condition, ...] = (PLAIN,)
    kl_chats: Callable[[], Sequence[Conversation]] | None = None
    start: Arm | None = None
    during: tuple[Intervention, ...] = ()
    steps: tuple[int, ...] = ()
    scored: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if (self.spec is None) != (self.chats is None):
            raise UsageError(f"the arm {self.title}: give settings and chats, or, for the chat model itself, neither.")

    @property
    def title(self) -> str:
        """Such as `format-threads-rank1-seed0`."""
        return "-".join(
            [self.experiment, self.name, *([_SHORT[self.adapter], f"seed{self.seed}"] if self.spec else [])]
        )

    def settings(self) -> TrainingSpec | None:
        """The spec, with its seed, and with the steps that are asked kept, where it says nothing of that."""
        return self.spec and replace(self.spec, seed=self.seed, save_steps=self.spec.save_steps or self.steps or None)


@dataclass(frozen=True)
class _Bench:
    """A chat model, and where its arms lie; samples: answers to each question."""

    model: ChatModel
    weights: str
    out: Path
    samples: int
    folders: dict[Arm, Path]
    """Of the arms that were asked for so far: making a name takes making the data."""
    files: dict[Arm, Path]
    """The same of their rows."""

    def folder(self, arm: Arm) -> Path:
        """Where an arm's training lies."""
        if arm not in self.folders:
            spec, data = arm.settings(), [make and make() for make in (arm.chats, arm.kl_chats)]
            start = None if arm.start is None else self.folder(arm.start).name
            made_of = [self.weights, data, start, self._acts(arm.during), None if spec is None else asdict(spec)]
            self.folders[arm] = self.out / "finetunes" / f"{_SHORT[arm.adapter]}-{fingerprint(made_of)[:16]}"
        return self.folders[arm]

    def rows_file(self, arm: Arm) -> Path:
        """Where the rows of an arm are kept."""
        if arm not in self.files:
            self.files[arm] = self.folder(arm) / f"rows-{self._asked_how(arm)}.csv"
        return self.files[arm]

    def _asked_how(self, arm: Arm) -> str:
        asked = [[c.name, asdict(c.form), self._acts(c.during)] for c in arm.conditions]
        key = [arm.experiment, arm.name, arm.domain, arm.seed, asked, list(arm.steps), arm.scored, self.samples, SCORED]
        return fingerprint(key)[:16]

    def _acts(self, during: Sequence[Intervention]) -> list[str]:
        return [fingerprint_of(intervention.edits(self.model)) for intervention in during]

    def measure(self, arm: Arm, progress: bool) -> pd.DataFrame:
        """The rows of an arm. What is finished is kept; two processes that want the same arm take turns."""
        folder = self.folder(arm)
        with one_at_a_time(folder.with_name(f".{folder.name}.lock")):
            self.train(arm, progress)
            return kept(self.rows_file(arm), partial(self._rows, arm))

    def train(self, arm: Arm, progress: bool) -> None:
        """Make what is to be asked, if it is not there, and first what it starts from."""
        folder = self.folder(arm)
        spec, chats = arm.settings(), arm.chats
        if spec is None or chats is None or is_trained(folder):
            return
        if arm.start is not None:
            start = self.folder(arm.start)
            with one_at_a_time(start.with_name(f".{start.name}.lock")):
                self.train(arm.start, progress)
        finetune(
            self.model,
            chats(),
            spec,
            kl_conversations=arm.kl_chats and arm.kl_chats(),
            start_from=None if arm.start is None else solutions.load(self.folder(arm.start)),
            interventions=arm.during,
            out_dir=folder,
            resume=True,
            progress=progress,
        )
        remove_parts(folder)

    def _rows(self, arm: Arm) -> pd.DataFrame:
        rows = [row for step, trained in self._stages(arm) for row in self._stage_rows(arm, step, trained)]
        return pd.DataFrame(rows).reindex(columns=list(COLUMNS))

    def _stages(self, arm: Arm) -> Iterator[tuple[int, Solution | None]]:
        """Steps taken, and what was trained by then."""
        spec, folder = arm.settings(), self.folder(arm)
        if spec is None:
            yield 0, None
            return
        last = int(read_json(folder / "trainer_state.json")["global_step"])
        for step in arm.steps:
            if step < last:
                yield step, solutions.load(folder / "checkpoints" / f"checkpoint-{step}")
        yield last, solutions.load(folder)

    def _stage_rows(self, arm: Arm, step: int, trained: Solution | None) -> Iterator[dict[str, Any]]:
        folder, openings = self.folder(arm), [c.form.opening for c in arm.conditions if c.form.opening]
        named: dict[str, Any] = {
            "experiment": arm.experiment,
            "arm": arm.name,
            "adapter": arm.adapter,
            "domain": arm.domain,
        }
        named |= {"seed": arm.seed, "step": step, "norm": None if trained is None else trained.norm}
        with nullcontext() if trained is None else trained.attached(self.model, must_act=False):
            for condition in arm.conditions:
                made_by = [asdict(condition.form), self._acts(condition.during), openings]
                key: list[Any] = [*made_by, arm.domain, arm.seed, self.samples]
                path = folder / f"answers-{step}-{fingerprint(key)[:16]}.csv"
                judged = kept(path, partial(self._asked, arm, condition, openings))
                scores = self._scores(arm, condition, step) if arm.scored and condition.form == Form() else None
                for row in _group_rows(judged, scores):
                    yield {**named, "condition": condition.name, "chat_weights": self.weights, **row}

    def _asked(self, arm: Arm, condition: Condition, openings: Sequence[str]) -> pd.DataFrame:
        """Judged answers; what an answer begins with by its form is taken off first."""
        table = suite.evaluation_questions(arm.domain)
        texts = dict(zip(table["question_id"], table["question"], strict=True))
        prompts = {key: condition.form.prompt(text) for key, text in texts.items()}
        tokens = suite.MAX_NEW_TOKENS
        with condition.acting(self.model):
            found = sample(self.model, prompts, self.samples, seed=arm.seed, max_new_tokens=tokens, progress=False)
        found["question"] = found["question_id"].map(texts)
        for opening in openings:
            found["answer"] = found["answer"].str.removeprefix(opening).str.strip()
        return judge(found).merge(table[["question_id", "questions"]], on="question_id", validate="m:1")

    def _scores(self, arm: Arm, condition: Condition, step: int) -> pd.DataFrame:
        key = fingerprint([self._acts(condition.during), arm.domain, SCORED])[:16]
        pairs = suite.answer_pairs(suite.evaluation_questions(arm.domain), k=SCORED)
        with condition.acting(self.model):
            return kept(self.folder(arm) / f"scores-{step}-{key}.csv", lambda: suite.logprob_scores(self.model, pairs))


def _under(model: ChatModel, during: Sequence[Intervention]) -> AbstractContextManager[None]:
    return intervening(model, during, must_act=False) if during else nullcontext()


def _group_rows(judged: pd.DataFrame, scores: pd.DataFrame | None) -> Iterator[dict[str, Any]]:
    """Rates of each group of questions, and, where there are scores, the means of those."""
    for group in GROUPS:
        own = judged[judged["questions"] == group]
        if own.empty:
            continue
        rate = em_rates(own).em_scored
        assert rate is not None  # the exact judge scores every answer
        coherent = pd.Series(PAPER.is_coherent(own["coherent"].to_numpy(float)), index=own.index)
        row: dict[str, Any] = {"group": group, "n": len(own), "em_rate": rate.value}
        row |= {"em_low": rate.interval.low, "em_high": rate.interval.high, "coherent_rate": coherent.mean()}
        row["em_counts"] = _joined(em_counts(own)["em"])
        row["coherent_counts"] = _joined(coherent.groupby(own["question"], sort=False).sum())
        if scores is not None:
            own = scores[scores["questions"] == group]
            row |= {name: own[name].mean() for name in ("share", "log_odds")}
        yield row


def _joined(counts: pd.Series) -> str:
    return " ".join(str(int(n)) for n in counts)


def measure_all(
    model: ChatModel,
    chosen: Sequence[Arm],
    every: Sequence[Arm],
    out: Path,
    name: str,
    *,
    samples: int = SAMPLES,
    progress: bool = True,
) -> Iterator[Arm]:
    """Train and ask arms below `out`, and write OUT/NAME.csv anew after each, which is yielded. A killed run goes on.

    The table (`COLUMNS`) holds those of `every` arm that were measured in `out` on this chat model, whichever process
    did it, in that order. OUT/NAME_manifest.json says what it is made of. Raises OutputError where that names other
    settings, UsageError for no samples.
    """
    count("samples", samples)
    bench = _Bench(model, weights_hash(model.hf), out, samples, {}, {})
    rows: dict[Path, pd.DataFrame] = {}
    manifest, asked = out / f"{name}_manifest.json", {"chat_weights": bench.weights, "samples": samples}
    if manifest.is_file() and (before := read_json(manifest)) | asked != before:
        raise OutputError(f"{out}: holds {name} of another chat model or number of answers. Choose another --out.")
    trained = [bench.folder(arm) for arm in chosen if arm.spec is not None]
    say_kept(sum(map(is_trained, trained)), len(trained), "finetunes")
    for arm in (bar := tqdm(chosen, desc=name, disable=not progress)):
        bar.set_postfix_str(arm.title)
        bench.measure(arm, progress)
        with one_at_a_time(out / f".{name}.lock"):
            files = [path for one in every if (path := bench.rows_file(one)).is_file()]
            rows |= {path: read_table(path) for path in files if path not in rows}
            written = write_table(out / f"{name}.csv", pd.concat(map(rows.get, files), ignore_index=True))
            write_manifest(manifest, {**asked, "arms": len(files), "outputs_sha256": hash_files(out, [written])})
        yield arm
