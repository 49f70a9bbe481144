"""What produced a result: configuration, seeds, versions, git revision, input hashes."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from em_interp.files.atomic import write_text

PACKAGES: Final = (
    *("em_interp", "torch", "transformers", "transformer_lens", "peft", "safetensors", "numpy", "scipy"),
    *("scikit-learn", "pandas", "plotly"),
)


NUMERIC: Final = ("python", "torch", "transformers", "peft", "numpy", "scipy", "scikit-learn", "pandas")
"""Those whose release can change a number."""


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """Path relative to ``root`` -> SHA-256."""
    return {path.relative_to(root).as_posix(): sha256(path) for path in sorted(files)}


def fingerprint(content: Any) -> str:
    """SHA-256 of a JSON value: the same content gives the same fingerprint."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def source_hash() -> str:
    """One hash over the package's own source files, so that a change of code is seen without git."""
    root = Path(__file__).resolve().parents[2]
    files = [p for name in ("em_interp", "analyses") for p in (root / name).rglob("*") if p.suffix in (".py", ".toml")]
    return fingerprint(hash_files(root, files))


def code_hash() -> str:
    """One hash over the source files and the versions of `NUMERIC`: the code that a kept result was made by."""
    found = versions()
    return fingerprint([source_hash(), {name: found[name] for name in NUMERIC}])


def git_revision() -> str | None:
    """Commit of the source tree, with ``+changes`` where it differs from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in megabytes (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def write_manifest(path: Path, content: dict[str, Any]) -> Path:
    """Write ``content`` with what this process knows of itself, as JSON. Atomic."""
    whole = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git_revision": git_revision(),
        "source_sha256": source_hash(),
        "platform": platform.platform(),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        **content,
    }
    return write_text(path, json.dumps(whole, indent=2, default=str) + "\n")
