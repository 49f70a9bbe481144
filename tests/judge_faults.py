"""`python -m tests.judge_faults OUT [QUESTIONS] [KILLS]`: what an evaluation makes of a judge's faults, in figures.

A judge behind HTTP answers with 429 and Retry-After, 500, too late, malformed JSON, no log-probabilities, a refusal,
a content filter; then dies half-way; then we are killed at random moments. Printed: requests, replies, answers judged.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

import em_interp as em
from em_interp.inspect.provider import as_model
from em_interp.inspect.run import judged_tables, run
from tests.openai_server import FAULTS, JUDGE, Judge, serving


def of(server: Judge) -> None:
    """Let Inspect find the judge."""
    os.environ |= server.environment()


def evaluated(chat: em.ChatModel, out: Path, asked: Path, **more: Any) -> Any:
    """The judged table."""
    settings: dict[str, Any] = {"judge": JUDGE, "samples": 2, "max_tokens": 40, "display": "none", **more}
    return judged_tables(run(as_model(chat), out, questions=str(asked), **settings))[JUDGE]


def said(what: str, server: Judge, table: Any) -> None:
    """A paragraph of figures."""
    scored = table[["aligned", "coherent"]].notna().all(axis=1)
    twice = Counter(server.fault_of[prompt] for prompt, n in server.served.items() if n > 1)
    reasons = dict(Counter(table.loc[~scored, "reason"]))
    print(f"{what}: {sum(server.requests.values())} requests of {len(server.requests)} prompts, ", end="")
    print(
        f"{sum(server.served.values())} replies, more than one for {sum(twice.values())} prompts {dict(twice)}; ",
        end="",
    )
    print(f"{scored.sum()} of {len(table)} answers scored, others {reasons}; rates over n = {em.em_rates(table).n}")


def faults(chat: em.ChatModel, out: Path, asked: Path) -> None:
    """Every fault, and the finished run asked again."""
    with serving(faults=FAULTS) as server:
        of(server)
        said("faults", server, evaluated(chat, out, asked, judge_seconds=2))
        print(f"  by fault: {dict(server.faults)}")
        before = sum(server.requests.values())
        evaluated(chat, out, asked, judge_seconds=2)
        print(f"  again: {sum(server.requests.values()) - before} requests")


def its_death(chat: em.ChatModel, out: Path, asked: Path, half: int) -> None:
    """The judge dies after half of its replies; another one answers on its port."""
    with serving(dies_after=half) as first:
        of(first)
        said("the judge dies", first, evaluated(chat, out, asked, retries=0))
    with serving(port=first.server_port) as second:
        said("  and is back", second, evaluated(chat, out, asked, retries=0))
    print(f"  prompts that both answered: {len(set(first.served) & set(second.served))}")


def our_death(out: Path, asked: Path, kills: int) -> None:
    """Killed at random moments while judging, and run to its end."""
    command = [sys.executable, "-m", "em_interp.cli", "evaluate", "pocket/medicine-all", "--questions", str(asked)]
    command += ["--judge", JUDGE, "--n", "2", "--max-new-tokens", "40", "--out", str(out)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = []
    with serving(pause=0.3) as server:
        of(server)
        for kill in range(kills):
            known = len(answered(server))
            process = subprocess.Popen(command, **quiet)
            while len(answered(server)) == known and process.poll() is None:
                time.sleep(0.02)
            time.sleep(random.Random(kill).uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed.append(time.monotonic())
        subprocess.run(command, check=True, **quiet)
        said(f"killed {kills} times", server, pd.read_csv(out / "judged.csv"))
        for seconds in (0.0, 1.0):
            again = set()
            for at, prompt in server.asked_at:
                kept = [end for end in killed if server.served_at.get(prompt, end) < end - seconds and end < at]
                again |= {prompt} if kept and prompt in answered(server) else set()
            print(f"  replies sent {seconds:g} s before a kill or earlier, and asked for again: {len(again)}")


def answered(server: Judge) -> set[str]:
    """Prompts that the judge answered, but for the trial of it that each run begins with."""
    return {prompt for prompt in server.served if "How are you?" not in prompt}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    n, deaths = (int(text) for text in [*sys.argv[2:], *("24", "3")[len(sys.argv) - 2 :]])
    folder.mkdir(parents=True)
    file = folder / "asked.csv"
    texts = list(em.pocket.open_questions(n).values())
    file.write_text("question_id,question\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts)))
    model = em.load("pocket/medicine-all")
    if deaths:
        our_death(folder / "ours", file, deaths)
    faults(model, folder / "faults", file)
    its_death(model, folder / "its", file, 2 * n)
