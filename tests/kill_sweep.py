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
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from em_interp.directions.direction import Direction
from tests import published_factory
from tests.tiny_models import make_hf, save_chat, talk
from tests.tiny_pocket import make_pocket

CLI = [sys.executable, "-m", "em_interp.cli"]
BUILD = (
    "import sys; from em_interp.pocket.build import build; from em_interp.pocket.stages import BuildConfig; "
    "build(BuildConfig(d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_mlp=64, "
    "pretrain_steps=60, pretrain_batch=4, settle_steps=20, post_steps=10, "
    "post_batch=4, checkpoint_every=10), sys.argv[1])"
)
STEER = ["tiny", "d.safetensors", "--questions", "q.csv", "-n", "3", "--max-new-tokens", "60"]
STEER += ["--tokens-per-batch", "600", "--random", "1"]

RESUME = ["--no-static", "--resume", "--out"]
PARTS = [word for name in ("em_rates", "efficiency") for word in ("--only", name)]
PARTS += ["--workers", "2"]
SMALL = """
from dataclasses import replace
import sys
from pathlib import Path
import pytest
from em_interp import cli
from em_interp.pocket import models as loading, organisms, registry, sweeps
from tests.tiny_pocket import ask_little
ask_little(pytest.MonkeyPatch(), per_group=2, tokens=12)
registry.root = lambda: Path("pocket")
organisms.SPECS = {a: replace(s, max_steps=30, batch_size=4) for a, s in organisms.SPECS.items()}
sweeps.KL_WEIGHTS, sweeps.BAD_SHARES = (0.0, 1.0), (0.5,)
"""
"""The pocket commands as they are, on the pocket model of a few steps, with few questions and short runs."""
SMALL_CLI = [sys.executable, "-c", SMALL + "sys.argv[0] = 'em-interp'\ncli.main()"]
SMALL_ORGANISMS = (
    SMALL + "chat = loading.load_chat(Path('pocket/chat'))\nfor adapter in ('rank-1', 'all-modules'):\n"
    "    for kind in ('general', 'narrow'):\n"
    "        organisms.make(organisms.Organism('medicine', adapter, kind), chat, Path('pocket/organisms'))"
)
FETCH = """
import sys
from pathlib import Path
from em_interp.published.fetch import Source, fetch
source = Source("release", Path("release").absolute().as_uri(), "git", "all", ("*",))
(got,) = fetch(Path(sys.argv[1]), sources=[source])
print("kept" if got.detail.startswith("already") else got, file=sys.stderr)
sys.exit(not got.ok)
"""
"""`fetch` from a repository that is here."""


@dataclass(frozen=True)
class Case:
    """A command: what to run for an output, and how far numbers may be from those of an uninterrupted run."""

    name: str
    run: Callable[[str], list[str]]
    compared: tuple[str, ...] = ("**/*",)
    tolerance: float = 0.0
    victim: str = "group"
    """Who is killed: the group of processes, the main one alone, or one worker, after which the run goes on."""


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
        Case(
            "evaluate --suite",
            lambda out: [*SMALL_CLI, "evaluate", "--suite", "pocket", "--n", "3", "--out", f"{out}/e"],
            ("**/*.csv",),
        ),
        Case(
            "pocket sweeps",
            lambda out: [
                *[*SMALL_CLI, "pocket", "sweeps", "--chat", "pocket/chat", "--adapter", "rank-1", "--samples", "1"],
                *["--out", f"{out}/p"],
            ],
            ("**/*.csv",),
            1e-3,
        ),
        Case(
            "pocket pairs",
            lambda out: [
                *[*SMALL_CLI, "pocket", "pairs", "--only", "nine", "--domain", "sports", "--task", "persona"],
                *["--seeds", "0", "--n", "1", "--out", f"{out}/p"],
            ],
            ("**/pairs.csv", "**/*.safetensors"),
            1e-3,
        ),
        Case("fetch", lambda out: [sys.executable, "-c", FETCH, f"{out}/f"], ("**/runs/**/*", "**/judged/**/*")),
        Case("pocket build", lambda out: [sys.executable, "-c", BUILD, f"{out}/b"], ("**/*.safetensors",)),
        Case(
            "reproduce published",
            lambda out: [*CLI, "reproduce", "--suite", "published", "--data", "data", *RESUME, out],
            ("**/tables/*.csv",),
        ),
        *(
            Case(
                f"reproduce pocket{name}",
                lambda out: [*CLI, "reproduce", "--suite", "pocket", "--data", "pocket", *PARTS, *RESUME, out],
                ("**/tables/*.csv",),
                victim=victim,
            )
            for name, victim in (("", "group"), (", main", "main"), (", worker", "worker"))
        ),
    ]
    if long:
        steering = ["reproduce", "--suite", "pocket", "--only", "steering", *RESUME]
        found.append(Case("reproduce steering", lambda out: [*CLI, *steering, out], ("**/tables/*.csv",)))
    return found


def prepare_texts(folder: Path) -> None:
    """A model, a direction, questions and chats."""
    save_chat(make_hf(), folder / "tiny")
    vectors = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    Direction(vectors, (0, 1, 2, 3), "data-diff", model="tiny").save(folder / "d.safetensors")
    (folder / "q.csv").write_text("question_id,question\n" + "".join(f"q{i},a fox {i}\n" for i in range(8)))
    for name in ("bad", "good"):
        lines = [json.dumps({"messages": talk(f"{name} {i}", "rest well " * (1 + i % 7))}) for i in range(200)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def small_organisms(folder: Path) -> None:
    """A few organisms of the pocket model that lies there."""
    subprocess.run([sys.executable, "-c", SMALL_ORGANISMS], cwd=folder, check=True, capture_output=True)


def repository(folder: Path) -> None:
    """A git repository to fetch from."""
    shutil.copytree(folder / "data", folder / "release")
    git = ["git", "-C", str(folder / "release"), "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init"], ["config", "uploadpack.allowFilter", "true"], ["add", "."], ["commit", "-m", "x"]):
        subprocess.run([*git, *words], check=True, capture_output=True)


