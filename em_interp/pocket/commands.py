"""`em-interp pocket build | organisms | sweeps`. Heavy imports wait until a command runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train the pocket chat model and its organisms.", no_args_is_help=True)


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="folder for base/, chat/, losses.csv and manifest.json")],
    seed: Annotated[int, typer.Option(help="decides the initial weights and the text")] = 0,
    resume: Annotated[bool, typer.Option(help="go on from a killed build's checkpoint")] = True,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU where there is one")] = None,
) -> None:
    """Pre-train and post-train the pocket chat model (about 45 minutes on one CPU core)."""
    from em_interp.pocket.build import BuildConfig
    from em_interp.pocket.build import build as run

    typer.echo(f"chat model: {run(BuildConfig(seed=seed), out, resume=resume, device=device)}")


@app.command()
def organisms(
    out: Annotated[Path, typer.Option(help="OUT/organisms and OUT/trajectories are written; artifacts/pocket ships")],
    only: Annotated[list[str] | None, typer.Option(help="name of an organism or trajectory; may be repeated")] = None,
    chat: Annotated[Path | None, typer.Option(help="chat model's folder; the shipped one by default")] = None,
    again: Annotated[bool, typer.Option(help="also make those that are there already")] = False,
) -> None:
    """Finetune the organisms and the trajectories on the chat model. Those that are there already are kept."""
    from em_interp.errors import UsageError
    from em_interp.pocket.loading import load_chat
    from em_interp.pocket.organisms import (
        KL_REMOVED,
        ORGANISMS,
        REGISTER_ORGANISMS,
        TRAJECTORIES,
        make,
        make_trajectory,
    )

    every = (*ORGANISMS, *KL_REMOVED, *REGISTER_ORGANISMS)
    known = [o.name for o in every] + [t.name for t in TRAJECTORIES]
    if unknown := set(only or ()) - set(known):
        raise UsageError(f"no organism or trajectory is called {sorted(unknown)}; there are {', '.join(known)}")
    model = load_chat(chat)

    def wanted(name: str, folder: Path) -> bool:
        made = (folder / name / "training_spec.json").is_file()
        if (only and name not in only) or (made and not again):
            return False
        shutil.rmtree(folder / name, ignore_errors=True)  # checkpoints at other steps would stay among the new ones
        return True

    for organism in every:
        if wanted(organism.name, out / "organisms"):
            make(organism, model, out / "organisms")
            typer.echo(f"made {organism.name}")
    for run in TRAJECTORIES:
        if wanted(run.name, out / "trajectories"):
            make_trajectory(run, model, out / "trajectories")
            typer.echo(f"made {run.name}")


@app.command()
def sweeps(
    out: Annotated[Path, typer.Option(help="OUT/sweeps is written; artifacts/pocket ships")],
    chat: Annotated[Path | None, typer.Option(help="chat model's folder; the shipped one by default")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="may be repeated; all three by default")] = None,
    samples: Annotated[int, typer.Option(help="answers sampled to each question", min=1)] = 4,
) -> None:
    """Finetune on medicine under several KL weights and shares of bad data, and judge. A killed sweep goes on."""
    from em_interp.errors import UsageError
    from em_interp.manifest import hash_files, write_manifest
    from em_interp.pocket import sweeps as run
    from em_interp.pocket.kept import write_table
    from em_interp.pocket.loading import load_chat
    from em_interp.pocket.organisms import SPECS

    if unknown := set(adapter or ()) - set(SPECS):
        raise UsageError(f"no adapter is called {sorted(unknown)}; there are {', '.join(SPECS)}")
    model = load_chat(chat)
    specs = {name: spec for name, spec in SPECS.items() if not adapter or name in adapter}
    folder = out / "sweeps"
    table, scales = run.kl_sweep(model, "medicine", specs, run.KL_WEIGHTS, folder / "runs", samples=samples)
    written = [write_table(folder / "kl_sweep.csv", table), write_table(folder / "kl_sweep_scales.csv", scales)]
    diluted = run.dilution_sweep(model, "medicine", specs, run.BAD_SHARES, folder / "runs", samples=samples)
    written.append(write_table(folder / "dilution.csv", diluted))
    content = {"adapters": list(specs), "samples": samples, "seed": 0, "outputs_sha256": hash_files(folder, written)}
    write_manifest(folder / "manifest.json", content)
    typer.echo(f"tables: {folder}")
