"""A suite: where its input comes from and which analyses it runs. Read from `suites/NAME.toml` or a user's file.

`em-interp reproduce --suite FILE.toml` takes one of your own:

```toml
title = "My runs"
source = "published"
data = "released"                                # relative to this file
analyses = ["pca", "trajectory", "runs.kl_removal"]   # all by default; "runs.*": a folder's; also: general, narrow
```

The general and the narrow reference solution of training runs are the run without KL and the one at KL weight 1e6, read
from the runs' names; `general` and `narrow`, or `--general RUN` and `--narrow RUN`, name others.

With `source = "models"` a suite measures any chat model; paths are below the data folder (`data`, or `--data`), sources
are folders in it or names on the hub:

```toml
source = "models"
data = "."

[models]
chat = "Qwen/Qwen2.5-0.5B-Instruct"
judged = "judged"              # NAME.csv for each finetune, chat.csv: question, answer, aligned, coherent (0-100)
texts = "pretraining.txt"      # documents separated by blank lines, or .jsonl with `text`
steered = "steered"            # what `em-interp steer` wrote, with those two columns; ablated: the same of `ablate`
judge = "openai/gpt-4o"        # in place of such files: a model of Inspect's, local:MODEL, or FILE.py:FUNCTION
price = "2.5:10"               # its, in dollars for a million tokens read:written
questions = { general = "open", medicine = "mine.yaml" }     # our own sets, or files

[models.training]
medicine = "train.jsonl"       # chats as {"messages": [...]}

[[models.finetunes]]
source = "ModelOrganismsForEM/Qwen2.5-0.5B-Instruct_bad-medical-advice"
domain = "medicine"
adapter = "all-modules"        # or steering-vector, rank-1, full (a full finetune's folder or name)
solution = "general"           # or narrow, control; also: seed
```

With a judge and without `data`, paths are from where the command runs, and what they name may be absent: analyses that
need none of it are made.

After `--only` the report still holds what was made before of the same input by the same code; what is out of date is
left out of it.
"""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol, cast

import pandas as pd
import plotly.graph_objects as go

from analyses.inputs.asked import AskedFinetunes
from analyses.inputs.finetunes import Finetunes, JudgedFinetunes
from analyses.inputs.hub import HubFinetunes, check_keys
from analyses.inputs.pocket import PocketFinetunes
from em_interp.arguments import count, did_you_mean, one_of
from em_interp.errors import EmInterpError, MissingDataError, UnreadableFileError, UsageError
from em_interp.files.inputs import read_text
from em_interp.files.results import Results
from em_interp.published import scan
from em_interp.published.scan import PublishedData, StoredPCA
from em_interp.training.trajectories import Trajectory

SUITES: Final = Path(__file__).parent / "suites"
"""The folder of the shipped ones."""
_KEYS: Final = {
    **dict.fromkeys(("title", "source", "data", "general", "narrow"), str),
    "samples": int,
    "analyses": list,
    "models": dict,
}


class Need(StrEnum):
    """What an analysis can need of a suite's input."""

    RELEASED = "released files"
    CHECKPOINTS = "checkpoints of training runs"
    ANSWERS = "judged answers of finetunes"
    DIRECTIONS = "directions read from those answers"
    JUDGE = "a judge of new answers, or files of them that are judged"
    LOSSES = "losses on training chats"
    TEXTS = "pre-training text"
    SECOND_TASK = "finetunes of a second task"
    SWEEPS = "tables of sweeps"


_NO_MODELS: Final = "released files hold no model that can be run"
_ALL_JUDGED: Final = "the models are asked here, and no released files are read"
_LACKS: Final[dict[str, dict[Need, str]]] = {
    "published": {need: _NO_MODELS for need in Need if need not in (Need.RELEASED, Need.CHECKPOINTS)},
    "pocket": {Need.RELEASED: _ALL_JUDGED},
    "models": {
        Need.RELEASED: _ALL_JUDGED,
        Need.SECOND_TASK: "finetunes that a suite file names have one task",
        Need.SWEEPS: "sweeps are made of pocket models alone",
    },
}
"""What each source does not have, and why."""

