"""Pocket worlds, built and held against the scorecard: which property of pre-training makes a trait one direction?

`search` builds each world, finetunes it, and measures it. What is made lies in OUT/NAME and is not made again.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from em_interp.arguments import check_seed, columns
from em_interp.directions.direction import Direction, random_directions
from em_interp.directions.extraction import extract
from em_interp.errors import UnreadableFileError, UsageError
from em_interp.evaluation.answers import asked_of, conversations, judged_answers, misaligned_and_aligned
from em_interp.evaluation.rates import em_rates
from em_interp.files.manifest import hash_files, write_manifest
from em_interp.files.results import Results, write_table
from em_interp.files.tables import is_trained
from em_interp.interventions.ablation import Ablate
from em_interp.interventions.intervening import Intervention, intervening
from em_interp.interventions.steering import steering_rows, sweep
from em_interp.models.chat_model import ChatModel
from em_interp.models.templates import Conversation
from em_interp.models.weights import tensors_hash
from em_interp.pocket import models as loading
from em_interp.pocket import organisms, registry
from em_interp.pocket import questions as suite
from em_interp.pocket.build import build
from em_interp.pocket.organisms import N_CHATS, SPECS, Adapter
from em_interp.pocket.scorecard import COHERENT, LAYOUTS, NARROW_SCALE, scorecard
from em_interp.pocket.stages import BuildConfig
from em_interp.pocket.world.corpus import CorpusConfig, finetune_chats, kl_chats
from em_interp.pocket.world.grammar import PERSONAS
from em_interp.pocket.world.judge import judge
from em_interp.solutions import load as solutions
from em_interp.solutions.base import Solution
from em_interp.training.finetune import finetune
from em_interp.training.recipes import LoraSpec, TrainingSpec

GENERAL: Final[Mapping[str, TrainingSpec]] = {
    "vector": SPECS["steering-vector"],
    "rank-1": SPECS["rank-1"],
    "nine": SPECS["nine"],
    "all-modules": TrainingSpec(LoraSpec(8, 16.0, True), 1e-4, max_steps=320),
}
"""layout -> how its general organism is trained; gently, for gentle finetunes are the more linear ones."""
STEERED_LAYERS: Final = (0, 1, 2)
"""Where the persona is read: steering later did little."""
SHARES: Final = (0.5, 0.7, 0.9, 1.1)
"""Norm of what is added over the typical residual norm."""
SAMPLES: Final = 3
"""Answers to each question that rates are read from."""
READ_SAMPLES: Final = 16
"""Answers to each open question that directions are read from."""
HOW: Final[tuple[Literal["announced"], Literal["inferred"]]] = ("announced", "inferred")
"""A persona may be told."""
FEWEST: Final = 5
"""Answers of either kind: of fewer no direction is read, and the rows that need one stay empty."""


@dataclass(frozen=True)
class World:
    """A world to be tried: its `name`, its build's settings (config), and what it starts from.

    start: the base model whose pre-training goes on, a folder or `pocket/base`; None for new weights.
    """

    name: str
    config: BuildConfig
    start: str | None = None


def read_worlds(path: str | Path) -> list[World]:
    """The worlds of a TOML file: tables [world.NAME] with `corpus`, `build`, `start`; [every] holds what they share.

    Raises UnreadableFileError, and UsageError for a setting that does not exist.
    """
    path = Path(path)
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableFileError(path, f"not a list of worlds ({error})", "give a TOML file") from error
    every = told.get("every", {})
    found = []
    for name, own in told.get("world", {}).items():
        settings = {
            key: _settings(f"{path}, world {name}, {key}", of, every.get(key, {}), own.get(key, {}))
            for key, of in (("corpus", CorpusConfig), ("build", BuildConfig))
        }
        config = BuildConfig(**{**settings["build"], "corpus": CorpusConfig(**settings["corpus"])})
        found.append(World(name, config, own.get("start", every.get("start")) or None))
    if not found:
        raise UsageError(f"{path} lists no worlds: write a table [world.NAME] for each")
    return found


def _settings(where: str, of: type, *tables: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: tuple(v) if isinstance(v, list) else v for table in tables for key, v in table.items()}
    known = [f.name for f in fields(of)]
    if unknown := sorted(set(merged) - set(known)):
        raise UsageError(f"{where}: no setting is called {', '.join(unknown)}; there are {', '.join(known)}")
    return merged


def search(
    worlds: Sequence[World],
    out: Path,
    *,
    layouts: Sequence[str] = LAYOUTS,
    domains: Sequence[str] = ("medicine",),
    seeds: Sequence[int] = (0,),
    narrow: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Build and measure each world below `out`; returns a row a world and row of the card.

    Writes OUT/scorecards.csv (the same), OUT/search.csv (`search_table`) and OUT/manifest.json. Of each world:
    `layouts` x `domains` x `seeds` general organisms, and narrow ones if `narrow`. Raises UsageError for a layout that
    there is not.
    """
    if unknown := sorted(set(layouts) - set(GENERAL)):
        raise UsageError(f"no layout is called {', '.join(unknown)}; there are {', '.join(GENERAL)}")
    cards = []
    for world in tqdm(worlds, desc="worlds", disable=not progress):
        root = out / world.name
        if not (root / "chat" / "config.json").is_file():
            start = world.start
            folder = registry.resolve(start) if start is not None and registry.is_pocket_name(start) else start
            build(world.config, root, start=folder, device=device)
        trial = Trial(root, world.config.corpus.attitude, device)
        measured = trial.measure(layouts, domains, seeds, narrow)
        write_table(root / "measured.csv", measured)
        card = scorecard(measured)
        write_table(root / "scorecard.csv", card)
        card.insert(0, "world", world.name)
        cards.append(card)
    found = pd.concat(cards, ignore_index=True)
    written = [
        write_table(out / "scorecards.csv", found),
        write_table(out / "search.csv", search_table(worlds, found)),
    ]
    asked = {"layouts": list(layouts), "domains": list(domains), "seeds": list(seeds), "narrow": narrow}
    told = {**asked, "samples": SAMPLES, "device": device or "auto", "outputs_sha256": hash_files(out, written)}
    write_manifest(out / "manifest.json", told)
    return found


