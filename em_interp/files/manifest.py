"""What produced a result: configuration, seeds, versions, git revision, input hashes."""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from em_interp.files.atomic import write_text

PACKAGES: Final = (
    *("em_interp", "torch", "transformers", "transformer_lens", "peft", "safetensors", "numpy", "scipy"),
    *("scikit-learn", "pandas", "plotly"),
)
"""Those whose versions a manifest names."""
NUMERIC: Final = ("python", "torch", "transformers", "peft", "numpy", "scipy", "scikit-learn", "pandas")
"""Those whose release can change a number."""


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """Path relative to `root` -> SHA-256."""
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


_ROOT: Final = Path(__file__).resolve().parents[2]
"""Where the project's packages lie."""


def source_hash() -> str:
    """One hash over the project's own source files, so that a change of code is seen without git. Not of benchmarks."""
    found = [p for name in ("em_interp", "analyses") for p in (_ROOT / name).rglob("*") if p.suffix in (".py", ".toml")]
    return fingerprint(hash_files(_ROOT, [p for p in found if "benchmarks" not in p.relative_to(_ROOT).parts]))


def code_hash(*modules: str) -> str:
    """One hash over source files and the versions of `NUMERIC`: the code that a kept result was made by.

    modules: full names; then only they count, and what they import of this project, directly or not.
    """
    return _code_hash(modules)


@cache
def _code_hash(modules: tuple[str, ...]) -> str:
    found = versions()
    source = fingerprint(hash_files(_ROOT, _imported(modules))) if modules else source_hash()
    return fingerprint([source, {name: found[name] for name in NUMERIC}])


def _imported(modules: Sequence[str]) -> set[Path]:
    """The files of modules of this project, of the packages that they lie in, and of all that these import of it."""
    files: set[Path] = set()
    todo = list(modules)
    while todo:
        name = todo.pop()
        for depth in range(1, name.count(".") + 2):
            place = _ROOT.joinpath(*name.split(".")[:depth])
            for path in (place / "__init__.py", place.with_suffix(".py")):
                if path.is_file() and path not in files:
                    files.add(path)
                    todo += _imports(path)
    return files


@cache
def _imports(path: Path) -> list[str]:
    """The names in a file that may be modules of this project."""
    found = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] in ("em_interp", "analyses")]


def git_revision() -> str | None:
    """Commit of the source tree, with `+changes` where it differs from it; None outside a checkout."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        head = _git(_ROOT, "rev-parse", "HEAD")
        changed = _git(_ROOT, "status", "--porcelain", "--untracked-files=no")
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
    """Write `content` with what this process knows of itself, as JSON. Atomic."""
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
