"""`em-interp steer`, `em-interp ablate`. Heavy imports wait until a command runs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from em_interp.errors import UsageError
from em_interp.files import atomic_path
from em_interp.texts import Question, read_questions

if TYPE_CHECKING:
    import pandas as pd

    from em_interp.directions import Direction
    from em_interp.models import ChatModel

Model = Annotated[str, typer.Argument(help="folder, hub name, adapter, or a pocket model such as pocket/chat")]
DirectionFile = Annotated[Path, typer.Argument(help="a direction, as Direction.save writes it")]
QuestionFile = Annotated[
    Path | None, typer.Option("--questions", help="YAML, .jsonl or .csv of questions, or .txt with one a line")
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="a question; may be repeated")]
Samples = Annotated[int, typer.Option("-n", "--samples", help="answers a question")]
RandomArms = Annotated[int, typer.Option("--random", help="norm-matched random directions as controls")]
Seed = Annotated[int, typer.Option(help="decides the samples and the random directions")]
NewTokens = Annotated[int, typer.Option(help="longest answer, in tokens")]
AnyModel = Annotated[bool, typer.Option("--any-model", help="the direction is of another model with the same axes")]


def register(app: typer.Typer) -> None:
    """Put both commands on the command line."""
    app.command()(steer)
    app.command()(ablate)


def steer(
    model: Model,
    direction: DirectionFile,
    layer: Annotated[list[int], typer.Option(help="block after which to add; may be repeated")],
    coefficient: Annotated[list[float], typer.Option(help="how much of the direction; may be repeated")],
    out: Annotated[Path, typer.Option(help="CSV for the answers")],
    questions: QuestionFile = None,
    prompt: Prompts = None,
    samples: Samples = 10,
    residual: Annotated[
        bool, typer.Option("--residual", help="coefficients in units of the typical residual norm of the layer")
    ] = False,
    scope: Annotated[str, typer.Option(help="tokens to act on: all, prompt or response")] = "all",
    random: RandomArms = 3,
    seed: Seed = 0,
    max_new_tokens: NewTokens = 600,
    any_model: AnyModel = False,
) -> None:
    """Answers while multiples of a direction are added, beside random controls: every layer with every coefficient."""
    from em_interp.steering import sweep

    asked = questions_asked(questions, prompt or ())
    with atomic_path(out) as temporary:  # first: a place that cannot be written is refused before the work
        chat, vectors = _load(model, direction, any_model)
        table = sweep(
            chat,
            vectors,
            asked,
            layers=layer,
            coefficients=coefficient,
            n=samples,
            name=direction.stem,
            units="residual" if residual else "direction",
            random_arms=random,
            scope=scope,
            seed=seed,
            max_new_tokens=max_new_tokens,
        )
        _write(table, temporary)
    typer.echo(f"{len(table)} answers: {out}")


def ablate(
    model: Model,
    direction: DirectionFile,
    save: Annotated[Path | None, typer.Option(help="folder for a checkpoint with orthogonalised weights")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV for answers under ablation by hooks")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="layer to ablate; may be repeated; default all")] = None,
    from_layer: Annotated[
        int | None, typer.Option(help="take this layer's vector everywhere, not each layer's own")
    ] = None,
    questions: QuestionFile = None,
    prompt: Prompts = None,
    samples: Samples = 10,
    random: RandomArms = 3,
    seed: Seed = 0,
    max_new_tokens: NewTokens = 600,
    any_model: AnyModel = False,
) -> None:
    """Take a direction out: as a checkpoint (--save), or in answers beside the unablated model and random controls."""
    from em_interp.ablation import Ablate, arms
    from em_interp.interventions import answers_by_arm
    from em_interp.orthogonalise import save_orthogonalised

    if save is not None:
        if out is not None or questions is not None or prompt:
            raise UsageError("--save writes weights and asks nothing: leave --out, --questions and --prompt out.")
        chat, vectors = _load(model, direction, any_model)
        typer.echo(f"checkpoint: {save_orthogonalised(chat, Ablate(vectors, layer or None, from_layer), save)}")
        return
    if out is None:
        raise UsageError("give --save FOLDER for a checkpoint, or --out FILE.csv for answers.")
    asked = questions_asked(questions, prompt or ())
    with atomic_path(out) as temporary:  # first: a place that cannot be written is refused before the work
        chat, vectors = _load(model, direction, any_model)
        modes = arms(vectors, layers=layer or None, from_layer=from_layer, random_arms=random, seed=seed)
        table = answers_by_arm(chat, modes, asked, samples, seed=seed, max_new_tokens=max_new_tokens)
        table.insert(0, "direction", direction.stem)
        _write(table, temporary)
    typer.echo(f"{len(table)} answers: {out}")


def questions_asked(path: Path | None, prompts: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """Questions by id, from a file (`texts.read_questions`) and from `prompts`; says what the file holds.

    Raises UsageError without any, or where a prompt is empty or has the id of a question in the file.
    """
    asked = {}
    if path is not None:
        found = read_questions(path)
        typer.echo(found, err=True)
        asked = found.asked()
    for number, text in enumerate(prompts):
        if not text.strip():
            raise UsageError("a --prompt is empty: write the question after it.")
        if f"prompt_{number}" in asked:
            raise UsageError(f"{path} has a question with the id prompt_{number}, which --prompt uses. Rename it.")
        asked[f"prompt_{number}"] = Question(f"prompt_{number}", (text,)).turns()
    if not asked:
        raise UsageError("no questions: give --questions FILE or --prompt TEXT.")
    return asked


def _write(table: pd.DataFrame, path: Path) -> None:
    """Every text quoted: a carriage return within an answer would otherwise end its row."""
    table.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)


def _load(model: str, path: Path, any_model: bool) -> tuple[ChatModel, Direction]:
    from em_interp import models
    from em_interp.directions import Direction
    from em_interp.pocket import loading, registry

    direction = Direction.load(path)
    chat = loading.load(model) if model.startswith(registry.PREFIX) else models.load(model)
    return chat, direction.for_model(chat.name) if any_model else direction
