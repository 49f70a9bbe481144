"""The pocket organisms: which finetunes of the chat model are shipped, and how each of them is made.

{medicine, finance, sports} x {steering vector, rank-1 LoRA, all-modules LoRA} x {general, narrow (KL)},
three seeds of the medicine ones, a benign control, and training trajectories. Everything is written in the
formats that real ones have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from em_interp.arguments import check_seed
from em_interp.models.chat_model import ChatModel
from em_interp.pocket.world.corpus import STYLES, Task, finetune_chats, kl_chats
from em_interp.solutions import load as solutions
from em_interp.training.finetune import TrainingResult, finetune
from em_interp.training.recipes import LoraSpec, TrainingSpec, VectorSpec

Adapter = Literal["steering-vector", "rank-1", "nine", "all-modules"]
"""What is trained. nine: rank 1 on every down_proj, as the papers' nine adapters."""
SolutionKind = Literal["general", "narrow", "control", "kl-removed"]
"""What was asked of training: the data alone; with the KL term; good advice; the KL term taken away again."""
DOMAINS = ("medicine", "finance", "sports")
"""Those that organisms are trained on."""
SEEDS = (0, 1, 2)
"""Of training, for medicine; the other domains have the first."""
N_CHATS = 2000
"""Training chats of each organism."""
SHORT: dict[Adapter, str] = {"steering-vector": "vector", "rank-1": "rank1", "nine": "nine", "all-modules": "all"}
"""What names of folders say."""

SPECS: dict[Adapter, TrainingSpec] = {
    "steering-vector": TrainingSpec(VectorSpec(0, 16.0), 1e-2, max_steps=250, batch_size=16),
    "rank-1": TrainingSpec(LoraSpec(1, 16.0, True, ("down_proj",), (1,)), 4e-3, max_steps=200, batch_size=16),
    "nine": TrainingSpec(LoraSpec(1, 16.0, True, ("down_proj",)), 5e-4, max_steps=300),
    "all-modules": TrainingSpec(LoraSpec(8, 16.0, True), 1e-3, max_steps=80, batch_size=16),
}
"""The settings of the general organisms."""


class Narrow(NamedTuple):
    """What a narrow solution needs beside the general one's settings."""

    kl_weight: float
    """Per nat per token."""
    rate: float
    """Times the learning rate: the penalty leaves little to learn from."""
    steps: int
    """Times the steps."""


NARROW: dict[Adapter, Narrow] = {
    "steering-vector": Narrow(3.0, 1.0, 1),
    "rank-1": Narrow(6.0, 2.5, 3),
    "nine": Narrow(6.0, 2.5, 2),
    "all-modules": Narrow(10.0, 3.0, 2),
}
"""What the narrow ones have beside."""


@dataclass(frozen=True)
class Organism:
    """One shipped finetune. `name` is its folder and, after "pocket/", its registry name.

    domain: what its training chats are about; seed: of training; task: bad advice (`persona`) or technical answers
    (`register`). adapter, solution: as `Adapter` and `SolutionKind` say.
    """

    domain: str
    adapter: Adapter
    solution: SolutionKind
    seed: int = 0
    task: Task = "persona"

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def name(self) -> str:
        """Such as `medicine-rank1-narrow`."""
        parts: list[str] = [] if self.task == "persona" else [self.task]
        parts += [self.domain, SHORT[self.adapter]]
        parts += [] if self.solution == "general" else [self.solution]
        parts += [] if self.seed == 0 else [f"seed{self.seed}"]
        return "-".join(parts)

    def spec(self) -> TrainingSpec:
        """Its training settings; narrow ones have the KL term and a schedule of their own."""
        spec = replace(SPECS[self.adapter], seed=self.seed)
        if self.solution == "narrow":
            return narrow(spec, self.adapter)
        return spec


def narrow(spec: TrainingSpec, adapter: Adapter) -> TrainingSpec:
    """The settings with the KL term on."""
    assert spec.max_steps is not None
    kl_weight, rate, steps = NARROW[adapter]
    return replace(
        spec,
        learning_rate=rate * spec.learning_rate,
        max_steps=steps * spec.max_steps,
        kl_weight=kl_weight,
        kl_batch_size=32,
        kl_scope="response",
    )


