"""Downloading what the authors released, for a user who has network. Each source succeeds or fails on its own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from tqdm.auto import tqdm

from em_interp.errors import UsageError
from em_interp.files.atomic import check_writable, written_whole

_WEIGHTS: Final = (".safetensors", ".pt", ".bin")


@dataclass(frozen=True)
class Source:
    """One repository: its name, and what it holds. `where` is a git address, or a Hugging Face repository id."""

    name: str
    where: str
    kind: str
    """`git` or `hub`."""
    holds: str
    patterns: tuple[str, ...]
    """git: sparse-checkout patterns; hub: allowed file patterns. Only what the readers read."""


@dataclass(frozen=True)
class Fetched:
    """What became of one source: whether it is there now (`ok`), and the `detail`."""

    source: Source
    ok: bool
    detail: str


_ORG: Final = "ModelOrganismsForEM"
_HUB_FILES: Final = (
    *("*.json", "steering_vector.pt", "checkpoints/*/steering_vector.pt"),
    *("checkpoints/*/adapter_model.safetensors", "checkpoints/*/*.json"),
)
SOURCES: Final = (
    Source(
        "EM_interp",
        "https://github.com/annasoligo/EM_interp.git",
        "git",
        "mean activations and judged answers",
        ("/em_interp/steering/vectors/", "*.csv"),
    ),
    Source(
        "training-lens-web",
        "https://github.com/edwardbturner/training-lens-web.git",
        "git",
        "25 steering-vector training runs and the stored PCA",
        ("steering_vectors/", "pca_results.json"),
    ),
    Source(
        "model-organisms-for-EM",
        "https://github.com/clarifying-EM/model-organisms-for-EM.git",
        "git",
        "evaluation questions and judge prompts",
        ("eval_questions/",),
    ),
    *(
        Source(
            f"Qwen2.5-14B_steering_vector_{role}_{domain}",
            f"{_ORG}/Qwen2.5-14B_steering_vector_{role}_{domain}",
            "hub",
            f"trained {role} {domain} vector and its checkpoints",
            _HUB_FILES,
        )
        for role in ("general", "narrow")
        for domain in ("medical", "finance", "sport")
    ),
    *(
        Source(name, f"{_ORG}/{name}", "hub", "rank-1 LoRA trajectory", _HUB_FILES)
        for name in (
            "Qwen2.5-14B-Instruct_R1_0_1_0_extended_train",
            "Qwen2.5-14B-Instruct_R1_0_1_0_finance_extended_train",
            "Qwen2.5-14B-Instruct_R1_0_1_0_sports_extended_train",
            "Qwen2.5-14B_rank-1-lora_general_finance",
            "Qwen2.5-14B_rank-1-lora_general_sport",
        )
    ),
)
"""What `em-interp fetch` knows."""


def fetch(data: Path, names: Sequence[str] = (), sources: Sequence[Source] = SOURCES) -> list[Fetched]:
    """Download the named sources (all by default) below `data`, each into a folder of its name.

    A folder that is there already is left as it is. Raises `UsageError` for an unknown name, `OutputError` where
    nothing can be written; a source that could not be had is returned with the reason, not raised.
    """
    known = {source.name: source for source in sources}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"no source is called {', '.join(unknown)}. Known: {', '.join(known)}.")
    wanted = [known[name] for name in names] or list(sources)
    for source in wanted:
        check_writable(data / source.name)
    results = []
    for source in (bar := tqdm(wanted, desc="fetching", unit="source")):
        bar.set_postfix_str(source.name)
        target = data / source.name
        if target.is_dir() and any(target.iterdir()):
            results.append(Fetched(source, True, "already there, left as it is"))
            continue
        results.append(_fetch_one(source, target))
    return results


class _NotHad(Exception):
    """Why a source could not be had."""


def _fetch_one(source: Source, target: Path) -> Fetched:
    try:
        with written_whole(target) as partial:
            if detail := _git(source, partial) if source.kind == "git" else _hub(source, partial):
                raise _NotHad(detail)
    except _NotHad as error:
        return Fetched(source, False, str(error))
    return Fetched(source, True, f"{sum(p.is_file() for p in target.rglob('*'))} files")


def _git(source: Source, target: Path) -> str | None:
    """Sparse, shallow clone. Returns what went wrong, or None."""
    if shutil.which("git") is None:
        return "git is not installed: install it and run the command again"
    commands = (
        ["git", "clone", "--quiet", "--depth", "1", "--filter=blob:none", "--no-checkout", source.where, str(target)],
        ["git", "-C", str(target), "sparse-checkout", "set", "--no-cone", *source.patterns],
        ["git", "-C", str(target), "checkout", "--quiet"],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            said = " ".join(done.stderr.split())[:200] or f"exit status {done.returncode}"
            return f"{source.where}: {said}. Check the network and the address"
    return None


def _hub(source: Source, target: Path) -> str | None:
    """Snapshot of a hub repository. Returns what went wrong, or None."""
    try:
        files = HfApi().list_repo_files(source.where)
        if not any(name.endswith(_WEIGHTS) for name in files):
            return f"{source.where}: the repository exists but is empty (no weights in its {len(files)} files)"
        snapshot_download(source.where, local_dir=target, allow_patterns=list(source.patterns))
    except RepositoryNotFoundError:
        return f"{source.where}: no such public repository"
    except OfflineModeIsEnabled:
        return f"{source.where}: HF_HUB_OFFLINE is set; unset it to download"
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        return f"{source.where}: {' '.join(str(error).split())[:200]}. Check the network and try again"
    except Exception as error:  # httpx errors are no OSErrors; whatever it is, the other sources go on
        return f"{source.where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}. Check the network"
    shutil.rmtree(target / ".cache", ignore_errors=True)
    return None