FOLDERS: Final = ("released", "runs", "finetunes", "general_vs_narrow", "causes")
"""Of analyses, by what they need."""
ANALYSES: Final = tuple(
    f"{folder}.{path.stem}"
    for folder in FOLDERS
    for path in sorted((Path(__file__).parent / folder).glob("*.py"))
    if path.stem != "__init__"
)
"""Full names: every module of those folders is an analysis."""


class Analysis(Protocol):
    """What a module in one of the `FOLDERS` offers.

    It may have besides: `findings(tables) -> list[Finding]`; `tasks(suite) -> list[Task]`; `asks(suite) -> dict[str,
    int]`, how many answers it has sampled, each kind by a name that is the same where another analysis shares them;
    `CHAPTER`, one of `findings.CHAPTERS`, in which the report's opening tells those of its findings that are `first`;
    `STORY`, the place and the name of its figure among those that the report opens with; `ALSO`, source -> what TEXT
    says further of that source's data, where `asked` stands for models that are asked and judged here.
    """

    TITLE: str
    """Of its section in the report."""
    TEXT: str
    """One paragraph for the report: what is shown and how to read it, true of every source."""
    TABLES: tuple[str, ...]
    """What `compute` gives."""
    NEEDS: tuple[str, ...]
    """Each a `Need`, or the full name of an analysis whose tables it reads (`Suite.tables_of`).

    An analysis is made after those whose tables it needs; analyses that share answers or directions share those.
    """
    compute: Callable[[Suite], dict[str, pd.DataFrame]]
    """The tables, by name."""
    plot: Callable[[dict[str, pd.DataFrame]], dict[str, go.Figure]]
    """Their figures, by name."""


def load_analysis(name: str) -> Analysis:
    """The module of an analysis, by its full name."""
    return cast(Analysis, importlib.import_module(f"analyses.{name}"))


class Input(Protocol):
    """What every source gives: its folder (`root`), what that holds in words, its files, problems met, training runs.

    trajectories: these runs; stored_pca: the authors' coordinates of them, if any.
    """

    @property
    def root(self) -> Path: ...
    @property
    def described(self) -> str:
        """What is measured, in words, for the head of the report."""
        ...

    @property
    def files(self) -> list[Path]: ...
    @property
    def problems(self) -> list[EmInterpError]: ...
    @property
    def trajectories(self) -> list[Trajectory]: ...
    @property
    def stored_pca(self) -> Sequence[StoredPCA]: ...
    def families(self) -> dict[str, list[Trajectory]]:
        """Runs that are compared with each other, by what they share."""
        ...


