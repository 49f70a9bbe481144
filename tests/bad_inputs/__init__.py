"""A sweep of bad inputs over every command and the Python that newcomers write: `python -m tests.bad_inputs`.

Each has an expectation: refused, or valid and why. Counted are: typed (refused with one message), valid, untyped (a
traceback), wrongly accepted, wrongly refused, hung, lost (an input or an output that was there has changed), and left
behind (what is new in the folder after a refusal).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import pkgutil
import re
import select
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from em_interp.errors import EmInterpError

SECONDS = 60
REFUSED = "refused"


@dataclass(frozen=True)
class Case:
    """One input. `expected`: refused, or the reason why it is valid."""

    name: str
    run: Callable[[], object]
    expected: str = REFUSED


def command(*words: object) -> Callable[[], int]:
    """The command line, in this process. Returns its exit status."""

    def run() -> int:
        from em_interp.cli import main

        before, sys.argv = sys.argv, ["em-interp", *map(str, words)]
        try:
            main()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.argv = before
        return 0

    return run


def outcome(case: Case) -> tuple[str, str]:
    """What came of it, in a process of its own, which may hang or die; and what was said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with contextlib.suppress(BaseException), os.fdopen(writing, "w", encoding="utf-8") as pipe:
            json.dump(_tried(case), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        if not select.select([pipe], [], [], SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hung", ""
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    found, said = json.loads(answer) if answer else ("untyped", f"the process died: {status}")
    return found, said


def _import_all() -> None:
    """What each process would import for itself otherwise."""
    import peft  # noqa: F401

    import analyses
    import em_interp

    for package in (em_interp, analyses):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def _tried(case: Case) -> tuple[str, str]:
    import torch

    torch.set_num_threads(1)  # a fork has no other
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            status = case.run()
            accepted = status == 0 if isinstance(status, int) else True
    except EmInterpError as error:
        accepted = False
        said.write(str(error))
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if re.search("em_interp/|analyses/", f.filename)]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return "untyped", f"{type(error).__name__}: {str(error)[:100]!r} at {where}"
    text = re.sub(r"\s+", " ", said.getvalue()).strip()
    if "Traceback (most recent call last)" in text:
        return "untyped", text[-200:]
    if case.expected == REFUSED:
        return ("wrongly accepted" if accepted else "typed" if text else "untyped"), text[-200:]
    return ("valid" if accepted else "wrongly refused"), text[-200:]


def snapshot() -> dict[str, str]:
    """Everything below the working folder, with the content of files."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
        for path in sorted(Path().rglob("*"))
    }


def _meant(case: Case, found: Iterable[str]) -> set[str]:
    """The report of a suite that could use some of its input, and what a full disk leaves to go on from."""
    parts = {str(p) for name in found if ".parts" in name for p in (Path(name), *Path(name).parents)}
    reports = {name for name in found if name.split("/")[0] == "partly"}
    return reports | parts if "full disk" in case.name else reports


def _restore(held: dict[str, bytes], lost: list[str], new: Iterable[str]) -> None:
    """The folder as it was, for the next case."""
    for path in map(Path, (*lost, *new)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in lost:
        if name in held:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(held[name])


@contextlib.contextmanager
def prepared() -> Iterator[list[Case]]:
    """Inside, the working folder is one with good and bad files; every case. What the cases spoil works there."""
    from tests.bad_inputs import commands, python, suites, world

    back, folder = Path.cwd(), tempfile.mkdtemp()
    os.chdir(folder)
    try:
        world.make()
        cases = [*commands.cases(), *suites.cases(), *python.cases()]
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), "two cases are one"
        _import_all()
        for name in commands.FIXED:
            assert _tried(Case(name, command(*commands.working(name)), "right"))[0] == "valid", name
        yield cases
    finally:
        os.chdir(back)
        shutil.rmtree(folder)


def judged(case: Case) -> tuple[str, list[str]]:
    """What came of it, and a line for each thing that is wrong with that. The folder is then as it was."""
    before = snapshot()
    held = {name: Path(name).read_bytes() for name, content in before.items() if content}
    found, said = outcome(case)
    wrong = [] if found in ("typed", "valid") else [f"{found}: {case.name}: {said}"]
    after = snapshot()
    lost = [name for name in before if after.get(name) != before[name]]
    if lost:
        wrong.append(f"lost: {case.name}: {', '.join(lost[:3])}")
    if found != "valid" and (new := sorted(after.keys() - before.keys() - _meant(case, after))):
        wrong.append(f"left behind: {case.name}: {', '.join(new[:3])}")
    _restore(held, lost, after.keys() - before.keys())
    return found, wrong


def sweep(part: str = "", says: Callable[[str], None] = print) -> tuple[Counter[str], list[str]]:
    """Counts, and a line for each thing that is wrong. part: only cases with this in their names."""
    counts, wrong = Counter[str](), []
    with prepared() as cases:
        for case in cases:
            if part in case.name:
                found, lines = judged(case)
                says(f"{found}: {case.name}")
                counts.update([found, *(line.partition(":")[0] for line in lines if not line.startswith(found))])
                wrong += lines
    return counts, wrong
