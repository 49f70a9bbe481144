"""What a folder of downloaded releases holds: found by file name and format, never by the names of particular runs."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from jaxtyping import Float
from tqdm.auto import tqdm

from em_interp.errors import BadValueError, EmInterpError, MissingDataError, UnreadableFileError
from em_interp.files.inputs import open_text, read_json
from em_interp.files.texts import QuestionSet
from em_interp.published.activations import CELL_FILE, ActivationSplit, model_of, read_activation_folder
from em_interp.published.judged import read_judged_csv
from em_interp.published.questions import JudgePrompt, read_yaml
from em_interp.published.runs import TrainingLog, looks_like_run, read_run
from em_interp.training.trajectories import Trajectory

GET_IT: Final = "`em-interp fetch --data DIR` downloads what the authors released"
"""The remedy for what is missing."""
_STEERING_FOLDER: Final = re.compile(r"layer_(\d+)")
_ABLATION_FOLDER: Final = re.compile(r"layer_range(\d+)-(\d+)")
_VARIANT: Final = r"_(json|template)$"
_SCALE_FILE: Final = re.compile(r"responses_scale_(-?[\d.]+)\.csv")


@dataclass(frozen=True, eq=False)
class JudgedSet:
    """One judged CSV and what its place on disk says of it.

    The authors write `ORGANISM/EXPERIMENT/ARM/WHERE/responses_*.csv`.
    """

    path: Path
    """The file."""
    role: str
    """`steering`, `ablation`, `baseline` (of an ablation) or `organism`."""
    folder: str
    """`ORGANISM`"""
    experiment: str
    """The path down to and including `EXPERIMENT`; arms of one experiment share it."""
    arm: str
    """The direction's folder, for steering and ablation."""
    organism: str
    """For `organism` and `baseline`: the model's name in the file name."""
    layers: str | None
    """Where it was steered (`24`) or ablated (`0-47`); None for an organism."""
    scale: float | None
    """The steering coefficient; None for others."""
    answers: pd.DataFrame
    """As `read_judged_csv` gives it, with the columns of `PublishedData.name_questions`."""

    @property
    def model(self) -> str:
        """The base model, as the folder's name tells it."""
        return model_of(self.folder)


@dataclass(frozen=True, eq=False)
class StoredPCA:
    """The web app's `pca_results.json` (at `path`): explained_variance_ratio, the runs of its `basis`, and projections.

    projections: run -> (steps, coordinates).
    """

    path: Path
    explained_variance_ratio: Float[np.ndarray, " n_components"]
    basis: tuple[str, ...]
    projections: dict[str, tuple[tuple[int, ...], Float[np.ndarray, "steps n_components"]]]


@dataclass(eq=False)
class PublishedData:
    """Everything usable below one folder (`root`), and every problem met on the way (`problems`, each with its remedy).

    splits: mean activations; trajectories and logs: training runs; judged: answers with scores; question_sets, judges:
    what was asked, and the judges' prompts with their files; stored_pca: the web app's.
    """

    root: Path
    splits: list[ActivationSplit] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    logs: list[TrainingLog] = field(default_factory=list)
    judged: list[JudgedSet] = field(default_factory=list)
    question_sets: list[QuestionSet] = field(default_factory=list)
    judges: list[tuple[Path, JudgePrompt]] = field(default_factory=list)
    stored_pca: list[StoredPCA] = field(default_factory=list)
    problems: list[EmInterpError] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    """Every file that was looked at, for the manifest."""

    @property
    def described(self) -> str:
        """What is here, counted, in words."""
        counts = {
            "sets of mean activations": len(self.splits),
            "training runs": len(self.trajectories),
            "files of judged answers": len(self.judged),
        }
        return "released files: " + (", ".join(f"{n} {what}" for what, n in counts.items() if n) or "none that is used")

    def name_questions(self) -> None:
        """Give every judged answer its base question and wording (plain, json, template), from the question files.

        Variants of a question are not independent of it, so intervals cluster by the base question. A text that no
        file knows is its own base, and its wording is unknown.
        """
        ids: dict[str, str] = {}
        for questions in self.question_sets:
            for question in questions.questions:
                for text in question.paraphrases:
                    ids.setdefault(text.strip(), question.id)
        for judged in self.judged:
            texts = judged.answers["question"].astype(str).str.strip()
            named = texts.map(ids).astype("string")
            judged.answers["base_question"] = named.str.replace(_VARIANT, "", regex=True).fillna(texts)
            variant = named.str.extract(_VARIANT)[0].fillna("plain")
            judged.answers["wording"] = variant.where(named.notna(), "unknown")

    def families(self) -> dict[str, list[Trajectory]]:
        """Runs that differ only in KL weight, phase or general/narrow, and have one width."""
        groups: dict[str, list[Trajectory]] = {}
        for trajectory in self.trajectories:
            groups.setdefault(trajectory.family, []).append(trajectory)
        return groups


