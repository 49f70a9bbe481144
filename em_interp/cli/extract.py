"""`em-interp extract`: chats in files to a direction file. Heavy imports wait until the command runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from em_interp.arguments import one_of
from em_interp.cli import options
from em_interp.errors import BadValueError, MissingDataError, UsageError

Chats = Sequence[Sequence[Mapping[str, str]]]


def extract(
    out: Annotated[Path, options.takes("out", "the direction, a .safetensors")],
    model: options.Model = None,
    named: options.NamedModel = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="judged CSV of the finetune's answers: coherent ones, misaligned minus aligned"),
    ] = None,
    positive: Annotated[Path | None, typer.Option(help="in place of --answers: JSONL of misaligned chats")] = None,
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
    """Read a direction from judged answers or from two files of chats.

    Its norm at each layer is printed. model-diff is the finetune (--adapter, of any kind) minus the model, on the
    misaligned chats alone. A killed run goes on where it stopped.
    """
    from em_interp.directions.activations import POOLINGS
    from em_interp.directions.extraction import contrast
    from em_interp.directions.gguf import save_gguf
    from em_interp.files.atomic import claim_output
    from em_interp.files.tables import claimed
    from em_interp.models.ranks import ranks

    model = options.model_of(model, named)
    options.once("--layer", layer or ())
    if (answers is None) == (positive is None) or (answers is not None and negative is not None):
        raise UsageError("give --answers FILE.csv, judged, or --positive (and --negative) FILE.jsonl of chats.")
    chosen = options.ModelChoice(model, adapter, base, any_base, device_map, dtype)
    inputs = [answers, positive, negative, *chosen.folders()]
    if gguf is not None:
        claim_output(gguf, inputs=[*inputs, out], force=force, endings=(".gguf",))
    one_of("--pooling", pooling, POOLINGS)
    asked = [model, adapter, base, answers, positive, negative, kind, scope, layer, pooling]
    with claimed(ranks().own(out), asked, inputs=inputs, force=force, endings=(".safetensors",)) as parts:
        texts = _read_answers(answers, kind) if answers is not None else _read(positive, negative, kind)
        chat = chosen.load()
        files = (answers, answers) if answers is not None else (positive, negative)
        bad, good = (
            None if side is None or path is None else _readable(chat, side, path, answers=answers is not None)
            for side, path in zip(texts, files, strict=True)
        )
        found = contrast(
            chat,
            bad or (),
            good,
            kind=kind,
            scope=scope,
            layers=layer,
            keep=False,
            resume_in=parts,
            tokens_per_batch=tokens_per_batch,
        )
        if not ranks().is_first:
            return
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


def _read_answers(path: Path, kind: str) -> tuple[Chats, Chats | None]:
    """The misaligned and the aligned coherent answers of a judged file; says how many. Raises MissingDataError.

    Of a file with groups of questions those to open ones, as the suites read directions.
    """
    from em_interp.evaluation.answers import conversations, misaligned_and_aligned
    from em_interp.evaluation.rates import em_counts
    from em_interp.interventions.judged import kind_of
    from em_interp.published.judged import read_judged_csv

    judged = read_judged_csv(path)
    if (of := kind_of(judged)) != "answers":
        remedy = "give the finetune's own, as `em-interp evaluate` samples them"
        raise BadValueError(path, f"it holds answers under {of}, between which no finetune's direction lies", remedy)
    em_counts(judged)  # refuses scores on another scale
    has_open = "questions" in judged and bool((judged["questions"] == "general").any())
    misaligned, aligned = misaligned_and_aligned(judged[judged["questions"] == "general"] if has_open else judged)
    where = " to open questions (group general)" if has_open else ""
    n = f"{len(misaligned)} misaligned and {len(aligned)} aligned"
    typer.echo(f"{path.name}: {n} coherent answers{where}", err=True)
    for what, side in (("misaligned", misaligned), ("aligned", aligned)):
        if side.empty and not (kind == "model-diff" and what == "aligned"):
            raise MissingDataError(
                path, f"it holds no coherent answer that is {what}", "sample more answers, or give --positive chats"
            )
    return conversations(misaligned), None if kind == "model-diff" else conversations(aligned)


def _readable(chat: Any, side: Chats, path: Path, *, answers: bool) -> Chats:
    """The chats that the template can take, which one whose answer begins with white space may not be.

    Of sampled answers the others are left out, and that is said. Raises BadValueError for one among chats.
    """
    from em_interp.models.chat import unreadable

    left_out = unreadable(chat.tokenizer, side)
    for position, why in left_out.items():
        if not answers:
            raise BadValueError(path, f"conversation {position + 1}: {why}", "strip the white space around its answer")
    if left_out:
        why = next(iter(left_out.values()))
        typer.echo(f"{path.name}: {len(left_out)} of {len(side)} answers are left out ({why})", err=True)
    return [turns for position, turns in enumerate(side) if position not in left_out]


def _read(positive: Path | None, negative: Path | None, kind: str) -> tuple[Chats, Chats | None]:
    """The chats of both files; says what they hold. Raises UsageError where no direction can lie between them."""

    from em_interp.files.texts import chats_read, read_chats

    assert positive is not None
    from em_interp.directions.extraction import READ_IN

    texts = read_chats(positive), None if negative is None else read_chats(negative)
    for path, chats in zip((positive, negative), texts, strict=True):
        if path is not None and chats is not None:
            typer.echo(chats_read(path, chats), err=True)
    if texts[0] == texts[1] and len(set(READ_IN.get(kind, kind))) == 1:
        raise UsageError("--positive and --negative hold the same chats, so that no direction lies between them.")
    return texts
