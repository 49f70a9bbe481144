"""Released training runs: steering-vector and LoRA checkpoints, in both layouts the authors used.

GitHub (training-lens-web): `RUN/steering_vector_checkpoint_N.pt`, one column vector each.
Hub: `RUN/checkpoints/checkpoint-N/steering_vector.pt` (dictionaries) with `adapter_config.json`, or
`RUN/checkpoints/checkpoint-N/adapter_model.safetensors` (PEFT) with `trainer_state.json`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from em_interp.errors import (
    AdapterError,
    AmbiguousDataError,
    BadValueError,
    EmInterpError,
    MissingDataError,
    ShapeError,
    UnreadableFileError,
    UsageError,
)
from em_interp.files.adapters import CONFIG, LoraConfig, plain_lora
from em_interp.published.activations import model_of
from em_interp.published.torchfile import check_finite, load_tensors, load_torch
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.training.trajectories import RunName, Trajectory

_GITHUB_FILE: Final = re.compile(r"steering_vector_checkpoint_(\d+)\.pt")
_HUB_FOLDER: Final = re.compile(r"checkpoint-(\d+)")
_LORA_KEY: Final = re.compile(r"(?P<module>.*layers\.(?P<layer>\d+)\..+)\.lora_(?P<matrix>[AB])(?:\.\w+)?\.weight")
_FETCH: Final = "download the run again, or leave the file out"
_PLAIN: Final = "take a run of plain LoRA, whose theta is scale * B A"


@dataclass(frozen=True, eq=False)
class LoraCheckpoint:
    """The matrices of one adapter checkpoint: A and B of each module, at training step `step`."""

    step: int
    A: dict[str, Float[Tensor, "rank d_in"]]
    B: dict[str, Float[Tensor, "d_out rank"]]


@dataclass(frozen=True, eq=False)
class TrainingLog:
    """The `loss` and gradient norm (`grad_norm`) at the logged `steps` of a run, from its `trainer_state.json`."""

    run: str
    steps: tuple[int, ...]
    loss: tuple[float | None, ...]
    grad_norm: tuple[float | None, ...]


@dataclass
class Run:
    """What one run folder gave: `trajectories` (of a LoRA one a module) and its `log`, if any."""

    trajectories: list[Trajectory] = field(default_factory=list)
    log: TrainingLog | None = None


def checkpoint_files(folder: Path) -> dict[Path, int]:
    """Checkpoint files of a run folder and their steps, in either layout. Empty where there is none.

    A repository that holds only its trained vector (a top-level `steering_vector.pt`) is a run of one checkpoint, at
    the step that its trainer_state.json names, or 0.
    """
    files: dict[Path, int] = {}
    for path in folder.glob("steering_vector_checkpoint_*.pt"):
        if match := _GITHUB_FILE.fullmatch(path.name):
            files[path] = int(match[1])
    for parent in (folder / "checkpoints", folder):
        for step_folder in parent.glob("checkpoint-*"):
            if match := _HUB_FOLDER.fullmatch(step_folder.name):
                for name in ("steering_vector.pt", "adapter_model.safetensors"):
                    if (step_folder / name).is_file():
                        files[step_folder / name] = int(match[1])
    if not files and (end := folder / "steering_vector.pt").is_file():
        files[end] = int(_number(_read_json(folder / "trainer_state.json", []).get("global_step")) or 0)
    return files


def looks_like_run(folder: Path) -> bool:
    """Whether a folder is a training run: it has checkpoints, or the files that come with them."""
    if checkpoint_files(folder) or (folder / "checkpoints").is_dir():
        return True
    return any((folder / name).is_file() for name in ("adapter_config.json", "steering_vector.pt"))


def read_run(folder: Path | str, problems: list[EmInterpError] | None = None) -> Run:
    """Every checkpoint of a run. With `problems`, bad files are listed there and the others still used.

    A run whose checkpoint numbers repeat is refused whole: nothing says which file is the right one. Raises
    `MissingDataError` (no weights), `AmbiguousDataError`, or what the checkpoint files raise.
    """
    folder = Path(folder)
    files = checkpoint_files(folder)
    if not files and (folder / "adapter_model.safetensors").is_file():
        raise MissingDataError(
            folder,
            "it holds a finished adapter and no checkpoints, so there is no training run to follow",
            "fetch a repository with checkpoints/; the adapter itself loads with PEFT",
        )
    if not files:
        raise MissingDataError(
            folder,
            "the repository exists but is empty: it holds no checkpoint with weights",
            "nothing can be done here if its source is empty too (several of the released repositories are); "
            "use another organism",
        )
    repeated = sorted(step for step, count in Counter(files.values()).items() if count > 1)
    if repeated:
        clash = sorted(str(path.relative_to(folder)) for path, step in files.items() if step == repeated[0])
        raise AmbiguousDataError(
            folder,
            f"checkpoint numbers appear twice: {repeated[:5]} (for example {' and '.join(clash)})",
            "keep one file for each step",
        )
    ordered = sorted(files.items(), key=lambda item: item[1])
    name = RunName.parse(folder.name)
    config = _read_json(folder / "adapter_config.json", problems)
    first = ordered[0][0].parent / "adapter_config.json"
    config = config or _read_json(first, problems)
    vectors = [(path, step) for path, step in ordered if path.suffix == ".pt"]
    adapters = [(path, step) for path, step in ordered if path.suffix == ".safetensors"]
    run = Run()
    if vectors:
        run.trajectories.append(_read_vectors(folder, name, config, vectors, problems))
    if adapters:
        run.trajectories.extend(_read_adapters(folder, name, config, adapters, problems))
    run.log = _read_log(folder, ordered[-1][0].parent, problems)
    return run


def solution_at(trajectory: Trajectory, step: int) -> SteeringVector:
    """The steering vector of one checkpoint, as something to attach, scale and perturb.

    Its base stays open: a run's name does not say which chat model of a family it was trained on.
    Raises `UsageError` for a run that is not of steering vectors, that names no layer or alpha, or has no such step.
    """
    if trajectory.parameter != "steering-vector" or trajectory.layer is None or trajectory.scales is None:
        raise UsageError(
            f"{trajectory.name}: parameter {trajectory.parameter}, layer {trajectory.layer}; a solution needs a "
            "steering vector with layer and alpha. Read LoRA checkpoints with em_interp.solutions.load.load_checkpoints"
        )
    if step not in trajectory.steps:
        raise UsageError(
            f"{trajectory.name} has no step {step}; it has {trajectory.steps[0]} to {trajectory.steps[-1]}"
        )
    index = trajectory.steps.index(step)
    alpha = float(trajectory.scales[index])
    return SteeringVector(trajectory.vectors[index].float(), trajectory.layer, alpha)


def _refuse(error: EmInterpError, problems: list[EmInterpError] | None) -> None:
    if problems is None:
        raise error
    problems.append(error)


def _read_json(path: Path, problems: list[EmInterpError] | None) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        _refuse(UnreadableFileError(path, f"it is not readable JSON ({error})", "download it again"), problems)
        return {}
    if not isinstance(content, dict):
        _refuse(UnreadableFileError(path, "it holds no JSON object", "download it again"), problems)
        return {}
    return content


def _read_vectors(
    folder: Path,
    name: RunName,
    config: dict[str, Any],
    files: list[tuple[Path, int]],
    problems: list[EmInterpError] | None,
) -> Trajectory:
    kept: list[tuple[int, Path, Tensor]] = []
    refused: list[int] = []
    alphas, layers = {_number(config.get("alpha"))}, {_number(config.get("layer_idx"))}
    for path, step in files:
        try:
            vector, extra = _read_vector(path)
        except EmInterpError as error:
            _refuse(error, problems)
            refused.append(step)
            continue
        alphas.add(_number(extra.get("alpha")))
        layers.add(_number(extra.get("layer_idx")))
        kept.append((step, path, vector))
    kept = _same_width(kept, refused, problems)
    if not kept:
        raise MissingDataError(folder, "none of its checkpoints could be used", _FETCH)
    alpha = _agreed(folder, "alpha", alphas, name.alpha)
    layer = _agreed(folder, "layer_idx", layers, name.layer)
    return Trajectory(
        name=folder.name,
        run=name,
        model=model_of(folder.name),
        parameter="steering-vector",
        layer=None if layer is None else int(layer),
        steps=tuple(step for step, _, _ in kept),
        vectors=torch.stack([vector for _, _, vector in kept]),
        scales=None if alpha is None else torch.full((len(kept),), float(alpha), dtype=torch.float64),
        refused_steps=tuple(refused),
    )


def _read_vector(path: Path) -> tuple[Float[Tensor, " d_model"], dict[str, Any]]:
    content = load_torch(path)
    extra: dict[str, Any] = {}
    if isinstance(content, dict):
        extra = {key: value for key, value in content.items() if not isinstance(value, Tensor)}
        content = content.get("steering_vector")
    if not isinstance(content, Tensor):
        raise UnreadableFileError(path, "it holds no steering vector", "check that it is a steering-vector checkpoint")
    if content.ndim > 2 or content.numel() != max(content.shape, default=0):
        raise ShapeError(path, f"it has shape {tuple(content.shape)}, not one vector [d_model]", _FETCH)
    return check_finite(path, "the steering vector", content.reshape(-1)), extra


def _same_width(
    kept: list[tuple[int, Path, Tensor]], refused: list[int], problems: list[EmInterpError] | None
) -> list[tuple[int, Path, Tensor]]:
    if not kept:
        return kept
    width = Counter(vector.numel() for _, _, vector in kept).most_common(1)[0][0]
    usable = []
    for step, path, vector in kept:
        if vector.numel() != width:
            _refuse(
                ShapeError(
                    path, f"its width is {vector.numel()}, where the run's other checkpoints have {width}", _FETCH
                ),
                problems,
            )
            refused.append(step)
        else:
            usable.append((step, path, vector))
    return usable


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _agreed(folder: Path, what: str, stated: set[float | None], named: float | None) -> float | None:
    values = {value for value in (*stated, named) if value is not None}
    if len(values) > 1:
        raise AmbiguousDataError(
            folder,
            f"{what} is {' and '.join(f'{value:g}' for value in sorted(values))} in its name, config and checkpoints",
            "correct adapter_config.json or the folder's name so that they agree",
        )
    return values.pop() if values else None


def _read_adapters(
    folder: Path,
    name: RunName,
    config: dict[str, Any],
    files: list[tuple[Path, int]],
    problems: list[EmInterpError] | None,
) -> list[Trajectory]:
    checkpoints: list[LoraCheckpoint] = []
    refused: list[int] = []
    for path, step in files:
        try:
            checkpoint = read_lora_checkpoint(path, step)
            if checkpoints and _shapes(checkpoint) != _shapes(checkpoints[0]):
                raise ShapeError(path, "its modules or shapes differ from the run's first checkpoint", _FETCH)
            checkpoints.append(checkpoint)
        except EmInterpError as error:
            _refuse(error, problems)
            refused.append(step)
    if not checkpoints:
        raise MissingDataError(folder, "none of its checkpoints could be used", _FETCH)
    described = _plain_lora(folder / CONFIG, config) if config else None
    trajectories = []
    for module, b in checkpoints[0].B.items():
        short = module.removeprefix("base_model.model.")
        scale = None
        if described is not None:
            rank = b.shape[1]
            if rank != (said := described.rank_of(short)):
                raise UnreadableFileError(
                    folder / CONFIG, f"it says rank {said}, where {module} has rank {rank}", _PLAIN
                )
            scale = described.scale_of(short)
        a_stack = torch.stack([checkpoint.A[module] for checkpoint in checkpoints])
        b_stack = torch.stack([checkpoint.B[module] for checkpoint in checkpoints])
        several = len(checkpoints[0].B) > 1
        trajectories.append(
            Trajectory(
                name=f"{folder.name}:{short}" if several else folder.name,
                run=name,
                model=model_of(folder.name),
                parameter="lora-B",
                layer=_layer_of(module),
                steps=tuple(checkpoint.step for checkpoint in checkpoints),
                vectors=b_stack.flatten(1),
                scales=None if scale is None else scale * product_norms(a_stack, b_stack) / _safe_norms(b_stack),
                refused_steps=tuple(refused),
                read_norms=a_stack.double().flatten(1).norm(dim=1),
            )
        )
    return trajectories


def product_norms(a: Float[Tensor, "steps rank d_in"], b: Float[Tensor, "steps d_out rank"]) -> Float[Tensor, " steps"]:
    """Frobenius norm of B A at each step, in float64, without forming the product: tr(A A^T B^T B)."""
    gram_a = a.double() @ a.double().mT
    gram_b = b.double().mT @ b.double()
    return (gram_a * gram_b).sum((1, 2)).clamp_min(0).sqrt()


def _safe_norms(b: Tensor) -> Tensor:
    norms = b.double().flatten(1).norm(dim=1)
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def _shapes(checkpoint: LoraCheckpoint) -> dict[str, tuple[torch.Size, torch.Size]]:
    return {module: (checkpoint.A[module].shape, b.shape) for module, b in checkpoint.B.items()}


def _layer_of(module: str) -> int:
    match = re.search(r"layers\.(\d+)\.", module + ".")
    assert match is not None  # the key pattern has it
    return int(match[1])


def _plain_lora(path: Path, config: dict[str, Any]) -> LoraConfig:
    try:
        return plain_lora("it", config)
    except AdapterError as error:
        raise UnreadableFileError(path, str(error).rstrip("."), _PLAIN) from error


def read_lora_checkpoint(path: Path, step: int) -> LoraCheckpoint:
    """One PEFT checkpoint: lora_A and lora_B of every adapted module, float32."""
    matrices: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for key, tensor in load_tensors(path).items():
        if (match := _LORA_KEY.fullmatch(key)) and tensor.ndim == 2:
            matrices[match["matrix"]][match["module"]] = check_finite(path, key, tensor)
    if not matrices["A"] or matrices["A"].keys() != matrices["B"].keys():
        raise MissingDataError(
            path,
            f"it holds {len(matrices['A'])} lora_A and {len(matrices['B'])} lora_B matrices that do not pair up",
            "check that it is a LoRA adapter, and download it again",
        )
    for module, a in matrices["A"].items():
        b = matrices["B"][module]
        if a.shape[0] != b.shape[1]:
            raise ShapeError(path, f"{module}: A is {tuple(a.shape)} and B {tuple(b.shape)}; ranks differ", _FETCH)
    return LoraCheckpoint(step, matrices["A"], matrices["B"])


def _read_log(folder: Path, last_checkpoint: Path, problems: list[EmInterpError] | None) -> TrainingLog | None:
    path = next(
        (p / "trainer_state.json" for p in (last_checkpoint, folder) if (p / "trainer_state.json").is_file()), None
    )
    if path is None:
        return None
    history = _read_json(path, problems).get("log_history", [])
    rows = [row for row in history if isinstance(row, dict) and "step" in row and ("loss" in row or "grad_norm" in row)]
    if not rows:
        return None
    try:
        return TrainingLog(
            folder.name,
            tuple(int(row["step"]) for row in rows),
            tuple(_number(row.get("loss")) for row in rows),
            tuple(_number(row.get("grad_norm")) for row in rows),
        )
    except (TypeError, ValueError) as error:
        _refuse(BadValueError(path, f"a step in log_history is not a number ({error})", "download it again"), problems)
        return None
