"""`em-interp doctor`: short, true, and status 0 whatever is broken."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from em_interp import __version__
from em_interp.cli import app

doctor_module = importlib.import_module("em_interp.cli.doctor")  # the package's name of it is the command


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def told(*words: str) -> str:
    found = CliRunner().invoke(app, ["doctor", *words])
    assert found.exit_code == 0, found.exception
    return found.output


def as_json() -> dict[str, dict[str, str]]:
    return dict(json.loads(told("--json")))


def test_it_is_short_and_says_what_is_here(tmp_path: Path) -> None:
    said = told("--out", "somewhere/else")
    assert len(said.splitlines()) < 40 and __version__ in said and "cores" in said
    for part in ("versions", "devices", "figures", "hub", "disk", "extras", "pocket"):
        assert f"\n{part} " in f"\n{said}"
    assert f"free at {tmp_path / 'somewhere' / 'else'}" in said and list(tmp_path.iterdir()) == []
    assert "HF_HUB_OFFLINE is set" in said


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, format: str, *values: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


@pytest.mark.parametrize(("status", "said"), [(200, "reachable"), (403, "reachable (status 403)")])
def test_a_hub_that_answers(hub: HTTPServer, status: int, said: str) -> None:
    hub.status = status  # type: ignore[attr-defined]
    assert list(as_json()["hub"].values()) == [said]


@pytest.mark.usefixtures("hub")
def test_a_hub_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "do_HEAD", lambda _: threading.Event().wait(2))
    monkeypatch.setattr(doctor_module, "_ANSWERS_WITHIN", 0.2)
    assert "not reachable" in next(iter(as_json()["hub"].values()))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "not reachable" in next(iter(as_json()["hub"].values()))


def test_what_is_lacking_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    there = doctor_module._version
    absent = ("kaleido", "gguf", "peft")
    monkeypatch.setattr(doctor_module, "_version", lambda name: None if name in absent else there(name))
    monkeypatch.setattr("shutil.which", lambda _: None)
    found = as_json()
    assert "pip install 'em_interp[static]'" in found["figures"][".svg, .png"]
    assert "plotly_get_chrome" in found["figures"][".svg, .png"]
    if found["extras"]:  # installed, not only a source tree
        assert "pip install 'em_interp[gguf]'" in found["extras"]["gguf"]
        assert found["versions"]["peft"].startswith("not installed, and") and "pip install" in found["versions"]["peft"]


def test_what_is_broken_is_said_and_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = as_json()
    assert "torch" in found["devices"]["failed"] and "free at" in found["disk"]["--out"]
