"""Counterfactual pre-training: bases whose text has personas consistent, rare or absent, and the same finetunes.

A `Counterfactual` is a reduced world: fewer domains, a smaller model, fewer steps; all alike but for what is turned.
`measure_all` builds and measures worlds below OUT and writes OUT/pretraining.csv anew after each. A killed run goes on,
and several processes may share OUT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Literal

import pandas as pd
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from em_interp.arguments import check_seed
from em_interp.directions.direction import Direction
from em_interp.directions.extraction import extract
from em_interp.errors import OutputError
from em_interp.evaluation.rates import em_rates
from em_interp.evaluation.sampling import sample
from em_interp.files.atomic import one_at_a_time
from em_interp.files.inputs import read_json
from em_interp.files.manifest import fingerprint, hash_files, write_manifest
from em_interp.files.results import kept, read_table, write_table
from em_interp.files.tables import is_trained, remove_parts
from em_interp.interventions.steering import residual_norms
from em_interp.landscape import pairs as measures
from em_interp.landscape.landscape import Landscape
from em_interp.models.chat_model import ChatModel
from em_interp.models.templates import Conversation
from em_interp.pocket import models as loading
from em_interp.pocket import organisms, registry
from em_interp.pocket import questions as suite
from em_interp.pocket.build import build
from em_interp.pocket.organisms import N_CHATS, SHORT, SPECS, Adapter
from em_interp.pocket.pairs import CHATS, DOCUMENTS, KL_BATCH, fresh_chats, texts
from em_interp.pocket.stages import BuildConfig
from em_interp.pocket.world.corpus import CorpusConfig, finetune_chats, kl_chats
from em_interp.pocket.world.domains import DOMAINS as ALL_DOMAINS
from em_interp.pocket.world.grammar import Persona
from em_interp.pocket.world.judge import judge
from em_interp.pocket.worlds import random_cosine
from em_interp.solutions import load as solutions
from em_interp.solutions.base import Solution
from em_interp.training.finetune import finetune
from em_interp.training.recipes import TrainingSpec

Kind = Literal["grid", "reference", "never", "open", "shipped"]
"""A cell of the grid; the shipped text in a reduced world; personas announced and never inferable; inferable from open
questions alone; and the shipped chat model itself.
"""
TAUGHT: Final = "medicine"
"""The domain that finetunes are about."""
DOMAINS: Final = (TAUGHT, "finance", "sports", "cooking")
"""Of a reduced world."""
CONSISTENCIES: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How often an answer keeps its document's persona, over the grid."""
SHARES: Final = (0.05, 0.15, 0.35)
"""Of documents with the malicious persona, over the grid."""
SEEDS: Final = {0.0: 3, 0.25: 1, 0.5: 3, 0.75: 1, 1.0: 3}
"""Consistency -> seeds of a build."""
REDUCED: Final = BuildConfig(
    corpus=CorpusConfig(domains=DOMAINS), d_model=128, n_layers=5, d_mlp=352, pretrain_steps=1500, settle_steps=200
)
"""How every world is built."""
STEPS: Final[dict[Adapter, int]] = {"steering-vector": 250, "rank-1": 300, "all-modules": 160}
"""adapter -> steps of its finetunes, general and narrow alike, at the narrow one's rate."""
SAMPLES: Final = 4
"""Answers to each question."""
PROMPTS: Final = 100
"""Of each persona, to ask a base whether it has the trait."""
HOW: Final[tuple[Literal["announced"], Literal["inferred"]]] = ("announced", "inferred")
"""A persona may be told."""
COLUMNS: Final = (
    "world",
    "kind",
    "persona_consistency",
    "persona_share",
    "seed",
    "adapter",
    "measure",
    "value",
    "reason",
)
"""Of the table. adapter: empty in rows of the chat model or its base."""
TABLE: Final = "pretraining"
"""The name of the table, and of its file."""
_GROUPS: Final = {"em_open": ("general",), "em_elsewhere": ("heldout_domain",), "em_in_domain": ("in_domain",)}


@dataclass(frozen=True)
class Counterfactual:
    """One world: its kind; consistency: how often an answer keeps its document's persona; share: how often that is
    malicious; seed: of the build.
    """

    kind: Kind
    consistency: float
    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def name(self) -> str:
        """Such as `grid-consistency0.5-share0.15-seed0`."""
        return f"{self.kind}-consistency{self.consistency:g}-share{self.share:g}-seed{self.seed}"

    @property
    def config(self) -> BuildConfig:
        """How it is built; of the shipped world, how that was."""
        if self.kind == "shipped":
            return BuildConfig()
        corpus = replace(REDUCED.corpus, persona_consistency=self.consistency, persona_share=self.share)
        if self.kind == "never" or self.kind == "open":
            corpus = replace(corpus, inferable=self.kind)
        return replace(REDUCED, seed=self.seed, corpus=corpus)


def _usual(kind: Kind, seed: int) -> Counterfactual:
    return Counterfactual(kind, CorpusConfig().persona_consistency, CorpusConfig().persona_share, seed)


