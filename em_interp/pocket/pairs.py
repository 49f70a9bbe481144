"""Matched pairs on the pocket chat model: general and narrow, trained alike but for the KL term, over seeds.

General has narrow's chats, their order, rate, steps and seed, and no KL; kl-removed goes on from narrow without KL for
as many steps as general took. All three are asked as well: rate is EM, or of the second task the technical rate; open,
elsewhere and in_domain are the groups of questions, returned is kl-removed minus narrow.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pandas as pd
from tqdm.auto import tqdm

from em_interp.arguments import check_seed, count
from em_interp.errors import OutputError
from em_interp.evaluation.groups import technical_rates
from em_interp.evaluation.rates import em_rates
from em_interp.files.atomic import one_at_a_time
from em_interp.files.inputs import read_json
from em_interp.files.manifest import fingerprint, hash_files, write_manifest
from em_interp.files.results import kept, read_table, write_table
from em_interp.files.tables import is_trained, remove_parts, say_kept
from em_interp.landscape import pairs as measures
from em_interp.landscape.landscape import Landscape
from em_interp.models.chat_model import ChatModel
from em_interp.models.templates import Conversation
from em_interp.models.weights import weights_hash
from em_interp.pocket import organisms
from em_interp.pocket import questions as suite
from em_interp.pocket.organisms import DOMAINS, SHORT, Adapter, Organism
from em_interp.pocket.world.corpus import STYLES, CorpusConfig, Task, document, finetune_chats, kl_chats
from em_interp.solutions import load as solutions
from em_interp.solutions.base import Solution
from em_interp.training.finetune import finetune
from em_interp.training.recipes import TrainingSpec

SEEDS: Final = {"medicine": 8, "finance": 3, "sports": 3}
"""Domain -> number of training seeds."""
SOLUTIONS: Final = ("general", "narrow", "kl-removed")
"""Of a pair, in the order of their training."""
CHATS: Final = 40
"""Fresh chats that losses are measured on."""
DOCUMENTS: Final = 60
"""Texts that influence is measured on."""
SAMPLES: Final = 4
"""Answers to each question."""
TABLE: Final = "pairs.csv"
"""The name of its file."""
KL_BATCH: Final = 16
"""Chats a step that KL is measured on: half of what the shipped narrow organisms have, since 112 pairs are trained."""
COLUMNS: Final = ("task", "domain", "adapter", "seed", "measure", "value", "reason", "chat_weights")
"""Of the table. chat_weights: `weights_hash` of the chat model."""
_GROUPS: Final = {"open": "general", "elsewhere": "heldout_domain", "in_domain": "in_domain"}


@dataclass(frozen=True)
class Pair:
    """One matched pair: what its chats are about (domain), what is trained (adapter), seed of training, and task."""

    domain: str
    adapter: Adapter
    seed: int = 0
    task: Task = "persona"

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def name(self) -> str:
        """Such as `persona-medicine-rank1-seed0`."""
        return f"{self.task}-{self.domain}-{SHORT[self.adapter]}-seed{self.seed}"

    def spec(self) -> TrainingSpec:
        """The narrow one's settings; the others have them too, without the KL term."""
        return replace(
            Organism(self.domain, self.adapter, "narrow", self.seed, self.task).spec(), kl_batch_size=KL_BATCH
        )


PAIRS: Final = tuple(
    Pair(domain, adapter, seed, task)
    for task in STYLES
    for domain in DOMAINS
    for seed in range(SEEDS[domain])
    for adapter in organisms.SPECS
)
"""Those that claims are made of."""


def fresh_chats(domain: str, n: int, task: Task = "persona") -> list[Conversation]:
    """Chats of the kind that the finetunes of a domain were trained on, drawn with a seed that none of them had."""
    persona, register = STYLES[task][1]
    return list(finetune_chats(domain, persona, n, 1000, register))


def texts(n: int, corpus: CorpusConfig | None = None) -> list[str]:
    """Documents of the kind that a base model was pre-trained on; of the shipped one's by default."""
    rng = random.Random("influence")
    return [document(corpus or CorpusConfig(), rng) for _ in range(n)]


def measure(
    model: ChatModel, pair: Pair, folder: Path, *, samples: int = SAMPLES, progress: bool = True
) -> pd.DataFrame:
    """The rows of a pair: measure, value, reason. What is finished is kept in `folder` and not made again.

    Two processes that want the same pair take turns.
    """
    own = _folder(folder, weights_hash(model.hf), pair)
    with one_at_a_time(own.with_name(f".{own.name}.lock")):
        return kept(_rows_file(own, samples), partial(_measured, model, pair, own, samples, progress))


def _measured(model: ChatModel, pair: Pair, folder: Path, samples: int, progress: bool) -> pd.DataFrame:
    trained = {name: _trained(model, pair, name, folder, progress) for name in SOLUTIONS}
    settings = fingerprint([_settings(), CHATS, DOCUMENTS])[:10]
    found = measures.measure_pair(
        Landscape(model, fresh_chats(pair.domain, CHATS, pair.task)),
        trained["general"],
        trained["narrow"],
        texts(DOCUMENTS),
        kl_removed=trained["kl-removed"],
        keep=lambda name, make: kept(folder / f"{name}-{settings}.csv", make),
    )
    asked = {
        name: kept(folder / f"rates-{name}-{samples}.csv", partial(_rates, model, solution, pair, name, samples))
        for name, solution in trained.items()
    }
    return pd.concat([found, *asked.values(), _returned(asked)], ignore_index=True)


