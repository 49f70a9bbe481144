"""`em-interp steer`. Heavy imports wait until the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from em_interp.cli import judging, options


def steer(
    layer: options.GivenLayers,
    coefficient: Annotated[list[float], typer.Option(help="how much of the direction; may be repeated")],
    out: Annotated[Path, options.takes("out", "the answers, a .csv")],
    model: options.Model = None,
    direction: options.DirectionFile = None,
    named: options.NamedModel = None,
    questions: options.QuestionFile = None,
    prompt: options.Prompts = None,
    n: options.Samples = 10,
    residual: Annotated[
        bool, typer.Option("--residual", help="coefficients in units of the typical residual norm of the layer")
    ] = False,
    scope: options.Scope = "all",
    random: options.RandomArms = 3,
    seed: options.Seed = 0,
    max_new_tokens: options.NewTokens = 600,
    judge: judging.JudgeName = None,
    any_model: options.AnyModel = False,
    adapter: options.Adapter = None,
    base: options.Base = None,
    any_base: options.AnyBase = False,
    device_map: options.DeviceMap = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    tokens_per_batch: options.BatchTokens = 65_536,
    force: options.Force = False,
) -> None:
    """Answer with a direction added, at each layer and coefficient.

    Beside it are random controls. With --judge, their rates and a figure too; else have the file judged, and give it to
    `em-interp rates`. A killed run goes on where it stopped.
    """
    from em_interp.files.tables import Parts, claimed
    from em_interp.interventions.steering import sweep
    from em_interp.models.ranks import ranks

    model, direction = options.model_and_file(model, direction, named)
    options.once("--layer", layer)
    options.once("--coefficient", coefficient)
    chosen = options.ModelChoice(model, adapter, base, any_base, device_map, dtype)
    inputs = [direction, questions, *chosen.folders()]
    grid = [layer, coefficient, residual, scope, random]
    asked_for = [model, adapter, base, direction, questions, prompt, n, seed, max_new_tokens, *grid]
    ends = judging.Judging.of(judge, out, inputs)
    with claimed(ranks().own(out), asked_for, inputs=inputs, force=force, endings=(".csv",)) as folder:
        ends.claim(force=force)
        asked = ends.asked(questions, prompt or ())
        chat, vectors = options.model_and_direction(chosen, direction, any_model=any_model)
        table = sweep(
            chat,
            vectors,
            asked,
            layers=layer,
            coefficients=coefficient,
            n=n,
            name=direction.stem,
            units="residual" if residual else "direction",
            random_arms=random,
            scope=scope,
            seed=seed,
            max_new_tokens=max_new_tokens,
            tokens_per_batch=tokens_per_batch,
            parts=Parts(folder),
        )
        if not ranks().is_first:
            return
        table.insert(0, "model", model)
        table.insert(1, "adapter", adapter or "")
        table.insert(3, "read_from", vectors.sources[0] if vectors.sources else "")
        ends.finish(table, questions)
