"""All commands speak one vocabulary: an idea has one name, one type and one help."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
import typer.main
from typer.testing import CliRunner

from em_interp.cli import app, options
from em_interp.errors import UsageError

ROOT = typer.main.get_command(app)
ARMS = {"pocket controls", "pocket mitigations"}
SAMPLES = {"evaluate", "steer", "ablate", "reproduce", "pocket sweeps", "pocket pairs", *ARMS}
RUNS_MODELS = {"extract", "steer", "ablate", "evaluate", "reproduce"}
FOR_ANY_MODEL = RUNS_MODELS - {"reproduce"}
TRAINS = {f"pocket {name}" for name in ("build", "organisms", "sweeps", "pairs", "pretraining", "worlds")} | ARMS
VOCABULARY = {
    "--model": FOR_ANY_MODEL | {"pocket organisms", "pocket sweeps", "pocket pairs", *ARMS},
    "--adapter": FOR_ANY_MODEL,
    "--base": FOR_ANY_MODEL | {"inspect"},
    "--any-base": FOR_ANY_MODEL,
    "--device-map": RUNS_MODELS | TRAINS,
    "--dtype": RUNS_MODELS,
    "--questions": {"evaluate", "steer", "ablate"},
    "--n": SAMPLES,
    "-n": SAMPLES,
    "--seed": {"evaluate", "steer", "ablate", "pocket build"},
    "--out": RUNS_MODELS | TRAINS,
    "--force": {*FOR_ANY_MODEL, "pocket build", "pocket organisms", "pocket sweeps"},
}
"""Each option, and where it must be."""


def commands(at: Any = ROOT, above: str = "") -> Iterator[tuple[str, Any]]:
    """(name, command) of all, such as "pocket build"."""
    if not hasattr(at, "commands"):
        yield above, at
        return
    for name, command in at.commands.items():
        yield from commands(command, f"{above} {name}".strip())


def options_of(command: Any) -> list[Any]:
    return [p for p in command.params if p.param_type_name == "option" and p.name != "help"]


def without_none(hint: Any) -> Any:
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(hint) else hint


def idea(help_text: str) -> str:
    """What an option means everywhere: its help up to a colon, after which a command says what it is there."""
    return re.split(r": ", help_text)[0]


def test_a_name_means_one_thing() -> None:
    said: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for _, command in commands():
        hints = get_type_hints(command.callback.__wrapped__)
        for option in options_of(command):
            for name in option.opts:
                said[name].add((idea(option.help), str(without_none(hints[option.name]))))
    assert {name: found for name, found in said.items() if len(found) > 1} == {}


def test_an_idea_has_one_name() -> None:
    called: dict[str, set[str]] = defaultdict(set)
    for name, command in commands():
        for option in options_of(command):
            assert option.help, f"{name} {option.opts[0]} has no help"
            called[idea(option.help)].add(option.opts[0])
    assert {help_text: names for help_text, names in called.items() if len(names) > 1} == {}
    assert not {name for names in called.values() for name in names} & {f"--{old}" for old in options.FORMER}


@pytest.mark.parametrize("option", VOCABULARY)
def test_the_vocabulary_is_there_where_it_applies(option: str) -> None:
    there = {name for name, command in commands() if option in {o for p in options_of(command) for o in p.opts}}
    assert VOCABULARY[option] <= there


def test_former_names_still_work_and_are_not_listed() -> None:
    for old in options.FORMER:
        for name, _ in commands():
            said = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"}).output
            assert f"--{old} " not in said, f"{name} lists --{old}"
    found = CliRunner().invoke(app, ["pocket", "organisms", "--out", "x", "--chat", "absent", "--only", "nobody"])
    assert isinstance(found.exception, UsageError) and "no organism" in str(found.exception)


def test_every_command_is_in_a_group_and_says_what_it_does_in_a_line() -> None:
    said = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert "..." not in said.partition("Pocket models")[0].partition("[ARGS]...")[2]
    for name, command in ROOT.commands.items():  # type: ignore[attr-defined]
        assert f"{command.rich_help_panel}:" in said, name
        assert re.search(rf"^  {name} +\S", said, flags=re.M), name


def test_help_loads_nothing_that_takes_long() -> None:
    """Numbers are in the closing note of issue 12; here, what they come from."""
    run = "import sys; sys.argv = ['em-interp', '--help']\nfrom em_interp.cli import main\n"
    code = run + "try: main()\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert not loaded & {"torch", "transformers", "numpy", "pandas", "plotly", "yaml", "safetensors", "markdown_it"}


def test_the_model_is_given_once_in_either_way(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    assert options.model_of("a", None) == options.model_of(None, "a") == "a"
    assert options.model_and_file("a", file, None) == ("a", file)
    assert options.model_and_file(str(file), None, "a") == ("a", file)
    for wrong in (("a", file, "b"), ("a", None, None), (None, None, "a"), (None, None, None)):
        with pytest.raises(UsageError, match="--model"):
            options.model_and_file(*wrong)
    for both in (("a", "b"), (None, None)):
        with pytest.raises(UsageError, match="--model"):
            options.model_of(*both)