def scan(root: Path | str, *, progress: bool = True) -> PublishedData:
    """Read everything below `root`; what cannot be used is listed in `problems` and the rest goes on.

    Raises `MissingDataError` where the folder does not exist or holds nothing that this package reads.
    """
    root = Path(root)
    if not root.is_dir():
        raise MissingDataError(root, "there is no such folder", f"pass the folder of the downloaded files; {GET_IT}")
    data = PublishedData(root)
    steps = _plan(root, data)
    for label, step in tqdm(steps, desc="reading", unit="item", disable=not progress):
        try:
            step()
        except EmInterpError as error:
            data.problems.append(error)
        except MemoryError:
            raise
        except Exception as error:  # a file that no reader foresaw must not cost the others
            data.problems.append(UnreadableFileError(label, f"it could not be read ({error!r})", "leave it out"))
    data.files = sorted(path for path in data.files if path.is_file())
    data.name_questions()
    if not (data.splits or data.trajectories or data.judged):
        details = "; ".join(str(problem) for problem in data.problems[:3])
        raise MissingDataError(
            root,
            "it holds no mean activations, training runs or judged answers that could be read"
            + (f" ({details})" if details else ""),
            f"point --data to the folder that holds the releases; {GET_IT}",
        )
    return data


def _plan(root: Path, data: PublishedData) -> list[tuple[Path, Callable[[], None]]]:
    steps: list[tuple[Path, Callable[[], None]]] = []
    seen: set[Path] = set()
    for name, folders, files in os.walk(root, followlinks=True):
        folder = Path(name)
        if folder.resolve() in seen:  # a link back up, or the same folder linked twice
            folders[:] = []
            continue
        seen.add(folder.resolve())
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        visible = sorted(f for f in files if not f.startswith("."))
        if looks_like_run(folder):
            steps.append((folder, _run_step(folder, data)))
            data.files += [p for p in folder.rglob("*") if p.is_file()]
            folders[:] = []
            continue
        if not folders and not [f for f in visible if not f.lower().startswith("readme")]:
            steps.append((folder, _empty_step(folder)))
        if any(CELL_FILE.fullmatch(f) for f in visible):
            steps.append((folder, _activation_step(folder, data)))
            data.files += [folder / f for f in visible if CELL_FILE.fullmatch(f)]
        for path in (folder / f for f in visible):
            reader = _reader_of(path, root)
            if reader is not None:
                steps.append((path, _file_step(reader, path, data)))
                data.files.append(path)
    return steps


def _run_step(folder: Path, data: PublishedData) -> Callable[[], None]:
    def step():
        # type: () -> None
        run = read_run(folder, data.problems)
        data.trajectories += run.trajectories
        if run.log is not None:
            data.logs.append(run.log)

    return step


def _activation_step(folder: Path, data: PublishedData) -> Callable[[], None]:
    return lambda: data.splits.extend(read_activation_folder(folder, data.problems))


