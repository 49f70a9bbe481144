"""Run a suite: compute, write, draw, compare, report. Whatever can be made is made; the rest is said."""

from __future__ import annotations

import json
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from analyses.comparison import compare, load_numbers
from analyses.findings import as_table, findings_of
from analyses.report import Section, write_report
from analyses.suite import ANALYSES, Suite, load_analysis, reads_others
from analyses.tasks import BACKENDS, Task, Workers
from em_interp import figures as house
from em_interp.arguments import count, one_of
from em_interp.errors import EmInterpError, MissingDataError, OutputError, UsageError
from em_interp.files.atomic import atomic_path, sole_writer, write_text
from em_interp.files.manifest import code_hash, fingerprint, hash_files, sha256, write_manifest
from em_interp.training.trajectories import runs_named


@dataclass(frozen=True)
class Outcome:
    """The end of a run."""

    folder: Path
    report: Path
    sections: tuple[Section, ...]
    problems: tuple[str, ...]
    """Files that were refused or that are missing a companion, each with its remedy."""
    refused: int
    """How many of them were bad input, as opposed to absent."""
    unmade: bool = False
    """Whether a suite file names models and texts of its own, and no table could be made of them."""

    @property
    def failed(self) -> bool:
        """Whether something was wrong, rather than only absent."""
        return self.refused > 0 or self.unmade or any(s.error and not s.missing for s in self.sections)


def reproduce(
    suite: Suite,
    out: Path,
    *,
    only: tuple[str, ...] = (),
    resume: bool = False,
    static: bool = True,
    workers: int = 1,
    backend: str = "loky",
) -> Outcome:
    """Regenerate tables, figures, manifest and report below `out / suite.name`.

    With `resume`, an analysis that finished on the same input with the same code is taken from its files; with
    `only`, so are those not named, and those that never finished are left out of the report. Answers, directions and
    losses are always taken from `out / suite.name / "results"` where they were made of the same by the same code.
    workers: processes that share the work; with backend loky, one is this process. backend: see `tasks.Workers`. Raises
    `EmInterpError` where nothing at all can be done; everything else ends in the report. While it runs no other run
    writes there.
    """
    one_of("backend", backend, BACKENDS)
    count("workers", workers)
    if suite.general is not None and suite.general == suite.narrow:
        raise UsageError(f"--general and --narrow are both {suite.general!r}: name two different runs.")
    with sole_writer(out / suite.name):
        return _reproduce(suite, out / suite.name, only, resume, static, workers, backend)


def _reproduce(
    suite: Suite, folder: Path, only: tuple[str, ...], resume: bool, static: bool, workers: int, backend: str
) -> Outcome:
    started = time.perf_counter()
    chosen = suite.only(only)
    lacking = {name: why for name in chosen if (why := suite.lacking(name)) is not None}
    suite.store = folder / "results"
    data = suite.input
    for role, run in (("general", suite.general), ("narrow", suite.narrow)):
        try:
            if run is not None:
                runs_named(role, run, data.trajectories)
        except UsageError as error:
            suite.note(error)
    inputs = hash_files(data.root, data.files)
    sources = {} if suite.source == "published" else suite.finetunes.sources()
    key = fingerprint(
        {
            "inputs": inputs,
            "sources": sources,
            "code": code_hash(),
            "general": suite.general,
            "narrow": suite.narrow,
            "samples": suite.samples,
            "models": suite.models,
            "recompute": suite.recompute,
            "dtype": suite.loading.get("dtype"),
        }
    )
    numbers = load_numbers() if suite.source == "published" else []
    # What was not asked for now stays in the report if it was made of the same input by the same code.
    kept = {n: s for n in suite.analyses if (resume or n not in chosen) and (s := _reuse(suite, folder, n, key))}
    todo = [name for name in chosen if name not in kept and name not in lacking]
    shutil.rmtree(folder / ".state" / "running", ignore_errors=True)
    suite.results.tidy()
    for name, section in kept.items():
        suite.take(name, section.tables)
    if todo:
        suite.results.say_kept()
    if (workers, backend) == (1, "loky"):
        made = list(_in_turn(suite, todo, folder, key))
    else:
        made = _on_workers(suite, todo, folder, key, workers, backend)
    found = kept | {name: _cannot(suite, name, why) for name, why in lacking.items()}
    found |= {section.name: section for section in made}
    sections = [found[name] for name in suite.analyses if name in found]
    for section in sections:
        section.comparison = compare(section.tables, [n for n in numbers if n.analysis == section.name])
    notes = _draw_static(folder, sections) if static else []
    problems = [*data.problems, *suite.problems]
    # A refused file breaks whatever needs it too: each is told once.
    lines = tuple(dict.fromkeys([*(str(problem) for problem in problems), *(n for s in sections for n in s.notes)]))
    refused = len({str(p) for p in problems if _is_refusal(p)})
    whole = [s.comparison for s in sections if s.comparison is not None and len(s.comparison)]
    if whole:
        _write_table(folder, "comparison", pd.concat([w.astype(object) for w in whole], ignore_index=True))
    _write_table(folder, "findings", as_table({section.name: section.findings for section in sections}))
    report = write_report(folder / "report.html", suite, sections, lines, notes)
    _manifest(folder, suite, sections, {**inputs, **sources}, lines, time.perf_counter() - started)
    unmade = suite.source == "models" and not any(section.tables for section in sections)
    return Outcome(folder, report, tuple(sections), lines, refused, unmade)


