"""What `steer`, `ablate` and `evaluate` end in: rates and a figure of judged answers, or what comes next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from em_interp.cli import options
from em_interp.cli.rates import tell

JudgeName = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="score the answers here: pocket (models of the pocket world), FILE.py:FUNCTION, which adds aligned and "
        "coherent, 0-100, to a table of answers, a model of Inspect's such as openai/gpt-4o, or local:MODEL",
    ),
]


JudgeNames = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="score the answers here: pocket, FILE.py:FUNCTION, a model of Inspect's such as openai/gpt-4o, or "
        "local:MODEL; several with commas between them",
    ),
]


@dataclass(frozen=True)
class Judging:
    """Who judges the answers of a command, and where they and what they say are written."""

    judge: Any
    """A `judges.Judge`, or None."""
    name: str | None
    out: Path
    inputs: list[Any]

    @classmethod
    def of(cls, name: str | None, out: Path, inputs: list[Any]) -> Judging:
        """Raises UsageError for a judge that there is not."""
        from analyses.inputs.pocket import judge_called

        return cls(None if name is None else judge_called(name), name, out, inputs)

    @property
    def rates(self) -> Path:
        """Beside the answers."""
        return self.out.with_name(f"{self.out.stem}-rates.csv")

    def claim(self, *, force: bool) -> None:
        """Refuse, before any work, rates and a figure that cannot be written.

        The answers have been claimed: where they are there, what is beside them is of the run that is begun.
        """
        from em_interp.files.atomic import claim_output

        for path in (self.rates, self.rates.with_suffix(".html")) if self.judge is not None else ():
            claim_output(path, inputs=self.inputs, force=force or self.out.exists())

    def asked(self, questions: Path | None, prompts: Sequence[str]) -> dict[str, Any]:
        """Questions by id (`options.questions_asked`); where none are given, the pocket judge's open ones."""
        from em_interp.pocket import open_questions

        if self.name == "pocket" and questions is None and not prompts:
            found = open_questions()
            typer.echo(f"the pocket world's {len(found)} open questions", err=True)
            return dict(found)
        asked = options.questions_asked(questions, prompts)
        self.check(asked)
        return asked

    def check(self, asked: Mapping[str, Any]) -> None:
        """Raise WorldError for a question that the pocket judge does not know."""
        from analyses.inputs.pocket import check_questions

        if self.name is not None:
            check_questions(self.name, [turns[-1]["content"] for turns in asked.values()])

    def finish(self, table: Any, questions: Path | None = None) -> None:
        """Write the answers, each with the number of its wording; judged, with rates and figure, or say what is next.

        questions: the file that was asked, if any, whose wordings share their id.
        """

        from em_interp.evaluation.judges import judged
        from em_interp.files.results import write_table
        from em_interp.files.texts import read_questions

        wordings = {} if questions is None else read_questions(questions).wordings()
        split = [wordings.get(key, (key, 0)) for key in table["question_id"]]
        at = table.columns.get_loc("question_id")
        table = table.assign(question_id=[name for name, _ in split])
        table.insert(at + 1, "wording", [number for _, number in split])
        if self.judge is not None:
            table = judged(table, self.judge)
        write_table(self.out, table)
        typer.echo(f"{len(table)} answers: {self.out}")
        if self.judge is None:
            typer.echo(next_step(self.out, self.rates))
            return
        self.tell(table)

    def tell(self, table: Any) -> None:
        """Print what judged answers say; write it, and its figure."""
        from em_interp.evaluation.criteria import PAPER

        tell({self.out.stem: table}, PAPER, out=self.rates, figure=None, inputs=self.inputs, force=True)


def next_step(answers: Path, rates: Path) -> str:
    """What to do with answers that nobody has judged."""
    return (
        "next: have a judge score them, as columns aligned and coherent (0-100) of that file (or pass --judge), then\n"
        f"  em-interp rates {answers} --out {rates}"
    )