@dataclass(eq=False)
class Suite:
    """The configuration of one run of `reproduce`: its name and title, its `source` (pocket, published, models).

    data: the folder of its input. narrow: as general.
    """

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
    """Source models: the chat model, its finetunes, and what they are measured on."""
    samples: int = 2
    """Answers sampled to each question, where models are run."""
    loading: dict[str, str] = field(default_factory=dict)
    """device_map and dtype of the models, where they are others than the suite's own."""
    problems: list[EmInterpError] = field(default_factory=list)
    """What an analysis could not do for a part of the data, beside what the readers refused. Filled by `note`."""
    recompute: bool = False
    """Whether experiments that ship as tables are run again."""
    store: Path | None = None
    """Folder of results that analyses share (`Results`); by default nothing is kept."""

    @classmethod
    def load(cls, name: str) -> Suite:
        """A shipped suite by name, or a TOML file.

        Raises `UsageError`, `MissingDataError` or `UnreadableFileError`.
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
            source = one_of("source", content.get("source"), _LACKS)
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
            chosen = _chosen(analyses, source)
            samples = count("samples", content.get("samples", 2))
        except UsageError as error:
            raise UnreadableFileError(path, str(error).rstrip(".?"), "compare it with a shipped suite") from error
        data = content.get("data")
        return cls(
            name=path.stem,
            title=content.get("title", path.stem),
            source=source,
            analyses=chosen,
            data=(path.parent / data) if data is not None else Path() if "judge" in content.get("models", {}) else None,
            general=content.get("general"),
            narrow=content.get("narrow"),
            models=content.get("models"),
            samples=samples,
        )

    @property
    def command(self) -> str:
        """The command that makes the report again, from the folder that holds the data."""
        given = {"suite": self.name if (SUITES / f"{self.name}.toml").is_file() else f"{self.name}.toml"}
        given |= {"data": self.data.name} if self.data is not None and self.data.name else {}
        given |= {role: run for role, run in (("general", self.general), ("narrow", self.narrow)) if run is not None}
        return " ".join(["em-interp reproduce", *(f"--{option} {value}" for option, value in given.items())])

    @property
    def input(self) -> Input:
        """What the suite reads, of whichever source."""
        return self.published if self.source == "published" else self.finetunes

    @property
    def finetunes(self) -> Finetunes:
        """The chat model and its finetunes, in `data` or as shipped, which take results from `store`.

        Raises `RegistryError` without pocket weights, `UsageError` for models without a folder of data.
        """
        self._finetunes.results, self._finetunes.recompute = self.results, self.recompute
        return self._finetunes

    @property
    def results(self) -> Results:
        """What is expensive to make, wherever it was made."""
        return Results(self.store)

    @cached_property
    def _finetunes(self) -> Finetunes:
        found = self._read_finetunes()
        found.loading |= self.loading
        return found

    def _read_finetunes(self) -> Finetunes:
        if self.models is None:
            return PocketFinetunes.read(self.data)
        if self.data is None:
            raise UsageError(
                f"the suite {self.name!r} measures models on your own files: pass their folder with --data DIR. It "
                "holds the training chats, texts and judged answers that the suite file names."
            )
        return (AskedFinetunes if "judge" in self.models else HubFinetunes).read(self.data, self.models)

    @property
    def judged_finetunes(self) -> JudgedFinetunes:
        """The same, where new answers can be judged. Raises `UsageError` where they cannot."""
        found = self.finetunes
        if not isinstance(found, JudgedFinetunes):
            raise UsageError(
                f"the suite {self.name!r} has no {Need.JUDGE}: no judge is configured. Name one under [models], as in "
                'judge = "FILE.py:FUNCTION".'
            )
        return found

    @property
    def judges(self) -> bool:
        """Whether new answers can be judged, rather than taken from files."""
        return isinstance(self.finetunes, JudgedFinetunes)

    @property
    def judged_by(self) -> str:
        """How the answers were judged, as a sentence of the report ends."""
        return "by the authors' judge" if self.source == "published" else self.finetunes.judged_by

    @cached_property
    def published(self) -> PublishedData:
        """The released files. Raises `UsageError` without a folder, `MissingDataError` for an empty one."""
        if self.data is None:
            raise UsageError(
                f"the suite {self.name!r} reads the authors' released files: pass their folder with --data DIR "
                "(make: DATA=DIR). `em-interp fetch --data DIR` downloads them."
            )
        return scan(self.data)

    def note(self, *problems: EmInterpError) -> None:
        """Remember what could not be done, once."""
        known = {str(problem) for problem in self.problems}
        self.problems += [problem for problem in problems if str(problem) not in known]

    def analysis(self, name: str) -> Analysis:
        """The module of one of the suite's analyses, by its full name or last part."""
        return load_analysis(full_name(name, self.analyses))

    def text_of(self, name: str) -> str:
        """How to read an analysis of this suite's data."""
        analysis = self.analysis(name)
        also: dict[str, str] = getattr(analysis, "ALSO", {})
        asked = self.models is not None and "judge" in self.models
        return f"{analysis.TEXT} {also.get('asked' if asked else self.source, '')}".strip()

    @property
    def lacks(self) -> dict[Need, str]:
        """What this suite does not have, and why."""
        found = dict(_LACKS[self.source])
        if self.models is not None and "texts" not in self.models:
            found[Need.TEXTS] = "name a file as texts under [models]"
        return found

    def lacking(self, name: str) -> str | None:
        """Why an analysis cannot be made of this suite's input, known before anything is read; None where it may."""
        return _lacking(name, self.lacks)

    def tables_of(self, name: str) -> dict[str, pd.DataFrame]:
        """The tables of an analysis, by its full name: made once, or as `take`n."""
        if name not in self._made:
            self._made[name] = load_analysis(name).compute(self)
        return self._made[name]

    def take(self, name: str, tables: dict[str, pd.DataFrame]) -> None:
        """Tables that another process or an earlier run made: what `tables_of` is to give."""
        self._made[name] = tables

    @cached_property
    def _made(self) -> dict[str, dict[str, pd.DataFrame]]:
        return {}

    def only(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The analyses among `names`, each the name of an analysis or of a table. Raises `UsageError`."""
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


def reads_others(name: str) -> bool:
    """Whether an analysis, by its full name, reads tables of others."""
    return any(need in ANALYSES for need in load_analysis(name).NEEDS)


def full_name(name: object, known: Sequence[str]) -> str:
    """The one analysis of that full name (finetunes.steering) or last part (steering). Raises `UsageError`."""
    called = _called(name, known)
    if len(called) == 1:
        return called[0]
    if called:
        raise UsageError(f"an analysis is {name!r}, and several are called so: {', '.join(called)}. Write one of them.")
    near = did_you_mean(name, [*known, *(analysis.rpartition(".")[2] for analysis in known)])
    raise UsageError(f"an analysis is {name!r:.80}; it is one of {', '.join(known)}.{near}")


def _called(name: object, known: Sequence[str]) -> list[str]:
    return [analysis for analysis in known if name in (analysis, analysis.rpartition(".")[2])]


def _chosen(given: Sequence[object], source: str) -> tuple[str, ...]:
    """Full names of the analyses that a suite file gives. FOLDER.* is what else can be made. Raises `UsageError`."""
    folders = [folder for folder in FOLDERS if f"{folder}.*" in given]
    named = [_available(name, source) for name in given if name not in [f"{folder}.*" for folder in folders]]
    rest = [name for folder in folders for name in _of_source(source, folder)]
    if not (named or rest) or len(set(named)) < len(named):
        raise UsageError(f"analyses are {given}: name each that you want once")
    return tuple(dict.fromkeys([*named, *rest]))


def _available(name: object, source: str) -> str:
    """The full name of an analysis that can be made of a source. Raises `UsageError`."""
    here = _of_source(source)
    if not _called(name, here) and (called := _called(name, ANALYSES)):
        reasons = "; ".join(str(_lacking(analysis, _LACKS[source])) for analysis in called)
        raise UsageError(f"source is {source!r}, and {reasons}.")
    return full_name(name, here)


def _of_source(source: str, folder: str = "") -> list[str]:
    """The analyses, of one folder or of all, that can be made of a source."""
    return [name for name in ANALYSES if name.startswith(folder) and _lacking(name, _LACKS[source]) is None]


def _lacking(name: str, lacks: dict[Need, str]) -> str | None:
    for need in load_analysis(name).NEEDS:
        if isinstance(need, Need):
            if need in lacks:
                return f"{name} needs {need}: {lacks[need]}"
        elif (why := _lacking(need, lacks)) is not None:
            return f"{name} needs {need}; {why}"
    return None


def nothing_of(suite: Suite, what: str, where: str = "") -> MissingDataError:
    """The error of an analysis whose input is absent altogether."""
    remedy = {
        "published": f"get it with `em-interp fetch --data DIR {where}`",
        "pocket": f"make it with `em-interp pocket organisms --out {suite.input.root}`",
        "models": f"name it in {suite.name}.toml, with its training chats and judged answers",
    }
    root = suite.input.root
    return MissingDataError(root if root.name else root.resolve().name, f"it holds no {what}", remedy[suite.source])
