"""What may be written where: no input destroyed, nothing replaced unasked, nothing left behind by the killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from em_interp.errors import OutputError, UsageError
from em_interp.files import atomic_path, claim_output, sole_writer, write_text, written_whole

HOLDS = """
import sys, time
from pathlib import Path
from em_interp.files import atomic_path, sole_writer, written_whole
with {context} as made:
    print("inside", flush=True)
    time.sleep(60)
"""


def holding(context: str) -> subprocess.Popen[str]:
    """A process that has entered a context of `files` and stays there."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS.format(context=context)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "inside\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    "context", ["atomic_path(Path({!r}))", "written_whole(Path({!r}))"], ids=["atomic_path", "written_whole"]
)
def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_live_ones_stays(tmp_path: Path, context: str) -> None:
    target = tmp_path / "made"
    process = holding(context.format(str(target)))
    (tmp_path / ".made.notes.tmp").write_text("a user's")
    try:
        (left,) = [name for name in names(tmp_path) if name != ".made.notes.tmp"]
        write_text(target, "whole")
        assert names(tmp_path) == sorted([left, ".made.notes.tmp", "made"])
    finally:
        end(process)
    write_text(target, "again")
    assert names(tmp_path) == [".made.notes.tmp", "made"] and target.read_text() == "again"


def test_claiming_removes_leftovers_of_older_versions_too(tmp_path: Path) -> None:
    (tmp_path / ".s.csv.abcd_123.tmp").touch()
    (tmp_path / "w" / ".partial-abcd1234").mkdir(parents=True)
    claim_output(tmp_path / "s.csv")
    claim_output(tmp_path / "w", folder=True, force=True)
    assert names(tmp_path) == ["w"] and names(tmp_path / "w") == []


def test_nothing_new_is_left_where_writing_failed(tmp_path: Path) -> None:
    for context in (atomic_path, written_whole):
        with pytest.raises(ZeroDivisionError), context(tmp_path / "a" / "b" / "c"):
            raise ZeroDivisionError
        assert names(tmp_path) == []
    with written_whole(tmp_path / "a" / "b") as new:
        (new / "x").write_text("1")
    with written_whole(tmp_path / "a" / "b") as new:
        (new / "y").write_text("2")
    assert names(tmp_path / "a") == ["b"] and names(tmp_path / "a" / "b") == ["x", "y"]
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_no_input_is_an_output(tmp_path: Path) -> None:
    given = tmp_path / "x.jsonl"
    given.write_text("{}")
    (tmp_path / "link.jsonl").symlink_to(given)
    (tmp_path / "X.JSONL").hardlink_to(given)  # as a file system that does not tell cases apart shows it
    (tmp_path / "model").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "model")
    for out in ("x.jsonl", "link.jsonl", "X.JSONL", "./model/../x.jsonl", "model/a.csv", "other/deep/a.csv"):
        with pytest.raises(OutputError, match="is the input"):
            claim_output(tmp_path / out, inputs=[None, "hub/name", given, tmp_path / "model"], force=True)
    (tmp_path / "model" / "deep").touch()
    with pytest.raises(OutputError, match="is the input"):
        claim_output(tmp_path / "model", inputs=[tmp_path / "model" / "deep"], folder=True, force=True)
    claim_output(tmp_path / "free.csv", inputs=[given, tmp_path / "model"])


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    (tmp_path / "there.csv").write_text("old")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "dangling.csv").symlink_to(tmp_path / "nowhere")
    for name, folder in (("there.csv", False), ("dangling.csv", False), ("full", True)):
        with pytest.raises(OutputError, match="Pass --force"):
            claim_output(tmp_path / name, folder=folder)
        claim_output(tmp_path / name, folder=folder, force=True)
    assert (tmp_path / "there.csv").read_text() == "old"
    (tmp_path / "empty").mkdir()
    claim_output(tmp_path / "empty", folder=True)


def test_a_place_that_cannot_be_written_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    for out, folder, says in (
        (tmp_path / "folder", False, "a folder is in the way"),
        (tmp_path / "file", True, "a file is in the way"),
        (tmp_path / "pipe", False, "neither"),
        (tmp_path / "file" / "a.csv", False, "could not be written"),
        (Path("/proc/none/a.csv"), False, "could not be written"),
        (tmp_path / ("n" * 245), False, "could not be written"),
    ):
        with pytest.raises(OutputError, match=says):
            claim_output(out, folder=folder, force=True)
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        claim_output(tmp_path / "x.pt", endings=(".safetensors",))
    claim_output(tmp_path / "deep" / "er" / "X.CSV", endings=(".csv",))
    assert names(tmp_path) == before


def test_one_run_writes_to_a_folder_at_a_time_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    process = holding(f"sole_writer(Path({str(tmp_path)!r}))")
    try:
        with pytest.raises(OutputError, match="another run"), sole_writer(tmp_path):
            pass
    finally:
        end(process)
    with sole_writer(tmp_path):
        assert names(tmp_path) == [".lock"]
    assert names(tmp_path) == []


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    code = (
        "import resource, torch; from pathlib import Path; from safetensors.torch import save_file;"
        "from em_interp.files import atomic_path, OutputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        f"    with atomic_path(Path({str(tmp_path)!r}) / 'new' / 'x') as new:\n"
        "        save_file({'x': torch.zeros(9999)}, new)\n"
        "except OutputError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "could not be written" in done.stdout and names(tmp_path) == []
