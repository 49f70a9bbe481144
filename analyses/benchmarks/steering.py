"""Steered generation: a sweep in one `generate` beside separate runs, and steered beside unsteered.

`python -m analyses.benchmarks.steering --out artifacts/benchmarks`: every method in every round, in rotating order,
after a warm-up, all through this package's seeded sampler with a KV cache. The steered arm of the second comparison
adds a vector too small to change a token, so that both generate the same text. Answers are compared, not only timed.
What one `generate` saves depends on how many answers a single run has: little, once those alone keep the machine busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import pandas as pd
import torch
import typer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Qwen2ForCausalLM

from em_interp.directions.direction import Direction
from em_interp.errors import UsageError
from em_interp.evaluation.sampling import sample
from em_interp.files.atomic import atomic_path, make_folder
from em_interp.files.manifest import write_manifest
from em_interp.interventions.intervening import intervening
from em_interp.interventions.steering import Steer, residual_norms, sweep
from em_interp.models import pretrained as models
from em_interp.models.architectures import find_blocks
from em_interp.models.chat_model import ChatModel
from em_interp.pocket import models as loading
from em_interp.pocket import registry
from em_interp.pocket.stages import BuildConfig, model_config
from em_interp.pocket.world import grammar as world
from em_interp.pocket.world.tokenizer import build_tokenizer

SHARES: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""The eight coefficients, in units of the typical residual norm."""
FAINT: Final = 1e-7
COMPARISONS: Final = {"sweep": ("one generate", "separate runs"), "generation": ("steered", "unsteered", "plain hook")}


@dataclass(frozen=True)
class Work:
    """What every method does."""

    model: ChatModel
    direction: Direction
    layer: int
    questions: dict[str, str]
    n: int
    max_new_tokens: int

    def answers(self) -> pd.DataFrame:
        """n answers a question from the model as it is now."""
        return sample(self.model, self.questions, self.n, max_new_tokens=self.max_new_tokens, progress=False)


def _one_generate(work: Work) -> pd.DataFrame:
    return sweep(
        work.model,
        work.direction,
        work.questions,
        layers=[work.layer],
        coefficients=SHARES,
        units="residual",
        n=work.n,
        random_arms=0,
        max_new_tokens=work.max_new_tokens,
        progress=False,
    )


def _separate_runs(work: Work) -> pd.DataFrame:
    norm = residual_norms(work.model, work.questions, [work.layer])[work.layer]
    tables = []
    for share in SHARES:
        with intervening(work.model, [Steer.of_residual(work.direction, work.layer, share, norm)]):
            tables.append(work.answers())
    return pd.concat(tables, ignore_index=True)


def _steered(work: Work) -> pd.DataFrame:
    with intervening(work.model, [Steer(work.direction, work.layer, FAINT)]):
        return work.answers()


def _plain_hook(work: Work) -> pd.DataFrame:
    with _added(find_blocks(work.model.hf)[work.layer], FAINT * work.direction.at(work.layer).to(work.model.device)):
        return work.answers()


@contextmanager
def _added(block: nn.Module, vector: Tensor) -> Iterator[None]:
    """The least that steering can be: one addition in a forward hook, for blocks that return a tensor."""
    handle = block.register_forward_hook(lambda _module, _args, output: output + vector)
    try:
        yield
    finally:
        handle.remove()


METHODS: Final[dict[str, Callable[[Work], pd.DataFrame]]] = {
    "one generate": _one_generate,
    "separate runs": _separate_runs,
    "steered": _steered,
    "unsteered": Work.answers,
    "plain hook": _plain_hook,
}


