"""Released YAML files: question sets (`em_interp.files.texts`), and judge prompts in the format of Betley et al."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from em_interp.errors import UnreadableFileError
from em_interp.files.texts import QuestionSet, question_of, question_set, yaml_entries


@dataclass(frozen=True)
class JudgePrompt:
    """A judge: its name and its prompt template with `{question}` and `{answer}`."""

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


def read_yaml(path: Path) -> QuestionSet | list[JudgePrompt]:
    """Questions or judges, whichever the file holds. Raises what `texts.read_questions` raises."""
    items = yaml_entries(path)
    if all("id" in item for item in items):
        return question_set(path, [question_of(path, item) for item in items])
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


def read_judges(path: Path) -> list[JudgePrompt]:
    """A judge file. Raises `UnreadableFileError` where it holds questions instead."""
    content = read_yaml(path)
    if isinstance(content, QuestionSet):
        raise UnreadableFileError(path, "it holds questions, not judge prompts", "read it with texts.read_questions")
    return content
