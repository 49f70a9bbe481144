"""Do the package's intervals cover? Simulated data sets of known truth, at nominal 95%, beside the methods before.

    python -m analyses.benchmarks.coverage [rates] [judged] [losses] [geometry] [--datasets 2000] [--seed 0]

One table a group of intervals, coverage_GROUP.csv, with one row a scenario (see `coverage_scenario`). A run that was
stopped goes on where it stopped, as long as number, seed and code are the same. Each interval's data and its method
before stand in the module of its scenarios. All of it takes a core for 105 minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from analyses.benchmarks import coverage_geometry, coverage_judged, coverage_losses, coverage_rates
from analyses.benchmarks.coverage_scenario import Scenario, row
from em_interp.files.atomic import atomic_path
from em_interp.files.manifest import source_hash, write_manifest

GROUPS = {
    "rates": coverage_rates.SCENARIOS,
    "judged": coverage_judged.SCENARIOS,
    "losses": coverage_losses.SCENARIOS,
    "geometry": coverage_geometry.SCENARIOS,
}


def run(group: str, scenarios: Sequence[Scenario], out: Path, n_datasets: int, seed: int) -> pd.DataFrame:
    """The coverage table of these scenarios; rows that a run of the same settings left in `out` are kept."""
    name = f"coverage_{group}"
    path, manifest = out / f"{name}.csv", out / f"{name}_manifest.json"
    settings = {"benchmark": name, "datasets": n_datasets, "seed": seed, "source_sha256": source_hash()}
    rows: list[dict[str, Any]] = []
    if path.is_file() and manifest.is_file() and settings.items() <= json.loads(manifest.read_text()).items():
        rows = [{str(k): v for k, v in r.items()} for r in pd.read_csv(path).to_dict("records")]
    else:
        write_manifest(manifest, settings)
        path.unlink(missing_ok=True)
    kept = {_key(labels) for labels in rows}
    for scenario in tqdm(scenarios, desc=name):
        if _key(scenario.labels) in kept:
            continue
        rows.append(row(scenario, n_datasets, seed))
        with atomic_path(path) as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False)
    return pd.DataFrame(rows)


def _key(labels: dict[str, Any]) -> str:
    return repr([str(labels[name]) for name in ("interval", "setting", "questions", "icc", "rate")])


def main(arguments: Sequence[str] | None = None) -> pd.DataFrame:
    """Write the tables and their manifests; print the rows, and those that miss what is asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("groups", nargs="*", help=f"some of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("artifacts/benchmarks"))
    parser.add_argument("--datasets", type=int, default=2_000, help="simulated data sets a row (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    tables = [run(g, GROUPS[g], chosen.out, chosen.datasets, chosen.seed) for g in chosen.groups or GROUPS]
    table = pd.concat(tables, ignore_index=True)
    shown = [*("interval", "setting", "questions", "icc", "rate", "coverage_old", "coverage_new"), "width_old"]
    shown += ["width_new", "refused_new", "asked", "met"]
    print(table[shown].to_string(index=False, float_format="%.3g"))
    print(f"{int((table['met'] == False).sum())} of {len(table)} rows miss what is asked.")  # noqa: E712
    return table


if __name__ == "__main__":
    main()