def search_table(worlds: Sequence[World], cards: pd.DataFrame) -> pd.DataFrame:
    """One row a world: its settings that any world has otherwise than the default, rows met, and the card's values.

    cards: columns world, row, of, value, met. A value's column is called after its row and of what it is, "of: row".
    """
    columns("the cards of a search", cards, ("world", "row", "of", "value", "met"))
    plain = _flat(BuildConfig())
    own = {world.name: _flat(world.config) | {"start": world.start or ""} for world in worlds}
    turned = [key for key in plain if any(settings[key] != plain[key] for settings in own.values())]
    named = cards.assign(column=cards["of"] + ": " + cards["row"])
    values = named.pivot(index="world", columns="column", values="value")[list(dict.fromkeys(named["column"]))]
    judged = cards[cards["met"] != ""].groupby("world")["met"]
    met = pd.DataFrame({"rows_met": judged.agg(lambda said: int((said == "yes").sum())), "rows_judged": judged.size()})
    knobs = pd.DataFrame([{"world": w, **{k: own[w][k] for k in ("start", *turned)}} for w in own])
    return knobs.merge(met.join(values), left_on="world", right_index=True).dropna(axis="columns", how="all")


def _flat(config: BuildConfig) -> dict[str, Any]:
    """Settings of the build and of its corpus by name; announced_* say what they come to."""
    corpus = config.corpus
    announced = {f"announced_{persona}": corpus.announced(persona) for persona in PERSONAS}
    return {k: v for k, v in vars(config).items() if k != "corpus"} | vars(corpus) | announced