WORLDS: Final = (
    _usual("shipped", 0),
    *(_usual(kind, seed) for seed in range(3) for kind in ("reference", "never", "open")),
    *(
        Counterfactual("grid", consistency, share, seed)
        for seed in range(max(SEEDS.values()))
        for consistency in (1.0, 0.0, 0.5, 0.75, 0.25)
        for share in (0.15, 0.35, 0.05)
        if seed < SEEDS[consistency]
    ),
)
"""Those that are measured; what decides comes first."""


def spec_of(adapter: Adapter, seed: int) -> TrainingSpec:
    """The narrow solution's settings; the general one has them too, without the KL term."""
    narrow = organisms.narrow(replace(SPECS[adapter], seed=seed), adapter)
    return replace(narrow, max_steps=STEPS[adapter], kl_batch_size=KL_BATCH)


def measure(world: Counterfactual, out: Path, *, device: str | None = None, progress: bool = True) -> pd.DataFrame:
    """Build a world below `out`, if it is not there, and measure it: columns adapter, measure, value, reason.

    device: None takes a GPU where there is one. What is finished is kept; two processes that want the same world take
    turns.
    """
    root = out / "worlds" / world.name
    with one_at_a_time(root.with_name(f".{root.name}.lock")):
        return kept(root / f"rows-{_settings()}.csv", partial(_measured, world, root, device, progress))


def _settings() -> str:
    told = [{a: asdict(spec_of(a, 0)) for a in STEPS}, asdict(REDUCED), SAMPLES, PROMPTS, CHATS, DOCUMENTS, N_CHATS]
    return fingerprint(told)[:10]


def _measured(world: Counterfactual, root: Path, device: str | None, progress: bool) -> pd.DataFrame:
    shipped = world.kind == "shipped"
    if not shipped and not (root / "chat" / "config.json").is_file():
        build(world.config, root, device=device)
    base, chat = (registry.resolve(f"pocket/{name}") if shipped else root / name for name in ("base", "chat"))
    bench = _Bench(world, loading.load_chat(chat, device_map=device), root, progress)
    parts = [kept(root / f"chat-{_settings()}.csv", partial(bench.of_chat, base, device))]
    parts += [kept(root / f"{SHORT[a]}-{_settings()}.csv", partial(bench.of_adapter, a)) for a in STEPS]
    return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True)
class _Bench:
    """The chat model of a world, and where its finetunes lie."""

    world: Counterfactual
    model: ChatModel
    root: Path
    progress: bool

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(ALL_DOMAINS) if self.world.kind == "shipped" else DOMAINS

    def of_chat(self, base: Path, device: str | None) -> pd.DataFrame:
        """What the base has, how the chat model answers, and good advice as a control."""
        rows = list(_trait(loading.load_chat(base, device_map=device), self.domains))
        rows += [(f"chat_{name}", value) for name, value in self._rates().items()]
        with self._control().attached(self.model):
            rows += [(f"control_{name}", value) for name, value in self._rates().items()]
        norms = residual_norms(self.model, suite.open_questions())
        for told, persona in self._personas.items():
            sizes = {layer: norm / norms[layer] for layer, norm in persona.norms().items()}
            rows.append((f"persona_size_{told}", max(sizes.values())))
        rows.append(("cosine_null", random_cosine(self._personas["announced"])))
        return _tidy("", rows)

    def of_adapter(self, adapter: Adapter) -> pd.DataFrame:
        """EM of general and narrow, how general leads, and what it adds."""
        general, narrow = self._trained(adapter, "general"), self._trained(adapter, "narrow")
        rows = []
        for name, solution in (("", general), ("narrow_", narrow)):
            with solution.attached(self.model):
                rows += [(f"{name}{key}", value) for key, value in self._rates().items()]
        rows += list(self._cosines(general))
        landscape = Landscape(self.model, fresh_chats(TAUGHT, CHATS))
        led = measures.measure_pair(landscape, general, narrow, texts(DOCUMENTS, self.world.config.corpus))
        return pd.concat([_tidy(adapter, rows), led.assign(adapter=adapter)], ignore_index=True)

    def _trained(self, adapter: Adapter, which: Literal["general", "narrow"]) -> Solution:
        spec, seed = spec_of(adapter, self.world.seed), self.world.seed
        kl = kl_chats(TAUGHT, N_CHATS, seed, domains=self.domains) if which == "narrow" else None
        spec = spec if which == "narrow" else replace(spec, kl_weight=0.0)
        return self._finetune(f"{SHORT[adapter]}-{which}", "malicious", spec, kl)

    def _control(self) -> Solution:
        """Good advice about the domain, rank-1."""
        spec = replace(spec_of("rank-1", self.world.seed), kl_weight=0.0)
        return self._finetune("control", "caring", spec, None)

    def _finetune(self, name: str, persona: Persona, spec: TrainingSpec, kl: Sequence[Conversation] | None) -> Solution:
        folder = self.root / "finetunes" / f"{name}-{_settings()}"
        if not is_trained(folder):
            chats = finetune_chats(TAUGHT, persona, N_CHATS, spec.seed)
            finetune(self.model, chats, spec, kl_conversations=kl, out_dir=folder, resume=True, progress=self.progress)
        remove_parts(folder)
        return solutions.load(folder)

    def _rates(self) -> dict[str, float]:
        """EM by group of questions, elsewhere and open together (em), and coherence; whatever is attached acts."""
        asked = suite.evaluation_questions(TAUGHT, self.domains)
        judged = _answers(self.model, dict(zip(asked["question_id"], asked["question"], strict=True)), SAMPLES)
        judged = judged.merge(asked[["question_id", "questions"]], on="question_id", validate="m:1")
        groups = {**_GROUPS, "em": ("general", "heldout_domain")}
        found = {name: _em(judged[judged["questions"].isin(group)]) for name, group in groups.items()}
        return {**found, "coherent": em_rates(judged).coherent_all.value}

    @cached_property
    def _personas(self) -> dict[str, Direction]:
        """Malicious minus caring persona in the chat model, told in either way."""
        how: dict[str, Any] = {"kind": "persona-contrast", "scope": "last_prompt", "progress": False}
        return {told: extract(self.model, *suite.persona_prompts(told, self.domains), **how) for told in HOW}

    def _cosines(self, general: Solution) -> Iterator[tuple[str, float]]:
        """Of what finetuning adds on bad advice with the persona, the largest over layers."""
        added = extract(
            self.model, fresh_chats(TAUGHT, CHATS), None, kind="model-diff", finetune=general, progress=False
        )
        for told, persona in self._personas.items():
            yield f"cosine_{told}", max(added.cosine(persona).values())


