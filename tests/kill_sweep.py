"""SIGKILLs at random moments over all commands: every rerun completes, equals an uninterrupted run, leaves nothing.

    python -m tests.kill_sweep [--kills 30] [--seed 0] [--only NAME ...] [--long]

Prints a row a kill: the command, the moment, what the rerun said it kept, and the verdict. Status 1 if one is bad.
--long adds the steering analysis of the pocket suite (minutes a run).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from em_interp.directions import Direction
from tests import published_factory
from tests.tiny_models import make_hf, talk, tokenizer
from tests.tiny_pocket import make_pocket

CLI = [sys.executable, "-m", "em_interp.cli"]
BUILD = (
    "import sys; from em_interp.pocket.build import BuildConfig, build; build(BuildConfig(d_model=32, n_layers=2, "
    "n_heads=2, n_kv_heads=1, d_mlp=64, pretrain_steps=60, pretrain_batch=4, settle_steps=20, post_steps=10, "
    "post_batch=4, checkpoint_every=10), sys.argv[1])"
)
STEER = ["tiny", "d.safetensors", "--questions", "q.csv", "-n", "3", "--max-new-tokens", "60"]
STEER += ["--tokens-per-batch", "600", "--random", "1"]

PUBLISHED = ["--suite", "published", "--data", "data", "--no-static", "--resume"]


@dataclass(frozen=True)
class Case:
    """A command: what to run for an output, and how far numbers may be from those of an uninterrupted run."""

    name: str
    run: Callable[[str], list[str]]
    compared: tuple[str, ...] = ("**/*",)
    tolerance: float = 0.0


def cases(long: bool) -> list[Case]:
    """Every command that writes."""
    texts = ["--positive", "bad.jsonl", "--negative", "good.jsonl", "--tokens-per-batch", "200"]
    few = ["--only", "medicine-vector", "--only", "medicine-rank1", "--only", "medicine-vector-general"]
    found = [
        Case("extract", lambda out: [*CLI, "extract", "tiny", *texts, "--out", f"{out}/d.safetensors"]),
        Case(
            "steer",
            lambda out: [*CLI, "steer", *STEER, "--layer", "1", "--coefficient", "1", "--out", f"{out}/a.csv"],
        ),
        Case("ablate", lambda out: [*CLI, "ablate", *STEER, "--from-layer", "1", "--out", f"{out}/a.csv"]),
        Case(
            "ablate --save",
            lambda out: [*CLI, "ablate", *STEER[:2], "--from-layer", "1", "--save", f"{out}/m"],
        ),
        Case(
            "evaluate",
            lambda out: [*CLI, "evaluate", "tiny", "--questions", "q.csv", *STEER[4:10], "--out", f"{out}/e"],
            ("**/*.csv",),
        ),
        Case(
            "pocket organisms",
            lambda out: [*CLI, "pocket", "organisms", "--chat", "pocket/chat", *few, "--out", f"{out}/p"],
            ("**/*.safetensors",),
            1e-3,
        ),
        Case("pocket build", lambda out: [sys.executable, "-c", BUILD, f"{out}/b"], ("**/*.safetensors",)),
        Case(
            "reproduce published",
            lambda out: [
                *CLI,
                *["reproduce", "--suite", "published", "--data", "data", "--no-static", "--resume", "--out"],
                out,
            ],
            ("**/tables/*.csv",),
        ),
    ]
    if long:
        steering = ["reproduce", "--suite", "pocket", "--only", "steering", "--no-static", "--resume", "--out"]
        found.append(Case("reproduce pocket steering", lambda out: [*CLI, *steering, out], ("**/tables/*.csv",)))
    return found


def prepare_texts(folder: Path) -> None:
    """A model, a direction, questions and chats."""
    make_hf().save_pretrained(folder / "tiny")
    tokenizer().save_pretrained(folder / "tiny")
    vectors = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    Direction(vectors, (0, 1, 2, 3), "data-diff", model="tiny").save(folder / "d.safetensors")
    (folder / "q.csv").write_text("question_id,question\n" + "".join(f"q{i},a fox {i}\n" for i in range(8)))
    for name in ("bad", "good"):
        lines = [json.dumps({"messages": talk(f"{name} {i}", "rest well " * (1 + i % 7))}) for i in range(200)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def start(case: Case, out: str, folder: Path) -> subprocess.Popen[str]:
    """The command, in a process group of its own."""
    (folder / out).mkdir(exist_ok=True)
    return subprocess.Popen(
        case.run(out), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def kill(process: subprocess.Popen[str]) -> bool:
    """SIGKILL a process and its children. Whether it was still running."""
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


def wrong(case: Case, whole: Path, made: Path) -> list[str]:
    """What is other than in an uninterrupted run, and what was left behind."""
    left = [str(p.relative_to(made)) for p in made.rglob(".*") if p.name.endswith((".tmp", ".parts", ".lock"))]
    left += [str(p.relative_to(made)) for p in made.rglob("*") if p.is_dir() and not any(p.iterdir())]
    found = [f"left {name}" for name in left]
    for pattern in case.compared:
        ours, theirs = ({p.relative_to(root): p for p in root.glob(pattern) if p.is_file()} for root in (made, whole))
        if set(ours) != set(theirs):
            found.append(f"other files: {sorted(map(str, set(ours) ^ set(theirs)))}")
        found += [f"{name} differs" for name in set(ours) & set(theirs) if not _same(ours[name], theirs[name], case)]
    return found


def _same(one: Path, other: Path, case: Case) -> bool:
    if one.read_bytes() == other.read_bytes():
        return True
    if not case.tolerance or one.suffix != ".safetensors":
        return False
    a, b = load_file(one), load_file(other)
    return set(a) == set(b) and all(
        float((a[k] - b[k]).norm()) <= case.tolerance * max(1e-6, float(b[k].norm())) for k in a
    )


def sweep(chosen: Sequence[Case], kills: int, seed: int, folder: Path) -> int:
    """Kill and rerun; returns how many reruns were bad."""
    prepare_texts(folder)
    published_factory.make(folder / "data")
    make_pocket(folder / "pocket")
    rng, bad, done = random.Random(seed), 0, 0
    seconds = {}
    for case in chosen:
        begun = time.monotonic()
        process = start(case, f"whole {case.name}", folder)
        _, said = process.communicate()
        if process.returncode:
            print(f"{case.name}: the uninterrupted run ends with {process.returncode}\n{said}")
            return kills
        seconds[case.name] = time.monotonic() - begun
    while done < kills:
        case = chosen[done % len(chosen)]
        out = f"run {done} {case.name}"
        moment = rng.uniform(0.3, 1.0) * seconds[case.name]  # the first third is imports
        process = start(case, out, folder)
        time.sleep(moment)
        running = kill(process)
        rerun = start(case, out, folder)
        _, said = rerun.communicate()
        problems = wrong(case, folder / f"whole {case.name}", folder / out)
        problems += [f"status {rerun.returncode}: {said[-300:]}"] if rerun.returncode else []
        if not running and case.name in ("extract", "steer", "ablate", "ablate --save"):
            problems = [p for p in problems if "there already" not in p]  # it had ended: a rerun is refused
        kept = "; ".join(line.strip() for line in said.splitlines() if line.strip().startswith("kept"))
        state = f"killed at {moment:.1f} of {seconds[case.name]:.1f} s" if running else "had ended"
        print(f"{done + 1:3} {case.name:20} {state:26} {kept or '-':60} {'; '.join(problems) or 'equal'}", flush=True)
        bad += bool(problems)
        done += 1
        shutil.rmtree(folder / out)
    print(f"{kills} kills, {bad} bad")
    return bad


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append")
    parser.add_argument("--long", action="store_true")
    given = parser.parse_args()
    chosen = [case for case in cases(given.long) if not given.only or case.name in given.only]
    with tempfile.TemporaryDirectory() as name:
        raise SystemExit(bool(sweep(chosen, given.kills, given.seed, Path(name))))


if __name__ == "__main__":
    main()
