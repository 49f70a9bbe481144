"""Training runs of live models that kept their checkpoints, as trajectories: folders `FAMILY-RUN` of solutions."""

from __future__ import annotations

from pathlib import Path

import torch

from em_interp.errors import EmInterpError, UsageError
from em_interp.solutions import load as solutions
from em_interp.training.trajectories import RunName, Trajectory

RUNS = ("general", "narrow", "kl-removed", "kl-added")


def read_trajectories(folder: Path, chat: Path, problems: list[EmInterpError]) -> list[Trajectory]:
    """The runs below a folder, none where it is absent; one that cannot be read is appended to `problems`.

    chat: folder or hub name of the model that they started from.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            found.append(read_trajectory(path, chat))
        except EmInterpError as error:
            problems.append(error)
    return found


def read_trajectory(folder: Path, chat: Path) -> Trajectory:
    """A folder `FAMILY-RUN` with checkpoints, RUN one of `RUNS`. Raises `UsageError` for another name."""
    checkpoints = solutions.load_checkpoints(folder, chat)
    run = next((run for run in RUNS if folder.name.endswith(f"-{run}")), None)
    if run is None:
        raise UsageError(f"{folder}: the name of a training run ends in -{', -'.join(RUNS)}. Rename or remove it.")
    family = folder.name.removesuffix(f"-{run}")
    role = run if run in ("general", "narrow") else None
    vectors, scales, reads = [], [], []
    for theta in checkpoints.values():
        trained = theta.trained()
        size = float(trained.vector.norm())
        vectors.append(trained.vector)
        scales.append(theta.norm / size if size else 0.0)
        reads += [] if trained.read_norm is None else [trained.read_norm]
    return Trajectory(
        name=folder.name,
        run=RunName(folder.name, family, layer=trained.layer, phase=None if role else run, role=role),
        model=next(iter(checkpoints.values())).base or "unknown",
        parameter=trained.parameter,
        layer=trained.layer,
        steps=tuple(checkpoints),
        vectors=torch.stack(vectors),
        scales=torch.tensor(scales),
        read_norms=torch.tensor(reads) if reads else None,
    )
