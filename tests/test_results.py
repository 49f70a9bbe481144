"""The store: one maker, whole or nothing, keyed by what made it and by the code that it stands on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

from em_interp.directions.extraction import Contrast, contrast
from em_interp.errors import UsageError
from em_interp.files import manifest
from em_interp.files.manifest import code_hash, source_hash
from em_interp.files.results import KEEPING_NOTHING, KeptWarning, Results
from em_interp.files.tables import Parts
from tests.tiny_models import make_chat, talk

CODE = ("em_interp.errors",)
TABLE = pd.DataFrame({"question": ["a", "NA"], "answer": ["", "x\ry"], "aligned": [0.1, None]})


def test_it_is_made_once_and_says_what_made_it(tmp_path: Path) -> None:
    results, made = Results(tmp_path), []

    def make(parts: Parts | None) -> pd.DataFrame:
        assert parts is not None
        parts.write(parts.path([0], "x"), [["kept"]])
        made.append(1)
        return TABLE

    for weights in ("w", "w", "v", "w"):
        found = results.table("answers", "pocket/a b", {"weights": weights}, make, code=CODE)
        pd.testing.assert_frame_equal(found, TABLE)
    assert len(made) == 2 == len(results)
    told = sorted(tmp_path.glob("answers/pocket_a_b-*.json"))
    assert [json.loads(p.read_text())["made_by"] for p in told] != [] and len(told) == 2
    assert json.loads(told[0].read_text())["code"] == {"modules": list(CODE), "hash": code_hash(*CODE)}
    assert not list(tmp_path.glob("*/.*"))
    assert KEEPING_NOTHING.table("answers", "a", {}, lambda parts: TABLE.assign(n=parts), code=CODE)["n"].isna().all()


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    model = make_chat()
    texts = [talk(f"a fox {i}", "see " * (i + 1)) for i in range(3)]
    whole = contrast(model, texts, texts[:2], progress=False)
    tensors, note = Results(tmp_path).tensors("contrasts", "a", {}, whole.state, code=CODE)
    again = Contrast.of_state(tensors, note)
    assert torch.equal(again.direction().vectors, whole.direction().vectors)
    assert again.direction().sources == whole.direction().sources
    assert torch.equal(again.positive.each("response", 1), whole.positive.each("response", 1))
    assert again.positive.questions == whole.positive.questions


def test_a_maker_that_fails_leaves_nothing_whole_and_what_it_had(tmp_path: Path) -> None:
    def half(parts: Parts | None) -> pd.DataFrame:
        assert parts is not None
        parts.write(parts.path([0], "x"), [["kept"]])
        raise UsageError("stopped")

    results = Results(tmp_path)
    with pytest.raises(UsageError):
        results.table("answers", "a", {}, half, code=CODE)
    assert len(results) == 0 and len(list(tmp_path.glob("answers/.a-*.parts/*.json"))) == 1
    results.table("answers", "a", {}, lambda _: TABLE, code=CODE)
    assert len(results) == 1 and not list(tmp_path.glob("*/.*"))


TWO = """
import sys, time
from pathlib import Path
import pandas as pd
from em_interp.files.results import Results
def make(_):
    print("made", flush=True)
    time.sleep(1)
    return pd.DataFrame({"a": [1]})
Results(Path(sys.argv[1])).table("k", "n", {}, make, code=("em_interp.errors",))
"""


def test_of_two_processes_one_makes_it(tmp_path: Path) -> None:
    line = [sys.executable, "-c", TWO, str(tmp_path)]
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert "".join(process.communicate()[0] for process in both) == "made\n"
    assert [process.returncode for process in both] == [0, 0] and not list(tmp_path.glob("*/.*"))


def test_what_was_said_when_it_was_made_is_said_again(tmp_path: Path) -> None:
    def make(_: Parts | None) -> pd.DataFrame:
        warnings.warn("plain passes", UserWarning, stacklevel=1)
        return TABLE

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for _ in range(2):
            with pytest.warns(KeptWarning, match="plain passes"):
                Results(tmp_path).table("k", "n", {}, make, code=CODE)


def test_what_nobody_used_for_long_goes(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for name in ("old", "new"):
        results.table("k", name, {}, lambda _: TABLE, code=CODE)
    (old,) = tmp_path.glob("k/old-*.csv")
    os.utime(old, (0, time.time() - 31 * 86_400))
    old.with_name(".new-0.lock").touch()
    results.tidy()
    assert {p.name.split("-")[0] for p in tmp_path.glob("k/*")} == {"new"} and not list(tmp_path.glob("k/.*"))


def test_the_code_of_a_result_is_what_it_stands_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def tree(**changed: str) -> tuple[str, str, str]:
        files = {
            "em_interp/__init__.py": "",
            "em_interp/a.py": "def f():\n    from em_interp.b import g\n",
            "em_interp/b.py": "g = 1",
            "em_interp/c.py": "",
            "analyses/__init__.py": "",
            "analyses/benchmarks/x.py": "",
        } | {name.replace("__", "/") + ".py": text for name, text in changed.items()}
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        manifest._code_hash.cache_clear()
        return code_hash("em_interp.a"), code_hash(), source_hash()

    monkeypatch.setattr(manifest, "_ROOT", tmp_path)
    before = tree()
    assert tree(analyses__benchmarks__x="x = 2") == before
    other = tree(em_interp__c="x = 2")
    assert other[0] == before[0] and other[1] != before[1] and other[2] != before[2]
    assert tree(em_interp__b="g = 2")[0] != before[0]
    manifest._code_hash.cache_clear()
