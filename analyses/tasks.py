"""Independent work over processes or a cluster, by joblib: loky on one machine, Ray on several."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from joblib import Parallel, delayed, parallel_config
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from analyses.progress import told, watched
from em_interp.arguments import one_of
from em_interp.errors import EmInterpError, MemoryLimitError, OutputError, UsageError
from em_interp.files.atomic import make_folder
from em_interp.files.manifest import fingerprint

if TYPE_CHECKING:  # a worker has no use for what no task of its needs
    from analyses.suite import Suite

BACKENDS: Final = ("loky", "ray")
_UNSEEN_SECONDS: Final = 2.0
"""Loky sees most deaths at once."""


@dataclass(frozen=True)
class Task:
    """`do(suite, *given)`, which leaves its result in the store of the suite, or returns one.

    `do` is a function of a module, so that another process finds it, and `given` can be pickled.
    """

    what: str
    do: Callable[..., object]
    given: tuple[Any, ...] = ()
    seconds: float = 1.0
    """About how long it takes: the longest are begun first."""
    stage: int = 0
    """It is begun when all tasks of lower stages are done, and finds their results in the store."""
    returns: bool = False
    """Whether it returns its result, rather than leave it in the store."""

    @property
    def key(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        """What tells it from other tasks: two analyses may need the same."""
        return self.do, self.given

    @property
    def mark(self) -> str:
        """The name of its file while it runs."""
        return fingerprint([self.do.__module__, self.do.__qualname__, repr(self.given)])[:24]


@dataclass(frozen=True)
class Done:
    """What came of a task."""

    value: Any = None
    problems: tuple[EmInterpError, ...] = ()
    """What the suite was told of on the way."""
    failed: EmInterpError | None = None
    """An output that cannot be written, or two workers that died while they did this task."""


class Workers:
    """Processes that do tasks, each with models of its own. A context manager: at its end they are gone.

    A worker that dies costs what it was doing, which is tried once more, alone. work: a folder, on a file system that
    all workers share.
    """

    def __init__(self, suite: Suite, work: Path, n: int, backend: str = "loky", *, total: int | None = None) -> None:
        self.suite, self.n, self.backend = replace(suite, problems=[]), n, backend
        self.running = work / "running"
        self.run_name = uuid.uuid4().hex
        self.bar = tqdm(desc="analysing", unit="task", total=total)
        self._stack, self._pool = ExitStack(), ExitStack()
        self._parallel: Parallel | None = None

    def __enter__(self) -> Workers:
        self._stack.enter_context(self.bar)
        self._stack.enter_context(_quiet_bars())
        self.n = self._stack.enter_context(jobs_on(self.backend, self.n))
        if self.backend == "ray":  # another machine, or a process that starts elsewhere, finds the same files
            self.suite.data = None if self.suite.data is None else self.suite.data.absolute()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            self._close()
            if self.backend == "loky" and kind is None:  # else joblib has killed them
                from joblib.externals.loky import get_reusable_executor

                get_reusable_executor(reuse=True).shutdown()

    def run(self, tasks: Sequence[Task]) -> dict[Task, Done]:
        """Do tasks that need nothing of each other, the longest first."""
        left, found = sorted(tasks, key=lambda task: -task.seconds), dict[Task, Done]()
        strikes: Counter[Task] = Counter()
        idle = 0
        while left:
            alone = [task for task in left if strikes[task]][:1]
            now = alone or left
            before = self.bar.n
            try:
                found |= zip(now, self._run(now), strict=True)
            except EmInterpError:
                raise
            except Exception as error:  # what tasks raise they return: a worker died, or the machinery failed
                begun = [task for task in now if (self.running / task.mark).exists()]
                kept = [t for t in now if not t.returns and (self.running / t.mark).with_suffix(".done").exists()]
                found |= dict.fromkeys(kept, Done())
                self._close()
                idle += not begun
                if idle > 2:
                    raise MemoryLimitError(
                        f"workers of this run end before they begin ({str(error).splitlines()[0]:.200}). Finished "
                        "work is kept: free memory, or pass a smaller --workers, and run the same command with "
                        "--resume."
                    ) from error
                strikes.update(begun)
                found |= {task: Done(failed=_died(task)) for task in begun if alone}
                self.bar.n = before
            left = [task for task in left if task not in found]
        return found

    def _run(self, tasks: Sequence[Task]) -> list[Done]:
        make_folder(self.running)
        for task in tasks:
            for ending in ("", ".done"):
                (self.running / task.mark).with_suffix(ending).unlink(missing_ok=True)
        if self._parallel is None:
            self._parallel = _WithBar(pre_dispatch="all", batch_size=1)
            self._parallel.bar = self.bar
            if self.backend == "ray":  # loky's processes stay from one call to the next as they are
                self._pool.enter_context(self._parallel)
        self._parallel.begun_at = self.bar.n
        calls = (delayed(_do)(self.run_name, self.suite, self.running, t) for t in tasks)
        careful = _none_waits_for_the_dead(self._parallel) if self.backend == "loky" else nullcontext()
        with careful, told(self.bar, self.running, {task.mark: task.what for task in tasks}):
            return list(self._parallel(calls))

    def _close(self) -> None:
        self._parallel = None
        with suppress(Exception):  # of a pool that is broken already
            self._pool.close()
        with suppress(OSError):
            for path in self.running.iterdir():
                path.unlink()
            self.running.rmdir()


@contextmanager
def _none_waits_for_the_dead(parallel: Parallel) -> Iterator[None]:
    """Inside, if a worker of loky has died and that is not seen, the others end too, which is.

    One that is killed while it sends a result leaves half of it: loky waits for the other half as long as any worker
    holds the pipe open, and the workers wait for the one that is gone to let go of the pipe.
    """
    dead: set[int] = set()

    def look() -> bool:
        executor: Any = getattr(parallel._backend, "_workers", None)
        known = dict(getattr(executor, "_processes", None) or {})
        if dead & set(known):  # for as long, and still counted
            for pid in set(known) - dead:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(OSError):
                executor._result_queue._writer.close()  # the last end that could be written to
            return False
        dead.clear()
        dead.update(pid for pid, process in known.items() if process.exitcode is not None)
        return True

    with watched(_UNSEEN_SECONDS, look):
        yield


class _WithBar(Parallel):  # type: ignore[misc]
    """Counts finished tasks in a bar."""

    bar: tqdm[Any]
    begun_at: int = 0

    def print_progress(self) -> None:
        self.bar.n = self.begun_at + self.n_completed_tasks
        self.bar.refresh(nolock=True)  # an interrupt inside would leave tqdm's lock taken for ever


def _died(task: Task) -> MemoryLimitError:
    return MemoryLimitError(
        f"a process died twice while it made {task.what}, most likely for lack of memory. All else is kept: free "
        "memory, or pass a smaller --workers, and run the same command with --resume."
    )


_HERE: Final[dict[str, Suite]] = {}
"""In a worker: the suite of its run, with the models that it has loaded."""


def _do(run: str, suite: Suite, running: Path, task: Task) -> Done:
    """In a worker: one task. Only a worker's death leaves its file in `running`."""
    mark = running / task.mark
    mark.touch()
    if run not in _HERE:
        _settle()
        _HERE.clear()
        _HERE[run] = suite
    own, value, failed = _HERE[run], None, None
    before = len(own.problems)
    with threadpool_limits(1), warnings.catch_warnings():
        try:
            value = task.do(own, *task.given)
        except OutputError as error:
            failed = error
        except Exception:  # the analysis that needs it meets it again, and says so
            value = None
    mark.rename(mark.with_suffix(".done"))
    return Done(value, tuple(own.problems[before:]), failed)