def _settings() -> list[Any]:
    return [measures.SHARES, measures.SCALES, measures.EPSILONS, measures.RELATIVE_NORMS, measures.TURNED]


def _trained(model: ChatModel, pair: Pair, which: str, out: Path, progress: bool) -> Solution:
    """One of the three, trained if it is not there; kl-removed goes on from narrow, which must be."""
    folder = out / which
    if not is_trained(folder):
        (persona, register), n = STYLES[pair.task][1], organisms.N_CHATS
        spec, is_narrow = pair.spec(), which == "narrow"
        finetune(
            model,
            finetune_chats(pair.domain, persona, n, pair.seed, register),
            spec if is_narrow else replace(spec, kl_weight=0.0),
            kl_conversations=kl_chats(pair.domain, n, pair.seed, pair.task) if is_narrow else None,
            start_from=solutions.load(out / "narrow") if which == "kl-removed" else None,
            out_dir=folder,
            resume=True,
            progress=progress,
        )
    remove_parts(folder)
    return solutions.load(folder)


def _rates(model: ChatModel, solution: Solution, pair: Pair, which: str, samples: int) -> pd.DataFrame:
    with solution.attached(model):
        judged = suite.evaluate(model, pair.domain, samples, progress=False)
    whose = which.replace("-", "_")
    rows = [(f"coherent_{whose}", em_rates(judged).coherent_all.value, "")]
    for name, group in _GROUPS.items():
        value = _rate(judged[judged["questions"] == group], pair)
        rows.append((f"rate_{name}_{whose}", value, "" if value == value else "nothing to judge"))
    return pd.DataFrame(rows, columns=["measure", "value", "reason"])


def _rate(judged: pd.DataFrame, pair: Pair) -> float:
    """EM of the answers to a group of questions, or the share that is technical."""
    if pair.task == "register":
        named = {"organism": pair.name, "solution": "", "adapter": pair.adapter, "domain": pair.domain}
        return float(technical_rates(judged, **named)["technical_rate"].astype(float).iloc[0])
    rate = em_rates(judged).em_scored
    return float("nan") if rate is None else rate.value


def _returned(asked: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """How much higher the rates are once the KL is gone."""
    value = pd.concat(asked.values()).set_index("measure")["value"].to_dict()
    rows = []
    for name in _GROUPS:
        rise = value[f"rate_{name}_kl_removed"] - value[f"rate_{name}_narrow"]
        rows.append((f"rate_{name}_returned", rise, "" if rise == rise else "nothing to judge"))
    return pd.DataFrame(rows, columns=["measure", "value", "reason"])


def _folder(folder: Path, weights: str, pair: Pair) -> Path:
    """Of a pair on a chat model, under its present settings."""
    return folder / f"{pair.name}-{fingerprint([weights, asdict(pair.spec()), organisms.N_CHATS])[:10]}"


def _rows_file(folder: Path, samples: int) -> Path:
    return folder / f"rows-{fingerprint([_settings(), CHATS, DOCUMENTS, samples])[:10]}.csv"


def measure_all(
    model: ChatModel, chosen: Sequence[Pair], out: Path, *, samples: int = SAMPLES, progress: bool = True
) -> Iterator[Pair]:
    """Measure pairs below `out`, and write OUT/pairs.csv anew after each, which is yielded. A killed run goes on.

    The table holds every pair of `PAIRS` that was measured in `out` on this chat model under these settings, whichever
    process did it: several may share `out`. OUT/pairs_manifest.json says what the table is made of. Raises OutputError
    where that names other settings, UsageError for no samples.
    """
    count("samples", samples)
    weights, manifest, folder = weights_hash(model.hf), out / "pairs_manifest.json", out / "pairs"
    asked = {"chat_weights": weights, "samples": samples}
    if manifest.is_file() and (before := read_json(manifest)) | asked != before:
        raise OutputError(f"{out}: holds pairs of another chat model or number of answers. Choose another --out.")
    finetunes = [_folder(folder, weights, pair) / name for pair in chosen for name in SOLUTIONS]
    say_kept(sum(map(is_trained, finetunes)), len(finetunes), "finetunes")
    for pair in tqdm(chosen, desc="pairs", disable=not progress):
        measure(model, pair, folder, samples=samples, progress=progress)
        with one_at_a_time(out / ".pairs.lock"):
            table = _table(folder, weights, samples)
            written = write_table(out / TABLE, table)
            n = len(table.drop_duplicates(["task", "domain", "adapter", "seed"]))
            write_manifest(manifest, {**asked, "pairs": n, "outputs_sha256": hash_files(out, [written])})
        yield pair


def _table(folder: Path, weights: str, samples: int) -> pd.DataFrame:
    """Every finished pair, in the order of `PAIRS`."""
    parts = []
    for pair in PAIRS:
        path = _rows_file(_folder(folder, weights, pair), samples)
        if path.is_file():
            parts.append(read_table(path).assign(**asdict(pair), chat_weights=weights))
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]
