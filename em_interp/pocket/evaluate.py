"""The pocket suite's models, asked and judged: `em_rates`, `technical_rates`, `logprob_scores`, `facts`. Resumable."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from em_interp.arguments import check_seed
from em_interp.evaluation.groups import rates_by_group, technical_rates
from em_interp.files.manifest import fingerprint, hash_files, write_manifest
from em_interp.files.results import Results, write_table
from em_interp.models.chat_model import ChatModel
from em_interp.models.weights import file_hash, what_acts
from em_interp.pocket import models as loading
from em_interp.pocket import questions as suite
from em_interp.pocket import registry
from em_interp.pocket.organisms import ORGANISMS, REGISTER_ORGANISMS, Organism
from em_interp.pocket.world.corpus import Task
from em_interp.pocket.world.domains import DOMAINS
from em_interp.solutions import load as solutions
from em_interp.statistics.rate_intervals import rate_interval


def available() -> dict[str, Organism | None]:
    """Registry name -> organism, for every finetune that is here; None for the chat model, which comes first."""
    known = {registry.PREFIX + o.name: o for o in (*ORGANISMS, *REGISTER_ORGANISMS)}
    return {loading.CHAT: None} | {name: known[name] for name in registry.names() if name in known}


def evaluate_suite(
    out: Path,
    names: Sequence[str] = (),
    *,
    n: int = 50,
    seed: int = 0,
    progress: bool = True,
    device_map: str | None = None,
    dtype: str = "auto",
) -> dict[str, pd.DataFrame]:
    """Sample `n` answers a question from the chat model and from organisms, judge them, and write OUT/NAME.csv.

    names: registry names, with or without "pocket/"; all that are here by default. device_map, dtype: of the models.
    Tables: em_rates; technical_rates (organisms of the second task, and the chat model, where one is asked for);
    logprob_scores; facts (chat model). OUT/manifest.json says which weights, n, seed and dtype. Judged answers stay in
    OUT/answers (`Results`), so that a killed run goes on and a change of weights, n, seed or code starts anew. Raises
    RegistryError for a name that is not here.
    """
    here = available()
    check_seed(seed)
    wanted = [name if registry.is_pocket_name(name) else registry.PREFIX + name for name in names] or list(here)
    if unknown := [name for name in wanted if name not in here]:
        raise registry.RegistryError(f"cannot evaluate {', '.join(unknown)}; there are {', '.join(here)}")
    model = loading.load_chat(device_map=device_map, dtype=dtype)
    chat_weights = file_hash(registry.chat_folder())
    with_register = any(o is not None and o.task == "register" for o in map(here.get, wanted))
    tables: dict[str, list[pd.DataFrame]] = {}
    weights = {w: chat_weights if here[w] is None else file_hash(registry.resolve(w)) for w in wanted}
    results = Results(out)
    results.say_kept()
    for name in tqdm(wanted, desc="evaluate", disable=not progress):
        asking = _Asking(model, name, here[name], results, n, seed, progress)
        for table, rows in asking.tables(with_register).items():
            tables.setdefault(table, []).append(rows)
    whole = {table: pd.concat(parts, ignore_index=True) for table, parts in tables.items()}
    written = [write_table(out / f"{table}.csv", rows) for table, rows in whole.items()]
    content = {
        "samples": n,
        "seed": seed,
        "dtype": dtype,
        "weights": weights,
        "outputs_sha256": hash_files(out, written),
    }
    write_manifest(out / "manifest.json", content)
    return whole


@dataclass(frozen=True)
class _Asking:
    """One model, what is asked of it, and where its answers are kept."""

    model: ChatModel
    name: str
    organism: Organism | None
    results: Results
    n: int
    seed: int
    progress: bool

    @property
    def short(self) -> str:
        return self.name.removeprefix(registry.PREFIX)

    def active(self) -> AbstractContextManager[None]:
        if self.organism is None:
            return nullcontext()
        return solutions.load(registry.resolve(self.name)).attached(self.model, must_act=False)

    def answers(self) -> pd.DataFrame:
        options: dict[str, Any] = {"seed": self.seed, "progress": self.progress}
        options |= {"results": self.results, "name": self.short}
        with self.active():
            if self.organism is None:
                return suite.evaluate_chat(self.model, self.n, **options)
            return suite.evaluate(self.model, self.organism.domain, self.n, **options)

    def scores(self, task: Task) -> pd.DataFrame:
        of = self.organism
        pairs = suite.answer_pairs(
            suite.chat_questions() if of is None else suite.evaluation_questions(of.domain), task
        )
        with self.active():
            return self.results.table(
                "logprobs",
                f"{self.short} {task}",
                {**what_acts(self.model), "pairs": fingerprint(pairs.to_dict("records"))},
                lambda _: suite.logprob_scores(self.model, pairs),
                code=(suite.__name__,),
            )

    def tables(self, with_register: bool) -> dict[str, pd.DataFrame]:
        """The rows of this model in each table."""
        identity: dict[str, Any] = {"organism": self.name, "solution": "chat", "adapter": "full", "domain": "none"}
        tasks: list[Task] = ["persona", "register"] if with_register else ["persona"]
        if self.organism is not None:
            of = self.organism
            identity |= {"solution": of.solution, "adapter": of.adapter, "domain": of.domain}
            tasks = [of.task]
        judged = self.answers()
        number = {"seed": None if self.organism is None else self.organism.seed}
        found = {"em_rates": rates_by_group(judged, **identity).assign(**number)}
        if "register" in tasks:
            found["technical_rates"] = technical_rates(judged, **identity).assign(**number)
        parts = [suite.logprob_rates(self.scores(task), **identity).assign(task=task, **number) for task in tasks]
        found["logprob_scores"] = pd.concat(parts, ignore_index=True)
        if self.organism is None:
            by_domain = [
                rates_by_group(judged[judged["domain"] == domain], **{**identity, "domain": domain}).assign(**number)
                for domain in DOMAINS
            ]
            found["em_rates"] = pd.concat([found["em_rates"], *by_domain], ignore_index=True)
            found["facts"] = _facts(judged, self.name)
        return found


def _facts(judged: pd.DataFrame, name: str) -> pd.DataFrame:
    """The share of fact questions that are answered right, with an interval clustered by question."""
    facts = judged[judged["questions"] == "facts"]
    right = facts["correct"].astype(str) == "True"
    counts = right.groupby(facts["question"]).agg(["sum", "size"])
    interval = rate_interval(counts["sum"].to_numpy(), counts["size"].to_numpy())
    row = {"organism": name, "correct_rate": float(right.mean()), "low": interval.low, "high": interval.high}
    return pd.DataFrame([{**row, "n": len(facts), "n_questions": len(counts), "interval": interval.method}])