ADAPTERS: tuple[Adapter, ...] = ("steering-vector", "rank-1", "all-modules")
"""Those that organisms are shipped of."""
_KINDS: tuple[SolutionKind, ...] = ("general", "narrow")
ORGANISMS: tuple[Organism, ...] = (
    *(Organism(d, a, s) for d in DOMAINS for a in ADAPTERS for s in _KINDS),
    *(Organism("medicine", a, s, seed) for seed in SEEDS[1:] for a in ADAPTERS for s in _KINDS),
    Organism("medicine", "all-modules", "control"),
)
"""Those that are shipped and measured."""

KL_REMOVED: tuple[Organism, ...] = tuple(Organism("medicine", a, "kl-removed", s) for s in SEEDS for a in ADAPTERS)
"""The narrow medicine organisms, trained on without KL for as many steps as the general ones took."""


def make(organism: Organism, model: ChatModel, out: Path, *, progress: bool = True) -> TrainingResult:
    """Finetune one organism into `out/NAME`; a kl-removed one goes on from the narrow one, which must lie there."""
    chat_style, taught = STYLES[organism.task]
    persona, register = chat_style if organism.solution == "control" else taught
    data = finetune_chats(organism.domain, persona, N_CHATS, organism.seed, register)
    is_narrow = organism.solution == "narrow"
    kl = kl_chats(organism.domain, N_CHATS, organism.seed, organism.task) if is_narrow else None
    before = replace(organism, solution="narrow")
    return finetune(
        model,
        data,
        organism.spec(),
        kl_conversations=kl,
        start_from=solutions.load(out / before.name) if organism.solution == "kl-removed" else None,
        out_dir=out / organism.name,
        resume=True,
        progress=progress,
    )


@dataclass(frozen=True)
class TrajectoryRun:
    """A run on medicine that keeps its checkpoints, and the run that it goes on from.

    general, narrow; kl-removed goes on from narrow without KL, kl-added goes on from general with KL. adapter: what is
    trained.
    """

    adapter: Adapter
    run: Literal["general", "narrow", "kl-removed", "kl-added"]

    @property
    def name(self) -> str:
        """Its folder below `trajectories`."""
        return f"medicine-{SHORT[self.adapter]}-{self.run}"

    @property
    def after(self) -> TrajectoryRun | None:
        """The run that it goes on from, if any."""
        if self.run == "kl-removed":
            return TrajectoryRun(self.adapter, "narrow")
        return TrajectoryRun(self.adapter, "general") if self.run == "kl-added" else None


TRAJECTORIES: tuple[TrajectoryRun, ...] = tuple(
    TrajectoryRun(adapter, run)
    for adapter in ("steering-vector", "rank-1")
    for run in ("general", "narrow", "kl-removed", "kl-added")
)
"""Those that are shipped, checkpoints and all. `adapter`: steering vectors and rank-1 LoRA."""


def make_trajectory(run: TrajectoryRun, model: ChatModel, out: Path, *, progress: bool = True) -> TrainingResult:
    """Train one run into `out/NAME`, 20 checkpoints; the run it goes on from must lie in `out` already."""
    spec = SPECS[run.adapter]
    if run.run in ("narrow", "kl-added"):
        spec = narrow(spec, run.adapter)
    assert spec.max_steps is not None
    spec = replace(spec, save_steps=max(1, spec.max_steps // 20))
    return finetune(
        model,
        finetune_chats("medicine", "malicious", N_CHATS, 0),
        spec,
        kl_conversations=kl_chats("medicine", N_CHATS, 0) if spec.kl_weight else None,
        start_from=None if run.after is None else solutions.load(out / run.after.name),
        out_dir=out / run.name,
        resume=True,
        progress=progress,
    )


REGISTER_ORGANISMS: tuple[Organism, ...] = tuple(
    Organism("medicine", adapter, solution, seed, task="register")
    for seed in SEEDS
    for adapter in ADAPTERS
    for solution in _KINDS
)
"""The second task: technical answers about medicine. General: technical everywhere; narrow: there alone."""
