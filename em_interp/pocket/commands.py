"""`em-interp pocket build`, `em-interp pocket organisms`. Heavy imports wait until a command runs."""

from __future__ import annotations

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
    """Pre-train and post-train the pocket chat model (about 45 minutes on two quiet CPU cores)."""
    from em_interp.pocket.build import BuildConfig
    from em_interp.pocket.build import build as run

    typer.echo(f"chat model: {run(BuildConfig(seed=seed), out, resume=resume, device=device)}")


@app.command()
def organisms(
    out: Annotated[Path, typer.Option(help="folder for the organisms")],
    only: Annotated[list[str] | None, typer.Option(help="name of an organism; may be repeated")] = None,
    chat: Annotated[Path | None, typer.Option(help="chat model's folder; the shipped one by default")] = None,
    again: Annotated[bool, typer.Option(help="also make those that are there already")] = False,
) -> None:
    """Finetune the organisms on the chat model. Those that are there already are kept."""
    from em_interp.errors import UsageError
    from em_interp.pocket.loading import load_chat
    from em_interp.pocket.organisms import ORGANISMS, make

    unknown = set(only or ()) - {o.name for o in ORGANISMS}
    if unknown:
        raise UsageError(f"no organism is called {sorted(unknown)}; there are {', '.join(o.name for o in ORGANISMS)}")
    model = load_chat(chat)
    for organism in ORGANISMS:
        wanted = not only or organism.name in only
        if wanted and (again or not (out / organism.name / "training_spec.json").is_file()):
            make(organism, model, out)
            typer.echo(f"made {organism.name}")
