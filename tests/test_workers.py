"""Tasks over processes: what a dead worker costs, that nothing outlives the run, and the same on Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest

from analyses.suite import Suite
from analyses.tasks import Task, Workers
from em_interp.errors import MemoryLimitError, OutputError, UsageError
from tests.light_tasks import Notes, dies, dies_while_it_sends, fails, full, noted, number


@pytest.fixture
def suite() -> Suite:
    return cast("Suite", Notes())


@pytest.mark.parametrize("backend", ["loky", pytest.param("ray", marks=pytest.mark.search)])
def test_a_dead_worker_costs_its_task(backend: str, suite: Suite, tmp_path: Path) -> None:
    if backend == "ray":
        pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    folders = [tmp_path / name for name in ("once", "always")]
    for folder in folders:
        folder.mkdir()
    once, always = (Task(f.name, dies, (f, n), 2.0, returns=True) for f, n in zip(folders, (1, 9), strict=True))
    others = [Task(f"number {i}", number, (i,), 3.0 - i, returns=True) for i in range(4)]
    dying = [] if backend == "ray" else [always]  # each death there costs a start of both actors
    with Workers(suite, tmp_path / "work", 2, backend) as pool:
        first = pool.run([*others, once])
        # a run of its own: beside `once`, it may be killed with it before it has begun
        first |= pool.run(dying)
        second = pool.run([Task("noted", noted, returns=True), Task("fails", fails), Task("full", full)])
    assert [first[task].value[0] for task in others] == list(range(4))
    assert os.getpid() not in {first[task].value[1] for task in others}
    assert first[once].value == "made" and first[once].failed is None
    if always in dying:
        assert isinstance(first[always].failed, MemoryLimitError)
        assert "died twice while it made always" in str(first[always].failed)
        assert len(list(folders[1].iterdir())) == 2
    of = {task.what: done for task, done in second.items()}
    assert of["noted"].value == "pocket" and [str(p) for p in of["noted"].problems] == ["a note of a worker"]
    assert of["fails"].value is None and of["fails"].failed is None
    assert isinstance(of["full"].failed, OutputError)
    assert suite.problems == [] and not (tmp_path / "work" / "running").exists()


def test_a_worker_that_dies_in_the_middle_of_a_result_holds_nobody_up(suite: Suite, tmp_path: Path) -> None:
    sending = Task("sending", dies_while_it_sends, (tmp_path,), 2.0, returns=True)
    others = [Task(f"number {i}", number, (i,), returns=True) for i in range(4)]
    with Workers(suite, tmp_path / "work", 2) as pool:
        found = pool.run([sending, *others])
    assert found[sending].value == "made" and [found[task].value[0] for task in others] == list(range(4))


HOLD = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
from analyses.tasks import Task, Workers
from tests.light_tasks import Notes, waits
folder = Path(sys.argv[1])
with Workers(Notes(), folder / "work", 2) as pool:
    pool.run([Task(str(i), waits, (folder, i)) for i in range(int(sys.argv[2]))])
"""


@pytest.mark.parametrize(("sign", "busy"), [(signal.SIGKILL, 2), (signal.SIGKILL, 1), (signal.SIGINT, 2)])
def test_nothing_outlives_the_run(sign: signal.Signals, busy: int, tmp_path: Path) -> None:
    """busy: how many of the two workers have a task."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), str(busy)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len([p for p in tmp_path.glob("pid-*") if p.read_text()]) < busy:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    if sign == signal.SIGINT:
        os.killpg(process.pid, sign)  # as a terminal does
    else:
        process.kill()
    process.wait()
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(process.pid)


def _alive(session: int) -> list[str]:
    """What still runs of a session: name and state of each process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = path.read_text().rpartition(")")
            state, _, _, of = rest.split()[:4]
            found += [f"{name}) {state}"] if int(of) == session and state != "Z" else []
    return found


def test_without_ray_the_extra_is_named(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"em_interp\[cluster\]"), Workers(suite, tmp_path, 2, "ray"):
        pass
