"""`em-interp pocket build | organisms | sweeps | pairs | controls | ...`. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from em_interp.cli import options
from em_interp.cli.pages import Command, Group

app = typer.Typer(
    cls=Group, help="Train the pocket chat model and its organisms.", no_args_is_help=True, rich_markup_mode=None
)


@app.command(cls=Command)
def build(
    out: Annotated[Path, options.takes("out", "a folder for base/, chat/, losses.csv and manifest.json")],
    seed: options.Seed = 0,
    resume: Annotated[bool, options.takes("resume", "its checkpoint", "--resume/--no-resume")] = True,
    device_map: options.DeviceMap = None,
    force: options.Force = False,
) -> None:
    """Pre-train and post-train the pocket chat model (about 45 minutes on one CPU core)."""
    from em_interp.files.atomic import check_writable, claim_output
    from em_interp.pocket.build import CHECKPOINT
    from em_interp.pocket.build import build as run
    from em_interp.pocket.stages import BuildConfig

    check_writable(out / CHECKPOINT)
    if not (out / CHECKPOINT).exists():  # else this build is not finished, and what is there is its own
        claim_output(out / "chat", force=force, folder=True)
    device = None if device_map == "auto" else device_map
    typer.echo(f"chat model: {run(BuildConfig(seed=seed), out, resume=resume, device=device)}")


@app.command(cls=Command)
def organisms(
    out: Annotated[Path, options.takes("out", "a folder for organisms/ and trajectories/")],
    only: Annotated[list[str] | None, options.takes("only", "names of organisms or trajectories")] = None,
    model: options.NamedModel = None,
    device_map: options.DeviceMap = None,
    force: options.Force = False,
) -> None:
    """Finetune the organisms and the trajectories on the chat model. Those that are there already are kept.

    A killed run goes on where it stopped.
    """
    from em_interp.errors import UsageError
    from em_interp.files.atomic import check_writable
    from em_interp.files.tables import is_trained, remove_parts, say_kept
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

    def wanted(name: str, folder: Path) -> bool:
        if only and name not in only:
            return False
        if is_trained(folder / name):
            remove_parts(folder / name)
            return force
        return True

    todo = [o for o in every if wanted(o.name, out / "organisms")]
    runs = [t for t in TRAJECTORIES if wanted(t.name, out / "trajectories")]
    asked = sum(not only or name in only for name in known)
    say_kept(asked - len(todo) - len(runs), asked, "finetunes")
    for path in [out / "organisms" / o.name for o in todo] + [out / "trajectories" / t.name for t in runs]:
        check_writable(path)
    chat = _chat_of(out, model, device_map)
    for organism in todo:
        make(organism, chat, out / "organisms")
        typer.echo(f"made {organism.name}")
    for run in runs:
        make_trajectory(run, chat, out / "trajectories")
        typer.echo(f"made {run.name}")


def _chat_of(out: Path, named: str | None, device_map: str | None) -> Any:
    """The chat model that finetunes in `out` are made from: a pocket model, and the same for all of them."""
    from em_interp.errors import MissingDataError, UsageError
    from em_interp.files.atomic import write_text
    from em_interp.models.weights import weights_hash
    from em_interp.pocket.models import load_chat
    from em_interp.pocket.world.tokenizer import build_tokenizer

    chat = None if named is None else Path(options.located(named))
    if chat is not None and not chat.is_dir():
        raise MissingDataError(chat, "there is no such folder", "give the folder chat/ of a pocket build with --model")
    model = load_chat(chat, device_map=device_map)
    if model.tokenizer.get_vocab() != build_tokenizer().get_vocab():
        raise UsageError(
            f"--model {chat}: no pocket chat model, it has another vocabulary. `em-interp pocket build` makes one."
        )
    weights, record = weights_hash(model.hf), out / "made_from.json"
    there = None
    if (out / "chat" / "config.json").is_file():
        there = weights_hash(load_chat(out / "chat").hf)
    elif record.is_file():
        there = json.loads(record.read_text(encoding="utf-8"))["chat_weights"]
    if there is not None and there != weights:
        raise UsageError(f"{out} belongs to another chat model than {chat or 'the shipped one'}. Choose another --out.")
    if there is None:
        write_text(record, json.dumps({"chat_weights": weights}) + "\n")
    return model


def _sweeps_called(name: str) -> str:
    return "only" if name == "adapter" else options.now_called(name)


@app.command(cls=Command, context_settings={"token_normalize_func": _sweeps_called})
def sweeps(
    out: Annotated[Path, options.takes("out", "a folder for sweeps/")],
    model: options.NamedModel = None,
    only: Annotated[list[str] | None, options.takes("only", "steering-vector, rank-1 or all-modules")] = None,
    n: options.Samples = 4,
    device_map: options.DeviceMap = None,
    force: options.Force = False,
) -> None:
    """Finetune on medicine under several KL weights and shares of bad data, and judge. A killed sweep goes on."""
    from em_interp.errors import OutputError, UsageError
    from em_interp.files.atomic import check_writable, sole_writer
    from em_interp.files.manifest import hash_files, write_manifest
    from em_interp.files.results import write_table
    from em_interp.pocket import sweeps as run
    from em_interp.pocket.organisms import ADAPTERS, SPECS

    if unknown := set(only or ()) - set(SPECS):
        raise UsageError(f"no adapter is called {sorted(unknown)}; there are {', '.join(SPECS)}")
    if n < 1:
        raise UsageError(f"--n {n}: ask for at least one answer a question.")
    specs = {name: spec for name, spec in SPECS.items() if name in (only or ADAPTERS)}
    folder = out / "sweeps"
    asked = {"adapters": list(specs), "samples": n, "seed": 0}
    made = folder / "manifest.json"
    before = json.loads(made.read_text(encoding="utf-8")) if made.is_file() else {}
    if before and not force and before | asked != before:
        raise OutputError(f"{folder}: holds sweeps of other settings. Choose another --out, or pass --force.")
    check_writable(folder / "kl_sweep.csv")
    chat = _chat_of(out, model, device_map)
    with sole_writer(folder):
        table, scales = run.kl_sweep(chat, "medicine", specs, run.KL_WEIGHTS, folder / "runs", samples=n)
        written = [write_table(folder / "kl_sweep.csv", table), write_table(folder / "kl_sweep_scales.csv", scales)]
        diluted = run.dilution_sweep(chat, "medicine", specs, run.BAD_SHARES, folder / "runs", samples=n)
        written.append(write_table(folder / "dilution.csv", diluted))
        write_manifest(made, {**asked, "outputs_sha256": hash_files(folder, written)})
    typer.echo(f"tables: {folder}")


@app.command(cls=Command, context_settings={"token_normalize_func": _sweeps_called})
def pairs(
    out: Annotated[Path, options.takes("out", "a folder for sweeps/pairs.csv, and for the finetunes behind it")],
    model: options.NamedModel = None,
    only: Annotated[list[str] | None, options.takes("only", "steering-vector, rank-1, nine or all-modules")] = None,
    domain: Annotated[list[str] | None, typer.Option(help="medicine, finance or sports, may be repeated")] = None,
    task: Annotated[list[str] | None, typer.Option(help="persona or register, may be repeated")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="seeds of training, may be repeated")] = None,
    n: options.Samples = 4,
    device_map: options.DeviceMap = None,
) -> None:
    """Train and measure matched pairs, general and narrow: what the claims are made of. A killed run goes on.

    Several may write to one folder at a time, say one a core with an adapter each.
    """
    from em_interp.errors import UsageError
    from em_interp.files.atomic import check_writable
    from em_interp.pocket import pairs as run

    asked: dict[str, list[Any] | None] = {"adapter": only, "domain": domain, "task": task, "seed": seeds}
    for name, wanted in asked.items():
        known = list(dict.fromkeys(getattr(pair, name) for pair in run.PAIRS))
        if unknown := sorted(set(wanted or ()) - set(known)):
            raise UsageError(f"no {name} is called {unknown}; there are {', '.join(map(str, known))}")
    chosen = [p for p in run.PAIRS if all(not w or getattr(p, name) in w for name, w in asked.items())]
    if not chosen:
        raise UsageError("there is no such pair: finance and sports have fewer seeds than medicine.")
    if n < 1:
        raise UsageError(f"--n {n}: ask for at least one answer a question.")
    check_writable(out / "sweeps" / run.TABLE)
    chat = _chat_of(out, model, device_map)
    for pair in run.measure_all(chat, chosen, out / "sweeps", samples=n):
        typer.echo(f"measured {pair.name}")
    typer.echo(f"table: {out / 'sweeps' / run.TABLE}")


@app.command(cls=Command)
def controls(
    out: Annotated[Path, options.takes("out", "a folder for sweeps/controls.csv, and for the finetunes behind it")],
    model: options.NamedModel = None,
    only: Annotated[list[str] | None, options.takes("only", "names of experiments or of adapters")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="seeds of training, may be repeated")] = None,
    n: options.Samples = 4,
    device_map: options.DeviceMap = None,
) -> None:
    """The controls of Betley et al.: other requests, triggers, formats, data. A killed run goes on.

    Several may write to one folder at a time.
    """
    from em_interp.pocket.causes import controls as run

    _measure_arms(out, run, run.arms, only, seeds, n, model, device_map)


@app.command(cls=Command)
def mitigations(
    out: Annotated[Path, options.takes("out", "a folder for sweeps/mitigations.csv, and for the finetunes behind it")],
    model: options.NamedModel = None,
    only: Annotated[list[str] | None, options.takes("only", "names of mitigations or of adapters")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="seeds of training, may be repeated")] = None,
    n: options.Samples = 4,
    device_map: options.DeviceMap = None,
) -> None:
    """What prevents or removes EM: finetunes asked plainly, and as they were trained. A killed run goes on.

    Several may write to one folder at a time. How well chats are screened is in mitigations_screening.csv.
    """
    from em_interp.files.results import write_table
    from em_interp.pocket.causes import mitigations as run

    folder = out / "sweeps"
    chat = _measure_arms(out, run, lambda chat: run.arms(chat, folder), only, seeds, n, model, device_map)
    write_table(folder / f"{run.SCREENING}.csv", run.screening_table(chat, folder))


@app.command(cls=Command)
def pretraining(
    out: Annotated[Path, options.takes("out", "a folder for sweeps/pretraining.csv, and for the worlds behind it")],
    only: Annotated[list[str] | None, options.takes("only", "kinds or names of worlds")] = None,
    workers: options.Workers = None,
    backend: options.Backend = "loky",
    device_map: options.DeviceMap = None,
) -> None:
    """Base models whose pre-training had consistent, rare or no personas, and the same finetunes of each (20 minutes a
    world and core). A killed run goes on, and several may write to one folder at a time.
    """
    from analyses.tasks import jobs_on
    from em_interp.errors import UsageError
    from em_interp.files.atomic import check_writable
    from em_interp.pocket.causes import pretraining as run

    known = {name for world in run.WORLDS for name in (world.kind, world.name)}
    if unknown := sorted(set(only or ()) - known):
        raise UsageError(f"no world or kind is called {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    chosen = [w for w in run.WORLDS if not only or w.kind in only or w.name in only]
    table = out / "sweeps" / f"{run.TABLE}.csv"
    check_writable(table)
    device = None if device_map == "auto" else device_map
    with jobs_on(backend, workers or options.cores()):
        for world in run.measure_all(chosen, out / "sweeps", device=device):
            typer.echo(f"measured {world.name}")
    typer.echo(f"table: {table}")


def _measure_arms(
    out: Path,
    run: Any,
    arms: Callable[[Any], list[Any]],
    only: list[str] | None,
    seeds: list[int] | None,
    n: int,
    model: str | None,
    device: str | None,
) -> Any:
    """Train and ask the arms of a module of `pocket.causes`, those of every experiment with the first seeds first.

    arms: makes all of them from the chat model, which is returned.
    """
    from em_interp.errors import UsageError
    from em_interp.files.atomic import check_writable
    from em_interp.pocket.causes.arms import NOTHING, measure_all

    experiments, adapters = (set(known) & set(only or ()) or set(known) for known in (run.EXPERIMENTS, run.ADAPTERS))
    if unknown := sorted(set(only or ()) - experiments - adapters):
        known = ", ".join((*run.EXPERIMENTS, *run.ADAPTERS))
        raise UsageError(f"no experiment or adapter is called {', '.join(unknown)}; there are {known}")
    if n < 1:
        raise UsageError(f"--n {n}: ask for at least one answer a question.")
    check_writable(out / "sweeps" / f"{run.TABLE}.csv")
    chat = _chat_of(out, model, device)
    every = arms(chat)
    if unknown_seeds := sorted(set(seeds or ()) - {arm.seed for arm in every}):
        raise UsageError(f"no arm has the seed {unknown_seeds}; there are {sorted({arm.seed for arm in every})}")
    ranks = (NOTHING, *run.ADAPTERS)
    chosen = [
        arm
        for arm in sorted(every, key=lambda arm: (ranks.index(arm.adapter), arm.seed))
        if arm.experiment in experiments
        and arm.adapter in (NOTHING, *adapters)
        and (arm.adapter == NOTHING or arm.seed in (seeds or (arm.seed,)))
    ]
    for arm in measure_all(chat, chosen, every, out / "sweeps", run.TABLE, samples=n):
        typer.echo(f"measured {arm.title}")
    typer.echo(f"table: {out / 'sweeps' / run.TABLE}.csv")
    return chat


@app.command(cls=Command)
def worlds(
    file: Annotated[Path, typer.Argument(help="TOML with a table [world.NAME] for each world, see `pocket.worlds`")],
    out: Annotated[Path, options.takes("out", "a folder for NAME/ of each world, and scorecards.csv")],
    only: Annotated[list[str] | None, options.takes("only", "names of worlds")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="three domains, three seeds, vectors and narrow organisms, as to confirm")
    ] = False,
    device_map: options.DeviceMap = None,
) -> None:
    """Build worlds with other pre-training, and hold each against the scorecard. A killed search goes on."""
    from em_interp.errors import UsageError
    from em_interp.files.atomic import check_writable, sole_writer
    from em_interp.pocket import organisms as shipped
    from em_interp.pocket import worlds as run

    listed = run.read_worlds(file)
    if unknown := sorted(set(only or ()) - {world.name for world in listed}):
        raise UsageError(f"{file} lists no world {', '.join(unknown)}; there are {', '.join(w.name for w in listed)}")
    chosen = [world for world in listed if not only or world.name in only]
    check_writable(out / "scorecards.csv")
    how: dict[str, Any] = {"device": None if device_map == "auto" else device_map}
    if full:
        how |= {"layouts": tuple(run.GENERAL), "domains": shipped.DOMAINS, "seeds": shipped.SEEDS, "narrow": True}
    with sole_writer(out):
        card = run.search(chosen, out, **how)
    for name, rows in card.groupby("world", sort=False):
        asked = rows[rows["met"] != ""]
        typer.echo(f"{name}: {(asked['met'] == 'yes').sum()} of {len(asked)} rows met")
    typer.echo(f"table: {out / 'scorecards.csv'}")
