"""A real family's stand-in from its hub names to the report; the others, and kills: `python -m tests.stand_ins`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tenacity import wait_none
from typer.testing import CliRunner

from analyses.general_vs_narrow import efficiency
from em_interp.cli import app
from tests import stand_ins
from tests.openai_server import serving

pytest.importorskip("inspect_ai")
ONLY = ("em_rates", "efficiency")


def test_a_suite_of_hub_names_is_sampled_judged_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All published layouts; offline; no prompt reaches the judge twice, on a second run none at all."""
    hub, family = tmp_path / "hub", stand_ins.FAMILIES["qwen2"]
    finetunes = stand_ins.make_hub(hub, family, n_layers=3)
    suite = stand_ins.make_suite(tmp_path, family, finetunes, samples=1)
    monkeypatch.setattr(efficiency, "CHATS", 4)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("inspect_ai.model._retry.wait_exponential_jitter", lambda **_: wait_none())
    given = ["reproduce", "--suite", str(suite), "--out", str(tmp_path / "out"), "--yes", "--no-static"]
    given += [word for name in ONLY for word in ("--only", name)]
    with serving() as judge:
        for name, value in stand_ins.surroundings(hub, judge).items():
            monkeypatch.setenv(name, value)
        found = CliRunner().invoke(app, given, catch_exceptions=False)
        assert "answers of about" in found.output and "for the judge" in found.output
        asked_once = sum(judge.requests.values())
        assert set(judge.served.values()) == {1}
        made = stand_ins.tables(tmp_path / "out")
        again = CliRunner().invoke(app, given, catch_exceptions=False)
        assert sum(judge.requests.values()) == asked_once
    assert found.exit_code == again.exit_code == 0, found.output
    assert stand_ins.tables(tmp_path / "out") == made
    assert stand_ins.wrong(tmp_path / "out", finetunes, ONLY) == []
