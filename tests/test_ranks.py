"""Processes that share a pass get what one process gets, and lose only what the one that died had not written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import em_interp as em
from em_interp.cli import main as command_line
from em_interp.errors import UsageError
from em_interp.models.ranks import _NOW, Ranks
from tests import shared_pass

ROOT = Path(__file__).parent.parent
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def launch(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *LAUNCH, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=240,
    )


def shards(folder: Path) -> dict[str, set[int]]:
    return {p.name: set(load_file(p)["index"].tolist()) for p in sorted((folder / "store").glob("shard-*"))}


def test_two_processes_give_what_one_gives_and_a_killed_one_costs_its_last_batch(tmp_path):
    with pytest.raises(SystemExit) as ended:
        shared_pass.main(tmp_path / "one", None)
    assert ended.value.code == 0
    killed = launch(ROOT / "tests" / "shared_pass.py", tmp_path / "two", "1")
    assert killed.returncode != 0
    before = shards(tmp_path / "two")
    assert before
    done = launch(ROOT / "tests" / "shared_pass.py", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    after = shards(tmp_path / "two")
    assert before.items() <= after.items()  # none was read again
    rows = [i for index in after.values() for i in index]
    assert sorted(rows) == list(range(len(shared_pass.CHATS)))
    one, two = (load_file(tmp_path / who / "means.safetensors") for who in ("one", "two"))
    for name, mean in one.items():
        torch.testing.assert_close(two[name], mean, rtol=1e-6, atol=1e-6)
    assert [path.name for path in (tmp_path / "two" / "out").iterdir()] == ["steered.csv"]
    for name in ("answers.csv", "swept.csv", "out/steered.csv"):
        one, two = (pd.read_csv(tmp_path / who / name).drop(columns="model", errors="ignore") for who in ("one", "two"))
        pd.testing.assert_frame_equal(one, two)


def test_commands_that_are_not_shared_say_so(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["em-interp", "reproduce"])
    with pytest.raises(SystemExit) as stopped:
        command_line()
    assert stopped.value.code == 2
    assert "started as 2 processes" in capsys.readouterr().err


def test_shares_are_whole_and_alike():
    rows = list(range(11))
    shares = [Ranks(i, 3).share(rows) for i in range(3)]
    assert sorted(row for share in shares for row in share) == rows
    assert {len(share) for share in shares} == {3, 4}
    assert Ranks(2, 3).own(Path("a/b.csv")) == Path("a/b-rank2.csv")
    assert Ranks(0, 3).own(Path("a/b.csv")) == Path("a/b.csv")


def test_one_process_is_left_as_it_is_and_nesting_is_refused():
    with em.data_parallel() as ranks:
        assert ranks == Ranks()
        part = torch.ones(2)
        assert ranks.total(part) is part
        assert ranks.gather([1]) == [1]
        assert ranks.device("cuda") == "cuda"
    token = _NOW.set(Ranks(0, 2))
    try:
        with pytest.raises(UsageError, match="inside data_parallel"), em.data_parallel():
            pass
    finally:
        _NOW.reset(token)
