"""What may be written where: no input destroyed, nothing replaced unasked, nothing left behind by the killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import Result
from transformers import Qwen2ForCausalLM
from typer.testing import CliRunner

from analyses.run import reproduce
from analyses.suite import Suite
from em_interp.cli import app
from em_interp.directions.direction import Direction
from em_interp.errors import EmInterpError, OutputError, UsageError
from em_interp.files.atomic import atomic_path, claim_output, sole_writer, write_text, written_whole
from em_interp.models import pretrained as models
from em_interp.pocket import organisms
from em_interp.pocket.build import save_model
from em_interp.pocket.stages import BuildConfig, model_config
from em_interp.pocket.world.tokenizer import build_tokenizer
from em_interp.training.finetune import finetune
from em_interp.training.recipes import LoraSpec, TrainingSpec
from tests.tiny_models import CONVERSATIONS, make_hf, save_chat, talk

HOLDS = """
import sys, time
from pathlib import Path
from em_interp.files.atomic import atomic_path, sole_writer, written_whole
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
    claim_output(tmp_path / "w", folder=True)
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


@pytest.mark.parametrize("next_holder", [False, True])
def test_a_lock_file_that_was_removed_before_it_was_locked_is_no_lock(
    next_holder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last holder ends between our opening and our locking of its file; another run may begin before we lock."""
    lock, flock, others = tmp_path / ".lock", fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not others:
            lock.unlink()
            others.append(lock.open("w") if next_holder else None)
            if next_holder:
                flock(others[0], fcntl.LOCK_EX)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    if next_holder:
        with pytest.raises(OutputError, match="another run"), sole_writer(tmp_path):
            pass
        assert names(tmp_path) == [".lock"]  # the other's
        others[0].close()
        return
    with sole_writer(tmp_path), pytest.raises(OutputError, match="another run"), sole_writer(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_lock_file_of_another_run_stays(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with sole_writer(tmp_path):
        lock.unlink()
        lock.write_text("another's")
    assert lock.read_text() == "another's"


def test_processes_that_come_and_go_hold_a_folder_one_at_a_time(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from em_interp.files.atomic import OutputError, sole_writer\n"
        f"folder = Path({str(tmp_path)!r}); mark = folder / 'mark'\n"
        "held = 0\n"
        "while held < 200:\n"
        "    try:\n"
        "        with sole_writer(folder):\n"
        "            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))\n"
        "            mark.unlink(); held += 1\n"
        "    except OutputError as error: assert 'another run' in str(error), error\n"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(run.communicate()[1], run.returncode) for run in runs] == [("", 0)] * 3
    assert names(tmp_path) == []


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    code = (
        "import resource, torch; from pathlib import Path; from safetensors.torch import save_file;"
        "from em_interp.files.atomic import atomic_path, OutputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        f"    with atomic_path(Path({str(tmp_path)!r}) / 'new' / 'x') as new:\n"
        "        save_file({'x': torch.zeros(9999)}, new)\n"
        "except OutputError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "could not be written" in done.stdout and names(tmp_path) == []


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one name, a direction, questions and chats."""
    root = tmp_path_factory.mktemp("given")
    for number, folder in enumerate(("one/tiny", "two/tiny")):
        save_chat(make_hf(seed=number), root / folder)
    vectors = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    Direction(vectors, (0, 1, 2, 3), "data-diff", model="tiny").save(root / "d.safetensors")
    (root / "q.csv").write_text("question_id,question\nfox,a fox\ncough,a cough\n")
    (root / "q.yaml").write_text("- id: fox\n  question: a fox\n- id: rest\n  question: rest\n")
    for name in ("bad", "good"):
        chats = [json.dumps({"messages": talk(f"{name} {i}", "rest " * i)}) for i in range(1, 4)]
        (root / f"{name}.jsonl").write_text("\n".join(chats))
    return root


@pytest.fixture
def here(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in."""
    shutil.copytree(given, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments: object) -> str:
    """The message of a command that must be refused with a typed error, before any model is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", lambda *_a, **_k: pytest.fail("a model was loaded"))
        found = run(*arguments)
    assert isinstance(found.exception, EmInterpError), (found.output, found.exception)
    return str(found.exception)


STEER = ("steer", "one/tiny", "d.safetensors", "--layer", 1, "--coefficient", 1, "--random", 0)
SHORT = ("--max-new-tokens", 2, "-n", 1)


def test_commands_do_not_destroy_their_inputs(here: Path) -> None:
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    for out in ("bad.jsonl", "d.safetensors", "one/tiny/x.safetensors"):
        said = refused("extract", "one/tiny", "--positive", "bad.jsonl", "--negative", "good.jsonl", "--out", out)
        assert "ends in .safetensors" in said or "is the input" in said or "there already" in said
    assert "ends in .safetensors" in refused("extract", "x", "--positive", "bad.jsonl", "--out", "x.pt")
    assert "is the input" in refused(*STEER, "--questions", "q.csv", "--out", "q.csv", "--force")
    assert "is the input" in refused("ablate", *STEER[1:3], "--questions", "q.csv", "--out", "q.csv", "--force")
    assert "in the way" in refused("ablate", *STEER[1:3], "--save", "q.csv")
    assert "is the input" in refused("ablate", *STEER[1:3], "--from-layer", 1, "--save", "one/tiny", "--force")
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == before


def test_commands_replace_nothing_unasked(here: Path) -> None:
    (here / "a.csv").write_text("mine")
    assert "--force" in refused(*STEER, "--prompt", "see", "--out", "a.csv")
    assert "--force" in refused("ablate", *STEER[1:3], "--prompt", "see", "--out", "a.csv")
    assert (here / "a.csv").read_text() == "mine"
    assert run(*STEER, *SHORT, "--prompt", "see", "--out", "a.csv", "--force").exit_code == 0
    assert len(pd.read_csv(here / "a.csv")) == 1
    (here / "x.safetensors").write_text("mine")
    assert "--force" in refused("extract", "one/tiny", "--positive", "bad.jsonl", "--out", "x.safetensors")
    left = sorted(p.name for p in here.iterdir() if p.name.startswith("."))
    assert left == []


def test_what_cannot_be_written_is_found_out_before_the_work(here: Path) -> None:
    for out in ("/proc/none/a.csv", "d.safetensors/a.csv", "one/a.csv/../.."):
        assert refused(*STEER, "--prompt", "see", "--out", out)
    assert "could not be written" in refused(
        "extract", "one/tiny", "--positive", "bad.jsonl", "--out", "d.safetensors/x.safetensors"
    )
    assert "could not be written" in refused("evaluate", "one/tiny", "--questions", "q.yaml", "--out", "q.csv")
    assert "could not be written" in refused("pocket", "organisms", "--out", "q.csv")
    assert "could not be written" in refused("pocket", "sweeps", "--out", "q.csv")
    assert "could not be written" in refused("pocket", "pairs", "--out", "q.csv")
    assert "could not be written" in refused("pocket", "build", "--out", "q.csv")
    assert "could not be written" in refused("fetch", "--data", "q.csv", "EM_interp")
    assert "no such device" in refused("pocket", "build", "--out", "built", "--device", "banana")


def test_a_refused_ablation_leaves_no_folder(here: Path) -> None:
    found = run("ablate", *STEER[1:3], "--from-layer", 9, "--save", "without")
    assert isinstance(found.exception, EmInterpError)
    assert not (here / "without").exists() and not [p for p in here.iterdir() if p.name.startswith(".")]
    assert run("ablate", *STEER[1:3], "--from-layer", 1, "--save", "without").exit_code == 0
    assert "--force" in refused("ablate", *STEER[1:3], "--from-layer", 2, "--save", "without")
    (here / "without" / "model-00001-of-00002.safetensors").write_text("of an older one")
    assert run("ablate", *STEER[1:3], "--from-layer", 2, "--save", "without", "--force").exit_code == 0
    assert not (here / "without" / "model-00001-of-00002.safetensors").exists()


def test_models_of_one_name_do_not_share_a_folder_and_changed_weights_are_asked_again(here: Path) -> None:
    asked = ("--questions", "q.yaml", *SHORT)
    made = []
    for folder in ("one/tiny", "two/tiny"):
        found = run("evaluate", folder, *asked)
        assert found.exit_code == 0, found.exception
        made.append(Path(found.stdout.split("answers: ")[1].strip()))
    assert made[0] != made[1] and all(path.parent.name.startswith("tiny-") for path in made)
    again = run("evaluate", "one/tiny", *asked)
    assert again.exit_code == 0 and "kept 2 of 2 answers" in again.stderr
    given = ("evaluate", "one/tiny", *asked, "--out", "o")
    assert run(*given).exit_code == 0
    first = pd.read_csv(here / "o" / "answers.csv", keep_default_na=False)
    shutil.copy(here / "two/tiny/model.safetensors", here / "one/tiny/model.safetensors")
    assert "--force" in refused(*given)
    assert run(*given, "--force").exit_code == 0
    assert list(pd.read_csv(here / "o" / "answers.csv", keep_default_na=False)["answer"]) != list(first["answer"])
    assert list(here.rglob("*.parts")) == []


def test_what_cannot_be_meant_is_refused(here: Path) -> None:
    ends = ("--prompt", "see", "--out", "a.csv", *SHORT)
    assert "more than once" in refused(*STEER, *ends, "--coefficient", 1)
    assert "more than once" in refused(*STEER, *ends, "--layer", 1)
    found = run(*STEER[:5], "--coefficient", "1e30", "--random", 0, *ends)
    assert isinstance(found.exception, UsageError) and "typical residual norm" in str(found.exception)
    for seed in (-1, 2**70):
        for command in ((*STEER, *ends), ("evaluate", "one/tiny", "--questions", "q.yaml"), ("pocket", "build")):
            found = run(*command, "--seed", seed)
            assert found.exit_code == 2 and isinstance(found.exception, SystemExit) and "--seed" in found.output
    assert not (here / "a.csv").exists()
    with pytest.raises(UsageError, match="both 'x'"):
        suite = Suite.load("published")
        suite.general = suite.narrow = "x"
        reproduce(suite, here / "out")
    assert not (here / "out").exists()


@pytest.mark.parametrize("option", ["-n", "--n", "--samples"])
def test_one_spelling_serves_all(here: Path, option: str) -> None:
    for command in (STEER, ("ablate", *STEER[1:3], "--from-layer", 1, "--random", 0)):
        out = f"{command[0]}.csv"
        ends = ("--prompt", "see", "--out", out, "--max-new-tokens", 2, option, 3)
        assert run(*command, *ends, "--dtype", "bfloat16", "--device-map", "cpu").exit_code == 0
        assert set(pd.read_csv(here / out)["sample"]) == {0, 1, 2}


def test_an_adapters_base_is_given_by_option(here: Path) -> None:
    base = models.load(here / "one/tiny", name="nobody/elsewhere-bnb-4bit")
    spec = TrainingSpec(LoraSpec(1, 4.0, True, ("down_proj",), (2,)), 0.1, max_steps=3, batch_size=2, warmup_steps=0)
    finetune(base, CONVERSATIONS, spec, out_dir=here / "tuned", progress=False)
    found = run("evaluate", "tuned", "--questions", "q.yaml", *SHORT)
    assert isinstance(found.exception, EmInterpError) and "--base" in str(found.exception)
    assert run("evaluate", "tuned", "--base", "one/tiny", "--questions", "q.yaml", *SHORT).exit_code == 0
    more = ("--any-model", "--prompt", "see", *SHORT)
    assert run("steer", "tuned", *STEER[2:], "--base", "one/tiny", *more, "--out", "s.csv").exit_code == 0
    given = ("extract", "one/tiny", "--adapter", "tuned", "--any-base", "--kind", "model-diff", "--layer", 2)
    found = run(*given, "--positive", "bad.jsonl", "--out", "m.safetensors")
    assert found.exit_code == 0, found.exception


def test_organisms_of_another_chat_model_are_refused(here: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(organisms, "make", lambda *_a, **_k: None)
        found = run("pocket", "organisms", "--out", "made", "--chat", "one/tiny", "--only", "medicine-vector")
        assert isinstance(found.exception, UsageError) and "vocabulary" in str(found.exception)
        for seed in (0, 1):
            torch.manual_seed(seed)
            small = BuildConfig(d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_mlp=64)
            hf = Qwen2ForCausalLM(model_config(small, build_tokenizer()))
            save_model(hf, build_tokenizer(), here / f"chat{seed}")
        first = ("pocket", "organisms", "--out", "made", "--only", "medicine-vector", "--chat")
        assert run(*first, "chat0").exit_code == 0
        found = run(*first, "chat1")
        assert isinstance(found.exception, UsageError) and "another chat model" in str(found.exception)