def measure(work: Work, rounds: int) -> pd.DataFrame:
    """One row a method and round: comparison, method, round, seconds, answers, tokens, tokens_per_second.

    Raises UsageError where methods that must agree give other answers in more than one of fifty (rounding at a tie).
    """
    rows = []
    texts: dict[str, list[str]] = {}
    names = [(comparison, name) for comparison, all_of_it in COMPARISONS.items() for name in all_of_it]
    for turn in tqdm(range(rounds + 1), desc="rounds"):  # round 0 warms up
        for comparison, name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = time.perf_counter()
            table = METHODS[name](work)
            seconds = time.perf_counter() - begun
            texts[name] = list(table["answer"])
            if turn:
                tokens = int(table["n_tokens"].sum())
                cell = {"comparison": comparison, "method": name, "round": turn, "seconds": seconds}
                rows.append({**cell, "answers": len(table), "tokens": tokens, "tokens_per_second": tokens / seconds})
    for first, second in (("one generate", "separate runs"), ("steered", "unsteered"), ("plain hook", "unsteered")):
        different = sum(a != b for a, b in zip(texts[first], texts[second], strict=True)) / len(texts[first])
        if different > 0.02:
            raise UsageError(f"{first} and {second} differ in {different:.0%} of their answers: times say nothing.")
    return pd.DataFrame(rows)


def ratios(table: pd.DataFrame) -> dict[str, float]:
    """The two figures that are asked for, each the median over rounds of the ratio within a round."""
    seconds = table.pivot(index="round", columns="method", values="seconds")
    return {
        "sweep_over_separate_seconds": float((seconds["one generate"] / seconds["separate runs"]).median()),
        "steered_over_unsteered_speed": float((seconds["unsteered"] / seconds["steered"]).median()),
        "plain_hook_over_unsteered_speed": float((seconds["unsteered"] / seconds["plain hook"]).median()),
    }


def random_model(seed: int = 0) -> ChatModel:
    """An untrained model with the pocket chat model's sizes and tokenizer, where no weights are at hand."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    hf = Qwen2ForCausalLM(model_config(BuildConfig(), tokenizer)).eval()
    return ChatModel(hf, tokenizer, name="random-pocket")


def make_work(model: ChatModel, n_questions: int, n: int, max_new_tokens: int, seed: int = 0) -> Work:
    """Open questions of the pocket world, and a random direction at the middle layer."""
    questions = {q.id: q.text for q in world.questions("open")[:n_questions]}
    layer = model.n_layers // 2
    vector = torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(seed))
    return Work(model, Direction(vector, (layer,), "random", model=model.name), layer, questions, n, max_new_tokens)


def main(
    out: Annotated[Path, typer.Option(help="folder for steering.csv and steering_manifest.json")],
    model: Annotated[str, typer.Option(help="a pocket model, folder or hub name; or 'random'")] = "pocket/chat",
    questions: Annotated[int, typer.Option(help="number of questions")] = 8,
    samples: Annotated[
        list[int] | None, typer.Option("-n", "--samples", help="answers a question; may be repeated; default 1 and 8")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 80,
    rounds: Annotated[int, typer.Option(help="rounds after the warm-up")] = 5,
    threads: Annotated[int, typer.Option(help="of torch on the CPU")] = 1,
) -> None:
    """Measure, and write the table and a manifest."""
    if rounds < 1 or questions < 1:
        raise UsageError(f"{rounds} rounds of {questions} questions measure nothing: give at least one of each.")
    make_folder(out)
    torch.set_num_threads(threads)
    if model == "random":
        chat = random_model()
    else:
        chat = loading.load(model) if registry.is_pocket_name(model) else models.load(model)
    tables, found = [], {}
    for n in samples or (1, 8):
        work = make_work(chat, questions, n, max_new_tokens)
        table = measure(work, rounds)
        answers = n * len(work.questions)
        found[f"{answers} answers a run"] = ratios(table)
        tables.append(table.assign(answers_per_run=answers))
    table = pd.concat(tables, ignore_index=True)
    with atomic_path(out / "steering.csv") as temporary:
        table.to_csv(temporary, index=False)
    settings = {
        "model": chat.name,
        "layers": chat.n_layers,
        "d_model": chat.d_model,
        "dtype": str(chat.dtype),
        "device": str(chat.device),
        "threads": threads,
        "questions": len(work.questions),
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "shares_of_residual_norm": SHARES,
    }
    write_manifest(out / "steering_manifest.json", {"settings": settings, "ratios": found})
    for size, values in found.items():
        typer.echo(f"{size}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))


if __name__ == "__main__":
    typer.run(main)
