"""`em-interp evaluate MODEL` where judges are models, or several: Inspect's task, its logs, rates and agreement."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from em_interp.cli import options
from em_interp.cli.rates import tell
from em_interp.errors import OutputError, UsageError


def by_inspect(judges: Sequence[str]) -> bool:
    """Whether these judges need Inspect: several, or one that is a model."""
    from em_interp.evaluation.judges import is_a_model

    return len(judges) > 1 or any(map(is_a_model, judges))


def safe_name(judge: str) -> str:
    """A judge's name as part of a file's."""
    return re.sub(r"[^\w.+-]+", "_", judge).strip("_")[-60:]


def evaluate_judged(
    chosen: options.ModelChoice,
    questions: str | None,
    judges: Sequence[str],
    out: Path,
    settings: dict[str, Any],
    *,
    prompts: Path | None,
    price: str | None,
    budget: float | None,
    force: bool,
) -> None:
    """Sample answers, have them judged, write OUT/judged.csv (or one a judge), rates, agreement and OUT/logs.

    settings: n, seed, max_new_tokens, tokens_per_batch.
    """
    from em_interp.files.manifest import fingerprint, write_manifest

    options.once("--judge", list(judges))
    runs, provider = _inspect()
    cost = _price(runs, price, budget)
    arguments = {
        "questions": questions or ("pocket" if "pocket" in judges else "open"),
        "judge": list(judges),
        "prompts": None if prompts is None else str(prompts),
        "samples": settings["n"],
        "max_tokens": settings["max_new_tokens"],
    }
    asked = len(runs.asked(arguments["questions"])) * settings["n"]
    made_by = {**arguments, **settings, "weights": chosen.weights(), "dtype": chosen.dtype}
    key = fingerprint(made_by)
    _claim(out, key, force)
    for judge in filter(runs.is_api, judges):
        used = runs.try_judge(judge, arguments["prompts"])
        if cost is not None:
            limit = float("inf") if budget is None else budget
            expected = runs.refuse_above(limit, cost, used, asked)
            typer.echo(f"{judge}: about ${expected:.2f} for {asked} answers", err=True)
    write_manifest(out / "manifest.json", {**made_by, "key": key})
    acting = provider.Acting(chosen.load(), tokens_per_batch=settings["tokens_per_batch"])
    model = provider.model_of(acting, chosen.adapter or chosen.model)
    display = "rich" if sys.stderr.isatty() else "plain"
    log = runs.run(model, out, display=display, seed=settings["seed"], **arguments)
    _tell(runs, log, judges, out, cost)


def _tell(runs: Any, log: Any, judges: Sequence[str], out: Path, cost: Any) -> None:
    from em_interp.evaluation.agreement import agreement
    from em_interp.evaluation.criteria import PAPER
    from em_interp.files.results import write_table

    tables = runs.judged_tables(log)
    for judge, table in tables.items():
        path = out / ("judged.csv" if len(tables) == 1 else f"judged-{safe_name(judge)}.csv")
        write_table(path, table)
        typer.echo(f"{len(table)} answers: {path}")
        unscored = table.loc[table["reason"] != "", "reason"].value_counts()
        for reason, n in unscored.items():
            typer.echo(f"  without a score: {n} ({runs.REASONS.get(reason, reason)})")
    tell(tables, PAPER, out=out / "judged-rates.csv", figure=None, inputs=[], force=True)
    if len(tables) > 1:
        path = write_table(out / "agreement.csv", agreement(tables, cluster="question_id"))
        typer.echo(f"agreement of the judges: {path}")
    for name, used in runs.spent(log, judges, cost).items():
        typer.echo(f"{name}: {used}")
    typer.echo(f"log: {log.location} (inspect view --log-dir {out / 'logs'})")
    if log.status != "success":
        typer.echo("some answers could not be had or judged: run the same command again for those alone.", err=True)
        raise typer.Exit(options.BAD_INPUT)


def _price(runs: Any, price: str | None, budget: float | None) -> Any:
    if budget is not None and price is None:
        raise UsageError("--budget needs --price READ:WRITTEN, the judge's dollars for a million tokens.")
    return None if price is None else runs.Price.of(price)


def _claim(out: Path, key: str, force: bool) -> None:
    """A folder that holds other answers is not written to; one that the same command began is gone on with."""
    from em_interp.files.atomic import claim_output

    try:
        before = json.loads((out / "manifest.json").read_text(encoding="utf-8")).get("key")
    except (OSError, ValueError, AttributeError):
        before = None
    if before not in (None, key) and not force:
        raise OutputError(f"{out}: holds answers of other settings. Choose another --out, or pass --force.")
    claim_output(out / "judged.csv", force=force or before == key)


def _inspect() -> tuple[Any, Any]:
    if find_spec("inspect_ai") is None:
        raise UsageError("a model as judge needs inspect_ai, which is not here: pip install 'em_interp[eval]'.")
    from em_interp.inspect import provider, run

    return run, provider
