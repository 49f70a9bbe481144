"""The largest learning rate at which the loss at convergence no longer depends on it: how gentle organisms are trained.

    python -m analyses.benchmarks.learning_rates [--layout all-modules] [--out artifacts/benchmarks] [--parts DIR]

One general medicine organism of the shipped chat model a rate and seed, many steps, then its loss on fresh chats, its
norm and its EM. Rates were chosen before looking. `largest` says which rate is the largest whose loss lies within
`SAME` of the lowest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import cast

import pandas as pd
from tqdm.auto import tqdm

from em_interp.evaluation.rates import em_rates
from em_interp.files.atomic import atomic_path
from em_interp.files.manifest import fingerprint, write_manifest
from em_interp.files.results import kept
from em_interp.landscape.landscape import Landscape
from em_interp.models.chat_model import ChatModel
from em_interp.models.weights import weights_hash
from em_interp.pocket import models
from em_interp.pocket import questions as suite
from em_interp.pocket.organisms import N_CHATS, SPECS, Adapter
from em_interp.pocket.pairs import fresh_chats
from em_interp.pocket.world.corpus import finetune_chats
from em_interp.training.finetune import finetune
from em_interp.training.recipes import TrainingSpec

RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
STEPS = 400
SEEDS = (0, 1)
CHATS = 100
SAMPLES = 2
SAME = 0.005
"""Nats per token: losses that close are the same."""


def measure(layout: Adapter, rates: Sequence[float], seeds: Sequence[int], steps: int, parts: Path) -> pd.DataFrame:
    """A row a rate and seed: loss (nats per token), norm, EM by group of questions, coherence; kept in `parts`."""
    model = models.load_chat()
    landscape = Landscape(model, fresh_chats("medicine", CHATS))
    found = []
    for seed, rate in tqdm([(seed, rate) for seed in seeds for rate in rates]):
        spec = replace(SPECS[layout], learning_rate=rate, max_steps=steps, seed=seed)
        path = parts / f"{fingerprint([asdict(spec), N_CHATS, CHATS, SAMPLES, weights_hash(model.hf)])[:16]}.csv"
        row = partial(_row, model, landscape, spec)
        found.append(kept(path, row).assign(layout=layout, learning_rate=rate, seed=seed, steps=steps))
    return pd.concat(found, ignore_index=True)


def _row(model: ChatModel, landscape: Landscape, spec: TrainingSpec) -> pd.DataFrame:
    chats = finetune_chats("medicine", "malicious", N_CHATS, spec.seed)
    solution = finetune(model, chats, spec, progress=False).solution
    assert solution is not None
    with solution.attached(model):
        judged = suite.evaluate(model, "medicine", SAMPLES, progress=False)
    em = {name: em_rates(judged[judged["questions"] == group]).em_scored for name, group in GROUPS.items()}
    row = {"loss": float(landscape.losses([solution]).mean[0]), "norm": solution.norm}
    row |= {f"em_{name}": float("nan") if found is None else found.value for name, found in em.items()}
    return pd.DataFrame([{**row, "coherent_rate": em_rates(judged).coherent_all.value}])


GROUPS = {"elsewhere": "heldout_domain", "open": "general", "in_domain": "in_domain"}


def largest(table: pd.DataFrame) -> float:
    """The largest rate up to which the mean loss over seeds stays within `SAME` of the lowest."""
    loss = table.groupby("learning_rate")["loss"].mean()
    return float(max(loss.index[loss <= loss.min() + SAME]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=tuple(SPECS), default="all-modules")
    parser.add_argument("--out", type=Path, default=Path("artifacts/benchmarks"))
    parser.add_argument("--parts", type=Path, default=Path("out/learning_rates"), help="a killed run goes on from here")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    rates, seeds, steps = (RATES[:2], SEEDS[:1], 2) if given.smoke else (RATES, SEEDS, STEPS)
    table = measure(cast("Adapter", given.layout), rates, seeds, steps, given.parts)
    name = f"learning_rates_{given.layout}"
    with atomic_path(given.out / f"{name}.csv") as tmp:
        table.to_csv(tmp, index=False)
    write_manifest(given.out / f"{name}_manifest.json", {"same": SAME, "largest": largest(table), "chats": CHATS})
    print(table.to_string(), f"\nlargest: {largest(table):g}")


if __name__ == "__main__":
    main()
