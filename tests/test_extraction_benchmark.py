"""The benchmark of extraction runs, and finds out which ways are right."""

from __future__ import annotations

import math
import os

from analyses.benchmarks import extraction
from analyses.benchmarks.common import random_chats, random_model


def test_extraction_at_a_small_size():
    model = random_model(64, 2, 100, seed=0)
    work = extraction.prepare(model, random_chats(8, 12.0, 0.5, 100, seed=0), 64)
    assert work.n_tokens == sum(len(row) for row in work.encoded) < work.tokens(work.arrival_groups())
    assert work.tokens(work.sorted_groups()) <= work.tokens(work.arrival_groups())
    for groups in (work.sorted_groups(), work.arrival_groups()):
        assert sorted(i for group in groups for i in group) == list(range(8))
    table = extraction.measure(work, rounds=2, warm_up=0).set_index("method")
    for name in ("ours", "bridge run_with_cache", "reference"):
        assert table.loc[name, "state"] == "right" and table.loc[name, "worst_relative_error"] < 1e-5
    # the last entry of hidden_states is after the final norm
    assert table.loc["output_hidden_states", "state"] == "silently wrong at layers [1]"
    assert table.loc["bare body, sorted", "of_sorted"] == 1.0 and table.loc["ours", "tokens_per_s"] > 0
    absent = extraction.missing_peers()
    for name in extraction.PEERS:
        assert name in absent or table.loc[name, "state"] in ("right", "no means")
    for name, why in absent.items():
        assert table.loc[name, "state"] == why and math.isnan(table.loc[name, "tokens_per_s"])
    assert 0 < extraction.peak_mb("ours", work) < 1e-6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
