"""`em-interp steer`, `em-interp ablate`. Heavy imports wait until a command runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from em_interp.cli import options
from em_interp.errors import UsageError
from em_interp.files.atomic import claim_output
from em_interp.files.texts import Question, read_questions

DirectionFile = Annotated[Path, typer.Argument(help="a direction, as Direction.save writes it")]
QuestionFile = Annotated[
    Path | None, typer.Option("--questions", help="YAML, .jsonl or .csv of questions, or .txt with one a line")
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="a question; may be repeated")]
RandomArms = Annotated[int, typer.Option("--random", min=0, help="norm-matched random directions as controls")]
AnyModel = Annotated[bool, typer.Option("--any-model", help="the direction is of another model with the same axes")]


def register(app: typer.Typer) -> None:
    """Put both commands on the command line."""
    app.command()(steer)
    app.command()(ablate)


def steer(
    model: options.Model,
    direction: DirectionFile,
    layer: Annotated[list[int], typer.Option(help="block after which to add; may be repeated")],
    coefficient: Annotated[list[float], typer.Option(help="how much of the direction; may be repeated")],
    out: Annotated[Path, typer.Option(help="CSV for the answers")],
    questions: QuestionFile = None,
    prompt: Prompts = None,
    samples: options.Samples = 10,
    residual: Annotated[
        bool, typer.Option("--residual", help="coefficients in units of the typical residual norm of the layer")
    ] = False,
    scope: Annotated[str, typer.Option(help="tokens to act on: all, prompt or response")] = "all",
    random: RandomArms = 3,
    seed: options.Seed = 0,
    max_new_tokens: options.NewTokens = 600,
    any_model: AnyModel = False,
    adapter: options.Adapter = None,
    base: options.Base = None,
    any_base: options.AnyBase = False,
    device_map: options.DeviceMap = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    tokens_per_batch: options.BatchTokens = 65_536,
    force: options.Force = False,
) -> None:
    """Answers while multiples of a direction are added, beside random controls: every layer with every coefficient.

    A killed run goes on where it stopped.
    """
    from em_interp.directions.direction import Direction
    from em_interp.files.results import write_table
    from em_interp.files.tables import Parts, claimed
    from em_interp.interventions.steering import sweep

    options.once("--layer", layer)
    options.once("--coefficient", coefficient)
    inputs = [direction, questions, *options.model_inputs(model, adapter, base)]
    grid = [layer, coefficient, residual, scope, random]
    asked_for = [model, adapter, base, direction, questions, prompt, samples, seed, max_new_tokens, *grid]
    with claimed(out, asked_for, inputs=inputs, force=force, endings=(".csv",)) as folder:
        asked = questions_asked(questions, prompt or ())
        vectors = Direction.load(direction)
        chat = options.load_model(
            model, adapter=adapter, base=base, any_base=any_base, device_map=device_map, dtype=dtype
        )
        table = sweep(
            chat,
            vectors.for_model(chat.name) if any_model else vectors,
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
            tokens_per_batch=tokens_per_batch,
            parts=Parts(folder),
        )
        write_table(out, table)
    typer.echo(f"{len(table)} answers: {out}")


def ablate(
    model: options.Model,
    direction: DirectionFile,
    save: Annotated[Path | None, typer.Option(help="folder for a checkpoint with orthogonalised weights")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV for answers under ablation by hooks")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="layer to ablate; may be repeated; default all")] = None,
    from_layer: Annotated[
        int | None, typer.Option(help="take this layer's vector everywhere, not each layer's own")
    ] = None,
    questions: QuestionFile = None,
    prompt: Prompts = None,
    samples: options.Samples = 10,
    random: RandomArms = 3,
    seed: options.Seed = 0,
    max_new_tokens: options.NewTokens = 600,
    any_model: AnyModel = False,
    adapter: options.Adapter = None,
    base: options.Base = None,
    any_base: options.AnyBase = False,
    device_map: options.DeviceMap = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    tokens_per_batch: options.BatchTokens = 65_536,
    force: options.Force = False,
) -> None:
    """Take a direction out: as a checkpoint (--save), or in answers beside the unablated model and random controls.

    A killed run goes on where it stopped.
    """
    from em_interp.directions.direction import Direction
    from em_interp.files.results import write_table
    from em_interp.files.tables import Parts, claimed
    from em_interp.interventions.ablation import Ablate, arms
    from em_interp.interventions.intervening import answers_by_arm
    from em_interp.interventions.orthogonalise import save_orthogonalised

    options.once("--layer", layer or ())
    inputs = [direction, questions, *options.model_inputs(model, adapter, base)]

    def load() -> tuple[Any, Any]:
        vectors = Direction.load(direction)
        chat = options.load_model(
            model, adapter=adapter, base=base, any_base=any_base, device_map=device_map, dtype=dtype
        )
        return chat, vectors.for_model(chat.name) if any_model else vectors

    if save is not None:
        if out is not None or questions is not None or prompt:
            raise UsageError("--save writes weights and asks nothing: leave --out, --questions and --prompt out.")
        claim_output(save, inputs=inputs, force=force, folder=True)
        chat, vectors = load()
        saved = save_orthogonalised(chat, Ablate(vectors, layer or None, from_layer), save, replace=force)
        typer.echo(f"checkpoint: {saved}")
        return
    if out is None:
        raise UsageError("give --save FOLDER for a checkpoint, or --out FILE.csv for answers.")
    where = [layer, from_layer, random]
    asked_for = [model, adapter, base, direction, questions, prompt, samples, seed, max_new_tokens, *where]
    with claimed(out, asked_for, inputs=inputs, force=force, endings=(".csv",)) as folder:
        asked = questions_asked(questions, prompt or ())
        chat, vectors = load()
        table = answers_by_arm(
            chat,
            arms(vectors, layers=layer or None, from_layer=from_layer, random_arms=random, seed=seed),
            asked,
            samples,
            seed=seed,
            max_new_tokens=max_new_tokens,
            tokens_per_batch=tokens_per_batch,
            parts=Parts(folder),
        )
        table.insert(0, "direction", direction.stem)
        write_table(out, table)
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
