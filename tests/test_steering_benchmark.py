from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from analyses.benchmarks import steering as benchmark
from em_interp.errors import UsageError


def test_a_small_run_writes_its_table_and_manifest(tmp_path):
    benchmark.main(tmp_path / "out", model="random", questions=2, samples=[1, 2], max_new_tokens=3, rounds=2)
    table = pd.read_csv(tmp_path / "out" / "steering.csv")
    methods = ["one generate", "separate runs", "steered", "unsteered", "plain hook"]
    assert sorted(table["method"]) == sorted(methods * 4) and set(table["answers_per_run"]) == {2, 4}
    table = table[table["answers_per_run"] == 2]
    assert set(table["round"]) == {1, 2}
    answers = table.set_index("method")["answers"]
    assert set(answers["one generate"]) == set(answers["separate runs"]) == {8 * 2} and set(answers["steered"]) == {2}
    tokens = table.groupby("method")["tokens"].first()
    assert tokens["one generate"] == tokens["separate runs"] and tokens["steered"] == tokens["unsteered"]
    manifest = json.loads((tmp_path / "out" / "steering_manifest.json").read_text())
    seconds = table.set_index(["round", "method"])["seconds"].unstack()
    expected = (seconds["one generate"] / seconds["separate runs"]).median()
    assert manifest["ratios"]["2 answers a run"]["sweep_over_separate_seconds"] == pytest.approx(expected)
    assert manifest["settings"]["model"] == "random-pocket"


def test_methods_that_disagree_are_not_timed(monkeypatch):
    work = benchmark.make_work(benchmark.random_model(), 1, 1, 3)
    monkeypatch.setitem(benchmark.METHODS, "steered", lambda w: w.answers().assign(answer="something else"))
    with pytest.raises(UsageError, match="differ in 100%"):
        benchmark.measure(work, 1)
    with pytest.raises(UsageError, match="at least one"):
        benchmark.main(Path("anywhere"), rounds=0)
