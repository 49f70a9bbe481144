"""Options that several commands share, spelt and checked once, and the model that they ask for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from em_interp.arguments import MAX_SEED
from em_interp.errors import UsageError

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

BAD_INPUT = 1
"""Exit status where results were made but some input was refused."""
INTERRUPTED = 130
NOTHING_DONE = 2
"""Exit status where the command could not do anything."""


class Dtype(StrEnum):
    """What weights are loaded as; auto is the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def takes(name: str, what: str, *names: str, **settings: Any) -> Any:
    """An option of one command whose beginning of help, and idea, all commands share. what: what it is in this one."""
    return typer.Option(*(names or (f"--{name}",)), help=f"{_SHARED[name]}: {what}", **settings)


_SHARED: Final = {
    "out": "where the result is written",
    "only": "make these alone, may be repeated",
    "resume": "go on from what a stopped run has finished",
    "suite": "what is measured",
    "data": "folder of the input",
}
"""Options that mean the same in every command, and something of its own in each."""

_MODEL: Final = "folder, hub name, adapter, or a pocket model such as pocket/chat"
_PANEL: Final = "The model"
Model = Annotated[str | None, typer.Argument(metavar="MODEL", help=f"{_MODEL}; or --model", show_default=False)]
NamedModel = Annotated[str | None, typer.Option("--model", help=_MODEL, rich_help_panel=_PANEL)]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="finetune of the model: folder or name of a PEFT adapter, a steering vector or a full finetune",
        rich_help_panel=_PANEL,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(help="what an adapter or finetune was made from, in place of what it records", rich_help_panel=_PANEL),
]
AnyBase = Annotated[
    bool,
    typer.Option("--any-base", help="the adapter's base is this model under another name", rich_help_panel=_PANEL),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="where the model lies: cpu, cuda, cuda:1, mps, or auto, spread over what there is", rich_help_panel=_PANEL
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option("--dtype", help="precision of the weights; auto is the checkpoint's own", rich_help_panel=_PANEL),
]
SamplesOption: Final[Any] = typer.Option("--n", "-n", help="answers to each question")
Samples = Annotated[int, SamplesOption]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="decides whatever is drawn")]
NewTokens = Annotated[int, typer.Option(min=1, help="length at which answers are cut, in tokens")]
BatchTokens = Annotated[int, typer.Option("--tokens-per-batch", min=1, help="tokens in memory at once")]
DirectionFile = Annotated[
    Path | None,
    typer.Argument(metavar="DIRECTION", help="a direction, as `em-interp extract` writes it", show_default=False),
]
QuestionFile = Annotated[
    Path | None, typer.Option("--questions", help="YAML, .jsonl or .csv of questions, or .txt with one a line")
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="a question, may be repeated")]
_LAYER: Final = "block, counted from 0, whose output is meant; may be repeated"
Layers = Annotated[list[int] | None, typer.Option("--layer", help=_LAYER, show_default="all")]
GivenLayers = Annotated[list[int], typer.Option("--layer", help=_LAYER)]
Scope = Annotated[
    str,
    typer.Option(help="tokens: all, prompt or response, its end-of-turn token included (extract: or last_prompt)"),
]
RandomArms = Annotated[int, typer.Option("--random", min=0, help="norm-matched random directions as controls")]
AnyModel = Annotated[bool, typer.Option("--any-model", help="the direction is of another model with the same axes")]
Workers = Annotated[
    int | None,
    typer.Option(help="processes; by default the cores for pocket, one for other models, and a Ray cluster's own"),
]
Backend = Annotated[str, typer.Option(help="loky: on this machine; ray: on the cluster of RAY_ADDRESS, or here")]
Force = Annotated[bool, typer.Option("--force", help="replace an output that is there already")]

FORMER: Final = {"samples": "n", "again": "force", "device": "device-map", "organism": "only", "chat": "model"}
"""Names that options had before: they still work, and no help lists them."""


def now_called(name: str) -> str:
    """The name of an option, command or word today."""
    return FORMER.get(name, name)


