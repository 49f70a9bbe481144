"""Real chat models as the input of a suite: finetunes from the hub or folders, and the user's own chats and answers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pandas as pd

from analyses.inputs.finetunes import Finetunes, Organism
from em_interp.arguments import count, did_you_mean, one_of
from em_interp.errors import (
    BadValueError,
    EmInterpError,
    InputFileError,
    MissingDataError,
    ModelError,
    UnreadableFileError,
    UsageError,
)
from em_interp.files.inputs import regular_file
from em_interp.files.texts import read_chats, read_texts
from em_interp.interventions.judged import kind_of
from em_interp.models import pretrained as models
from em_interp.models.chat import unreadable
from em_interp.models.chat_model import ChatModel
from em_interp.models.templates import Conversation
from em_interp.models.weights import source_hash
from em_interp.published.judged import read_judged_csv
from em_interp.solutions import load as solutions
from em_interp.solutions.base import Solution

DTYPES = ("auto", "float32", "bfloat16", "float16")
FOLDERS = ("judged", "steered", "ablated")
_LOADING = ("device_map", "dtype")
_OF_JUDGE = ("prompts", "price")
_KEYS = {"chat": str, "training": dict, "texts": str, "finetunes": list, "judge": str, "questions": dict}
_KEYS |= dict.fromkeys((*FOLDERS, *_LOADING, *_OF_JUDGE), str)
_ENTRY_KEYS = {"source": str, "domain": str, "adapter": str, "solution": str, "name": str, "seed": int}
_ENTRY_KEYS |= {"any_base": bool}
ADAPTERS = ("steering-vector", "rank-1", "all-modules", "full")
SOLUTIONS = ("general", "narrow", "control")


@dataclass(eq=False, kw_only=True)
class HubFinetunes(Finetunes):
    """Finetunes of any chat model, measured on files below `root`."""

    chat_source: str
    training: dict[str, Path]
    """Domain -> JSONL of the chats that its finetunes were trained on."""
    text_file: Path | None
    folders: dict[str, Path]
    """Of judged answers. judged: NAME.csv with question, answer, aligned, coherent (0-100), and, where known, questions
    (group). steered, ablated: what `em-interp steer` and `em-interp ablate` wrote, with both scores."""

    @classmethod
    def read(cls, root: Path, content: dict[str, Any]) -> Self:
        """From the table [models] of a suite file, whose file names are relative to `root`.

        Keys: chat (folder or hub name), training (domain = JSONL), texts (file), device_map and dtype (of
        `pretrained.load`), and [[finetunes]] with source (folder or hub name), domain, adapter (steering-vector,
        rank-1, all-modules, full), solution (general, narrow, control), name (what tables and files call it; by default
        the source's last part), seed and any_base (the base that it records is the chat model under another name).
        Answers come from files, of the folders judged, steered and ablated (by default called so), or are asked and
        judged here (judge, prompts, price and questions, as `asked.AskedFinetunes` has them). Raises `UsageError` for
        what is lacking, `MissingDataError` for absent files.
        """
        check_keys("[models]", content, _KEYS)
        check_keys("[models.training]", content.get("training", {}), None)
        check_keys("[models.questions]", content.get("questions", {}), None)
        if "questions" in content and "judge" not in content:
            raise UsageError("[models] has questions and no judge: name one (judge = ...), or leave them out.")
        if lonely := [key for key in _OF_JUDGE if key in content and "judge" not in content]:
            raise UsageError(f"[models] has {lonely[0]} and no judge: name one (judge = ...), or leave it out.")
        one_of("dtype", content.get("dtype", "auto"), DTYPES)
        listed = content.get("finetunes", [])
        for item in listed:
            check_keys("[[models.finetunes]]", item, _ENTRY_KEYS)
        if not content.get("chat") or not listed:
            raise UsageError("[models] needs chat, and at least one [[models.finetunes]] with source and domain.")
        if not root.is_dir():
            raise MissingDataError(root, "there is no such folder", "make it, with the files that the suite names")

        def inside(name: str) -> Path:
            path = root / name
            if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):  # noqa: PTH100  (links stay)
                raise UsageError(f"{name} lies outside the data folder {root}. Put it, or a link to it, inside.")
            return path

        organisms = _organisms(root, listed)
        training = {domain: inside(name) for domain, name in content.get("training", {}).items()}
        texts = inside(content["texts"]) if "texts" in content else None
        questions = {group: cls._questions(inside(name)) for group, name in content.get("questions", {}).items()}
        prompts = inside(content["prompts"]) if "prompts" in content else None
        read_here = [*training.values(), *questions.values(), *(each for each in (texts, prompts) if each)]
        for file in read_here:
            if os.path.lexists(file):  # an absent one is said by each analysis that needs it
                regular_file(file)
        answers = {name: inside(content.get(name, name)) for name in FOLDERS}
        for folder in answers.values():
            if not _is_readable_folder(folder):
                raise UnreadableFileError(
                    folder, "the folder of judged answers cannot be read", "make it a folder that you may read"
                )
        folders = [root / str(content["chat"]), *(e.path for e in organisms)]
        folders.append(root / "trajectories")
        local = [p for folder in folders if folder.is_dir() for p in folder.rglob("*")]
        files = {*read_here, *local, *(path for folder in answers.values() for path in folder.glob("*.csv"))}
        return cls(
            root,
            organisms,
            sorted(p for p in files if p.is_file() and p.is_relative_to(root)),
            chat_source=str(content["chat"]),
            training=training,
            text_file=texts,
            folders=answers,
            loading={key: content[key] for key in _LOADING if key in content},
            **cls._asking(root, content, questions, prompts),
        )

    @classmethod
    def _questions(cls, path: Path) -> Path:
        """Where questions of that name are."""
        return path

    @classmethod
    def _asking(
        cls, root: Path, content: dict[str, Any], questions: dict[str, Path], prompts: Path | None
    ) -> dict[str, Any]:
        """The fields of a set of finetunes that are asked here."""
        del root, content, questions, prompts
        return {}

    @property
    def judged_by(self) -> str:
        return "elsewhere, and taken from files"

    @property
    def described(self) -> str:
        n = len(self.organisms)
        return f"{self.chat_source} and {n} finetune{'s' if n > 1 else ''} of it"

    @property
    def chat_path(self) -> Path:
        here = self.root / self.chat_source
        return here if here.is_dir() else Path(self.chat_source)

    def load_chat(self) -> ChatModel:
        return models.load(self.chat_path, **self.loading)

    def sources(self) -> dict[str, str]:
        """The chat model and the finetunes that do not lie below `root`: folders elsewhere, and repositories."""
        found = {}
        for path in (self.chat_path, *(organism.path for organism in self.organisms)):
            if path.is_relative_to(self.root):
                continue
            try:
                found[str(path)] = source_hash(path)
            except ModelError as error:  # each analysis that needs it says so
                found[str(path)] = str(error)
        return found

    def solution(self, organism: Organism) -> Solution:
        """Fetched from the hub if need be."""
        folder = solutions.folder_of(organism.path)
        found = solutions.load(folder, self.chat)
        _check_label(organism, found.adapters)
        named: Any = found  # kinds are dataclasses, which their protocol does not say
        return replace(named, base=self.chat.name) if organism.any_base else found

    def answers_file(self, organism: Organism | None) -> str:
        """NAME.csv among the judged ones."""
        return str(self.folders["judged"] / f"{'chat' if organism is None else organism.name}.csv")

    def evaluate(self, organism: Organism | None, domain: str, n: int) -> pd.DataFrame:
        """The judged answers of a finetune, or of the chat model (chat.csv); all of them, whatever `n`.

        Rows without a score are in it: rates count them. Raises `UsageError` where there is no table.
        """
        path = Path(self.answers_file(organism))
        if not path.is_file():
            command = f"em-interp evaluate {self._said(organism)} --questions FILE --out answers/{path.stem}"
            raise UsageError(
                f"{path} is absent: no judge is configured. Sample answers with `{command}`, have a judge score "
                f"answers/{path.stem}/answers.csv 0-100 (columns aligned and coherent), and put them here."
            )
        table = _read_judged(path, "the chat model" if organism is None else organism.name)
        table = table.assign(row=range(2, len(table) + 2))
        if "questions" not in table:
            table = table.assign(questions="general")
        return table

    def steered(self) -> dict[str, pd.DataFrame]:
        """Raises `MissingDataError` where there are none."""
        return self._judged_files("steering")

    def ablated(self) -> dict[str, pd.DataFrame]:
        """Raises `MissingDataError` where there are none."""
        return self._judged_files("ablation")

    def _judged_files(self, kind: str) -> dict[str, pd.DataFrame]:
        command, folder = _COMMANDS[kind], self.folders[_MADE[kind]]
        found, refused = {}, []
        for path in sorted(folder.glob("*.csv")):
            if path.stem.endswith(_OF_COMMANDS):
                continue
            try:
                table = _read_judged(path, f"`em-interp {command}`")
                if kind_of(table) != kind:
                    raise BadValueError(path, f"it holds {kind_of(table)}, not {kind}", "put it into its own folder")
                found[path.stem] = table
            except EmInterpError as error:
                refused.append(error)
        told = {str(problem) for problem in self.problems}
        self.problems += [error for error in refused if str(error) not in told]
        if not found and not refused:
            raise MissingDataError(folder, f"it holds no judged answers of `em-interp {command}`", self._how(kind))
        if not found:
            raise refused[0]
        return found

    def _how(self, kind: str) -> str:
        """The commands that make what is missing, of the first finetune that one can do it with."""
        organism = (self.select(solution="general", seed=None) or self.organisms)[0]
        chat, direction = shlex.quote(str(self.chat_path)), shlex.quote(f"{organism.name}.safetensors")
        answers, source = shlex.quote(self.answers_file(organism)), self._said(organism)
        out = shlex.quote(str(self.folders[_MADE[kind]] / f"{organism.name}.csv"))
        asked = f"--questions FILE --out {out}"
        if kind == "steering":
            doses = " ".join(f"--coefficient {share:g}" for share in (0, 0.2, 0.4, 0.6, 0.8))
            last = f"em-interp steer {chat} {direction} --layer L --residual {doses} {asked}"
        else:
            last = f"em-interp ablate {source} {direction} {asked}"
            last = last.replace(f"{source} {direction}", f"{chat} {direction} {source.removeprefix(chat).strip()}")
        return (
            f"`em-interp extract {source} --answers {answers} --out {direction}`, then `{last}`, and have a judge add "
            "the columns aligned and coherent (0-100) to it. Or name a judge under [models] (judge = "
            '"FILE.py:FUNCTION"), and answers are asked and judged here'
        )

    def _said(self, organism: Organism | None) -> str:
        """A model as a command takes it."""
        chat = shlex.quote(str(self.chat_path))
        return chat if organism is None else f"{chat} --adapter {shlex.quote(str(organism.path))}"

    def open_answers(self, organism: Organism) -> pd.DataFrame:
        """The judged answers of a finetune to open questions (group general). Raises `UsageError`."""
        judged = scored(self.evaluate(organism, organism.domain, 0))
        return judged[judged["questions"] == "general"]

    def training_chats(self, domain: str, n: int, task: str = "persona") -> list[Conversation]:
        """The first `n` of the domain's file, without those that the chat template cannot take, which are told.

        Raises `UsageError` where no file is named.
        """
        if task != "persona" or domain not in self.training:
            raise UsageError(
                f"no training chats for {domain} ({task}): name a JSONL file under [models.training], {domain} = ..."
            )
        path = self.training[domain]
        chats = read_chats(path)[:n]
        left_out = unreadable(self.chat.tokenizer, chats)
        told = {str(problem) for problem in self.problems}
        for position, error in left_out.items():
            problem = BadValueError(
                path, f"conversation {position + 1} is left out ({error})", "strip the white space at its answers' ends"
            )
            self.problems += [] if str(problem) in told else [problem]
        return [turns for position, turns in enumerate(chats) if position not in left_out]

    def texts(self, n: int) -> list[str]:
        """The first `n` documents of the text file, cut as in the papers' code. Raises `UsageError`."""
        if self.text_file is None:
            raise UsageError("no pre-training text: name a file as texts under [models].")
        return list(read_texts(self.text_file, min_characters=100, max_characters=2000, max_documents=n))


_MADE = {"steering": "steered", "ablation": "ablated"}
_COMMANDS = {"steering": "steer", "ablation": "ablate"}
"""Folder and command of answers of each kind (`judged.kind_of`)."""
_OF_COMMANDS = ("-rates", "-differences")
"""What the names end in of the tables that commands write beside judged answers."""


def scored(judged: pd.DataFrame) -> pd.DataFrame:
    """The answers with both scores."""
    return judged.dropna(subset=["aligned", "coherent"]).reset_index(drop=True)


def _read_judged(path: Path, of: str) -> pd.DataFrame:
    """Raises `BadValueError` that says whose answers they are."""
    try:
        return read_judged_csv(path)
    except InputFileError as error:
        raise BadValueError(path, f"judged answers of {of}: {error.problem}", error.remedy) from error


def _organisms(root: Path, listed: list[dict[str, Any]]) -> tuple[Organism, ...]:
    """The tables [[models.finetunes]]. Raises UsageError."""
    organisms = []
    for item in listed:
        lacking = {"source", "domain", "adapter", "solution"} - set(item)
        if lacking:
            raise UsageError(f"a finetune {item} lacks {', '.join(sorted(lacking))}.")
        source = item["source"]
        name = item.get("name", source.rsplit("/", 1)[-1])
        if not name or Path(name).name != name:
            raise UsageError(f"a finetune is called {name!r}: files take its name, so give one without a slash.")
        organisms.append(
            Organism(
                name,
                item["domain"],
                one_of(f"adapter of {source}", item["adapter"], ADAPTERS),
                one_of(f"solution of {source}", item["solution"], SOLUTIONS),
                count(f"seed of {source}", item.get("seed", 0), at_least=0),
                root / source if (root / source).is_dir() else Path(source),
                any_base=item.get("any_base", False),
            )
        )
    for organism in organisms:
        _check_label(organism, _possible_labels(organism))
    names = [organism.name for organism in organisms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"several finetunes are called {', '.join(twice)}. Give each a name of its own (name = ...).")
    return tuple(organisms)


def check_keys(where: str, content: object, known: Mapping[str, type] | None) -> None:
    """A table of a suite file: each key known and of its type, or text, without `known`. Raises UsageError."""
    if not isinstance(content, dict):
        raise UsageError(f"{where} is {content!r:.60}, not a table.")
    for key, value in content.items():
        if known is not None and key not in known:
            raise UsageError(f"{where} has no key {key}. It takes {', '.join(known)}.{did_you_mean(key, known)}")
        kind = str if known is None else known[key]
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool) or value == "":
            raise UsageError(f"{where}: {key} is {value!r:.60}; write {_WRITTEN[kind]}.")


_WRITTEN = {bool: "true or false", str: "text in quotes", int: "a whole number", list: "a list", dict: "a table"}


def _is_readable_folder(folder: Path) -> bool:
    """Absent is readable: then there are no judged answers, which each analysis says."""
    return not (folder.exists() or folder.is_symlink()) or (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK))


def _check_label(organism: Organism, called: Sequence[str]) -> None:
    """Raise UsageError where the suite file does not call a finetune what it may be called."""
    if organism.adapter not in called:
        said = " or ".join(map(repr, called))
        raise UsageError(f"{organism.name}: the suite file says adapter = {organism.adapter!r}, and it is {said}.")


def _possible_labels(organism: Organism) -> Sequence[str]:
    """What a finetune may be called by its folder's files alone; anything, where it is not here or cannot be read."""
    if not organism.path.is_dir():
        return ADAPTERS
    try:
        return solutions.kind_of(organism.path).ADAPTERS
    except EmInterpError:  # each analysis that needs it says so
        return ADAPTERS
