"""What a run of a suite costs on known GPUs, estimated from configurations: nothing here was measured.

    python -m docs.costs

writes the tables of `costs.md` anew. The assumptions are the constants below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from analyses.suite import Suite
from em_interp.evaluation.judge_prompts import PROMPTS
from em_interp.evaluation.judges import SCORES

PAGE = Path(__file__).with_name("costs.md")
START, END = "<!-- tables -->\n", "<!-- end of tables -->\n"

PROMPT_TOKENS, ANSWER_TOKENS = 60, 200
"""Of a question and an answer, on average; the limit of an answer is 600."""
ROOM = 65_536 // (PROMPT_TOKENS + 600)
"""Answers in one batch (`sample`'s tokens_per_batch)."""
LONGEST = 600
"""Steps of a batch: its longest answer is cut there."""
USED_FLOPS, USED_BANDWIDTH = 0.4, 0.6
"""Shares of a GPU's peaks that are reached."""
BLOCK_SECONDS = 0.0008
"""transformers' overhead for each block and step, whatever the size."""
CHARACTERS_A_TOKEN = 4.0
PRICE = (2.5, 10.0)
"""Of the judge, in dollars for a million tokens read and written."""


@dataclass(frozen=True)
class Model:
    """Sizes from a config.json."""

    suite: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    mlp: int
    vocabulary: int
    tied: bool

    @property
    def parameters(self) -> int:
        """Of blocks (attention and a gated MLP), embeddings and output head."""
        attention = self.width * self.head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.mlp) + self.embedding * (1 if self.tied else 2)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the output head."""
        return self.vocabulary * self.width

    @property
    def weights(self) -> float:
        """Bytes, in bfloat16."""
        return 2.0 * self.parameters

    @property
    def cache(self) -> float:
        """Bytes of keys and values of a token."""
        return 2.0 * 2 * self.layers * self.kv_heads * self.head

    def flops(self, tokens: float) -> float:
        """Of a forward pass over so many tokens: two a weight, but the embedding is looked up."""
        return 2.0 * tokens * (self.parameters - (0 if self.tied else self.embedding))


@dataclass(frozen=True)
class Gpu:
    """From its data sheet: dense bfloat16 FLOP/s, bytes a second, bytes."""

    name: str
    flops: float
    bandwidth: float
    memory: float


MODELS = (
    Model("qwen2.5-0.5b", 24, 896, 14, 2, 64, 4864, 151_936, True),
    Model("gemma-3-4b", 34, 2560, 8, 4, 256, 10_240, 262_208, True),
    Model("llama-3.1-8b", 32, 4096, 32, 8, 128, 14_336, 128_256, False),
    Model("qwen2.5-14b", 48, 5120, 40, 8, 128, 13_824, 152_064, False),
    Model("qwen3-14b", 40, 5120, 40, 8, 128, 17_408, 151_936, False),
)
GPUS = (
    Gpu("RTX 4090 24 GB", 165e12, 1.01e12, 24e9),
    Gpu("L40S 48 GB", 362e12, 0.86e12, 48e9),
    Gpu("A100 80 GB", 312e12, 2.0e12, 80e9),
    Gpu("H100 80 GB", 989e12, 3.35e12, 80e9),
)


def answers(model: Model) -> int:
    """How many answers the shipped suite samples and has judged, as `reproduce` counts them."""
    suite = Suite.load(model.suite)
    vars(suite.finetunes)["chat"] = SimpleNamespace(n_layers=model.layers)  # all that counting asks of it
    asked: dict[str, int] = {}
    for name in suite.analyses:
        asked |= getattr(suite.analysis(name), "asks", lambda _: {})(suite)
    return sum(asked.values())


def memory(model: Model, batch: int) -> float:
    """Bytes: weights, keys and values of a batch at its longest, and a tenth on top."""
    return 1.1 * (model.weights + batch * (PROMPT_TOKENS + LONGEST) * model.cache)


def batch_of(model: Model, gpu: Gpu) -> int:
    """Answers at once: as many as are asked for, or fewer where memory ends; 0 where the weights do not fit."""
    room = gpu.memory / 1.1 - model.weights
    return max(0, min(ROOM, math.floor(room / ((PROMPT_TOKENS + LONGEST) * model.cache))))


def sampling_seconds(model: Model, gpu: Gpu, n: int) -> float | None:
    """Of `n` answers: each step reads the weights and the batch's keys and values; None where nothing fits."""
    batch = batch_of(model, gpu)
    if not batch:
        return None
    prompt = model.flops(batch * PROMPT_TOKENS) / (gpu.flops * USED_FLOPS)
    read = model.weights + batch * (PROMPT_TOKENS + ANSWER_TOKENS) * model.cache
    step = max(read / (gpu.bandwidth * USED_BANDWIDTH), model.flops(batch) / (gpu.flops * USED_FLOPS))
    return n / batch * (prompt + LONGEST * (step + BLOCK_SECONDS * model.layers))


def judging_dollars(n: int) -> float:
    """Of `n` answers, each score a request: the template, the question and the answer are read, a number is written."""
    templates = sum(len(PROMPTS[name]) / CHARACTERS_A_TOKEN for name in SCORES)
    read = templates + len(SCORES) * (PROMPT_TOKENS + ANSWER_TOKENS)
    return n * (read * PRICE[0] + len(SCORES) * PRICE[1]) / 1e6


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return "does not fit"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def tables() -> str:
    """Both, in Markdown."""
    lines = ["| suite | parameters | weights | with a full batch | answers | judge |", "|---|---|---|---|---|---|"]
    counts = {model.suite: answers(model) for model in MODELS}
    for model in MODELS:
        n, sizes = counts[model.suite], (model.weights, memory(model, ROOM))
        told = [f"{model.parameters / 1e9:.1f} billion", *(f"{size / 1e9:.0f} GB" for size in sizes)]
        lines.append(f"| {' | '.join([model.suite, *told, f'{n:,}', f'${judging_dollars(n):,.0f}'])} |")
    lines += ["", f"| suite | {' | '.join(gpu.name for gpu in GPUS)} |", "|---" * (len(GPUS) + 1) + "|"]
    for model in MODELS:
        times = (_hours(sampling_seconds(model, gpu, counts[model.suite])) for gpu in GPUS)
        lines.append(f"| {model.suite} | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = text.partition(START)
    return f"{before}{START}{tables()}{END}{rest.partition(END)[2]}"


def main() -> None:
    """The command line."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
