"""`em-interp reproduce`. Heavy imports wait until the command runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.markup import escape

from em_interp.cli import options
from em_interp.cli.remedies import brief

_TOLD: Final = 12
"""Problems that are listed on the terminal."""


def reproduce(
    suite: Annotated[str, options.takes("suite", "pocket, published, or a TOML file")] = "pocket",
    data: Annotated[
        Path | None, options.takes("data", "the released files, a pocket build, or the files of a suite of your own")
    ] = None,
    out: Annotated[Path, options.takes("out", "a folder, in which the suite has one of its own")] = Path("out"),
    only: Annotated[list[str] | None, options.takes("only", "names of analyses or of tables")] = None,
    resume: Annotated[bool, options.takes("resume", "of the same input and code", "--resume")] = False,
    general: Annotated[str | None, typer.Option(help="run that stands for the general solution")] = None,
    narrow: Annotated[str | None, typer.Option(help="run that stands for the narrow solution")] = None,
    n: Annotated[int | None, options.SamplesOption] = None,
    device_map: options.DeviceMap = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    workers: options.Workers = None,
    backend: options.Backend = "loky",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="run the experiments on causes again (hours), not their shipped tables")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask before what takes long or costs money")] = False,
    static: Annotated[bool, typer.Option(help="also write .svg and .png where Chrome is found")] = True,
) -> None:
    """The papers' tables and figures, in a self-contained report.

    Of pocket models, of what the authors released, or of models of your own: see --suite. Tables, figures and a
    manifest lie beside the report.
    """
    from analyses.report import story, summary
    from analyses.run import reproduce as run
    from analyses.suite import Suite

    chosen = Suite.load(suite)
    chosen.data = data or chosen.data
    chosen.general, chosen.narrow = general or chosen.general, narrow or chosen.narrow
    chosen.samples = chosen.samples if n is None else n
    chosen.recompute = recompute
    chosen.loading = options.loading(device_map, dtype)
    chosen.store = out / chosen.name / "results"
    _agree(chosen, tuple(only or ()), yes=yes)
    try:
        # Small models: a second process costs little memory. Others take one, and whatever devices they ask for.
        n = workers if workers is not None else options.cores() if chosen.source == "pocket" or backend == "ray" else 1
        outcome = run(chosen, out, only=tuple(only or ()), resume=resume, static=static, workers=n, backend=backend)
    except KeyboardInterrupt:
        options.err.print("Stopped. Finished analyses are kept: run the same command with --resume.")
        raise typer.Exit(options.INTERRUPTED) from None
    options.out.print(summary(outcome.sections))
    for (what, reason), names in _reasons(outcome.sections).items():
        options.err.print(f"[bold]{what}[/bold] {', '.join(names)}: {escape(reason)}")
    if outcome.problems:
        options.err.print(f"[bold]Not everything could be used ({len(outcome.problems)}):[/bold]")
        for problem in outcome.problems[:_TOLD]:
            options.err.print(f"  - {escape(brief(problem))}")
        if len(outcome.problems) > _TOLD:
            options.err.print(f"  and {len(outcome.problems) - _TOLD} more, in the report")
    if told := story(outcome.sections):
        options.out.print(told)
    options.out.print(f"report: {outcome.report}")
    if outcome.failed:
        raise typer.Exit(options.BAD_INPUT)


def _agree(suite: Any, only: tuple[str, ...], *, yes: bool) -> None:
    """Say what a suite that asks models will take; ask whether to go on where that is much. Raises typer.Abort."""
    from analyses import plan

    if not plan.asks(suite):
        return
    names = [name for name in suite.only(only) if suite.lacking(name) is None]
    if not any(hasattr(suite.analysis(name), "asks") for name in names):
        return
    plan.check_judge(suite)
    if fetched := plan.downloads(suite):
        options.err.print(plan.said_of_downloads(fetched))
        if plan.is_large(fetched) and not yes:
            typer.confirm("Download?", abort=True, err=True)
    effort = plan.effort(suite, names)
    options.err.print(plan.said_of_effort(effort))
    if plan.is_long(effort) and not yes:
        typer.confirm("Begin?", abort=True, err=True)


def _reasons(sections: Sequence[Any]) -> dict[tuple[str, str], list[str]]:
    """(What became of them, why and what to do) -> the analyses without a result of which that is true."""
    found: dict[tuple[str, str], list[str]] = {}
    for section in sections:
        if section.error is not None:
            what = "no data" if section.missing else "failed"
            found.setdefault((what, brief(section.error)), []).append(section.name)
    return found