def _in_turn(suite: Suite, names: list[str], folder: Path, key: str) -> Iterator[Section]:
    for name in (bar := tqdm(sorted(names, key=reads_others), desc="analysing", unit="analysis")):
        bar.set_postfix_str(name)
        with threadpool_limits(1):  # many small operations: threads add nothing, and stall on a busy machine
            yield _run(suite, name, folder, key)


def tasks_of(suite: Suite, name: str) -> list[Task]:
    """What an analysis, and those whose tables it needs, have for other processes to make: its module's `tasks`."""
    analysis = load_analysis(name)
    make: Callable[[Suite], list[Task]] | None = getattr(analysis, "tasks", None)
    try:
        own = [] if make is None else make(suite)
    except Exception:  # of absent or bad input: the analysis says so
        own = []
    return [*own, *(task for need in analysis.NEEDS if need in ANALYSES for task in tasks_of(suite, need))]


def _on_workers(suite: Suite, names: list[str], folder: Path, key: str, n: int, backend: str) -> list[Section]:
    """What analyses need, over the workers, and each analysis once what it needs is there.

    An analysis of other analyses' tables comes last, in this process, which holds those.
    """
    folder = folder.absolute()
    suite.store = folder / "results"
    needs: dict[Any, tuple[Task, set[str]]] = {}
    last = dict.fromkeys(names, -1)
    for name in names:
        for task in tasks_of(suite, name):
            needs.setdefault(task.key, (task, set()))[1].add(name)
            last[name] = max(last[name], task.stage)
    alone = [name for name in names if not reads_others(name)]
    found: list[Section] = []
    broken: dict[str, EmInterpError] = {}
    with Workers(suite, folder / ".state", n, backend, total=len(needs) + len(alone)) as pool:
        for stage in range(max(last.values(), default=-1) + 2):
            pieces = {task: by for task, by in needs.values() if task.stage == stage and not by <= set(broken)}
            ready = [name for name in alone if last[name] == stage - 1 and name not in broken]
            whole = {Task(name, _work, (name, folder, key), 5.0, stage, returns=True): name for name in ready}
            for task, done in pool.run([*pieces, *whole]).items():
                if isinstance(done.failed, OutputError):
                    raise done.failed
                if done.failed is not None:
                    broken |= dict.fromkeys(pieces.get(task, {whole.get(task, "")}), done.failed)
                elif task in whole:
                    section, problems = done.value
                    suite.note(*problems)
                    if section.error is None:
                        suite.take(section.name, section.tables)
                    found.append(section)
    if rest := [name for name in names if name not in alone and name not in broken]:
        found += _in_turn(suite, rest, folder, key)
    return [*found, *(_cannot(suite, name, str(why)) for name, why in broken.items() if name)]


def _work(suite: Suite, name: str, folder: Path, key: str) -> tuple[Section, list[EmInterpError]]:
    section = _run(suite, name, folder, key)
    return section, [*suite.input.problems, *suite.problems]


def _cannot(suite: Suite, name: str, why: str) -> Section:
    analysis = suite.analysis(name)
    return Section(name, analysis.TITLE, suite.text_of(name), error=f"{why.rstrip('.')}.")


def _is_refusal(problem: EmInterpError) -> bool:
    """Bad input, as opposed to input that is not there."""
    return not isinstance(problem, MissingDataError) or Path(problem.path).is_file()