def _empty_step(folder: Path) -> Callable[[], None]:
    def step():
        # type: () -> None
        raise MissingDataError(
            folder,
            "the folder is empty: it holds no data file",
            "remove it, or fetch it again (some of the released repositories exist but are empty)",
        )

    return step


def _file_step(reader: Callable[[Path, PublishedData], None], path: Path, data: PublishedData) -> Callable[[], None]:
    return lambda: reader(path, data)


def _reader_of(path: Path, root: Path) -> Callable[[Path, PublishedData], None] | None:
    """Which reader a file belongs to. Files of no known kind are left alone."""
    suffix = path.suffix.lower()
    if suffix == ".csv" and (path.name.startswith("responses") or _header_has_question(path)):
        return _read_judged
    if suffix in (".yaml", ".yml") and re.search(r"question|judge|eval", str(path.relative_to(root)).lower()):
        return _read_yaml
    if path.name == "pca_results.json":
        return _read_stored_pca
    return None


def _header_has_question(path: Path) -> bool:
    try:
        with open_text(path, newline="") as file:
            return "question" in next(csv.reader(file), [])
    except (EmInterpError, csv.Error):
        return True  # let the reader say what is wrong


def _read_yaml(path: Path, data: PublishedData) -> None:
    content = read_yaml(path)
    if isinstance(content, QuestionSet):
        data.question_sets.append(content)
    else:
        data.judges += [(path, judge) for judge in content]


def _read_judged(path: Path, data: PublishedData) -> None:
    parts = path.relative_to(data.root).parts
    padded = ("",) * max(0, 5 - len(parts)) + parts
    folder, _, arm, where, name = padded[-5:]
    experiment = "/".join(parts[:-3])
    organism = re.sub(r"^responses_?", "", path.stem) or path.stem
    scale_match = _SCALE_FILE.fullmatch(name)
    scale = float(scale_match[1]) if scale_match else None
    layers: str | None = None
    is_ablation = any(part.lower().startswith("ablat") for part in parts[:-1])
    if (match := _STEERING_FOLDER.fullmatch(where)) and scale is not None and not is_ablation:
        role, layers = "steering", match[1]
    elif is_ablation and (arm == "baseline" or where == "no_ablate"):
        role = "baseline"
    elif is_ablation:
        role = "ablation"
        block = _ABLATION_FOLDER.fullmatch(where)
        layers = f"{block[1]}-{int(block[2]) - 1}" if block else where
    else:
        role = "organism"
    data.judged.append(JudgedSet(path, role, folder, experiment, arm, organism, layers, scale, read_judged_csv(path)))


def _read_stored_pca(path: Path, data: PublishedData) -> None:
    try:
        content = read_json(path)
        ratios = np.asarray(content["pca_info"]["explained_variance_ratio"], dtype=float)
        basis = tuple(dict.fromkeys(map(str, content["pca_models"]["model_names"])))
        rows = zip(
            content["pca_models"]["model_names"],
            content["pca_models"]["checkpoint_numbers"],
            content["pca_models"]["projected_coordinates"],
            strict=True,
        )
        collected: dict[str, tuple[list[int], list[list[float]]]] = {}
        for name, step, point in rows:
            steps, points = collected.setdefault(str(name), ([], []))
            steps.append(int(step))
            points.append([float(value) for value in point])
        for name, entry in content.get("projection_models", {}).items():
            collected[str(name)] = ([int(s) for s in entry["checkpoint_numbers"]], entry["projected_coordinates"])
        projections = {n: (tuple(s), np.asarray(p, dtype=float)) for n, (s, p) in collected.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableFileError(
            path, f"it lacks the web app's PCA layout ({error!r})", "download it again"
        ) from error
    if not all(np.isfinite(points).all() for _, points in projections.values()) or not np.isfinite(ratios).all():
        raise BadValueError(path, "it holds NaN or infinite numbers", "download it again")
    data.stored_pca.append(StoredPCA(path, ratios, basis, projections))
