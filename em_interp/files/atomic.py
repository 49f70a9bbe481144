"""Outputs: what may be written where, and writing whole or not at all, to a temporary name first, then rename.

A temporary file or folder is locked while its writer lives. What a killed writer left is removed by the next one that
writes to the same place.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from em_interp.errors import OutputError, UsageError

_DAY: Final = 86_400


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` on success, removed on failure or interruption.

    Raises `OutputError` where the target cannot be written (full disk, no permission); what was there stays.
    """
    with _typed(path), ExitStack() as stack:
        stack.enter_context(_parents(path))
        remove_leftovers(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        stack.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX)
        temporary = Path(name)
        stack.callback(temporary.unlink, missing_ok=True)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def written_whole(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder`, or whose files move into it where it exists already.

    replace: of what is there, nothing stays. Raises `OutputError` where that cannot be; then nothing new is left, no
    empty folder either.
    """
    with _typed(folder), ExitStack() as stack:
        stack.enter_context(_parents(folder))
        remove_leftovers(folder)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        handle = os.open(temporary, os.O_RDONLY)
        stack.callback(os.close, handle)
        with suppress(OSError):  # a network file system that cannot lock folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        if replace and folder.is_dir():
            shutil.rmtree(folder)
        move_folder(temporary, folder)


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder; where the target exists already, what lies in it moves there. Raises `OutputError`."""
    with _typed(target):
        if target.is_dir():
            for path in sorted(source.iterdir()):
                path.replace(target / path.name)
        else:
            source.rename(target)


def discard(folder: Path, target: Path) -> None:
    """Remove a folder beside `target`: under a temporary name, so that the next run ends what a kill cuts short."""
    temporary = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    folder.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> Path:
    """Create a folder for results. Raises `OutputError` where that cannot be."""
    with _typed(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def claim_output(
    path: Path,
    *,
    inputs: Iterable[str | Path | None] = (),
    force: bool = False,
    endings: Sequence[str] = (),
    folder: bool = False,
) -> Path:
    """Refuse, before any work, an output file (or `folder`) that may not or cannot be written. Writes nothing.

    inputs: files and folders that the command reads; what is no path here (a name on the hub) is passed over. No input,
    and no place within one, is ever an output. force: whether an existing output may be replaced. endings: those that
    the file's name may have, each with its dot. Raises `UsageError` or `OutputError`.
    """
    with _typed(path):
        if endings and path.suffix.lower() not in endings:
            raise UsageError(f"{path}: this output's name ends in {' or '.join(endings)}. Change the ending.")
        for source in (Path(given) for given in inputs if given is not None):
            if source.exists() and _touches(path, source):
                raise OutputError(f"{path}: is the input {source}, or shares its folder. Choose another output.")
        remove_leftovers(path)
        if os.path.lexists(path):
            if path.is_dir() != folder or not (path.is_dir() or path.is_file() or path.is_symlink()):
                there = "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder"
                raise OutputError(f"{path}: {there} is in the way. Choose another output.")
            if not force and not (folder and not any(path.iterdir())):
                raise OutputError(f"{path}: is there already, and was left as it is. Pass --force to replace it.")
            if folder and force and any(p.is_dir() for p in path.iterdir()):
                raise OutputError(f"{path}: holds folders, so it is not replaced whole. Remove it, or choose another.")
    return check_writable(path)


def check_writable(path: Path) -> Path:
    """Try whether a file or folder could be written, and remove what killed writers of it left. Raises `OutputError`.

    Nothing is made, no folder either.
    """
    with _typed(path):
        parent = next(p for p in path.absolute().parents if os.path.lexists(p))
        tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".tmp", dir=parent).close()
    remove_leftovers(path)
    return path


def _touches(output: Path, source: Path) -> bool:
    """Whether writing the output would change the source."""
    if output.exists() and output.samefile(source):
        return True
    target, given = output.resolve(), source.resolve()
    return (source.is_dir() and target.is_relative_to(given)) or given.is_relative_to(target)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Inside, no other process writes to `folder`, which is made. A killed process holds nothing.

    Raises `OutputError` where one writes there now.
    """
    lock = folder / ".lock"
    with ExitStack() as stack:
        with _typed(folder):
            stack.enter_context(_parents(lock))
            try:
                handle = _locked(lock)
            except BlockingIOError:
                raise OutputError(f"{folder}: another run writes there now. Wait, or choose another --out.") from None
        stack.callback(os.close, handle)
        stack.callback(lambda: lock.unlink() if _is_at(handle, lock) else None)
        yield


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Inside, no other process holds this lock file, which is made; waits for its turn. A killed process holds nothing.

    Raises `OutputError` where it cannot be made.
    """
    with ExitStack() as stack:
        with _typed(lock):
            handle = _locked(lock, wait=True)
        stack.callback(os.close, handle)
        stack.callback(lambda: lock.unlink() if _is_at(handle, lock) else None)
        yield


def _locked(path: Path, *, wait: bool = False) -> int:
    """A handle that holds the lock of a file, which is made. Raises `BlockingIOError` where another holds it.

    The last holder may have removed the file between opening and locking: then the lock is of no use to the next one.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with ExitStack() as stack:
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(handle, path):
                stack.pop_all()
                return handle


def _is_at(handle: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def remove_leftovers(target: Path) -> None:
    """Remove what killed writers of a file or folder left beside it (and what older versions left inside it)."""
    name = re.compile(rf"\.{re.escape(target.name)}\.\w{{8}}\.tmp")
    with suppress(OSError):
        found = [p for p in target.parent.iterdir() if name.fullmatch(p.name)]
        found += [p for p in target.glob(".partial-*") if p.is_dir()]
        for path in found:
            if _abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _abandoned(path: Path) -> bool:
    """Whether no live process holds it; where that cannot be told, whether it is a day old."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - path.stat().st_mtime > _DAY
    finally:
        os.close(handle)


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make the folders above; those made here go again if nothing came into them."""
    made = [p for p in path.absolute().parents if not p.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty: it was needed
            for folder in made:
                folder.rmdir()


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    """Failures to write as `OutputError`; safetensors has an error of its own for a full disk."""
    if "\0" in str(path):
        raise OutputError(f"{str(path)!r}: a path cannot hold a zero byte. To fix it: choose another --out.")
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(
            f"{path}: could not be written ({reason}). Nothing was changed there. To fix it: free disk space or choose "
            "another --out folder that you may write to."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