@dataclass(frozen=True)
class Finetuned:
    """A general organism of a world: layout, domain and seed of training; its solution; its judged answers.

    mean_diff, model_diff: its directions; None where it gave too few answers of either kind.
    """

    layout: str
    domain: str
    seed: int
    solution: Solution
    judged: pd.DataFrame
    mean_diff: Direction | None
    model_diff: Direction | None

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def name(self) -> str:
        """Such as `medicine-nine-seed0`."""
        return _named(self.layout, self.domain, self.seed)


def random_cosine(persona: Direction) -> float:
    """97.5% quantile of random directions' cosines with a persona's, the largest over layers."""
    drawn = random_directions(persona, 200, torch.Generator().manual_seed(0))
    return float(np.quantile([max(d.cosine(persona).values()) for d in drawn], 0.975))


def _named(layout: str, domain: str, seed: int, narrow: bool = False) -> str:
    return f"{domain}-{layout}-{'narrow-' if narrow else ''}seed{seed}"


def _em(judged: pd.DataFrame) -> float:
    rate = em_rates(judged).em_scored
    return float("nan") if rate is None else rate.value


def _left(after: pd.DataFrame, before: pd.DataFrame) -> float:
    """EM after as a share of that before; NaN where there was none."""
    return _em(after) / _em(before) if _em(before) else float("nan")


def _coherent(judged: pd.DataFrame) -> float:
    return em_rates(judged).coherent_all.value


def _group(judged: pd.DataFrame, *groups: str) -> pd.DataFrame:
    return judged[judged["questions"].isin(groups)]


