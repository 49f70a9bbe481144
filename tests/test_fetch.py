"""Downloading, against repositories made here; the network is not touched."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import em_interp.published.fetch as module
from em_interp.errors import UsageError
from em_interp.published import scan
from em_interp.published.fetch import SOURCES, Source, fetch


@pytest.fixture
def repository(synthetic: Path) -> Source:
    git = ["git", "-C", str(synthetic), "-c", "user.name=t", "-c", "user.email=t@t"]
    (synthetic / "large_and_not_wanted.bin").write_bytes(b"0" * 1000)
    for arguments in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-q", "-m", "release"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    subprocess.run([*git, "config", "uploadpack.allowFilter", "true"], check=True)
    patterns = ("/vectors/", "runs/", "*.csv")
    return Source("release", f"file://{synthetic}", "git", "everything", patterns)


def test_git_brings_what_the_readers_read(repository: Source, tmp_path: Path) -> None:
    target = tmp_path / "fetched"
    results = fetch(target, sources=[repository])
    assert [r.ok for r in results] == [True], results
    assert not (target / "release" / "large_and_not_wanted.bin").exists()
    data = scan(target, progress=False)
    assert data.problems == []
    assert (len(data.splits), len(data.judged)) == (3, 6)
    again = fetch(target, sources=[repository])
    assert again[0].detail == "already there, left as it is"


def test_what_could_not_be_had_is_said_and_leaves_nothing_behind(repository: Source, tmp_path: Path) -> None:
    absent = Source("absent", f"file://{tmp_path}/nowhere", "git", "nothing", ("*",))
    results = fetch(tmp_path / "fetched", sources=[absent, repository])
    assert [r.ok for r in results] == [False, True]
    assert "nowhere" in results[0].detail
    assert sorted(p.name for p in (tmp_path / "fetched").iterdir()) == ["release"]


class FakeHub:
    def __init__(self, files: list[str] | Exception) -> None:
        self.files = files

    def list_repo_files(self, where: str) -> list[str]:
        if isinstance(self.files, Exception):
            raise self.files
        return self.files


HUB = Source("thing", "org/thing", "hub", "a vector", ("*.json",))


def test_an_empty_hub_repository_is_said_to_be_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HfApi", lambda: FakeHub([".gitattributes", "README.md"]))
    result = fetch(tmp_path, sources=[HUB])[0]
    assert not result.ok
    assert "exists but is empty" in result.detail


def test_hub_files_arrive_and_failures_do_not_stop_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(where: str, local_dir: Path, allow_patterns: list[str]) -> None:
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        (Path(local_dir) / "adapter_config.json").write_text("{}")

    monkeypatch.setattr(module, "HfApi", lambda: FakeHub(["steering_vector.pt"]))
    monkeypatch.setattr(module, "snapshot_download", download)
    assert fetch(tmp_path, sources=[HUB])[0].ok
    for error in (ConnectionError("no route"), RuntimeError("odd")):
        monkeypatch.setattr(module, "HfApi", lambda error=error: FakeHub(error))
        other = Source("other", "org/other", "hub", "a vector", ("*",))
        result = fetch(tmp_path, sources=[other])[0]
        assert not result.ok
        assert "org/other" in result.detail


def test_offline_is_said(tmp_path: Path) -> None:
    result = fetch(tmp_path, sources=[HUB])[0]
    assert not result.ok
    assert "org/thing" in result.detail


def test_unknown_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no source is called nothing. Known: EM_interp"):
        fetch(tmp_path, ["nothing"])
    assert len({s.name for s in SOURCES}) == len(SOURCES)
