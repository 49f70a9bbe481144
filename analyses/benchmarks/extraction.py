"""All-layer response means: this package beside a bare forward pass and other ways to get them.

`python -m analyses.benchmarks.extraction --out artifacts/benchmarks`: real (unpadded) tokens a second on conversations
of log-normal length, every method in every round, in rotating order, after a warm-up. Token ids are made once, before:
their time is the column `tokenise_s`. Errors are against one unpadded conversation at a time, summed in float64.
"""

from __future__ import annotations

import functools
import importlib
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final
from unittest import mock

import numpy as np
import pandas as pd
import torch
import typer
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from analyses.benchmarks.common import installed, process_peak_mb, random_chats, random_model
from em_interp.directions import activations
from em_interp.directions.activations import collect
from em_interp.errors import UsageError
from em_interp.files.atomic import atomic_path, make_folder
from em_interp.files.manifest import write_manifest
from em_interp.models.chat import Batch, Encoded, budget_groups, collate, encode_all, pad_id
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import hidden_of, hook_name, residuals
from em_interp.models.pretrained import load

REFERENCE_BATCH: Final = 25
WRONG: Final = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative error from which a method counts as wrong; in half precision 2e-2."""
Means = Float[Tensor, "n_layers d_model"]


@dataclass(frozen=True)
class Work:
    """A model and conversations, tokenised."""

    model: ChatModel
    conversations: Sequence[Sequence[dict[str, str]]]
    encoded: Sequence[Encoded]
    tokens_per_batch: int
    tokenise_s: float
    rows: Sequence[Any] = field(repr=False)
    """What `collect` makes of the conversations."""

    @property
    def n_tokens(self) -> int:
        """Real tokens."""
        return sum(len(row) for row in self.encoded)

    def sorted_groups(self) -> list[list[int]]:
        """The batches that `collect` makes."""
        return budget_groups([len(row) for row in self.encoded], self.tokens_per_batch)

    def arrival_groups(self) -> list[list[int]]:
        """Batches in the order given, of as many padded tokens at most."""
        groups: list[list[int]] = []
        longest = 0
        for i, row in enumerate(self.encoded):
            longest = max(longest, len(row))
            if not groups or longest * (len(groups[-1]) + 1) > self.tokens_per_batch:
                groups.append([])
                longest = len(row)
            groups[-1].append(i)
        return groups

    def batches(self, groups: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Padded batches where the model is."""
        for group in groups:
            yield collate(self.encoded, group, pad=pad_id(self.model.tokenizer)).to(self.model.device)

    def tokens(self, groups: Sequence[Sequence[int]]) -> int:
        """Tokens with padding."""
        return sum(len(group) * max(len(self.encoded[i]) for i in group) for group in groups)


# -- the work


def prepare(model: ChatModel, conversations: Sequence[Sequence[dict[str, str]]], tokens_per_batch: int) -> Work:
    """Tokenise, timed."""
    started = time.perf_counter()
    rows = activations._read_all(model, conversations, ["response"])
    seconds = time.perf_counter() - started
    encoded = encode_all(model.tokenizer, conversations)
    return Work(model, conversations, encoded, tokens_per_batch, seconds, rows)


# -- the methods: each reads every conversation once and returns the means, or None where it only runs the model


def ours(work: Work) -> Means:
    """`em_interp.directions.activations.collect`."""
    with mock.patch.object(activations, "_read_all", return_value=work.rows):
        return collect(work.model, work.conversations, tokens_per_batch=work.tokens_per_batch, progress=False).mean()


@torch.no_grad()
def bare_sorted(work: Work) -> None:
    """The body alone, over the batches that `collect` makes."""
    for batch in work.batches(work.sorted_groups()):
        work.model.hf.base_model(**batch.inputs(), use_cache=False)


@torch.no_grad()
def bare_arrival(work: Work) -> None:
    """The body alone, in the order given."""
    for batch in work.batches(work.arrival_groups()):
        work.model.hf.base_model(**batch.inputs(), use_cache=False)


