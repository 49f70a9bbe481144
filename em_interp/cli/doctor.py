"""`em-interp doctor`: what is here and what is not. It imports nothing of the package that could be broken."""

from __future__ import annotations

import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from em_interp import __version__
from em_interp.cli import options

_ANSWERS_WITHIN: Final = 3.0
"""Seconds that the hub is given."""
_SHOWN: Final = ("torch", "transformers", "transformer_lens", "peft", "accelerate", "numpy", "pandas", "plotly")


def doctor(
    out: Annotated[Path, options.takes("out", "a folder, whose free space is told")] = Path("out"),
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, for a bug report or a script")] = False,
) -> None:
    """Versions, devices, Chrome, network, disk and extras: what is here.

    Ends with status 0 whatever is found, and leaves nothing behind.
    """
    parts: dict[str, Callable[[], dict[str, str]]] = {
        "versions": _versions,
        "devices": _devices,
        "figures": _figures,
        "hub": _hub,
        "disk": lambda: _disk(out),
        "extras": _extras,
        "pocket": _pocket,
    }
    found = {name: _tried(part) for name, part in parts.items()}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, lines in found.items():
        for i, (what, said) in enumerate(lines.items()):
            typer.echo(f"{name if i == 0 else '':10}{what:16} {said}".rstrip())


def _tried(part: Callable[[], dict[str, str]]) -> dict[str, str]:
    try:
        return part()
    except Exception as error:  # a broken installation breaks in many ways, and this is where to read of it
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"}


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "em_interp": __version__}
    needs = {name: needed for name, needed, extra in _required() if extra is None}
    for name in dict.fromkeys((*_SHOWN, *(n for n in needs if _version(n) is None or _version(n) not in needs[n]))):
        there = _version(name)
        wanted = needs.get(name)
        wrong = wanted is not None and (there is None or there not in wanted)
        found[name] = f"{there or 'not installed'}{f', and {wanted} is needed: pip install {name!r}' if wrong else ''}"
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _required() -> list[tuple[str, Any, str | None]]:
    """(package, its versions, the extra that asks for it or None) of what this package asks for."""
    from packaging.requirements import Requirement

    try:
        lines = [Requirement(line) for line in metadata.requires("em_interp") or ()]
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        return []
    extras = metadata.metadata("em_interp").get_all("Provides-Extra") or []
    found: list[tuple[str, Any, str | None]] = []
    for line in lines:
        if line.marker is None or line.marker.evaluate({"extra": ""}):
            found.append((line.name, line.specifier, None))
        found += [(line.name, line.specifier, e) for e in extras if line.marker and line.marker.evaluate({"extra": e})]
    return found


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{options.cores()} cores, {_memory()}"}
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        found[f"cuda:{i}"] = f"{name}, {_gigabytes(free)} of {_gigabytes(total)} free: --device-map cuda:{i}, or auto"
    if not torch.cuda.is_available():
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        found["cuda"] = "none here" if built else "none: this torch is built without CUDA"
    there = torch.backends.mps.is_available()
    found["mps"] = "here: --device-map mps" if there else "none"
    return found


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = Path("/proc/meminfo")
    lines = dict(line.split(":") for line in info.read_text().splitlines()) if info.is_file() else {}
    free = lines.get("MemAvailable")
    return f"{_gigabytes(total)} of memory" + (f", {_gigabytes(1024 * int(free.split()[0]))} free" if free else "")


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB"


def _figures() -> dict[str, str]:
    from em_interp.figures.export import CHROME

    chrome = next((path for name in CHROME if (path := shutil.which(name))), None)
    kaleido = _version("kaleido")
    lacking = [] if chrome else ["Chrome or Chromium: install one, or run plotly_get_chrome"]
    lacking += [] if kaleido else ["kaleido: pip install 'em_interp[static]'"]
    if not lacking:
        return {".svg, .png": f"drawn by {chrome}, kaleido {kaleido}"}
    return {".svg, .png": f"not drawn (.html is). Lacking: {'; '.join(lacking)}"}


def _hub() -> dict[str, str]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return {"": "not asked: HF_HUB_OFFLINE is set, so only what is in the cache is found"}
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    name = constants.ENDPOINT.partition("//")[2]
    try:
        with urllib.request.urlopen(request, timeout=_ANSWERS_WITHIN):
            return {name: "reachable"}
    except urllib.error.HTTPError as error:  # an answer, if not the page
        return {name: f"reachable (status {error.code})"}
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return {name: f"not reachable ({reason}): only what is in the cache, or in folders, is found"}


def _disk(out: Path) -> dict[str, str]:
    from huggingface_hub import constants

    places = {"--out": out.absolute(), "hub's cache": Path(constants.HF_HUB_CACHE)}
    return {name: f"{_gigabytes(shutil.disk_usage(_there(path)).free)} free at {path}" for name, path in places.items()}


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _extras() -> dict[str, str]:
    found: dict[str, str] = {}
    by_extra: dict[str, list[str]] = {}
    for name, _, extra in _required():
        if extra not in (None, "dev", "docs"):
            by_extra.setdefault(str(extra), []).append(name)
    for extra, names in by_extra.items():
        absent = [name for name in names if _version(name) is None]
        install = f"{', '.join(absent)} not installed: pip install 'em_interp[{extra}]'"
        found[extra] = install if absent else ", ".join(f"{name} {_version(name)}" for name in names)
    return found


def _pocket() -> dict[str, str]:
    from em_interp.pocket import registry

    return {"weights": f"{len(registry.names())} models in {registry.root()}"}