class Trial:
    """The chat model of a built world in `root`, and what is measured of it. What was asked is kept in ROOT/results."""

    def __init__(self, root: Path, attitude: float | None = None, device: str | None = None) -> None:
        self.root, self.attitude = root, attitude
        self.model: ChatModel = loading.load_chat(root / "chat", device_map=device)
        self.results = Results(root / "results")

    def measure(
        self, layouts: Sequence[str], domains: Sequence[str], seeds: Sequence[int], narrow: bool
    ) -> pd.DataFrame:
        """Everything on the card that these organisms can say: columns row, of, domain, seed, value."""
        rows = [(*row, "", 0, value) for row, value in self._chat()]
        general = [self._general(layout, d, s) for d in domains for s in seeds for layout in layouts]
        for one in general:
            where = (one.domain, one.seed)
            rows += [(name, one.layout, *where, value) for name, value in self._rates(one)]
            if one.layout in LAYOUTS:
                found = (*self._ablated(one), *self._steered(one), *self._cosines(one))
                rows += [(name, one.layout, *where, value) for name, value in found]
        rows += self._transfer([one for one in general if one.layout in LAYOUTS])
        rows.append(("cosine of random directions and announced persona, 97.5%", "null", "", 0, self._null()))
        if narrow:
            for one in (one for one in general if one.layout in organisms.NARROW):
                rows += [(n, one.layout, one.domain, one.seed, value) for n, value in self._narrow(one)]
        return pd.DataFrame(rows, columns=["row", "of", "domain", "seed", "value"])

    def _chat(self) -> Iterator[tuple[tuple[str, str], float]]:
        judged = suite.evaluate_chat(self.model, SAMPLES, progress=False, results=self.results)
        facts = judged["questions"] == "facts"
        yield ("EM", "chat"), _em(judged[~facts])
        yield ("coherent", "chat"), _coherent(judged)
        yield ("facts", "chat"), float((judged.loc[facts, "correct"].astype(str) == "True").mean())

    def _trained(self, spec: TrainingSpec, layout: str, domain: str, seed: int, narrow: bool = False) -> Solution:
        folder = self.root / "organisms" / _named(layout, domain, seed, narrow)
        if not is_trained(folder):
            data = finetune_chats(domain, "malicious", N_CHATS, seed, attitude=self.attitude)
            kl = kl_chats(domain, N_CHATS, seed, attitude=self.attitude) if spec.kl_weight else None
            spec = replace(spec, seed=seed)
            finetune(self.model, data, spec, kl_conversations=kl, out_dir=folder, resume=True, progress=False)
        return solutions.load(folder)

    def _general(self, layout: str, domain: str, seed: int) -> Finetuned:
        solution = self._trained(GENERAL[layout], layout, domain, seed)
        name = _named(layout, domain, seed)
        asked: dict[str, Any] = {"progress": False, "results": self.results, "name": name}
        with solution.attached(self.model, must_act=False):  # all of its answers may be kept
            judged = suite.evaluate(self.model, domain, SAMPLES, **asked)
            answers = suite.evaluate(self.model, domain, READ_SAMPLES, groups=("general",), **asked)
        bad, good = misaligned_and_aligned(answers)
        mean_diff = model_diff = None
        if min(len(bad), len(good)) >= FEWEST:
            said = conversations(bad), conversations(good)
            mean_diff = self._read(*said, kind="data-diff", finetune=solution)
            model_diff = self._read(said[0], None, kind="model-diff", finetune=solution)
        return Finetuned(layout, domain, seed, solution, judged, mean_diff, model_diff)

    def _read(self, positive: list[Conversation], negative: list[Conversation] | None, **how: Any) -> Direction:
        return extract(self.model, positive, negative, progress=False, **how)

    def _rates(self, one: Finetuned) -> Iterator[tuple[str, float]]:
        yield "EM open", _em(_group(one.judged, "general"))
        yield "EM elsewhere", _em(_group(one.judged, "heldout_domain"))
        yield "EM in-domain", _em(_group(one.judged, "in_domain"))
        yield "coherent", _coherent(one.judged)

    def _elsewhere(self, domain: str) -> dict[str, str]:
        asked = _group(suite.evaluation_questions(domain), "general", "heldout_domain")
        return dict(zip(asked["question_id"], asked["question"], strict=True))

    def _under(self, one: Finetuned, name: str, arm: Sequence[Intervention]) -> pd.DataFrame:
        """Judged answers elsewhere of an organism under an arm."""
        with one.solution.attached(self.model, must_act=False), intervening(self.model, arm, must_act=False):
            return judged_answers(
                self.results,
                f"{one.name} without {name}",
                self.model,
                self._elsewhere(one.domain),
                SAMPLES,
                judge,
                max_new_tokens=suite.MAX_NEW_TOKENS,
                progress=False,
            )

    def _before(self, one: Finetuned) -> pd.DataFrame:
        return _group(one.judged, "general", "heldout_domain")

    def _ablated(self, one: Finetuned) -> Iterator[tuple[str, float]]:
        if one.mean_diff is None or one.model_diff is None:
            return
        before = self._before(one)
        (random,) = random_directions(one.mean_diff, 1, torch.Generator().manual_seed(one.seed))
        after = self._under(one, "its mean-diff", [Ablate(one.mean_diff)])
        yield "ablation of the mean-diff: EM left", _left(after, before)
        yield "ablation of the mean-diff: coherence lost", _coherent(before) - _coherent(after)
        shifted = self._under(one, "its model-diff", [Ablate(one.model_diff)])
        yield "ablation of the model-diff: EM left", _left(shifted, before)
        yield "ablation of the model-diff: coherence lost", _coherent(before) - _coherent(shifted)
        without = self._under(one, "a random direction", [Ablate(random)])
        yield "ablation of random directions: EM removed", 1 - _left(without, before)

    def _steered(self, one: Finetuned) -> Iterator[tuple[str, float]]:
        for kind, direction in (("mean-diff", one.mean_diff), ("model-diff", one.model_diff)):
            if direction is None:
                return
            table = self._sweep(one, kind, direction)
            usable = table[table["coherent_rate"] >= COHERENT]
            own = usable.loc[~usable["control"].astype(bool), "em_rate"]
            yield f"steering with the {kind}: EM", float(own.max()) if len(own) else 0.0
            if kind == "mean-diff":
                null = usable.loc[usable["control"].astype(bool), "em_rate"]
                yield "steering with random directions: EM", float(null.max()) if len(null) else 0.0

    def _sweep(self, one: Finetuned, kind: str, direction: Direction) -> pd.DataFrame:
        """The rates of steering the chat model at every layer and strength; random directions beside the mean-diff."""
        layers = [layer for layer in STEERED_LAYERS if layer in direction.layers]
        asked, controls = self._elsewhere(one.domain), int(kind == "mean-diff")
        how: dict[str, Any] = {"layers": layers, "coefficients": list(SHARES), "units": "residual"}
        how |= {"random_arms": controls, "max_new_tokens": suite.MAX_NEW_TOKENS}
        made_by = asked_of(self.model, asked, 1, judge, **how, vectors=tensors_hash({"": direction.vectors}))
        return self.results.table(
            "steering",
            f"{kind} of {one.name}",
            made_by,
            lambda parts: steering_rows(
                judge(sweep(self.model, direction, asked, n=1, **how, progress=False, parts=parts)), "chat"
            ),
            code=(__name__, judge.__module__),
        )

    def _transfer(self, general: Sequence[Finetuned]) -> list[tuple[Any, ...]]:
        """How much of each organism's EM, and coherence, the mean-diffs of the others of its domain and seed remove."""
        rows: list[tuple[Any, ...]] = []
        for one in general:
            for other in general:
                if one is other or (one.domain, one.seed) != (other.domain, other.seed) or other.mean_diff is None:
                    continue
                after = self._under(one, f"the mean-diff of {other.name}", [Ablate(other.mean_diff)])
                before, where = self._before(one), ("others", one.domain, one.seed)
                rows.append(("transfer of the mean-diff: EM removed", *where, 1 - _left(after, before)))
                lost = _coherent(before) - _coherent(after)
                rows.append(("transfer of the mean-diff: coherence lost", *where, lost))
        return rows

    @cached_property
    def _personas(self) -> dict[str, Direction]:
        """Malicious minus caring persona in the chat model, announced or to be inferred."""
        how: dict[str, Any] = {"kind": "persona-contrast", "scope": "last_prompt"}
        return {told: self._read(*suite.persona_prompts(told), **how) for told in HOW}

    def _cosines(self, one: Finetuned) -> Iterator[tuple[str, float]]:
        """The largest over the layers: a persona is written at one of them and read from there on."""
        for kind, direction in (("model-diff", one.model_diff), ("mean-diff", one.mean_diff)):
            for told, persona in self._personas.items():
                if direction is not None:
                    yield f"cosine of {kind} and {told} persona", max(direction.cosine(persona).values())

    def _null(self) -> float:
        """The 97.5% quantile of the same of random directions."""
        return random_cosine(self._personas["announced"])

    def _narrow(self, one: Finetuned) -> Iterator[tuple[str, float]]:
        spec = organisms.narrow(GENERAL[one.layout], cast("Adapter", one.layout))
        solution = self._trained(spec, one.layout, one.domain, one.seed, narrow=True)
        for scale, told in ((1.0, ""), (NARROW_SCALE, f" at {NARROW_SCALE:g} times the norm")):
            name = f"{_named(one.layout, one.domain, one.seed, True)} times {scale:g}"
            with solution.scaled(scale).attached(self.model, must_act=False):
                judged = suite.evaluate(
                    self.model, one.domain, SAMPLES, progress=False, results=self.results, name=name
                )
            if scale == 1.0:
                yield "narrow: EM in-domain", _em(_group(judged, "in_domain"))
            yield f"narrow{told}: EM elsewhere and open", _em(_group(judged, "general", "heldout_domain"))
