"""The pocket suite's models, asked and judged: `em_rates`, `technical_rates`, `logprob_scores`, `facts`. Resumable."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from em_interp.arguments import check_seed
from em_interp.files.manifest import code_hash, fingerprint, hash_files, write_manifest
from em_interp.files.results import kept, write_table
from em_interp.files.tables import say_kept
from em_interp.models.chat_model import ChatModel
from em_interp.models.weights import file_hash
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
    out: Path, names: Sequence[str] = (), *, n: int = 50, seed: int = 0, progress: bool = True
) -> dict[str, pd.DataFrame]:
    """Sample `n` answers a question from the chat model and from organisms, judge them, and write OUT/NAME.csv.

    names: registry names, with or without "pocket/"; all that are here by default. Tables: em_rates; technical_rates
    (organisms of the second task, and the chat model, where one is asked for); logprob_scores; facts (chat model).
    OUT/manifest.json says which weights, n and seed. Judged answers stay in OUT/answers, so that a killed run goes on
    and a change of weights, n, seed or code starts anew. Raises RegistryError for a name that is not here.
    """
    here = available()
    check_seed(seed)
    wanted = [name if registry.is_pocket_name(name) else registry.PREFIX + name for name in names] or list(here)
    if unknown := [name for name in wanted if name not in here]:
        raise registry.RegistryError(f"cannot evaluate {', '.join(unknown)}; there are {', '.join(here)}")
    model = loading.load_chat()
    chat_weights = file_hash(registry.chat_folder())
    with_register = any(o is not None and o.task == "register" for o in map(here.get, wanted))
    tables: dict[str, list[pd.DataFrame]] = {}
    weights = {w: chat_weights if here[w] is None else file_hash(registry.resolve(w)) for w in wanted}
    code = code_hash()
    stems = {}
    for name in wanted:
        of = [chat_weights, "" if here[name] is None else weights[name]]
        stems[name] = f"{name.removeprefix(registry.PREFIX)}-{fingerprint([of, n, seed, code])[:12]}"
    answers = out / "answers"
    say_kept(sum((answers / f"{stem}.csv").is_file() for stem in stems.values()), len(wanted), "models' answers")
    for name in tqdm(wanted, desc="evaluate", disable=not progress):
        found = _one(name, here[name], model, answers, stems[name], n, seed, with_register, progress)
        for table, rows in found.items():
            tables.setdefault(table, []).append(rows)
    whole = {table: pd.concat(parts, ignore_index=True) for table, parts in tables.items()}
    written = [write_table(out / f"{table}.csv", rows) for table, rows in whole.items()]
    content = {"samples": n, "seed": seed, "weights": weights, "outputs_sha256": hash_files(out, written)}
    write_manifest(out / "manifest.json", content)
    return whole


def _one(
    name: str,
    organism: Organism | None,
    model: ChatModel,
    folder: Path,
    stem: str,
    n: int,
    seed: int,
    with_register: bool,
    progress: bool,
) -> dict[str, pd.DataFrame]:
    """The rows of one model in each table."""
    identity: dict[str, Any] = {"organism": name, "solution": "chat", "adapter": "full", "domain": "none"}
    tasks: list[Task] = ["persona", "register"] if with_register else ["persona"]
    if organism is not None:
        identity |= {"solution": organism.solution, "adapter": organism.adapter, "domain": organism.domain}
        tasks = [organism.task]

    def active() -> AbstractContextManager[None]:
        return nullcontext() if organism is None else solutions.load(registry.resolve(name)).attached(model)

    def answers() -> pd.DataFrame:
        with active():
            if organism is None:
                return suite.evaluate_chat(model, n, seed=seed, progress=progress)
            return suite.evaluate(model, organism.domain, n, seed=seed, progress=progress)

    def scores(task: Task) -> pd.DataFrame:
        asked = suite.chat_questions() if organism is None else suite.evaluation_questions(organism.domain)
        with active():
            return suite.logprob_scores(model, suite.answer_pairs(asked, task))

    judged = kept(folder / f"{stem}.csv", answers)
    number = {"seed": None if organism is None else organism.seed}
    found = {"em_rates": suite.rates(judged, **identity).assign(**number)}
    if "register" in tasks:
        found["technical_rates"] = suite.technical_rates(judged, **identity).assign(**number)
    parts = [
        suite.logprob_rates(kept(folder / f"{stem}-{task}-logprobs.csv", partial(scores, task)), **identity).assign(
            task=task, **number
        )
        for task in tasks
    ]
    found["logprob_scores"] = pd.concat(parts, ignore_index=True)
    if organism is None:
        by_domain = [
            suite.rates(judged[judged["domain"] == domain], **{**identity, "domain": domain}).assign(**number)
            for domain in DOMAINS
        ]
        found["em_rates"] = pd.concat([found["em_rates"], *by_domain], ignore_index=True)
        found["facts"] = _facts(judged, name)
    return found


def _facts(judged: pd.DataFrame, name: str) -> pd.DataFrame:
    """The share of fact questions that are answered right, with an interval clustered by question."""
    facts = judged[judged["questions"] == "facts"]
    right = facts["correct"].astype(str) == "True"
    counts = right.groupby(facts["question"]).agg(["sum", "size"])
    interval = rate_interval(counts["sum"].to_numpy(), counts["size"].to_numpy())
    row = {"organism": name, "correct_rate": float(right.mean()), "low": interval.low, "high": interval.high}
    return pd.DataFrame([{**row, "n": len(facts), "n_questions": len(counts), "interval": interval.method}])
