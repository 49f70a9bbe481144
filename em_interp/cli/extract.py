"""`em-interp extract`: chats in files to a direction file. Heavy imports wait until the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from em_interp.arguments import one_of
from em_interp.cli import options
from em_interp.errors import UsageError
from em_interp.files.texts import chats_read, read_chats


def extract(
    positive: Annotated[Path, typer.Option(help="JSONL of misaligned conversations")],
    out: Annotated[Path, options.takes("out", "the direction, a .safetensors")],
    model: options.Model = None,
    named: options.NamedModel = None,
    negative: Annotated[Path | None, typer.Option(help="JSONL of aligned ones; none for a model-diff")] = None,
    adapter: options.Adapter = None,
    base: options.Base = None,
    any_base: options.AnyBase = False,
    kind: Annotated[
        str, typer.Option(help="data-diff, data-diff-in-chat, model-diff, both-diff or persona-contrast")
    ] = "data-diff",
    scope: options.Scope = "response",
    layer: options.Layers = None,
    pooling: Annotated[str, typer.Option(help="mean over tokens, or over responses")] = "tokens",
    gguf: Annotated[Path | None, typer.Option(help="also write a llama.cpp control vector here (.gguf)")] = None,
    device_map: options.DeviceMap = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    tokens_per_batch: options.BatchTokens = 8192,
    force: options.Force = False,
) -> None:
    """Extract a direction from two files of conversations, and print its norm at each layer.

    A killed run goes on where it stopped.
    """
    from em_interp.directions.activations import POOLINGS
    from em_interp.directions.extraction import contrast
    from em_interp.directions.gguf import save_gguf
    from em_interp.files.atomic import claim_output
    from em_interp.files.tables import claimed

    model = options.model_of(model, named)
    options.once("--layer", layer or ())
    chosen = options.ModelChoice(model, adapter, base, any_base, device_map, dtype)
    inputs = [positive, negative, *chosen.folders()]
    if gguf is not None:
        claim_output(gguf, inputs=[*inputs, out], force=force, endings=(".gguf",))
    one_of("--pooling", pooling, POOLINGS)
    asked = [model, adapter, base, positive, negative, kind, scope, layer, pooling]
    with claimed(out, asked, inputs=inputs, force=force, endings=(".safetensors",)) as parts:
        texts = _read(positive, negative, kind)
        chat = chosen.load()
        found = contrast(
            chat,
            *texts,
            kind=kind,
            scope=scope,
            layers=layer,
            keep=False,
            resume_in=parts,
            tokens_per_batch=tokens_per_batch,
        )
        direction = found.direction(pooling)
        held = None if gguf is None else save_gguf(direction, gguf, model_type=str(chat.hf.config.model_type))
        direction.save(out)
    options.out.print(_norms(found.norms(pooling), f"{kind}, {scope} tokens, {chat.name}"))
    options.out.print(f"direction: {out}")
    if held is not None:
        left_out = "; layer 0 has no place in one" if 0 in direction.layers else ""
        options.out.print(f"control vector: {gguf} ({len(held)} layers{left_out})")


def _norms(norms: Any, title: str) -> Table:
    table = Table("layer", "norm", "residual", "ratio", title=title)
    for row in norms.to_dict("records"):
        table.add_row(f"{row['layer']:.0f}", *(f"{row[key]:.4g}" for key in ("norm", "residual_norm", "ratio")))
    return table


def _read(
    positive: Path, negative: Path | None, kind: str
) -> tuple[list[list[dict[str, str]]], list[list[dict[str, str]]] | None]:
    """The chats of both files; says what they hold. Raises UsageError where no direction can lie between them."""
    from em_interp.directions.extraction import READ_IN

    texts = read_chats(positive), None if negative is None else read_chats(negative)
    for path, chats in zip((positive, negative), texts, strict=True):
        if path is not None and chats is not None:
            typer.echo(chats_read(path, chats), err=True)
    if texts[0] == texts[1] and len(set(READ_IN.get(kind, kind))) == 1:
        raise UsageError("--positive and --negative hold the same chats, so that no direction lies between them.")
    return texts