def _masked_mean(work: Work, stacks: Iterator[tuple[Batch, Sequence[Tensor]]]) -> Means:
    total = torch.zeros(work.model.n_layers, work.model.d_model, dtype=torch.float64, device=work.model.device)
    count = 0
    for batch, layers in stacks:
        for layer, hidden in enumerate(layers):
            total[layer] += hidden[batch.answer_mask].sum(0)
        count += int(batch.answer_mask.sum())
    return (total / count).cpu()


@torch.no_grad()
def output_hidden_states(work: Work) -> Means:
    """The whole model with output_hidden_states=True, in the order given; the usual way in notebooks."""

    def stacks() -> Iterator[tuple[Batch, Sequence[Tensor]]]:
        for batch in work.batches(work.arrival_groups()):
            out = work.model.hf(**batch.inputs(), output_hidden_states=True, use_cache=False)
            yield batch, out.hidden_states[1:]

    return _masked_mean(work, stacks())


@torch.no_grad()
def run_with_cache(work: Work) -> Means:
    """TransformerBridge.run_with_cache on the block outputs, in the order given."""
    bridge = work.model.bridge
    names = [hook_name(layer) for layer in range(work.model.n_layers)]

    def stacks() -> Iterator[tuple[Batch, Sequence[Tensor]]]:
        for batch in work.batches(work.arrival_groups()):
            _, cache = bridge.run_with_cache(
                batch.input_ids, attention_mask=batch.attention_mask, names_filter=names, return_type=None
            )
            yield batch, [cache[name] for name in names]

    return _masked_mean(work, stacks())


@torch.no_grad()
def reference(work: Work) -> Means:
    """The reference repository's way, rewritten plainly: batches of 25 as they come, the whole model, all layers kept
    in full, then a Python loop over layers and responses whose sums stay in the model's dtype."""
    model = work.model
    n = len(work.encoded)
    sums: list[list[Tensor]] = [[] for _ in range(model.n_layers)]
    count = 0
    groups = [list(range(first, min(first + REFERENCE_BATCH, n))) for first in range(0, n, REFERENCE_BATCH)]
    for batch in work.batches(groups):
        kept: dict[int, Tensor] = {}

        def keep(layer: int, kept: dict[int, Tensor]) -> Callable[..., None]:
            def hook(_module: object, _args: object, output: object) -> None:
                kept[layer] = hidden_of(output).detach()

            return hook

        handles = [block.register_forward_hook(keep(layer, kept)) for layer, block in enumerate(model.hf.model.layers)]
        model.hf(**batch.inputs(), use_cache=False)
        for handle in handles:
            handle.remove()
        for layer in range(model.n_layers):
            for row in range(len(batch.index)):
                sums[layer].append(kept[layer][row][batch.answer_mask[row]].sum(0).cpu())
        count += int(batch.answer_mask.sum())
    return torch.stack([torch.stack(rows).sum(0).double() / count for rows in sums])


@torch.no_grad()
def nnsight(work: Work) -> Means:
    """nnsight's trace, saving every block's output and stopping after the last, in the order given."""
    library = importlib.import_module("nnsight")
    traced = library.NNsight(work.model.hf)

    def stacks() -> Iterator[tuple[Batch, Sequence[Tensor]]]:
        for batch in work.batches(work.arrival_groups()):
            with traced.trace(**batch.inputs(), use_cache=False) as tracer:
                outputs = library.save([layer.output for layer in traced.model.layers])
                tracer.stop()
            yield batch, [hidden_of(output) for output in outputs]

    return _masked_mean(work, stacks())


@torch.no_grad()
def steering_vectors(work: Work) -> Means:
    """steering-vectors' record_activations, in the order given."""
    library = importlib.import_module("steering_vectors")

    def stacks() -> Iterator[tuple[Batch, Sequence[Tensor]]]:
        for batch in work.batches(work.arrival_groups()):
            with library.record_activations(work.model.hf) as recorded:
                work.model.hf(**batch.inputs(), use_cache=False)
            yield batch, [recorded[layer][0].to(batch.answer_mask.device) for layer in range(work.model.n_layers)]

    return _masked_mean(work, stacks())