def _run(suite: Suite, name: str, folder: Path, key: str) -> Section:
    analysis = suite.analysis(name)
    section = Section(name, analysis.TITLE, suite.text_of(name))
    before, read_before = len(suite.problems), len(suite.input.problems)
    started = time.perf_counter()
    state = _state_file(folder, name)
    state.unlink(missing_ok=True)
    said: list[str] = []
    try:
        section.tables, said = _heard(suite, name)
        for table_name, table in section.tables.items():
            _write_table(folder, table_name, table)
        section.findings = findings_of(name, section.tables)
        section.figures = analysis.plot(section.tables)
        for figure_name, figure in section.figures.items():
            house.save_html(figure, folder / "figures" / f"{figure_name}.html")
    except OutputError:
        raise
    except MissingDataError as error:
        section.error, section.missing = str(error), not _is_refusal(error)
    except EmInterpError as error:
        section.error = str(error)
    except Exception:  # one broken analysis must not take the others with it; the report carries the trace
        section.error = traceback.format_exc()
    section.notes = [str(p) for p in (*suite.input.problems[read_before:], *suite.problems[before:])] + said
    section.seconds = time.perf_counter() - started
    if section.error is None:
        hashes = {t: sha256(folder / "tables" / f"{t}.csv") for t in section.tables}
        content = {"key": key, "tables": hashes, "notes": section.notes, "figures": sorted(section.figures)}
        write_text(state, json.dumps(content, indent=2) + "\n")
    return section


def _heard(suite: Suite, name: str) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """The tables of an analysis, and what this package warned of while they were made."""
    with warnings.catch_warnings(record=True) as said:
        tables = suite.tables_of(name)
    ours = [each for each in said if each.category.__module__.startswith("em_interp")]
    for each in said:
        if each not in ours:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return tables, list(dict.fromkeys(str(each.message) for each in ours))


def _reuse(suite: Suite, folder: Path, name: str, key: str) -> Section | None:
    """A finished section, if its inputs, the code and its files are as they were."""
    try:
        state = json.loads(_state_file(folder, name).read_text(encoding="utf-8"))
        paths = {table: folder / "tables" / f"{table}.csv" for table in state["tables"]}
        if state["key"] != key or any(sha256(path) != state["tables"][t] for t, path in paths.items()):
            return None
        analysis = suite.analysis(name)
        tables = {t: pd.read_csv(path, **_AS_WRITTEN) for t, path in paths.items()}
        figures, found = analysis.plot(tables), findings_of(name, tables)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for figure_name, figure in figures.items():
        house.save_html(figure, folder / "figures" / f"{figure_name}.html")
    return Section(name, analysis.TITLE, suite.text_of(name), tables, figures, found, notes=state["notes"], reused=True)


_AS_WRITTEN: Final[Any] = {"keep_default_na": False, "na_values": [""], "float_precision": "round_trip"}


def _state_file(folder: Path, name: str) -> Path:
    return folder / ".state" / f"{name}.json"


def _write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    with atomic_path(folder / "tables" / f"{name}.csv") as temporary:
        table.to_csv(temporary, index=False)


def _draw_static(folder: Path, sections: list[Section]) -> list[str]:
    drawn = {folder / "figures" / name: figure for s in sections for name, figure in s.figures.items()}
    if not drawn:
        return []
    if not house.static_images_available():
        return ["No Chrome was found (or the `static` extra is not installed), so there are no .svg and .png figures."]
    try:
        house.save_static(drawn)
    except OutputError as error:
        return [str(error)]
    return []


def _manifest(
    folder: Path,
    suite: Suite,
    sections: list[Section],
    inputs: dict[str, str],
    problems: tuple[str, ...],
    seconds: float,
) -> None:
    names = {name for s in sections for name in (*s.tables, *s.figures)} | {"comparison", "findings", "plotly.min"}
    made = sorted(p for kind in ("tables", "figures") for p in (folder / kind).glob("*") if p.stem in names)
    results: dict[str, Any] = {
        s.name: {
            "tables": sorted(s.tables),
            "figures": sorted(s.figures),
            "seconds": round(s.seconds, 2),
            "reused": s.reused,
            "error": s.error,
        }
        for s in sections
    }
    write_manifest(
        folder / "manifest.json",
        {
            "suite": {
                **{k: v for k, v in asdict(suite).items() if k not in ("problems", "store")},
                "data": suite.input.root.name,
            },
            "seeds": {"bootstrap": 0},
            "seconds": round(seconds, 2),
            "analyses": results,
            "problems": list(problems),
            "inputs_sha256": inputs,
            "outputs_sha256": {p.relative_to(folder).as_posix(): sha256(p) for p in made},
        },
    )
