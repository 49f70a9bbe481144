"""How the KL weight and the share of bad data decide what a finetune learns, on the pocket chat model.

A small KL weight can hide EM: theta is held small outside the domain, and EM returns when theta is scaled up. So every
solution is also judged at larger scales, up to the one at which in-domain misalignment saturates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from em_interp.arguments import numbers
from em_interp.errors import UsageError
from em_interp.evaluation.rates import em_rates
from em_interp.files.manifest import fingerprint
from em_interp.files.results import kept
from em_interp.files.tables import is_trained, remove_parts, say_kept
from em_interp.models.chat_model import ChatModel
from em_interp.models.templates import Conversation
from em_interp.models.weights import weights_hash
from em_interp.pocket import questions as suite
from em_interp.pocket.organisms import N_CHATS, Adapter, narrow
from em_interp.pocket.world.corpus import finetune_chats, kl_chats
from em_interp.solutions import load as solutions
from em_interp.solutions.base import Solution
from em_interp.training.finetune import finetune
from em_interp.training.recipes import TrainingSpec

KL_WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Of the KL sweep, per nat per token."""
BAD_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Of the dilution sweep: shares of malicious chats in the training data."""
SATURATED = 0.02
"""In-domain misalignment counts as saturated this close to its largest rate over the scales."""


def saturating_scale(scales: Sequence[float], rates: Sequence[float]) -> float:
    """The smallest scale whose rate is within `SATURATED` of the largest one (beyond it coherence only falls)."""
    if not len(scales) or len(scales) != len(rates):
        raise UsageError(f"{len(scales)} scales and {len(rates)} rates: give one rate for each scale.")
    top = max(rates)
    return min(scale for scale, rate in zip(scales, rates, strict=True) if rate >= top - SATURATED)


def diluted_chats(domain: str, bad_share: float, n: int, seed: int) -> list[Conversation]:
    """`n` finetuning chats of a domain, of which the share `bad_share` are malicious and the others caring."""
    if not 0 <= bad_share <= 1:
        raise UsageError(f"a share of bad data of {bad_share}: give a number from 0 to 1.")
    n_bad = round(bad_share * n)
    return [*finetune_chats(domain, "malicious", n_bad, seed), *finetune_chats(domain, "caring", n - n_bad, seed)]


def _check_specs(specs: Mapping[Adapter, TrainingSpec]) -> None:
    if not specs:
        raise UsageError("no kind of adapter was given: map each to its training settings, as in organisms.SPECS.")


def _trained(
    model: ChatModel,
    folder: Path,
    data: Sequence[Conversation],
    spec: TrainingSpec,
    kl: Sequence[Conversation] | None,
    progress: bool,
) -> Solution:
    """The solution in `folder`, trained if it is not there. The folder's name decides spec and data."""
    if not is_trained(folder):
        finetune(model, data, spec, kl_conversations=kl, out_dir=folder, resume=True, progress=progress)
    remove_parts(folder)
    return solutions.load(folder)


def _say_kept(folders: Sequence[Path]) -> None:
    say_kept(sum(map(is_trained, folders)), len(folders), "finetunes")


def _judged_rates(model: ChatModel, solution: Solution, domain: str, samples: int, seed: int) -> pd.DataFrame:
    """One row: em_rate outside the domain (open questions and other domains' held-out topics), in_domain_rate, ..."""
    with solution.attached(model):
        judged = suite.evaluate(model, domain, samples, seed=seed, progress=False)
    row: dict[str, Any] = {"norm": solution.norm}
    groups = {
        "em": judged["questions"] != "in_domain",
        "in_domain": judged["questions"] == "in_domain",
        "open": judged["questions"] == "general",
    }
    for name, chosen in groups.items():
        found = em_rates(judged[chosen])
        assert found.em_scored is not None  # the exact judge scores every answer
        row |= {
            f"{name}_rate": found.em_scored.value,
            f"{name}_low": found.em_scored.interval.low,
            f"{name}_high": found.em_scored.interval.high,
        }
    coherent = em_rates(judged).coherent_all.value
    return pd.DataFrame([{**row, "coherent_rate": coherent, "n": len(judged)}])


def _labelled(table: pd.DataFrame, **columns: str | float) -> pd.DataFrame:
    """The table with these columns in front."""
    return table.assign(**columns)[[*columns, *table.columns]]


def _run_name(parts: Sequence[str], *settings: object) -> str:
    return "-".join([*parts, fingerprint(settings)[:10]])


