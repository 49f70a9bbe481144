from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analyses.benchmarks import coverage
from analyses.benchmarks.coverage_scenario import Outcomes, Scenario, row


def normal_means(rng: np.random.Generator, n_datasets: int, k: int) -> Outcomes:
    """Means of k normal values of variance 1: old knows too little (z), new is Student's; every tenth is refused."""
    data = rng.standard_normal((n_datasets, k)) + 3
    mean, error = data.mean(1), data.std(1, ddof=1) / k**0.5
    z, t = stats.norm.ppf(0.975), stats.t.ppf(0.975, k - 1)
    refused = np.where(np.arange(n_datasets) % 10 == 0, np.nan, 0.0)
    return Outcomes(
        np.full(n_datasets, 3.0), mean - z * error, mean + z * error, mean - t * error + refused, mean + t * error
    )


def scenarios() -> list[Scenario]:
    return [Scenario("mean", "normal", k, partial(normal_means, k=k)) for k in (3, 8)]


def test_a_row_counts_what_its_data_sets_got() -> None:
    found = row(scenarios()[0], 20_000)
    z, df = stats.norm.ppf(0.975), 2
    assert found["coverage_old"] == pytest.approx(2 * stats.t.cdf(z, df) - 1, abs=0.01)
    assert found["coverage_new"] == pytest.approx(0.95, abs=0.01)
    assert found["miss_low_new"] + found["miss_high_new"] == pytest.approx(1 - found["coverage_new"])
    assert (found["refused_old"], found["refused_new"]) == (0, pytest.approx(0.1))
    assert found["width_new"] / found["width_old"] == pytest.approx(stats.t.ppf(0.975, df) / z, rel=0.02)
    assert found["asked"] == "0.9-1" and found["met"] is True
    assert row(scenarios()[1], 500)["asked"] == "0.93-0.97"


def test_a_stopped_run_goes_on_and_equals_a_whole_one(tmp_path) -> None:
    whole = coverage.run("means", scenarios(), tmp_path / "whole", 200, 0)
    coverage.run("means", scenarios()[:1], tmp_path / "stopped", 200, 0)
    first = (tmp_path / "stopped" / "coverage_means.csv").read_text()
    again = coverage.run("means", scenarios(), tmp_path / "stopped", 200, 0)
    pd.testing.assert_frame_equal(again, whole, check_dtype=False)
    assert (tmp_path / "stopped" / "coverage_means.csv").read_text().startswith(first)
    other = coverage.run("means", scenarios()[:1], tmp_path / "stopped", 200, 1)
    assert len(other) == 1 and other["coverage_new"].item() != whole["coverage_new"].iloc[0]
