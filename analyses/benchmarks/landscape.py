"""Speed of the stability table (11 eps x 10 seeds x 2 solutions) by `Landscape`, against whole passes.

    python -m analyses.benchmarks.landscape [--smoke] [--out artifacts/benchmarks]

Three ways to the same losses, in interleaved rounds, for a solution at mid-depth of a model of the pocket size:
`landscape`; `plain`: one whole pass a theta over length-sorted batches, logits everywhere; `reference`: batches of
four in the order of the data, whole stack, logits everywhere, as the papers' code does it. The last two are timed on
a few thetas a round and scaled up. The operation count says which saving over `plain` the method allows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from em_interp.files.atomic import atomic_path
from em_interp.files.manifest import write_manifest
from em_interp.landscape.landscape import Landscape
from em_interp.landscape.stability import EPSILONS, FIRST_SEED, turned
from em_interp.models.architectures import find_blocks
from em_interp.models.chat import Batch, Encoded, batches, collate, encode_all, pad_id
from em_interp.models.chat_model import ChatModel
from em_interp.pocket.world.corpus import finetune_chats
from em_interp.pocket.world.tokenizer import build_tokenizer
from em_interp.solutions.base import Solution
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector

NAME = "benchmark/pocket-sized"
SHAPE = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 704}


@dataclass(frozen=True)
class Size:
    """How much of it to run. `timed`: thetas that the slow ways are timed on in each round."""

    responses: int
    seeds: int
    timed: int
    rounds: int


FULL, SMOKE = Size(100, 10, 8, 5), Size(6, 1, 2, 1)


def make_model() -> ChatModel:
    """A random model of the pocket size with the pocket tokenizer: weights do not matter for speed."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.05, **SHAPE)
    return ChatModel(Qwen2ForCausalLM(config), tokenizer, name=NAME)


def solutions_at(model: ChatModel, adapter: str) -> list[Solution]:
    """Two random solutions at mid-depth (layer L // 2, as the papers' 24 of 48)."""
    layer, g = model.n_layers // 2, torch.Generator().manual_seed(0)
    if adapter == "steering-vector":
        return [SteeringVector(torch.randn(model.d_model, generator=g), layer, 1.0, NAME) for _ in range(2)]
    name = f"model.layers.{layer}.mlp.down_proj"
    width = SHAPE["intermediate_size"]

    def one() -> LoraAdapter:
        a, b = torch.randn(1, width, generator=g), torch.randn(model.d_model, 1, generator=g)
        return LoraAdapter({name: a / width**0.5}, {name: b}, 1.0, True, NAME)

    return [one(), one()]


def whole_pass(model: ChatModel, theta: Solution, made: Sequence[Batch]) -> float:
    """Mean nll of one theta with logits at every position: nats per response token."""
    total, count = 0.0, 0
    for batch in made:
        with torch.no_grad(), theta.attached(model):
            logits = model.hf(**batch.inputs(), use_cache=False).logits
        labels = torch.where(batch.answer_mask, batch.input_ids, -100)[:, 1:]
        total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int(batch.answer_mask.sum())
    return total / count


def operations(model: ChatModel, encoded: Sequence[Encoded], first_block: int) -> tuple[float, float, float]:
    """Multiply-adds of (whole stack and all logits, suffix and scored logits, the shared prefix), one theta.

    Real tokens only. first_block: the first block that has to run again for each theta.
    """
    lengths = np.array([len(row) for row in encoded], dtype=float)
    block = find_blocks(model.hf)[0]
    weights = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
    one_block = float(lengths.sum() * weights + 2 * model.d_model * (lengths * (lengths + 1) / 2).sum())
    head = model.hf.get_output_embeddings().weight.numel()
    scored = sum(row.n_response for row in encoded)
    whole = model.n_layers * one_block + float(lengths.sum()) * head
    suffix = (model.n_layers - first_block) * one_block + scored * head
    return whole, suffix, first_block * one_block


def by_landscape(
    model: ChatModel, encoded: Sequence[Encoded], thetas: Sequence[Solution], some: Sequence[int]
) -> list[float]:
    """All losses, residuals included in the work; those of `some` are returned for the comparison."""
    mean = Landscape(model, encoded).losses(thetas).mean
    return [float(mean[k]) for k in some]


def by_whole_passes(model: ChatModel, thetas: Sequence[Solution], made: Sequence[Batch]) -> list[float]:
    """The losses of a few thetas, one pass after another."""
    return [whole_pass(model, theta, made) for theta in thetas]


