from __future__ import annotations

import json

import pandas as pd
import pytest

from analyses.benchmarks import landscape


def test_landscape_benchmark_runs_and_its_ways_agree(tmp_path):
    result = landscape.main(["--smoke", "--out", str(tmp_path)])
    rounds = pd.read_csv(tmp_path / "landscape.csv")
    assert (
        set(rounds["way"]) == {"landscape", "plain", "reference"}
        and (rounds["largest_relative_difference"] < 1e-5).all()
    )
    assert (rounds["seconds"] > 0).all() and len(result) == 4
    # 6 blocks and all logits, against the blocks above layer 3 and the response's logits
    assert result["allowed_speedup"].between(1.5, 3.5).all()
    saved = 1 - 1 / result["speedup_over_plain"]
    assert result["share_of_saving"].tolist() == pytest.approx((saved / (1 - 1 / result["allowed_speedup"])).tolist())
    manifest = json.loads((tmp_path / "landscape_manifest.json").read_text())
    assert manifest["benchmark"] == "landscape" and manifest["shape"]["hidden_size"] == 256
