"""Long work keeps what it has: beside its output, under a hash of all that made it, until the output is there."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from em_interp.errors import UnreadableFileError
from em_interp.files.atomic import atomic_path, claim_output, discard, remove_leftovers, sole_writer, write_text
from em_interp.files.manifest import code_hash, fingerprint


def _parts_of(output: Path) -> Path:
    return output.parent / f".{output.name}.parts"


@contextmanager
def work_folder(output: Path, key: str = "begun") -> Iterator[Path]:
    """`.OUTPUT.parts` beside an output, for one process at a time. Removed at the end; an error or a kill leaves it.

    key: a hash of the command, by which a later run finds out that it `is_begun`.
    """
    folder = _parts_of(output)
    try:
        with sole_writer(folder):
            (folder / key).touch()
            try:
                yield folder
            except BaseException:
                if {path.name for path in folder.iterdir()} <= {key, ".lock"}:  # nothing to keep
                    (folder / key).unlink(missing_ok=True)
                raise
            discard(folder, output)
    finally:
        with suppress(OSError):  # not empty
            folder.rmdir()


def is_begun(output: Path, key: str) -> bool:
    """Whether a run that was stopped has begun this output with the same key: then what lies there is its own."""
    return os.path.isfile(_parts_of(output) / key)  # noqa: PTH113  (no name is too long for it)


def is_trained(folder: Path) -> bool:
    """Whether a finetune in a folder is finished."""
    return (folder / "training_spec.json").is_file()  # written last


def remove_parts(output: Path) -> None:
    """Remove what a run left that was killed after its output was written."""
    remove_leftovers(output)
    if _parts_of(output).is_dir():
        with work_folder(output):
            pass


@contextmanager
def claimed(
    output: Path, made_by: Any, *, inputs: Iterable[str | Path | None], force: bool, endings: Sequence[str]
) -> Iterator[Path]:
    """`claim_output`, and inside its `work_folder`. made_by: JSON values, what the command was asked to do.

    A run that was stopped may finish what it has begun without `force`.
    """
    key = fingerprint(made_by)[:16]
    claim_output(output, inputs=inputs, force=force or is_begun(output, key), endings=endings)
    with work_folder(output, key) as folder:
        yield folder


@dataclass(frozen=True)
class Parts:
    """Finished batches of answers in a folder: one JSON file a batch, named by a hash of code and all that made it."""

    folder: Path
    of_row: Sequence[Any] = field(default=())
    """JSON values: what makes each row's answer beside what was asked and what acts on all rows."""

    def path(self, rows: Sequence[int], made_by: Any) -> Path:
        """Where the answers of a batch are. made_by: JSON values."""
        own = [self.of_row[i] for i in rows] if self.of_row else None
        return self.folder / f"{fingerprint([code_hash(), own, made_by])[:32]}.json"

    def read(self, path: Path) -> list[list[Any]]:
        """The fields of each answer of a batch, or nothing where it is not finished."""
        try:
            return list(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return []

    def write(self, path: Path, answers: Sequence[Sequence[Any]]) -> None:
        """Keep a finished batch. Raises OutputError."""
        write_text(path, json.dumps(answers))


def say_kept(n: int, total: int, what: str) -> None:
    """Tell the user, on stderr, what a run that was stopped had done."""
    if n:
        tqdm.write(f"kept {n} of {total} {what} from a run that was stopped", file=sys.stderr)


class Pace:
    """When to save: so seldom that saving takes at most a twentieth of the time."""

    def __init__(self) -> None:
        self.saved_at, self.cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self.saved_at >= 20 * self.cost

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save."""
        begun = time.monotonic()
        yield
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - begun


def save_state(path: Path, tensors: Mapping[str, Tensor], note: Any) -> None:
    """Tensors and a JSON note in one safetensors file, atomically. Raises OutputError."""
    with atomic_path(path) as new:
        held = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        save_file(held, new, metadata={"em_interp": json.dumps(note)})


def load_state(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What `save_state` wrote. Raises UnreadableFileError."""
    try:
        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()["em_interp"])
            return {name: file.get_tensor(name) for name in file.keys()}, note  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UnreadableFileError(path, f"not a readable checkpoint ({error})", "delete it to start afresh") from error


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of optimisers as named tensors."""
    return {
        f"optimizer.{number}.{i}.{key}": value
        for number, optimizer in enumerate(optimizers)
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; other tensors are passed over."""
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, i, key = name.split(".", 3)
            states[int(number)].setdefault(int(i), {})[key] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class RunningTotals:
    """The totals of a pass over rows, by layer, on disk: a killed pass goes on after the batches that are in them.

    pace: how often they are saved.
    """

    def __init__(self, folder: str | Path, made_by: Any, totals: dict[int, list[Tensor]], n: int) -> None:
        self.path, self.totals, self.n = Path(folder) / f"{fingerprint(made_by)[:32]}.safetensors", totals, n
        self.pace = Pace()
        self.done: list[int] = []
        """The rows that are in the totals."""
        if self.path.is_file():
            tensors, self.done = load_state(self.path)
            for name, tensor in sorted(tensors.items()):  # LAYER.PART
                totals.setdefault(int(name.split(".")[0]), []).append(tensor)
            say_kept(len(self.done), n, "conversations")

    def keep(self, rows: Sequence[int]) -> None:
        """A batch was added: save if it is time, or if it was the last."""
        self.done += rows
        if self.pace.due() or len(self.done) == self.n:
            with self.pace.saving():
                named = {f"{layer}.{part}": x for layer, xs in self.totals.items() for part, x in enumerate(xs)}
                save_state(self.path, named, self.done)