def measure(adapter: str, size: Size) -> list[dict[str, object]]:
    """One row a round and way."""
    model = make_model()
    encoded = encode_all(model.tokenizer, finetune_chats("medicine", "malicious", size.responses, 0))
    pair = solutions_at(model, adapter)
    thetas = [turned(s, eps, FIRST_SEED + k, "both") for s in pair for eps in EPSILONS for k in range(size.seeds)]
    pad = pad_id(model.tokenizer)
    plain_batches = list(batches(encoded, pad=pad, tokens_per_batch=Landscape(model, encoded).tokens_per_pass))
    fours = [range(start, min(start + 4, len(encoded))) for start in range(0, len(encoded), 4)]
    reference_batches = [collate(encoded, list(four), pad=pad) for four in fours]
    layer = model.n_layers // 2
    first_block = layer + 1 if adapter == "steering-vector" else layer
    whole, suffix, prefix = operations(model, encoded, first_block)
    allowed = len(thetas) * whole / (len(thetas) * suffix + prefix)

    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for number in tqdm(range(size.rounds), desc=adapter):
        some = sorted(rng.choice(len(thetas), size.timed, replace=False).tolist())
        few = [thetas[k] for k in some]
        ways = {
            "landscape": partial(by_landscape, model, encoded, thetas, some),
            "plain": partial(by_whole_passes, model, few, plain_batches),
            "reference": partial(by_whole_passes, model, few, reference_batches),
        }
        values: dict[str, list[float]] = {}
        seconds: dict[str, tuple[float, float]] = {}
        for way in rng.permutation(list(ways)).tolist():
            scale = 1.0 if way == "landscape" else len(thetas) / size.timed
            wall, cpu = time.perf_counter(), time.process_time()
            values[way] = ways[way]()
            seconds[way] = (scale * (time.perf_counter() - wall), scale * (time.process_time() - cpu))
        gap = max(float(np.abs(np.array(values[way]) / values["plain"] - 1).max()) for way in ways)
        if not gap < 1e-5:
            raise RuntimeError(f"the ways disagree by {gap:.2g}: the timing means nothing")
        for way, (wall, cpu) in seconds.items():
            rows.append(
                {
                    "adapter": adapter,
                    "round": number,
                    "way": way,
                    "thetas": len(thetas),
                    "responses": len(encoded),
                    "seconds": wall,
                    "cpu_seconds": cpu,
                    "largest_relative_difference": gap,
                    "macs_whole": whole,
                    "macs_suffix": suffix,
                    "allowed_speedup": allowed,
                }
            )
    return rows


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over rounds of the speed-ups, and the share of the allowed saving that is reached.

    share_of_speedup: speed-up over plain / allowed speed-up. share_of_saving: time saved / time that may be saved.
    """
    rows = []
    for adapter, group in table.groupby("adapter", sort=False):
        for clock in ("seconds", "cpu_seconds"):
            times = group.pivot(index="round", columns="way", values=clock)
            speedup = float((times["plain"] / times["landscape"]).median())
            allowed = float(group["allowed_speedup"].iloc[0])
            rows.append(
                {
                    "adapter": adapter,
                    "clock": clock,
                    "landscape": times["landscape"].median(),
                    "plain": times["plain"].median(),
                    "reference": times["reference"].median(),
                    "speedup_over_plain": speedup,
                    "allowed_speedup": allowed,
                    "share_of_speedup": speedup / allowed,
                    "share_of_saving": (1 - 1 / speedup) / (1 - 1 / allowed),
                    "speedup_over_reference": float((times["reference"] / times["landscape"]).median()),
                }
            )
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> pd.DataFrame:
    """Run the benchmark; write landscape.csv, landscape_summary.csv and a manifest. Returns the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few responses and thetas: does it run?")
    parser.add_argument("--out", type=Path, default=Path("artifacts/benchmarks"))
    chosen = parser.parse_args(arguments)
    size = SMOKE if chosen.smoke else FULL
    table = pd.DataFrame([row for adapter in ("steering-vector", "rank-1") for row in measure(adapter, size)])
    result = summary(table)
    for name, frame in (("landscape", table), ("landscape_summary", result)):
        with atomic_path(chosen.out / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False)
    content = {"benchmark": "landscape", "size": vars(size), "shape": SHAPE, "threads": torch.get_num_threads()}
    write_manifest(chosen.out / "landscape_manifest.json", content)
    print(result.to_string(index=False))
    return result


if __name__ == "__main__":
    main()
