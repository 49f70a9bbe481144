"""Which questions the task asks: this project's own sets, the pocket world's, or the user's files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from em_interp.arguments import one_of
from em_interp.errors import UsageError
from em_interp.files.texts import Question, read_questions
from em_interp.pocket import questions as pocket

SETS: Final = ("open", "medical", "finance", "sport", "technical")
"""This project's own, files of the folder `questions` beside this module."""
FOLDER: Final = Path(__file__).parent / "questions"
"""Where they are."""
FORMATS: Final[dict[str, str]] = yaml.safe_load((FOLDER / "formats.yaml").read_text(encoding="utf-8"))
"""The forms in which an answer can be asked for: plain, json, template; and what is put after the question."""


@dataclass(frozen=True)
class Asked:
    """One wording of a question, as a sample of the task."""

    key: str
    """Its id; with the epoch it decides the answer's random numbers."""
    turns: tuple[dict[str, str], ...]
    """The conversation that the answer goes on."""
    told: dict[str, Any]
    """What tables say of it: question_id (its wordings share it), wording, question, system, questions, domain."""
    judge_prompts: dict[str, str] = field(default_factory=dict)
    """Score -> template, where the user's file brings its own."""


def asked(source: str | Sequence[str], *, form: str = "plain", system: str | None = None) -> list[Asked]:
    """What `source` names: sets (`SETS`), `pocket`, `pocket/DOMAIN`, and files, several with commas between them.

    Files are those of `texts.read_questions`. form: one of `FORMATS`. system: a system prompt for questions that have
    none. Raises UsageError for what is none of these, and what `read_questions` raises.
    """
    one_of("the format of answers", form, FORMATS)
    found: list[Asked] = []
    for name in source.split(",") if isinstance(source, str) else source:
        if name == "pocket" or name.startswith("pocket/"):
            found += _pocket(name.partition("/")[2])
        elif name in SETS:
            group = "general" if name == "open" else name
            found += [each for q in read_questions(FOLDER / f"{name}.yaml").questions for each in _wordings(q, group)]
        elif Path(name).suffix:
            found += [each for q in read_questions(name).questions for each in _wordings(q, "general")]
        else:
            raise UsageError(
                f"there are no questions {name!r:.80}. Give {', '.join(SETS)}, pocket, pocket/DOMAIN, or a file: "
                ".yaml, .jsonl, .csv, or .txt with one a line."
            )
    if twice := sorted(key for key, n in Counter(each.key for each in found).items() if n > 1):
        raise UsageError(f"questions come more than once: {', '.join(twice[:3])}. Ask each once.")
    return [_put(each, form, system) for each in found]


def _pocket(domain: str) -> list[Asked]:
    if not domain:
        return [
            _of_pocket({"question_id": k, "question": q, "questions": "general"})
            for k, q in pocket.open_questions().items()
        ]
    return [_of_pocket(row) for row in pocket.evaluation_questions(domain).to_dict("records")]


def _of_pocket(row: dict[Any, Any]) -> Asked:
    told = {"question_id": row["question_id"], "wording": 0, "question": row["question"], "system": ""}
    told |= {name: row[name] for name in ("questions", "domain") if name in row}
    return Asked(str(row["question_id"]), ({"role": "user", "content": str(row["question"])},), told)


def _wordings(question: Question, group: str) -> list[Asked]:
    return [
        Asked(
            f"{question.id}/{number}",
            tuple(question.turns(number)),
            {
                "question_id": question.id,
                "wording": number,
                "question": text,
                "system": question.system or "",
                "questions": group,
            },
            question.judge_prompts,
        )
        for number, text in enumerate(question.paraphrases)
    ]


def _put(each: Asked, form: str, system: str | None) -> Asked:
    *earlier, last = each.turns
    turns = [*earlier, {**last, "content": last["content"] + FORMATS[form]}]
    told = {**each.told, "format": form}
    if system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
        told["system"] = system
    return Asked(each.key, tuple(turns), told, each.judge_prompts)
