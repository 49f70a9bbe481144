"""`em-interp extract`: chats in files to a direction file. Heavy imports wait until the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from em_interp.texts import chats_read, read_chats


def resolve(name: str, adapter: str | None, device_map: str | None) -> Any:
    """A ChatModel from a folder, the hub, or the pocket registry (`pocket/...`), with an adapter active if given."""
    from em_interp import models
    from em_interp.pocket import loading, registry

    if not registry.is_pocket_name(name):
        return models.load(name, adapter=adapter, device_map=device_map)
    model = loading.load(name)
    if adapter is not None:
        source = registry.resolve(adapter) if registry.is_pocket_name(adapter) else adapter
        model.add_adapter(Path(adapter).name.replace(".", "-"), source)
    return model


def extract(
    model: Annotated[str, typer.Argument(help="folder, hub name, or pocket/NAME")],
    positive: Annotated[Path, typer.Option(help="JSONL of misaligned conversations")],
    out: Annotated[Path, typer.Option(help="direction file to write (.safetensors)")],
    negative: Annotated[Path | None, typer.Option(help="JSONL of aligned ones; none for a model-diff")] = None,
    adapter: Annotated[str | None, typer.Option(help="finetune: a PEFT or steering-vector folder or name")] = None,
    kind: Annotated[
        str, typer.Option(help="data-diff, data-diff-in-chat, model-diff, both-diff or persona-contrast")
    ] = "data-diff",
    scope: Annotated[str, typer.Option(help="tokens: prompt, last_prompt, response or all")] = "response",
    layer: Annotated[list[int] | None, typer.Option(help="0-based block; may be repeated; all by default")] = None,
    pooling: Annotated[str, typer.Option(help="mean over tokens, or over responses")] = "tokens",
    gguf: Annotated[Path | None, typer.Option(help="also write a llama.cpp control vector here")] = None,
    device_map: Annotated[str | None, typer.Option(help="'auto' spreads the model over the GPUs")] = None,
) -> None:
    """Extract a direction from two files of conversations, and print its norm at each layer."""
    from em_interp.control_vectors import save_gguf
    from em_interp.extraction import contrast

    texts = read_chats(positive), None if negative is None else read_chats(negative)
    for path, chats in zip((positive, negative), texts, strict=True):
        if path is not None and chats is not None:
            typer.echo(chats_read(path, chats), err=True)
    chat = resolve(model, adapter, device_map)
    found = contrast(chat, *texts, kind=kind, scope=scope, layers=layer, keep=False)
    direction = found.direction(pooling)
    direction.save(out)
    table = Table("layer", "norm", "residual", "ratio", title=f"{kind}, {scope} tokens, {chat.name}")
    for row in found.norms(pooling).to_dict("records"):
        table.add_row(f"{row['layer']:.0f}", *(f"{row[key]:.4g}" for key in ("norm", "residual_norm", "ratio")))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"direction: {out}")
    if gguf is not None:
        held = save_gguf(direction, gguf, model_type=str(chat.hf.config.model_type))
        left_out = "; layer 0 has no place in one" if 0 in direction.layers else ""
        console.print(f"control vector: {gguf} ({len(held)} layers{left_out})")