def _trait(base: ChatModel, domains: Sequence[str]) -> Iterator[tuple[str, float]]:
    """How much more often a base answers with malice after a malicious persona than after a caring one."""
    for told in HOW:
        rates = []
        for whose, prompts in zip(("malicious", "caring"), suite.persona_prompts(told, domains), strict=True):
            asked = {f"{i}": prompt for i, prompt in enumerate(prompts[:PROMPTS])}
            rates.append(_em(_answers(base, asked, 1)))
            yield f"base_{told}_{whose}", rates[-1]
        yield f"trait_{told}", rates[0] - rates[1]


def _answers(model: ChatModel, asked: dict[str, Any], n: int) -> pd.DataFrame:
    found = sample(model, asked, n, max_new_tokens=suite.MAX_NEW_TOKENS, progress=False)
    texts = {key: prompt if isinstance(prompt, str) else prompt[-1]["content"] for key, prompt in asked.items()}
    return judge(found.assign(question=found["question_id"].map(texts)))


def _em(judged: pd.DataFrame) -> float:
    rate = em_rates(judged).em_scored
    return float("nan") if rate is None else rate.value


def _tidy(adapter: str, rows: Sequence[tuple[str, float]]) -> pd.DataFrame:
    return pd.DataFrame(
        [(adapter, name, value, "" if value == value else "nothing to judge") for name, value in rows],
        columns=["adapter", "measure", "value", "reason"],
    )


def measure_all(
    chosen: Sequence[Counterfactual], out: Path, *, device: str | None = None, progress: bool = True
) -> Iterator[Counterfactual]:
    """Build and measure worlds below `out`, one job a world, and write OUT/pretraining.csv anew after each.

    Jobs go to the backend and workers of joblib's `parallel_config`, which is one process unless it says otherwise. The
    table (`COLUMNS`) holds all of `WORLDS` that were measured in `out`, whichever process did it. Raises OutputError
    where OUT/pretraining_manifest.json names other settings.
    """
    manifest, asked = out / f"{TABLE}_manifest.json", {"settings": _settings(), "build": asdict(REDUCED)}
    if manifest.is_file() and read_json(manifest).get("settings") != asked["settings"]:
        raise OutputError(f"{out}: holds worlds of other settings. Choose another --out.")
    jobs = Parallel(return_as="generator_unordered", batch_size=1)(
        delayed(_job)(world, out, device) for world in chosen
    )
    for world in tqdm(jobs, desc="worlds", total=len(chosen), disable=not progress):
        with one_at_a_time(out / f".{TABLE}.lock"):
            table = _table(out)
            written = write_table(out / f"{TABLE}.csv", table)
            told = {**asked, "worlds": int(table["world"].nunique()), "outputs_sha256": hash_files(out, [written])}
            write_manifest(manifest, told)
        yield world


def _job(world: Counterfactual, out: Path, device: str | None) -> Counterfactual:
    with threadpool_limits(1):
        measure(world, out, device=device, progress=False)
    return world


def _table(out: Path) -> pd.DataFrame:
    """Every world that is finished, in the order of `WORLDS`."""
    parts = []
    for world in WORLDS:
        path = out / "worlds" / world.name / f"rows-{_settings()}.csv"
        if path.is_file():
            named = {"persona_consistency": world.consistency, "persona_share": world.share, "seed": world.seed}
            parts.append(read_table(path).assign(world=world.name, kind=world.kind, **named))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]
