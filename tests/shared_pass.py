"""What every process of a launch runs in `test_ranks`: python shared_pass.py FOLDER [the process that is killed]."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import em_interp as em
from em_interp.cli import main as command_line
from em_interp.directions.store import ActivationStore
from em_interp.files.tables import Parts
from tests.tiny_models import make_chat, talk

CHATS = [talk("a fox " * (1 + i % 5), "see the doctor " * (1 + i % 3)) for i in range(23)]
QUESTIONS = {f"q{i}": text for i, text in enumerate(("a fox", "see the doctor", "rest", "what should I do"))}


def kill_at_second_shard() -> None:
    written, write = [0], ActivationStore.write

    def once(self: ActivationStore, *given: object) -> None:
        if written[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        written[0] += 1
        write(self, *given)

    ActivationStore.write = once


def main(folder: Path, dies: str | None) -> None:
    torch.set_num_threads(1)
    model = make_chat("qwen2")
    with em.data_parallel() as ranks:
        if dies is not None and ranks.number == int(dies):
            kill_at_second_shard()
        (folder / f"parts-{ranks.number}").mkdir(parents=True, exist_ok=True)
        stored = em.collect(model, CHATS, store=folder / "store", tokens_per_batch=64, progress=False)
        kept = em.collect(model, CHATS, keep=True, scopes=("response", "prompt"), progress=False)
        running = em.collect(model, CHATS, resume_in=folder / f"parts-{ranks.number}", progress=False)
        few = em.collect(model, CHATS[:1], progress=False)
        vectors = em.Direction(
            torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), (0, 1, 2, 3), "random", model.name
        )
        parts = Parts(folder / f"parts-{ranks.number}")
        answers = em.sample(model, QUESTIONS, n=5, max_new_tokens=6, progress=False, parts=parts)
        swept = em.sweep(
            model, vectors, QUESTIONS, layers=[1], coefficients=[0, 2], n=2, max_new_tokens=6, progress=False
        )
        if ranks.is_first:
            means = {"stored": stored.mean(), "running": running.mean("response", "responses"), "few": few.mean()}
            each = {"each": stored.each("response", 2), "kept": kept.each("prompt", 1)}
            save_file(means | each, folder / "means.safetensors")
            answers.to_csv(folder / "answers.csv")
            swept.to_csv(folder / "swept.csv")
    steer(folder, model, vectors)


def steer(folder: Path, model: em.ChatModel, vectors: em.Direction) -> None:
    """The command, by every process of the launch."""
    if os.environ.get("RANK", "0") == "0":
        model.hf.save_pretrained(folder / "model")
        model.tokenizer.save_pretrained(folder / "model")
        vectors.save(folder / "d.safetensors")
        (folder / "questions.csv").write_text("question_id,question\na,a fox\nb,rest\n", encoding="utf-8")
    with em.data_parallel() as ranks:
        ranks.wait()
    given = (folder / "model", folder / "d.safetensors", "--questions", folder / "questions.csv", "--any-model")
    sizes = ("--layer", "1", "--coefficient", "2", "--n", "2", "--max-new-tokens", "5")
    sys.argv = ["em-interp", "steer", *map(str, given), *sizes, "--out", str(folder / "out" / "steered.csv")]
    command_line()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