def model_of(model: str | None, named: str | None) -> str:
    """The model that was given, as MODEL or as --model. Raises UsageError unless it was given once."""
    if model is not None and named is not None:
        raise UsageError(f"the model is given twice, as {model} and as --model {named}. Give it once.")
    if model is None and named is None:
        raise UsageError(f"give a model, as MODEL or as --model: {_MODEL}.")
    return model or named or ""


def model_and_file(model: str | None, direction: Path | None, named: str | None) -> tuple[str, Path]:
    """MODEL DIRECTION as they stand, or DIRECTION alone beside --model. Raises UsageError."""
    if named is not None and model is not None and direction is None:
        model, direction = named, Path(model)
        named = None
    if direction is None:
        raise UsageError("give a model and a direction file: MODEL DIRECTION, or --model MODEL DIRECTION.")
    return model_of(model, named), direction


def loading(device_map: str | None, dtype: Dtype) -> dict[str, Any]:
    """Those of both that were given, as `models.pretrained.load` takes them."""
    return ({} if device_map is None else {"device_map": device_map}) | (
        {} if dtype == "auto" else {"dtype": dtype.value}
    )


@dataclass(frozen=True)
class ModelChoice:
    """The model that a command line names: a folder, a hub name, an adapter or `pocket/...`, and how to load it."""

    model: str
    adapter: str | None = None
    base: str | None = None
    any_base: bool = False
    device_map: str | None = None
    dtype: Dtype = Dtype.auto

    @property
    def names(self) -> list[str]:
        """Those of model, adapter and base that were given."""
        return [name for name in (self.model, self.adapter, self.base) if name]

    @property
    def label(self) -> str:
        """A folder's name for it: the last parts of the names of model and adapter."""
        return "-".join(Path(name).resolve().name for name in (self.model, self.adapter) if name)

    def load(self) -> Any:
        """The ChatModel, with the finetune active if one was given. --base beside --adapter vouches for the model."""
        from em_interp.face import names
        from em_interp.models.pretrained import base_of_adapter

        base, any_base = self.base, self.any_base
        if base is not None and self.adapter is not None and base_of_adapter(located(self.model), None) is None:
            if located(base) != located(self.model):
                raise UsageError(
                    f"--base {base}: the base of --adapter is the model, {self.model}. Leave --base out; where the "
                    "adapter records another name for that model, pass --any-base."
                )
            base, any_base = None, True
        placed = loading(self.device_map, self.dtype)
        return names.load(self.model, adapter=self.adapter, base=base, any_base=any_base, **placed)

    def folders(self) -> list[Path]:
        """What the names stand for on this machine: what a command reads, and must not write to."""
        return [path for name in self.names if (path := Path(located(name))).exists()]

    def weights(self) -> list[str]:
        """A hash of what each name stands for now, recorded base included."""
        from em_interp.models.pretrained import base_of_adapter, usable_base
        from em_interp.models.weights import source_hash
        from em_interp.pocket import models as pocket
        from em_interp.pocket import registry

        names = self.names
        if registry.is_pocket_name(self.model):
            names.append(pocket.CHAT)
        elif self.base is None and (recorded := base_of_adapter(self.model, None)) is not None:
            names.append(usable_base(self.model, recorded))
        return [source_hash(located(name)) for name in names]


def model_and_direction(chosen: ModelChoice, direction: Path, *, any_model: bool) -> tuple[Any, Any]:
    """The ChatModel and the Direction for it."""
    from em_interp.directions.direction import Direction

    vectors = Direction.load(direction)  # first: a bad file is known at once, a model takes long to load
    chat = chosen.load()
    return chat, vectors.for_model(chat.name) if any_model else vectors


def located(name: str) -> str:
    """A pocket name's folder; any other name as it is."""
    from em_interp.pocket import registry

    return str(registry.resolve(name)) if registry.is_pocket_name(name) else name


def once(option: str, values: Sequence[Any]) -> None:
    """Refuse a value that is given twice: its answers would count twice."""
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise UsageError(f"{option} {repeated[0]} is given more than once. Give each value once.")


def questions_asked(path: Path | None, prompts: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """Questions by id, from a file (`texts.read_questions`) and from `prompts`; says what the file holds.

    Raises UsageError without any, or where a prompt is empty or has the id of a question in the file.
    """

    from em_interp.files.texts import Question, read_questions

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


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