@torch.no_grad()
def repeng(work: Work) -> None:
    """repeng's batched_get_hiddens, batches of 32 as they come: the last token of every layer. Tokenises itself."""
    extract = importlib.import_module("repeng.extract")
    texts = [work.model.tokenizer.apply_chat_template(chat, tokenize=False) for chat in work.conversations]
    extract.batched_get_hiddens(work.model.hf, work.model.tokenizer, texts, list(range(work.model.n_layers)), 32)


@torch.no_grad()
def oracle(work: Work) -> Means:
    """One unpadded conversation at a time, float64 sums."""
    singles = [[i] for i in range(len(work.encoded))]
    layers = range(work.model.n_layers)
    total = torch.zeros(work.model.n_layers, work.model.d_model, dtype=torch.float64)
    for batch in tqdm(work.batches(singles), total=len(singles), desc="oracle", leave=False):
        kept = residuals(work.model.hf, batch.inputs(), layers)
        for layer in layers:
            total[layer] += kept[layer][batch.answer_mask].double().sum(0).cpu()
    return total / sum(row.n_response for row in work.encoded)


METHODS: Final[dict[str, Callable[[Work], Tensor | None]]] = {
    "ours": ours,
    "bare body, sorted": bare_sorted,
    "bare body, arrival order": bare_arrival,
    "output_hidden_states": output_hidden_states,
    "bridge run_with_cache": run_with_cache,
    "reference": reference,
    "nnsight": nnsight,
    "steering_vectors": steering_vectors,
    "repeng": repeng,
}
PEERS: Final = ("nnsight", "steering_vectors", "repeng")
"""Those that need a package of the same name, which this one does not depend on."""


# -- measuring


def missing_peers() -> dict[str, str]:
    """Peer -> why it cannot be imported here."""
    reasons = {}
    for name in PEERS:
        try:
            importlib.import_module(name)
        except Exception as error:  # peers break in many ways on versions that they were not made for
            reasons[name] = f"not importable here: {type(error).__name__}: {str(error).splitlines()[0]}"
    return reasons


def _seconds(method: Callable[[Work], Tensor | None], work: Work) -> tuple[float, Tensor | None]:
    started = time.perf_counter()
    result = method(work)
    if work.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def measure(work: Work, *, rounds: int, warm_up: int) -> pd.DataFrame:
    """One row a method: median real tokens a second over the rounds, their spread, ratios, and the error."""
    absent = missing_peers()
    names = [name for name in METHODS if name not in absent]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    results: dict[str, Tensor | None] = {}
    for r in tqdm(range(warm_up + rounds), desc="rounds"):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            took, results[name] = _seconds(METHODS[name], work)
            if r >= warm_up:
                seconds[name].append(took)
    truth = oracle(work)
    table = pd.DataFrame({"method": names})
    speeds = {name: work.n_tokens / np.asarray(times) for name, times in seconds.items()}
    table["tokens_per_s"] = [float(np.median(speeds[name])) for name in names]
    table["sd"] = [float(np.std(speeds[name], ddof=1)) if rounds > 1 else math.nan for name in names]
    for other, column in (("bare body, sorted", "of_sorted"), ("bare body, arrival order", "of_arrival")):
        table[column] = [float(np.median(speeds[name] / speeds[other])) for name in names]
    errors = [_error(results[name], truth) for name in names]
    table["worst_relative_error"] = [max(error) if error else math.nan for error in errors]
    table["state"] = [_state(error, WRONG.get(work.model.dtype, 2e-2)) for error in errors]
    gone = pd.DataFrame({"method": list(absent), "state": list(absent.values())})
    whole = pd.concat([table, gone], ignore_index=True)
    return whole.assign(rounds=rounds, n=len(work.encoded), n_tokens=work.n_tokens, tokenise_s=work.tokenise_s)


