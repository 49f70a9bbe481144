"""Options that several commands share, spelt and checked once, and the model that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from em_interp.arguments import MAX_SEED
from em_interp.errors import UsageError
from em_interp.files.texts import Question, read_questions


class Dtype(StrEnum):
    """What weights are loaded as; auto is the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Argument(help="folder, hub name, adapter, or a pocket model such as pocket/chat")]
Adapter = Annotated[str | None, typer.Option(help="finetune of MODEL: a PEFT or steering-vector folder or name")]
Base = Annotated[
    str | None, typer.Option(help="with an adapter as MODEL: its base, in place of the one that it records")
]
AnyBase = Annotated[bool, typer.Option("--any-base", help="the adapter's base is this model under another name")]
DeviceMap = Annotated[str | None, typer.Option(help="'auto' spreads the model over the GPUs; or cpu, cuda, ...")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="precision of the weights")]
Samples = Annotated[int, typer.Option("-n", "--n", "--samples", help="answers to each question")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="decides whatever is drawn")]
NewTokens = Annotated[int, typer.Option(min=1, help="length at which answers are cut, in tokens")]
BatchTokens = Annotated[int, typer.Option("--tokens-per-batch", min=1, help="tokens in memory at once")]
Force = Annotated[bool, typer.Option("--force", help="replace an output that is there already")]


def load_model(
    name: str,
    *,
    adapter: str | None = None,
    base: str | None = None,
    any_base: bool = False,
    device_map: str | None = None,
    dtype: Dtype = Dtype.auto,
) -> Any:
    """A ChatModel from a folder, the hub, or the pocket registry (`pocket/...`), with an adapter active if given."""
    from em_interp.models import pretrained as models
    from em_interp.pocket import models as loading
    from em_interp.pocket import registry

    options: dict[str, Any] = {"device_map": device_map, "dtype": dtype.value}
    if adapter is not None and registry.is_pocket_name(adapter):
        adapter = str(registry.resolve(adapter))
    if not registry.is_pocket_name(name):
        given: dict[str, Any] = {} if base is None else {"base": base}
        return models.load(name, adapter=adapter, any_base=any_base, **given, **options)
    if base is not None:
        raise UsageError(f"--base {base}: the pocket models bring their own base. Leave it out.")
    model = loading.load(name, **options)
    if adapter is not None:
        model.add_adapter(Path(adapter).name.replace(".", "-"), adapter, any_base=any_base)
    return model


def model_inputs(*names: str | None) -> list[Path]:
    """The folders here that names of models and adapters stand for: what a command reads, and must not write to."""
    from em_interp.pocket import registry

    given = [registry.resolve(name) if registry.is_pocket_name(name) else Path(name) for name in names if name]
    return [path for path in given if path.exists()]


def once(option: str, values: Sequence[Any]) -> None:
    """Refuse a value that is given twice: its answers would count twice."""
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise UsageError(f"{option} {repeated[0]} is given more than once. Give each value once.")


DirectionFile = Annotated[Path, typer.Argument(help="a direction, as Direction.save writes it")]


QuestionFile = Annotated[
    Path | None, typer.Option("--questions", help="YAML, .jsonl or .csv of questions, or .txt with one a line")
]


Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="a question; may be repeated")]


RandomArms = Annotated[int, typer.Option("--random", min=0, help="norm-matched random directions as controls")]


AnyModel = Annotated[bool, typer.Option("--any-model", help="the direction is of another model with the same axes")]


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


out = Console(soft_wrap=True)


err = Console(stderr=True, soft_wrap=True)


BAD_INPUT = 1
"""Exit status where results were made but some input was refused."""


INTERRUPTED = 130


NOTHING_DONE = 2
"""Exit status where the command could not do anything."""