def _settle(parent: int | None = None) -> None:
    """Leave Ctrl-C to the process that started this one, and end when that, the `parent`, is gone, killed or not."""
    if parent is not None:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    from joblib.externals.loky import process_executor

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    process_executor._MAX_MEMORY_LEAK_SIZE = 2**62  # models and their work are no leak: a worker that ends loads again


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Processes started inside draw no bars of their own: those of two would overwrite each other."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TQDM_DISABLE")
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


@contextmanager
def jobs_on(backend: str, n: int) -> Iterator[int]:
    """Inside, `joblib.Parallel` has n workers of one of `BACKENDS`, which end with this process; yields their number.

    Raises UsageError for another backend, or where Ray cannot be had.
    """
    one_of("--backend", backend, BACKENDS)
    with ExitStack() as stack:
        options: dict[str, Any] = {"initializer": _settle, "initargs": (os.getpid(),)}
        if backend == "ray":
            n, options = stack.enter_context(_ray(n))
        stack.enter_context(parallel_config(backend, n_jobs=n, **options))
        yield n


@contextmanager
def _ray(n: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """A Ray cluster: that of RAY_ADDRESS, or one of `n` cores here for as long as the context.

    Yields the number of workers, at most one a GPU where there are GPUs, and joblib's options.

    Raises UsageError where Ray is not installed, or the cluster does not answer.
    """
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise UsageError(
            "--backend ray needs ray, which is not installed: pip install 'em_interp[cluster]', or leave --backend out."
        ) from error
    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS")
        settings: dict[str, Any] = {} if address else {"num_cpus": n}
        os.environ.setdefault("RAY_worker_niceness", "0")  # nobody but this process waits for them
        try:
            ray.init(address=address, include_dashboard=None if address else False, logging_level="ERROR", **settings)
        except Exception as error:  # of many kinds: no such address, no room for its files
            raise UsageError(
                f"no Ray cluster at {address or 'this machine'} ({error}). Check RAY_ADDRESS, or leave --backend out."
            ) from error
    try:
        register_ray()
        gpus = int(ray.cluster_resources().get("GPU", 0))
        yield (min(n, gpus), {"ray_remote_args": {"num_gpus": 1}}) if gpus else (n, {})
    finally:
        if ours:
            ray.shutdown()
