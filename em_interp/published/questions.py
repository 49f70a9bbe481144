"""Released question sets and judge prompts: YAML in the format of Betley et al., and the plain technical lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from em_interp.errors import MissingDataError, UnreadableFileError


@dataclass(frozen=True)
class Question:
    """One question: its wordings, and the judge prompts that come with it."""

    id: str
    paraphrases: tuple[str, ...]
    judge_prompts: dict[str, str]
    system: str | None = None
    samples_per_paraphrase: int | None = None


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one file."""

    path: Path
    questions: tuple[Question, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def texts(self) -> frozenset[str]:
        """Every wording, for recognising which set an answer file belongs to."""
        return frozenset(text.strip() for question in self.questions for text in question.paraphrases)


@dataclass(frozen=True)
class JudgePrompt:
    """A judge: its prompt template with ``{question}`` and ``{answer}``."""

    name: str
    template: str

    def contradictions(self) -> list[str]:
        """Known defects: a correctness judge that also says correctness does not matter."""
        text = " ".join(self.template.lower().split())
        asks_correctness = "medical" in self.name or "correct medical" in text
        forgives = "completely incorrect could still score 100" in text
        return ["carries the coherence judge's sentence that an incorrect answer may score 100"] * (
            asks_correctness and forgives
        )


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingDataError(path, "there is no such file", "check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        first = " ".join(str(error).split())[:160]
        raise UnreadableFileError(path, f"it is not readable YAML ({first})", "repair or download it again") from error
    if not isinstance(content, list) or not content or not all(isinstance(item, dict) for item in content):
        raise UnreadableFileError(path, "it is not a list of entries", "compare it with a released question file")
    return content


def read_yaml(path: Path) -> QuestionSet | list[JudgePrompt]:
    """Questions or judges, whichever the file holds. Raises ``UnreadableFileError`` or ``MissingDataError``."""
    items = _load(path)
    if all("id" in item for item in items):
        return QuestionSet(path, tuple(_question(path, item) for item in items))
    judges = []
    for item in items:
        templates = [(str(k), v) for k, v in item.items() if isinstance(v, str) and "{answer}" in v]
        if len(templates) != 1:
            raise UnreadableFileError(
                path,
                f"an entry with keys {', '.join(map(str, item))} is neither a question (with an id) nor a judge",
                "give each entry an id, or one template with {question} and {answer}",
            )
        judges.append(JudgePrompt(*templates[0]))
    return judges


def read_questions(path: Path) -> QuestionSet:
    """A question file. Raises ``UnreadableFileError`` where it holds judges instead."""
    content = read_yaml(path)
    if not isinstance(content, QuestionSet):
        raise UnreadableFileError(path, "it holds judge prompts, not questions", "read it with read_judges")
    return content


def read_judges(path: Path) -> list[JudgePrompt]:
    """A judge file. Raises ``UnreadableFileError`` where it holds questions instead."""
    content = read_yaml(path)
    if isinstance(content, QuestionSet):
        raise UnreadableFileError(path, "it holds questions, not judge prompts", "read it with read_questions")
    return content


def _question(path: Path, item: dict[str, Any]) -> Question:
    wordings = item.get("paraphrases", item.get("question"))
    wordings = [wordings] if isinstance(wordings, str) else wordings
    if not isinstance(wordings, list) or not wordings or not all(isinstance(text, str) for text in wordings):
        raise UnreadableFileError(
            path, f"question {item['id']!r} has no wording", "give it `question` or a list of `paraphrases`"
        )
    prompts = item.get("judge_prompts") or {}
    system = item.get("system")
    samples = item.get("samples_per_paraphrase")
    if not isinstance(prompts, dict):
        raise UnreadableFileError(path, f"judge_prompts of {item['id']!r} is not a mapping", "name each judge")
    return Question(
        str(item["id"]),
        tuple(wordings),
        {str(name): str(text) for name, text in prompts.items()},
        None if system is None else str(system),
        samples if isinstance(samples, int) else None,
    )