def _error(means: Tensor | None, truth: Means) -> list[float]:
    if means is None:
        return []
    return ((means.double() - truth).norm(dim=1) / truth.norm(dim=1)).tolist()


def _state(error: Sequence[float], limit: float) -> str:
    wrong = [layer for layer, size in enumerate(error) if not size < limit]
    if not error:
        return "no means"
    return f"silently wrong at layers {wrong}" if wrong else "right"


def peak_mb(name: str, work: Work) -> float:
    """Peak memory of one run of a method, in MB: the device's, or this whole process's on a CPU."""
    if work.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        METHODS[name](work)
        return torch.cuda.max_memory_allocated() / 1e6
    METHODS[name](work)
    return process_peak_mb()


def main(
    out: Annotated[Path, typer.Option(help="folder for extraction.csv and its manifest")] = Path(
        "artifacts/benchmarks"
    ),
    model: Annotated[str | None, typer.Option(help="folder or hub name; a random Qwen2 by default")] = None,
    width: Annotated[int, typer.Option(help="d_model of the random model")] = 384,
    n_layers: Annotated[int, typer.Option(help="layers of the random model")] = 8,
    n: Annotated[int, typer.Option(help="conversations")] = 256,
    median: Annotated[float, typer.Option(help="median length in words")] = 200.0,
    sigma: Annotated[float, typer.Option(help="standard deviation of the logarithm of the length")] = 0.7,
    tokens_per_batch: Annotated[int, typer.Option(help="token budget of a batch")] = 8192,
    rounds: Annotated[int, typer.Option(help="timed rounds")] = 5,
    warm_up: Annotated[int, typer.Option(help="rounds before them")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    seed: Annotated[int, typer.Option(help="of weights, texts and lengths")] = 0,
    peak: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure extraction and write the table."""
    n_words = 8000
    if peak is not None and peak not in METHODS:
        raise UsageError(f"no method is called {peak!r}; there are {', '.join(METHODS)}.")
    chat = load(model) if model is not None else random_model(width, n_layers, n_words, seed)
    chat.hf.to(device, getattr(torch, dtype))
    work = prepare(chat, random_chats(n, median, sigma, n_words, seed), tokens_per_batch)
    if peak is not None:
        typer.echo(peak_mb(peak, work))
        return
    table = measure(work, rounds=rounds, warm_up=warm_up)
    again = functools.partial(_peak_of, sys.argv[1:])
    names = ["ours", "bare body, sorted", "bare body, arrival order", "reference"]
    peaks = {name: again(name) for name in tqdm(names, desc="peak memory")}
    bare = peaks["bare body, sorted"]
    table["peak_mb_beyond_bare"] = [peaks[name] - bare if name in peaks else math.nan for name in table["method"]]
    make_folder(out)
    with atomic_path(out / "extraction.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    write_manifest(
        out / "extraction.json",
        {
            "benchmark": "extraction",
            "peers": {name: installed(name) for name in PEERS},
            "model": chat.name,
            "parameters": sum(p.numel() for p in chat.hf.parameters()),
            "attention": chat.hf.config._attn_implementation,
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "threads": torch.get_num_threads(),
            "dtype": dtype,
            "seed": seed,
            "lengths": [len(row) for row in work.encoded],
            "median": median,
            "sigma": sigma,
            "tokens_per_batch": tokens_per_batch,
            "padded_tokens": {
                "sorted": work.tokens(work.sorted_groups()),
                "arrival": work.tokens(work.arrival_groups()),
            },
            "peaks_mb": peaks,
        },
    )
    typer.echo(table.to_string(index=False))


def _peak_of(arguments: Sequence[str], name: str) -> float:
    """`peak_mb` in a process of its own."""
    command = [sys.executable, "-m", "analyses.benchmarks.extraction", *arguments, "--peak", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    typer.run(main)
