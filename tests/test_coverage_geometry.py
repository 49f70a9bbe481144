from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from analyses.benchmarks import coverage_geometry as geometry
from analyses.benchmarks.coverage_scenario import row


def of(interval: str, part: str, questions: int) -> geometry.Scenario:
    """The first row that says so."""
    return next(
        s
        for s in geometry.SCENARIOS
        if s.interval == interval and part in s.setting and s.questions == questions and s.icc == 0.4
    )


def test_rows_are_told_apart_by_their_labels() -> None:
    labels = {tuple(map(str, scenario.labels.values())) for scenario in geometry.SCENARIOS}
    assert len(labels) == len(geometry.SCENARIOS)
    assert {s.interval for s in geometry.SCENARIOS} == {
        "cosine", "null of a cosine", "AUC of probes", "accuracy of probes", "held-out separation", "split-half cosine",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("interval", "part", "n", "old_at_most"),
    [
        ("cosine", "true 0.9, noise 0.5", 300, 0.5),
        ("cosine", "true 0, noise 0.5", 300, 0.7),
        ("null of a cosine", "noise, 1/k", 60, 0.85),
        ("AUC of probes", "AUC 0.5, both", 120, 0.87),
        ("AUC of probes", "AUC 0.6, one class", 120, 0.87),
    ],
)
def test_the_interval_in_use_covers_where_the_one_before_did_not(
    interval: str, part: str, n: int, old_at_most: float
) -> None:
    found = row(of(interval, part, 8), n)
    assert found["coverage_new"] >= 0.9 and found["refused_new"] < 0.05
    assert found["coverage_old"] <= old_at_most


def test_every_kind_of_row_runs() -> None:
    for interval in ("accuracy of probes", "held-out separation", "split-half cosine"):
        found = row(of(interval, "", 8), 3)
        assert 0 <= found["coverage_new"] <= 1 and found["width_new"] > 0


def test_data_sets_have_the_noise_that_is_said() -> None:
    """The plain cosine of a true 1 is shrunk to 1 / (1 + noise^2) where the two share nothing."""
    make = partial(
        geometry.cosines, questions=20, icc=0.4, cosine=0.999, noise=0.5, spectrum="isotropic", d=64, shared=False
    )
    found = make(np.random.default_rng(0), 200)
    centre = np.tanh((np.arctanh(found.old_low) + np.arctanh(found.old_high)) / 2)
    assert centre.mean() == pytest.approx(1 / 1.25, abs=0.04)
