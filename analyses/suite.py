"""A suite: where its input comes from and which analyses it runs. Read from ``suites/NAME.toml`` or a user's file."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol, cast

import pandas as pd
import plotly.graph_objects as go

from analyses.inputs.hub import Finetunes, check_keys
from analyses.inputs.pocket import Organisms, pocket_organisms
from em_interp.arguments import count, did_you_mean, one_of
from em_interp.errors import EmInterpError, MissingDataError, UnreadableFileError, UsageError
from em_interp.files.inputs import read_text
from em_interp.files.tables import Parts
from em_interp.published import scan
from em_interp.published.scan import PublishedData

SUITES: Final = Path(__file__).parent / "suites"
_KEYS: Final = {
    **dict.fromkeys(("title", "source", "data", "general", "narrow"), str),
    "samples": int,
    "analyses": list,
    "models": dict,
}
_SOURCES: Final = ("published", "pocket", "models")


class Analysis(Protocol):
    """What a module in this folder offers."""

    TITLE: str
    TEXT: str
    """One paragraph for the report: what is shown and how to read it."""
    TABLES: tuple[str, ...]
    compute: Callable[[Suite], dict[str, pd.DataFrame]]
    plot: Callable[[dict[str, pd.DataFrame]], dict[str, go.Figure]]


@dataclass(eq=False)
class Suite:
    """The configuration of one run of ``reproduce``."""

    name: str
    title: str
    source: str
    analyses: tuple[str, ...]
    """Full names: folder and module below `analyses`, such as finetunes.steering."""
    data: Path | None = None
    general: str | None = None
    """Run that stands for the general solution; by default read from the runs' names."""
    narrow: str | None = None
    models: dict[str, Any] | None = None
    """Source models: the chat model, its finetunes, and what they are measured on (``finetunes.Finetunes``)."""
    samples: int = 2
    """Answers sampled to each question, where models are run."""
    problems: list[EmInterpError] = field(default_factory=list)
    """What an analysis could not do for a part of the data, beside what the readers refused. Filled by ``note``."""
    work: Path | None = None
    """Where analyses keep what they have until they are finished; nowhere by default."""

    @classmethod
    def load(cls, name: str) -> Suite:
        """A shipped suite by name, or a TOML file.

        Raises ``UsageError``, ``MissingDataError`` or ``UnreadableFileError``.
        """
        is_file = name.endswith(".toml")
        path = Path(name) if is_file else SUITES / f"{name}.toml"
        if not path.is_file():
            shipped = ", ".join(sorted(p.stem for p in SUITES.glob("*.toml")))
            if is_file:
                raise MissingDataError(path, "there is no such suite file", f"pass a TOML file, or one of: {shipped}")
            raise UsageError(f"there is no suite {name!r}. Shipped: {shipped}; or pass a file ending in .toml.")
        try:
            content = tomllib.loads(read_text(path))
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise UnreadableFileError(
                path, f"it is not readable TOML ({error})", "compare it with a shipped suite"
            ) from error
        try:
            check_keys("the suite", content, _KEYS)
            source = one_of("source", content.get("source"), _SOURCES)
        except UsageError as error:
            raise UnreadableFileError(path, str(error).rstrip(".?"), "compare it with a shipped suite") from error
        if (source == "models") != isinstance(content.get("models"), dict):
            raise UnreadableFileError(
                path,
                f"source is {source!r} and [models] is {content.get('models')!r}",
                "source models needs that table",
            )
        shipped = "qwen2.5-0.5b" if source == "models" else source
        shipped_analyses = tomllib.loads((SUITES / f"{shipped}.toml").read_text(encoding="utf-8"))["analyses"]
        analyses = content.get("analyses", shipped_analyses)
        try:
            chosen = [full_name(name, shipped_analyses) for name in analyses]
            samples = count("samples", content.get("samples", 2))
        except UsageError as error:
            raise UnreadableFileError(path, str(error).rstrip(".?"), "compare it with a shipped suite") from error
        if not chosen or len(set(chosen)) < len(chosen):
            raise UnreadableFileError(path, f"analyses are {analyses}", "name each that you want once")
        data = content.get("data")
        return cls(
            name=path.stem,
            title=content.get("title", path.stem),
            source=source,
            analyses=tuple(chosen),
            data=None if data is None else (path.parent / data),
            general=content.get("general"),
            narrow=content.get("narrow"),
            models=content.get("models"),
            samples=samples,
        )

    @property
    def input(self) -> PublishedData | Organisms:
        """What the suite reads: its root folder, its files, and the problems met on the way."""
        return self.published if self.source == "published" else self.organisms

    @cached_property
    def organisms(self) -> Organisms:
        """The chat model and its finetunes, in ``data`` or as shipped.

        Raises ``RegistryError`` without pocket weights, ``UsageError`` for models without a folder of data.
        """
        if self.models is None:
            return pocket_organisms(self.data)
        if self.data is None:
            raise UsageError(
                f"the suite {self.name!r} measures models on your own files: pass their folder with --data DIR. It "
                "holds the training chats, texts and judged answers that the suite file names."
            )
        return Finetunes.read(self.data, self.models)

    @cached_property
    def published(self) -> PublishedData:
        """The released files. Raises ``UsageError`` without a folder, ``MissingDataError`` for an empty one."""
        if self.data is None:
            raise UsageError(
                f"the suite {self.name!r} reads the authors' released files: pass their folder with --data DIR "
                "(make: DATA=DIR). `em-interp fetch --data DIR` downloads them."
            )
        return scan(self.data)

    def parts(self, analysis: str) -> Parts | None:
        """Where an analysis keeps its answers, batch by batch."""
        return None if self.work is None else Parts(self.work / f"{analysis}.parts")

    def note(self, *problems: EmInterpError) -> None:
        """Remember what could not be done, once."""
        known = {str(problem) for problem in self.problems}
        self.problems += [problem for problem in problems if str(problem) not in known]

    def analysis(self, name: str) -> Analysis:
        """The module of one of the suite's analyses, by its full name or last part."""
        return cast(Analysis, importlib.import_module(f"analyses.{full_name(name, self.analyses)}"))

    def only(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The analyses among ``names``, each the name of an analysis or of a table. Raises ``UsageError``."""
        if not names:
            return self.analyses
        by_table = {table: a for a in self.analyses for table in self.analysis(a).TABLES}
        chosen = []
        for name in names:
            called = _called(name, self.analyses) or ([by_table[name]] if name in by_table else [])
            if len(called) != 1:
                what = "no such analysis or table" if not called else f"several of that name: {', '.join(called)}"
                raise UsageError(
                    f"--only {name}: the suite {self.name!r} has {what}. "
                    f"Analyses: {', '.join(self.analyses)}. Tables: {', '.join(sorted(by_table))}."
                )
            chosen += called
        return tuple(a for a in self.analyses if a in chosen)


def full_name(name: object, known: Sequence[str]) -> str:
    """The one analysis of that full name (finetunes.steering) or last part (steering). Raises ``UsageError``."""
    called = _called(name, known)
    if len(called) == 1:
        return called[0]
    if called:
        raise UsageError(f"an analysis is {name!r}, and several are called so: {', '.join(called)}. Write one of them.")
    near = did_you_mean(name, [*known, *(analysis.rpartition(".")[2] for analysis in known)])
    raise UsageError(f"an analysis is {name!r:.80}; it is one of {', '.join(known)}.{near}")


def _called(name: object, known: Sequence[str]) -> list[str]:
    return [analysis for analysis in known if name in (analysis, analysis.rpartition(".")[2])]


def nothing_of(suite: Suite, what: str, where: str = "") -> MissingDataError:
    """The error of an analysis whose input is absent altogether."""
    remedy = {
        "published": f"get it with `em-interp fetch --data DIR {where}`",
        "pocket": f"make it with `em-interp pocket organisms --out {suite.input.root}`",
        "models": f"name it in {suite.name}.toml, with its training chats and judged answers",
    }
    return MissingDataError(suite.input.root, f"it holds no {what}", remedy[suite.source])
