"""`em-interp extract`: chats in files to a direction file. Heavy imports wait until the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from em_interp.arguments import one_of
from em_interp.cli import options
from em_interp.errors import UsageError
from em_interp.files.texts import chats_read, read_chats


def extract(
    model: options.Model,
    positive: Annotated[Path, typer.Option(help="JSONL of misaligned conversations")],
    out: Annotated[Path, typer.Option(help="direction file to write (.safetensors)")],
    negative: Annotated[Path | None, typer.Option(help="JSONL of aligned ones; none for a model-diff")] = None,
    adapter: options.Adapter = None,
    base: options.Base = None,
    any_base: options.AnyBase = False,
    kind: Annotated[
        str, typer.Option(help="data-diff, data-diff-in-chat, model-diff, both-diff or persona-contrast")
    ] = "data-diff",
    scope: Annotated[str, typer.Option(help="tokens: prompt, last_prompt, response or all")] = "response",
    layer: Annotated[list[int] | None, typer.Option(help="0-based block; may be repeated; all by default")] = None,
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
    from em_interp.directions.extraction import READ_IN, contrast
    from em_interp.directions.gguf import save_gguf
    from em_interp.files.atomic import claim_output
    from em_interp.files.tables import claimed

    options.once("--layer", layer or ())
    inputs = [positive, negative, *options.model_inputs(model, adapter, base)]
    if gguf is not None:
        claim_output(gguf, inputs=[*inputs, out], force=force, endings=(".gguf",))
    one_of("--pooling", pooling, POOLINGS)
    asked = [model, adapter, base, positive, negative, kind, scope, layer, pooling]
    with claimed(out, asked, inputs=inputs, force=force, endings=(".safetensors",)) as parts:
        texts = read_chats(positive), None if negative is None else read_chats(negative)
        for path, chats in zip((positive, negative), texts, strict=True):
            if path is not None and chats is not None:
                typer.echo(chats_read(path, chats), err=True)
        if texts[0] == texts[1] and len(set(READ_IN.get(kind, kind))) == 1:
            raise UsageError("--positive and --negative hold the same chats, so that no direction lies between them.")
        chat = options.load_model(
            model, adapter=adapter, base=base, any_base=any_base, device_map=device_map, dtype=dtype
        )
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
    table = Table("layer", "norm", "residual", "ratio", title=f"{kind}, {scope} tokens, {chat.name}")
    for row in found.norms(pooling).to_dict("records"):
        table.add_row(f"{row['layer']:.0f}", *(f"{row[key]:.4g}" for key in ("norm", "residual_norm", "ratio")))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"direction: {out}")
    if held is not None:
        left_out = "; layer 0 has no place in one" if 0 in direction.layers else ""
        console.print(f"control vector: {gguf} ({len(held)} layers{left_out})")
