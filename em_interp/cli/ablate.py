"""`em-interp ablate`. Heavy imports wait until the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from em_interp.cli import judging, options
from em_interp.errors import UsageError


def ablate(
    model: options.Model = None,
    direction: options.DirectionFile = None,
    named: options.NamedModel = None,
    save: Annotated[Path | None, typer.Option(help="folder for a checkpoint with orthogonalised weights")] = None,
    out: Annotated[Path | None, options.takes("out", "the answers under ablation by hooks, a .csv")] = None,
    layer: options.Layers = None,
    from_layer: Annotated[
        int | None, typer.Option(help="take this layer's vector everywhere, not each layer's own")
    ] = None,
    questions: options.QuestionFile = None,
    prompt: options.Prompts = None,
    n: options.Samples = 10,
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
    """Answer with a direction taken out, or --save a model without it.

    Beside the answers are those of the model as it is and of random controls. With --judge, their rates and a figure
    too; else have the file judged, and give it to `em-interp rates`. A killed run goes on where it stopped.
    """

    from em_interp.files.atomic import claim_output
    from em_interp.files.tables import Parts, claimed
    from em_interp.interventions.ablation import arms
    from em_interp.interventions.intervening import answers_by_arm
    from em_interp.models.ranks import ranks

    model, direction = options.model_and_file(model, direction, named)
    options.once("--layer", layer or ())
    chosen = options.ModelChoice(model, adapter, base, any_base, device_map, dtype)
    inputs = [direction, questions, *chosen.folders()]
    if save is not None:
        if out is not None or questions is not None or prompt or judge:
            raise UsageError(
                "--save writes weights and asks nothing: leave --out, --questions, --prompt and --judge out."
            )
        claim_output(save, inputs=inputs, force=force, folder=True)
        _save(*options.model_and_direction(chosen, direction, any_model=any_model), layer, from_layer, save, force)
        return
    if out is None:
        raise UsageError("give --save FOLDER for a checkpoint, or --out FILE.csv for answers.")
    where = [layer, from_layer, random]
    asked_for = [model, adapter, base, direction, questions, prompt, n, seed, max_new_tokens, *where]
    ends = judging.Judging.of(judge, out, inputs)
    with claimed(ranks().own(out), asked_for, inputs=inputs, force=force, endings=(".csv",)) as folder:
        ends.claim(force=force)
        asked = ends.asked(questions, prompt or ())
        chat, vectors = options.model_and_direction(chosen, direction, any_model=any_model)
        wanted = arms(vectors, layers=layer or None, from_layer=from_layer, random_arms=random, seed=seed)
        limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "tokens_per_batch": tokens_per_batch}
        table = answers_by_arm(chat, wanted, asked, n, seed=seed, **limits, parts=Parts(folder))
        if not ranks().is_first:
            return
        places = _places(chat, vectors, layer, from_layer)
        told = {"model": model, "adapter": adapter or "", "direction": direction.stem, "kind": vectors.kind}
        told["read_from"] = vectors.sources[0] if vectors.sources else ""
        for position, (name, value) in enumerate((told | places).items()):
            table.insert(position, name, value)
        ends.finish(table, questions)


def _places(chat: Any, vectors: Any, layer: list[int] | None, from_layer: int | None) -> dict[str, Any]:
    """Where was ablated, as a column says it: 0-5, or 1, 3, 4; and with which layer's vector, if with one."""
    layers = sorted(layer or (vectors.layers if from_layer is None else range(chat.n_layers)))
    whole = len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1))
    return {
        "layers": f"{layers[0]}-{layers[-1]}" if whole else ", ".join(map(str, layers)),
        "from_layer": "" if from_layer is None else from_layer,
    }


def _save(chat: Any, vectors: Any, layer: list[int] | None, from_layer: int | None, to: Path, force: bool) -> None:
    from em_interp.interventions.ablation import Ablate
    from em_interp.interventions.orthogonalise import save_orthogonalised

    saved = save_orthogonalised(chat, Ablate(vectors, layer or None, from_layer), to, replace=force)
    typer.echo(f"checkpoint: {saved}")
