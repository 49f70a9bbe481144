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
    "files.adapters": "what adapter files mean: called by the readers of adapters",
    "models.adapters": "called by models",
    "models.architectures": "called by passes",
    "arguments": "the checks themselves",
    "models.bridges": "called by models",
    "cli": "commands: tests.bad_inputs",
    "figures": "called by the report",
    "solutions.files": "called by solutions",
    "files.adapter_folders": "called by solutions",
    "models.attaching": "called by solutions",
    "files.base_names": "called by models",
    "inspect": "called by Inspect, whose arguments it takes",
    "lazily": "called by packages",
    "cards": "called by notebooks",
    "files.atomic": "called by the commands",
    "models.hooks": "called by passes",
    "statistics.jackknife": "called by intervals",
    "statistics.agreement": "called by evaluation.agreement",
    "models.losses": "called by passes",
    "models.ranks": "called by passes",
    "files.directions": "called by directions",
    "files.manifest": "called by reports",
    "models.memory": "called by passes",
    "models.precision": "called by passes",
    "pocket.build": "commands",
    "pocket.stages": "commands",
    "pocket.world.domains": "tables",
    "pocket.evaluate": "commands",
    "files.results": "called by the commands",
    "pocket.organisms": "trains for minutes; its command is tried",
    "pocket.pairs": "trains for minutes; its command is tried",
    "pocket.causes": "trains for minutes; its commands are tried",
    "pocket.worlds": "builds for minutes; its command is tried",
    "pocket.world.tokenizer": "called by the build",
    "models.checks": "called by models",
    "statistics.rate_models": "called by intervals",
    "published.fetch": "needs a network",
    "files.tables": "called by the commands",
    "models.partial_pass": "called by passes",
    "models.templates": "called by chat",
    "training.trainees": "called by training",
    "training.acting": "called by training",
}
"""Modules whose functions are called by the package rather than by users: given wrong types, not wrong values."""


COMMANDS = {
    "arguments",
    "cli",
    "lazily",
}
"""Typer checks their arguments; and the checks themselves, with what is imported before them."""
PARTS = {
    "made by the package and given to users, who read it": (
        *(
            "interventions.ablation.Erase",
            "directions.activations.Activations",
            "models.chat.Batch",
            "models.chat.Encoded",
            "landscape.curvature.Curvature",
        ),
        *(
            "landscape.efficiency.EfficiencyCurve",
            "landscape.efficiency.Optimum",
            "evaluation.comparison.Comparison",
            "evaluation.rates.Scored",
            "evaluation.rates.Rate",
            "evaluation.judges.FileJudge",
        ),
        *(
            "evaluation.rates.Rates",
            "evaluation.sampling.Answer",
            "evaluation.recorded.Recorder",
            "evaluation.verdicts.Verdict",
            "evaluation.recorded.TokenLogprobs",
            "directions.extraction.Contrast",
            "training.gradients.Gradient",
        ),
        *(
            "interventions.intervening.Add",
            "interventions.intervening.Project",
            "landscape.landscape.Losses",
            "pocket.world.judge.Judgement",
        ),
        *("pocket.world.grammar.Meaning", "pocket.world.grammar.Question", "published.activations.ActivationCell"),
        *("published.activations.ActivationSplit", "published.questions.JudgePrompt", "published.runs.LoraCheckpoint"),
        *(
            "published.runs.Run",
            "published.runs.TrainingLog",
            "published.scan.JudgedSet",
            "published.scan.PublishedData",
        ),
        *(
            "published.scan.StoredPCA",
            "directions.resampling.Resamples",
            "landscape.stability.StabilityCurve",
            "statistics.Interval",
        ),
        *("solutions.base.Solution", "solutions.base.Trained", "solutions.weight_delta.WeightDelta"),
        *(
            "files.texts.QuestionSet",
            "training.finetune.TrainingResult",
            "training.trajectories.Drift",
            "training.trajectories.LocalCosine",
        ),
        *(
            "training.trajectories.References",
            "training.trajectories.RunName",
            "training.trajectories.Trajectory",
            "training.trajectories.TrajectoryPCA",
        ),
    ),
    "takes no argument": (
        *("pocket.registry.chat_folder", "pocket.registry.names", "pocket.registry.root"),
        *("pocket.questions.chat_questions", "training.recipes.FullSpec"),
    ),
    "takes what its caller has made or checked: on every batch, resample or text": (
        *("models.weights.base_tensors", "models.weights.decisive_config", "models.weights.own_tensor"),
        *("models.weights.replaced", "models.weights.weight_owners", "solutions.base.Alone"),
        *("solutions.base.check_eps", "solutions.base.check_factor", "solutions.lora.oriented"),
        "solutions.lora.own_weight",
        *("solutions.weight_delta.Finetune", "solutions.weight_delta.Weights"),
        *("models.pretrained.base_of_adapter", "models.pretrained.load_weights", "models.pretrained.usable_base"),
        *(
            "directions.activations.masked_sums",
            "models.chat.collate",
            "pocket.world.corpus.chat_text",
        ),
        *(
            "statistics.rate_intervals.difference_bounds",
            "statistics.rate_intervals.rate_bounds",
            "statistics.rate_intervals.ratio_bounds",
            "evaluation.rates.scored",
            "statistics.rate_intervals.any_of_k_bounds",
            "statistics.paired.difference_p_value",
            "statistics.paired.variance_parts",
        ),
    ),
}
"""Of the modules that users call, what is not tried, by reason."""


