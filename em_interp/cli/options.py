"""Options that several commands share, spelt and checked once, and the model that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from em_interp.arguments import MAX_SEED
from em_interp.errors import UsageError


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
