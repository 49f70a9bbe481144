"""Each argument of each public function in turn replaced by what nobody means: only typed errors may leave."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import math
import os
import pkgutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import em_interp
from em_interp.errors import EmInterpError

SECONDS = 3.0
"""A call that goes on for longer was accepted: it is stopped."""
INNER = {
    "adapter_config": "what adapter files mean: called by the readers of adapters",
    "adapter_files": "called by models",
    "arguments": "the checks themselves",
    "seeds": "the checks themselves",
    "bridges": "called by models",
    "cli": "commands: tests.fuzz.commands",
    "evaluate_command": "commands",
    "extract_command": "commands",
    "intervention_commands": "commands",
    "command_options": "called by the commands",
    "figures": "called by the report",
    "files": "called by the commands",
    "hooks": "called by passes",
    "jackknife": "called by intervals",
    "limits": "called by passes",
    "losses": "called by passes",
    "manifest": "called by reports",
    "memory": "called by passes",
    "pocket.build": "commands",
    "pocket.commands": "commands",
    "pocket.corpus": "called by the build",
    "pocket.domains": "tables",
    "pocket.evaluate": "commands",
    "pocket.kept": "called by the commands",
    "pocket.organisms": "commands",
    "pocket.tokenizer": "called by the build",
    "pocket.token_kinds": "called by the suite",
    "probe": "called by models",
    "rate_models": "called by intervals",
    "published.fetch": "needs a network",
    "resume": "called by the commands",
    "solution_files": "called by solutions",
    "suffix": "called by passes",
    "templates": "called by chat",
    "trainees": "called by training",
}
"""Modules whose functions are called by the package rather than by users: given wrong types, not wrong values."""


COMMANDS = {
    "arguments",
    "command_options",
    "cli",
    "evaluate_command",
    "extract_command",
    "intervention_commands",
    "pocket.commands",
}
"""Typer checks their arguments; and the checks themselves."""
PARTS = {
    *("activations.check_readable", "evaluation.rates.em_counts", "evaluation.rates.Difference", "inputs.open_text"),
    *("interventions.check_scope", "interventions.check_direction", "interventions.intervening"),
    *("pocket.judge.Judgement", "pocket.registry.root", "pocket.registry.names", "pocket.registry.chat_folder"),
    *("pocket.suite.chat_questions", "pocket.suite.evaluate", "pocket.suite.evaluate_chat", "pocket.world.answer"),
    *("pocket.suite.technical_rates", "pocket.suite.logprob_scores", "pocket.suite.logprob_rates"),
    *("pocket.sweeps.kl_sweep", "pocket.sweeps.dilution_sweep", "pocket.world.Question", "pocket.world.Meaning"),
    *("pocket.world.capital", "pocket.world.advise", "pocket.world.answer_open", "recipes.FullSpec"),
    *("published.activations.ActivationCell", "published.activations.ActivationSplit", "published.runs.Run"),
    *("published.questions.JudgePrompt", "published.runs.LoraCheckpoint", "published.runs.TrainingLog"),
    *("published.runs.product_norms", "published.scan.JudgedSet", "published.scan.StoredPCA"),
    *("published.scan.PublishedData", "rate_intervals.rate_bounds", "rate_intervals.difference_bounds"),
    *("rate_intervals.ratio_bounds", "resampling.Resamples", "solution_space.space_of", "solution_space.dimension"),
    *("solution_space.fixed_layer", "solution_space.check_inside_blocks", "solutions.refuse_other_models"),
    *("statistics.Interval", "statistics.no_interval", "statistics.too_few", "statistics.check_level"),
    *("texts.QuestionSet", "texts.question_of", "texts.chats_read", "training.TrainingResult"),
    *("trajectories.TrajectoryPCA", "trajectories.Drift", "weights.tensors_hash", "weights.adapter_hash"),
    *("weights.adapter_norm",),
    *("ablation.Erase", "activations.Activations", "activations.scope_weights", "activations.masked_sums"),
    *("chat.Encoded", "chat.Batch", "chat.token_ids", "chat.end_of_turn_id", "chat.pad_id", "chat.collate"),
    *("chat.budget_groups", "curvature.Curvature", "efficiency.EfficiencyCurve", "efficiency.Optimum"),
    *("evaluation.rates.Rate", "evaluation.rates.Rates", "evaluation.sampling.Answer", "extraction.Contrast"),
    *(
        "gradients.Gradient",
        "interventions.Add",
        "interventions.Project",
        "landscape.Losses",
        "stability.StabilityCurve",
    ),
    *("trajectories.RunName", "trajectories.Trajectory", "trajectories.References", "trajectories.LocalCosine"),
}
"""Results and parts of calculations: made by the package, given to users."""


CALLBACKS = {"around", "evaluate", "label", "on_checkpoint"}
"""The user's own code: what it raises is the user's."""


class TooLongError(BaseException):
    """The call went on."""


@cache
def hostile() -> dict[str, Any]:
    from em_interp.models import ChatModel
    from tests.fuzz.calls import world_of
    from tests.tiny_models import make_hf, tokenizer

    other = ChatModel(make_hf(hidden_size=16), tokenizer(), name="other")
    return {
        "None": None,
        "nan": math.nan,
        "inf": math.inf,
        "-1": -1,
        "0": 0,
        "1.5": 1.5,
        "True": True,
        "2**70": 2**70,
        "10**400": 10**400,
        "-1e308": -1e308,
        "np.int64": np.int64(3),
        "np.float32": np.float32(1.0),
        "''": "",
        "word": "no such word",
        "zero byte": "\0",
        "surrogate": "\ud800",
        "bytes": b"x",
        "[]": [],
        "()": (),
        "{}": {},
        "[None]": [None],
        "['x']": ["x"],
        "[-1]": [-1],
        "[99]": [99],
        "[2**70]": [2**70],
        "[nan]": [math.nan],
        "[[]]": [[]],
        "[{}]": [{}],
        "[[{}]]": [[{}]],
        "[[role only]]": [[{"role": "user"}]],
        "[[human]]": [[{"role": "human", "content": "x"}]],
        "[[no turns], []]": [[{"role": "user", "content": ""}], []],
        "{'x': None}": {"x": None},
        "{'x': ''}": {"x": ""},
        "{'x': []}": {"x": []},
        "{1: 2}": {1: 2},
        "set": {1},
        "object": object(),
        "class": dict,
        "lambda": lambda *_: None,
        "array nan": np.full(3, np.nan),
        "array empty": np.zeros(0),
        "array words": np.array(["x"]),
        "tensor nan": torch.full((2, 4), math.nan),
        "tensor empty": torch.zeros(0, 4),
        "tensor int": torch.ones(2, 4, dtype=torch.int64),
        "tensor big": torch.ones(2, 9, 4),
        "frame empty": pd.DataFrame(),
        "frame other": pd.DataFrame({"x": [1]}),
        "frame words": pd.DataFrame({"question": ["a"], "answer": [None], "aligned": ["x"], "coherent": ["y"]}),
        "absent": Path("absent"),
        "folder": Path(),
        "fifo": Path("fifo"),
        "link": Path("dangling"),
        "binary": Path("binary.safetensors"),
        "text": Path("text.pt"),
        "other model": other,
        "hf": other.hf,
        "direction": world_of()["direction"],
        "other width": em_interp.directions.Direction(torch.ones(2, 16), (0, 1), "random"),
        "solution": world_of()["vector"],
        "lora": world_of()["adapter"],
    }


def public() -> dict[str, Callable[..., Any]]:
    """Every public function, class and method of the package."""
    found: dict[str, Callable[..., Any]] = {}
    for info in pkgutil.walk_packages(em_interp.__path__, "em_interp."):
        module = importlib.import_module(info.name)
        short = info.name.removeprefix("em_interp.")
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != info.name:
                continue
            if inspect.isfunction(thing) or (
                inspect.isclass(thing)
                and not (issubclass(thing, BaseException) or getattr(thing, "_is_protocol", False))
            ):
                found[f"{short}.{name}"] = thing
    return found


def spoil(function: Callable[..., Any], given: dict[str, Any]) -> str:
    """Call it: "accepted", "refused", "too long", or the exception that leaked and where from."""
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                _use(function(**given))
        return "accepted"
    except EmInterpError:
        return "refused"
    except TooLongError:
        return "too long"
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/em_interp/" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}" if frames else "?"
        return f"{type(error).__name__}: {str(error)[:90]!r} at {where}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _stop(*_: object) -> None:
    raise TooLongError


def _use(result: Any) -> None:
    if isinstance(result, Iterator):
        list(islice(result, 20))
    elif isinstance(result, contextlib.AbstractContextManager) and not isinstance(result, (io.IOBase, torch.Tensor)):
        with result:
            pass


def prepare() -> None:
    """Files that no reader can use, in the working folder."""
    if not Path("fifo").exists():
        os.mkfifo("fifo")
        Path("dangling").symlink_to("nowhere")
        Path("binary.safetensors").write_bytes(b"\xff\x00" * 50)
        Path("text.pt").write_text("not a tensor")


def trials() -> Iterator[tuple[str, str, str]]:
    """Every function of users, argument of it and label of a hostile value."""
    from tests.fuzz.calls import calls

    for name, (function, _) in calls().items():
        for argument, parameter in inspect.signature(function).parameters.items():
            if argument not in CALLBACKS and parameter.kind is not parameter.VAR_KEYWORD:
                yield from ((name, argument, label) for label in hostile())


def leak(name: str, argument: str, label: str) -> str | None:
    """What leaked from one trial, as "function(argument=value): exception"."""
    from tests.fuzz.calls import calls

    function, given = calls()[name]
    outcome = spoil(function, {**given, argument: hostile()[label]})
    return None if outcome in ("accepted", "refused", "too long") else f"{name}({argument}={label}): {outcome}"


def leaks() -> list[str]:
    """What leaked from all trials."""
    prepare()
    return [found for trial in trials() if (found := leak(*trial)) is not None]


def unguarded() -> list[str]:
    """Functions that take an object of no type at all where they say which they take."""
    nothing = type("Nothing", (), {})()
    found = []
    for name, function in public().items():
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:
            continue
        typed = [p for p in parameters.values() if p.annotation not in (Any, object, inspect.Parameter.empty, "Any")]
        if not typed or name.split(".")[0] in COMMANDS or ".".join(name.split(".")[:2]) in COMMANDS:
            continue
        needed = [
            p.name
            for p in parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        outcome = spoil(function, {**dict.fromkeys(needed, nothing), typed[0].name: nothing})
        if outcome != "refused":
            found.append(f"{name}({typed[0].name}=nothing): {outcome}")
    return found


def unlisted() -> list[str]:
    """Public functions that have neither a call in tests.fuzz.calls nor a module that is called by the package."""
    from tests.fuzz.calls import calls

    modules = set(INNER)
    known = {name.split(".__")[0] for name in calls()} | PARTS
    return [
        name for name in public() if name not in known and not any(name.startswith(f"{module}.") for module in modules)
    ]