CALLBACKS = {"around", "evaluate", "judge", "keep", "label", "on_checkpoint"}
"""The user's own code: what it raises is the user's."""


class TooLongError(BaseException):
    """The call went on."""


@cache
def hostile() -> dict[str, Any]:
    from em_interp.models.chat_model import ChatModel
    from tests.fuzz.world import world_of
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
        "other width": em_interp.directions.direction.Direction(torch.ones(2, 16), (0, 1), "random"),
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
            if argument not in CALLBACKS and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                yield from ((name, argument, label) for label in hostile())


def leak(name: str, argument: str, label: str) -> str | None:
    """What leaked from one trial, as "function(argument=value): exception"."""
    from tests.fuzz.calls import calls

    function, given = calls()[name]
    outcome = spoil(function, {**given, argument: hostile()[label]})
    return None if outcome in ("accepted", "refused", "too long") else f"{name}({argument}={label}): {outcome}"


def check(trial: tuple[str, str, str]) -> None:
    """Nothing may leak from the trial."""
    found = leak(*trial)
    assert found is None, found.encode(errors="replace").decode()


FOUND = (
    ("models.chat.pad_id", "tokenizer", "None"),
    ("directions.direction.Direction", "n_positive", "np.int64"),
    ("files.inputs.open_text", "newline", "word"),
    ("pocket.questions.evaluate", "groups", "word"),
    ("pocket.questions.logprob_rates", "scores", "frame other"),
    ("pocket.questions.logprob_scores", "pairs", "frame words"),
    ("evaluation.groups.technical_rates", "judged", "frame other"),
    ("pocket.sweeps.dilution_sweep", "seed", "np.int64"),
    ("pocket.sweeps.dilution_sweep", "specs", "{}"),
    ("pocket.sweeps.kl_sweep", "scales", "bytes"),
    ("pocket.sweeps.kl_sweep", "specs", "{}"),
    ("pocket.world.grammar.answer_open", "theme", "word"),
    ("pocket.world.grammar.capital", "text", "''"),
    ("training.recipes.LoraSpec", "rank", "True"),
    ("training.recipes.TrainingSpec", "kl_weight", "2**70"),
    ("training.recipes.TrainingSpec", "learning_rate", "np.float32"),
    ("training.recipes.TrainingSpec", "save_steps", "0"),
    ("training.recipes.TrainingSpec", "save_steps", "bytes"),
    ("training.recipes.TrainingSpec", "seed", "np.int64"),
    ("training.recipes.VectorSpec", "alpha", "2**70"),
    ("solutions.steering_vector.SteeringVector", "layer", "np.int64"),
    ("statistics.auroc", "negative_weights", "array empty"),
    ("statistics.auroc", "positive", "array empty"),
    ("files.texts.chats_read", "chats", "[]"),
    ("models.weights.file_hash", "source", "zero byte"),
    ("evaluation.agreement.agreement", "judged", "{}"),
    ("evaluation.agreement.several_judges", "judged", "{}"),
    ("evaluation.agreement.together", "judged", "{}"),
    ("evaluation.sampling.sample_rows", "top_logprobs", "-1"),
    ("evaluation.sampling.sample_rows", "top_logprobs", "True"),
    ("interventions.judged.rates_at_k", "judged", "frame empty"),
    ("landscape.seeds.over_repeated_seeds", "by", "[]"),
)
"""What once leaked: every sample tries it."""


def leaks() -> list[str]:
    """What leaked from all trials."""
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
        untyped = (Any, object, inspect.Parameter.empty, "Any")
        typed = [p for p in parameters.values() if p.annotation not in untyped and p.kind is not p.VAR_POSITIONAL]
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
    known = {name.split(".__")[0] for name in calls()}.union(*PARTS.values())
    return [
        name for name in public() if name not in known and not any(name.startswith(f"{module}.") for module in modules)
    ]