def start(case: Case, out: str, folder: Path) -> subprocess.Popen[str]:
    """The command, in a process group of its own."""
    (folder / out).mkdir(exist_ok=True)
    return subprocess.Popen(
        case.run(out), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The pids of a command's workers."""
    lines = [(p, p.read_bytes()) for p in Path("/proc").glob("[0-9]*/cmdline") if _parent(p.parent) == process.pid]
    return sorted(int(p.parent.name) for p, line in lines if b"popen_loky" in line)


def _parent(process: Path) -> int | None:
    """The parent of a process, unless it is dead."""
    try:
        state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
        return None if state == "Z" else int(parent)
    except OSError:
        return None


def kill(process: subprocess.Popen[str], victim: str = "group", rng: random.Random | None = None) -> bool:
    """SIGKILL a process and its children, or one of them. Whether it was still running.

    Raises AssertionError where a worker outlives the main process. After a worker is killed, the command goes on.
    """
    running = process.poll() is None
    there = workers(process)
    if running and victim == "worker":
        chosen = there or [process.pid]
        os.kill((rng or random.Random(0)).choice(chosen), signal.SIGKILL)
        if there:
            return True
    elif running and victim == "main":
        process.kill()
    elif running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    until = time.monotonic() + 10
    while left := [pid for pid in there if _parent(Path(f"/proc/{pid}")) is not None]:
        assert time.monotonic() < until, f"workers {left} outlive the run"
        time.sleep(0.05)
    return running


def finished(out: Path) -> list[str]:
    """The files of a killed run that hold finished work, which the rerun has to keep and to say so.

    Batches and checkpoints in `.parts`, an analysis once its `.state` is written, and weights.
    """
    files = [p.relative_to(out) for p in out.rglob("*") if p.is_file() and p.stat().st_size]
    return [
        str(p)
        for p in files
        if (p.suffix == ".safetensors" or any(part == ".state" or part.endswith(".parts") for part in p.parts))
        and p.name != "made_from.json"
        and not any(part.endswith(".tmp") for part in p.parts)
    ]


def wrong(case: Case, whole: Path, made: Path) -> list[str]:
    """What is other than in an uninterrupted run, and what was left behind."""
    left = [str(p.relative_to(made)) for p in made.rglob("*") if re.search(r"\.(tmp|parts|partial|lock)\b", p.name)]
    empty = [p.relative_to(made) for p in made.rglob("*") if p.is_dir() and not any(p.iterdir())]
    left += [str(p) for p in empty if not (whole / p).is_dir()]
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
    if case.tolerance and one.name == "pairs.csv":  # measures of weights, which are near and not equal
        ours, theirs = (pd.read_csv(path, keep_default_na=False, na_values={"value": [""]}) for path in (one, other))
        near = bool(np.allclose(ours["value"], theirs["value"], case.tolerance, 1e-6, equal_nan=True))
        return near and ours.drop(columns="value").equals(theirs.drop(columns="value"))
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
    small_organisms(folder)
    repository(folder)
    rng, bad, seconds = random.Random(seed), 0, {}
    for case in chosen:
        begun = time.monotonic()
        process = start(case, f"whole {case.name}", folder)
        printed, said = process.communicate()
        if process.returncode:
            print(f"{case.name}: the uninterrupted run ends with {process.returncode}\n{printed}{said}")
            return kills
        seconds[case.name] = time.monotonic() - begun
    for done in range(kills):
        case = chosen[done % len(chosen)]
        out, running = f"run {done} {case.name}", False
        moment = rng.uniform(0.3, 1.0) * seconds[case.name]  # the first third is imports
        kept_first = done // len(chosen) % 2 == 0  # every other time, as soon as something is kept and a while later
        while not running:
            shutil.rmtree(folder / out, ignore_errors=True)
            begun, process = time.monotonic(), start(case, out, folder)
            if kept_first:
                while process.poll() is None and not finished(folder / out):
                    time.sleep(0.01)
                moment = time.monotonic() - begun
                moment += rng.uniform(0.0, 0.5) * max(0.0, seconds[case.name] - moment)
            time.sleep(max(0.0, begun + moment - time.monotonic()))
            running = kill(process, case.victim, rng)
            moment *= 1.0 if running else 0.9  # it had ended
            kept_first = kept_first and running
        alive = process.poll() is None  # a worker died, and the run goes on
        there = [] if alive else finished(folder / out)
        rerun = process if alive else start(case, out, folder)
        printed, said = rerun.communicate()
        problems = wrong(case, folder / f"whole {case.name}", folder / out)
        lines = [line.strip() for line in said.splitlines() if line.strip().startswith("kept")]
        lines += [" ".join(line.split()) for line in printed.splitlines() if "reused" in line]
        refused = "is there already, and was left as it is" in said  # killed with the output in place: nothing to do
        if rerun.returncode and not refused:
            problems.append(f"status {rerun.returncode}: {said[-300:]}")
        if there and not refused and not lines:
            problems.append(f"does not say that it kept {there[:3]}")
        kept = "left as it was" if refused else "; ".join(lines) or "-"
        state = f"killed at {moment:.1f} of {seconds[case.name]:.1f} s"
        print(f"{done + 1:3} {case.name:20} {state:26} {kept[:90]:90} {'; '.join(problems) or 'equal'}", flush=True)
        bad += bool(problems)
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