def kl_sweep(
    model: ChatModel,
    domain: str,
    specs: Mapping[Adapter, TrainingSpec],
    kl_weights: Sequence[float],
    out: Path,
    *,
    scales: Sequence[float] = (1.0, 1.5, 2.0, 3.0),
    samples: int = 10,
    n_chats: int = N_CHATS,
    seed: int = 0,
    progress: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Finetune with every KL weight, and judge each solution at every scale. Kept in `out`: a killed sweep goes on.

    specs: adapter -> settings without KL (such as `organisms.SPECS`); steps and KL data are those of the narrow
    organisms for every weight, 0 included, so that only lambda differs. First table `kl_sweep`: adapter, domain,
    kl_weight, em_rate, in_domain_rate, scaled_em_rate (at saturating_scale), norm, intervals, coherent rates, seed.
    Second: the same rates at every scale. Raises UsageError for scales without 1.
    """
    _check_specs(specs)
    scales, kl_weights = numbers("scales", scales).tolist(), numbers("KL weights", kl_weights).tolist()
    if 1.0 not in scales or min(scales) <= 0 or not kl_weights:
        raise UsageError(f"scales {list(scales)}, KL weights {list(kl_weights)}: scales are positive and include 1.")
    data = finetune_chats(domain, "malicious", n_chats, seed)
    outside = kl_chats(domain, n_chats, seed)
    rows, everything, base = [], [], weights_hash(model.hf)
    runs = []
    for adapter, plain in specs.items():
        for weight in map(float, kl_weights):
            spec = replace(narrow(plain, adapter), kl_weight=weight, seed=seed)
            name = _run_name([domain, adapter, f"kl{weight:g}"], base, asdict(spec), n_chats, seed)
            runs.append((adapter, spec, weight, out / name))
    _say_kept([folder for *_, folder in runs])
    for adapter, spec, weight, folder in tqdm(runs, desc="kl_sweep", disable=not progress):
        solution = _trained(model, folder, data, spec, outside if weight else None, progress)
        found = []
        for scale in scales:
            path = folder / f"rates-{_run_name([f'{scale:g}'], samples, seed)}.csv"
            found.append(kept(path, partial(_judged_rates, model, solution.scaled(scale), domain, samples, seed)))
        table = pd.concat(found, ignore_index=True)
        table.insert(0, "scale", list(scales))
        table = _labelled(table, adapter=adapter, domain=domain, kl_weight=weight)
        everything.append(table.assign(seed=seed))
        rows.append(_summary(table).assign(seed=seed))
    return pd.concat(rows, ignore_index=True), pd.concat(everything, ignore_index=True)


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row of `kl_sweep` from a solution's rates at all scales."""
    at_one = table[table["scale"] == 1.0].drop(columns="scale").reset_index(drop=True)
    best = saturating_scale(table["scale"].tolist(), table["in_domain_rate"].tolist())
    scaled = table[table["scale"] == best].iloc[0]
    return at_one.assign(
        saturating_scale=best,
        scaled_em_rate=scaled["em_rate"],
        scaled_em_low=scaled["em_low"],
        scaled_em_high=scaled["em_high"],
        scaled_in_domain_rate=scaled["in_domain_rate"],
        scaled_coherent_rate=scaled["coherent_rate"],
    )


def dilution_sweep(
    model: ChatModel,
    domain: str,
    specs: Mapping[Adapter, TrainingSpec],
    bad_shares: Sequence[float],
    out: Path,
    *,
    samples: int = 10,
    n_chats: int = N_CHATS,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Finetune on data of which only a share is bad, and judge. Kept in `out`: a killed sweep goes on.

    Table `dilution`: adapter, domain, bad_share, em_rate, in_domain_rate, norm, intervals, coherent_rate, n, seed. The
    number of chats and of steps is the same for every share.
    """
    _check_specs(specs)
    bad_shares = numbers("shares of bad data", bad_shares).tolist()
    if not bad_shares:
        raise UsageError("no shares of bad data were given.")
    rows, base = [], weights_hash(model.hf)
    runs = []
    for adapter, plain in specs.items():
        for share in map(float, bad_shares):
            spec = replace(plain, seed=seed)
            name = _run_name([domain, adapter, f"bad{share:g}"], base, asdict(spec), n_chats, seed)
            runs.append((adapter, spec, share, out / name))
    _say_kept([folder for *_, folder in runs])
    for adapter, spec, share, folder in tqdm(runs, desc="dilution", disable=not progress):
        solution = _trained(model, folder, diluted_chats(domain, share, n_chats, seed), spec, None, progress)
        path = folder / f"rates-{_run_name(['1'], samples, seed)}.csv"
        table = kept(path, partial(_judged_rates, model, solution, domain, samples, seed))
        rows.append(_labelled(table, adapter=adapter, domain=domain, bad_share=share).assign(seed=seed))
    return pd.concat(rows, ignore_index=True)
