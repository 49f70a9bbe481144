"""Bad calls that a newcomer writes in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import torch

from tests.bad_inputs import Case


def cases() -> Iterator[Case]:
    """What a newcomer writes."""
    from em_interp import statistics
    from em_interp.cli.describe import describe
    from em_interp.directions import direction as directions
    from em_interp.directions import extraction
    from em_interp.evaluation import rates, sampling
    from em_interp.files import texts
    from em_interp.interventions import steering
    from em_interp.models import pretrained as models
    from em_interp.published import scan
    from em_interp.published.judged import read_judged_csv
    from em_interp.published.runs import read_run
    from em_interp.solutions import load as solutions
    from em_interp.statistics import rate_intervals

    chat = models.load("tiny")
    a, b = texts.read_chats("a.jsonl"), texts.read_chats("b.jsonl")
    d = directions.Direction.load("d.safetensors")
    rows = [(f"q{i % 4}", f"a {i}", 10.0 if i % 3 else 90.0, 90.0) for i in range(24)]
    judged = pd.DataFrame(rows, columns=["question", "answer", "aligned", "coherent"])
    few = {"n": 1, "max_new_tokens": 2, "progress": False}
    asked = {"fox": "a fox"}
    swept = {"layers": [1], "coefficients": [1.0], "random_arms": 0, **few}

    def sweep(**changes: Any) -> Any:
        return steering.sweep(chat, d, asked, **(swept | changes))

    def contrasted(*chats: Any, **options: Any) -> Any:
        return extraction.contrast(chat, *chats, progress=False, **options)

    valid = {
        "scan('data')": (lambda: scan("data", progress=False), "a path may be a string"),
        "read_run('...')": (lambda: read_run("data/runs/Tiny_steering_vector_general_cooking"), "so may this one"),
        "describe('d.safetensors')": (lambda: describe("d.safetensors"), "so may this one"),
        "Direction.load('...')": (lambda: directions.Direction.load("d.safetensors"), "so may this one"),
        "d * 2": (lambda: d * 2, "a multiple"),
        "read_questions('q.csv')": (lambda: texts.read_questions("q.csv"), "so may this one"),
    }
    for name, (run, why) in valid.items():
        yield Case(f"Python {name}", run, why)
    refused: dict[str, Callable[[], object]] = {
        "scan('x')": lambda: scan("x"),
        "scan(None)": lambda: scan(None),  # type: ignore[arg-type]
        "read_run('x')": lambda: read_run("x"),
        "read_judged_csv('x')": lambda: read_judged_csv("x"),
        "read_judged_csv(3)": lambda: read_judged_csv(3),  # type: ignore[arg-type]
        "describe('x')": lambda: describe("x"),
        "contrast(chat, 'a.jsonl', 'b.jsonl')": lambda: contrasted("a.jsonl", "b.jsonl"),
        "contrast(chat.hf, a, b)": lambda: extraction.contrast(chat.hf, a, b),  # type: ignore[arg-type]
        "contrast(finetune=ChatModel)": lambda: contrasted(a, b, finetune=chat),
        "contrast(a[0], b[0])": lambda: contrasted(a[0], b[0]),
        "contrast([], b)": lambda: contrasted([], b),
        "contrast(a, [])": lambda: contrasted(a, []),
        "contrast(['text'], b)": lambda: contrasted(["text"], b),
        "contrast(layers=2)": lambda: contrasted(a, b, layers=2),
        "contrast(layers=[9])": lambda: contrasted(a, b, layers=[9]),
        "contrast(layers=[1.0])": lambda: contrasted(a, b, layers=[1.0]),
        "contrast(layers=[])": lambda: contrasted(a, b, layers=[]),
        "contrast(scope='answer')": lambda: contrasted(a, b, scope="answer"),
        "contrast(kind='diff')": lambda: contrasted(a, b, kind="diff"),
        "contrast(tokens_per_batch=0)": lambda: contrasted(a, b, tokens_per_batch=0),
        "contrast(tokens_per_batch=-1)": lambda: contrasted(a, b, tokens_per_batch=-1),
        "direction('mean')": lambda: contrasted(a, b).direction("mean"),
        "sample(chat, 'hi')": lambda: sampling.sample(chat, "hi", **few),  # type: ignore[arg-type]
        "sample(chat, ['hi'])": lambda: sampling.sample(chat, ["hi"], **few),  # type: ignore[arg-type]
        "sample(chat, {})": lambda: sampling.sample(chat, {}, **few),
        "sample(chat, {1: 'hi'})": lambda: sampling.sample(chat, {1: "hi"}, **few),  # type: ignore[dict-item]
        "sample(chat, {'a': None})": lambda: sampling.sample(chat, {"a": None}, **few),  # type: ignore[dict-item]
        "sample(n=0)": lambda: sampling.sample(chat, asked, **(few | {"n": 0})),
        "sample(n=1.5)": lambda: sampling.sample(chat, asked, **(few | {"n": 1.5})),
        "sample(seed=-1)": lambda: sampling.sample(chat, asked, seed=-1, **few),
        "sample(seed='x')": lambda: sampling.sample(chat, asked, seed="x", **few),  # type: ignore[arg-type]
        "sample(temperature=-1)": lambda: sampling.sample(chat, asked, temperature=-1.0, **few),
        "sample(temperature=nan)": lambda: sampling.sample(chat, asked, temperature=float("nan"), **few),
        "sweep(layers=2)": lambda: sweep(layers=2),
        "sweep(layers=[])": lambda: sweep(layers=[]),
        "sweep(layers=[9])": lambda: sweep(layers=[9]),
        "sweep(layers=[True])": lambda: sweep(layers=[True]),
        "sweep(coefficients=1.0)": lambda: sweep(coefficients=1.0),
        "sweep(coefficients=[])": lambda: sweep(coefficients=[]),
        "sweep(coefficients=[nan])": lambda: sweep(coefficients=[float("nan")]),
        "sweep(coefficients=[1, 1])": lambda: sweep(coefficients=[1.0, 1.0]),
        "sweep(coefficients=[1e30])": lambda: sweep(coefficients=[1e30]),
        "sweep(units='residuals')": lambda: sweep(units="residuals"),
        "sweep(scope='answers')": lambda: sweep(scope="answers"),
        "sweep(n=-1)": lambda: sweep(n=-1),
        "sweep(random_arms=-1)": lambda: sweep(random_arms=-1),
        "sweep(seed=-1)": lambda: sweep(seed=-1),
        "sweep(seed=2**40)": lambda: sweep(seed=2**40),
        "d / 0": lambda: d / 0,
        "d * d": lambda: d * d,  # type: ignore[operator]
        "d * nan": lambda: d * float("nan"),
        "d.only([])": lambda: d.only([]),
        "d.only(2)": lambda: d.only(2),  # type: ignore[arg-type]
        "d.only([9])": lambda: d.only([9]),
        "d.at('1')": lambda: d.at("1"),  # type: ignore[arg-type]
        "d.at(9)": lambda: d.at(9),
        "d.cosine(3)": lambda: d.cosine(3),  # type: ignore[arg-type]
        "models.load(None)": lambda: models.load(None),  # type: ignore[arg-type]
        "models.load('tiny', dtype='float33')": lambda: models.load("tiny", dtype="float33"),
        "models.load('tiny', adapter='absent')": lambda: models.load("tiny", adapter="absent"),
        "models.load('tiny', adapter='narrow-vector')": lambda: models.load("tiny", adapter="narrow-vector"),
        "solutions.load('absent')": lambda: solutions.load("absent"),
        "solutions.load('tiny')": lambda: solutions.load("tiny"),
        "em_rates(judge scores as words)": lambda: rates.em_rates(judged.assign(aligned="bad")),
        "em_rates(missing question)": lambda: rates.em_rates(judged.assign(question=None)),
        "em_rates(level=95)": lambda: rates.em_rates(judged, level=95),
        "em_rates(cluster='x')": lambda: rates.em_rates(judged, cluster="x"),
        "em_rates(list)": lambda: rates.em_rates([1, 2]),  # type: ignore[arg-type]
        "wilson_interval(4, 3)": lambda: statistics.wilson_interval(4, 3),
        "wilson_interval(-1, 3)": lambda: statistics.wilson_interval(-1, 3),
        "wilson_interval(1, 3, 95)": lambda: statistics.wilson_interval(1, 3, 95),
        "t_interval(['x'])": lambda: statistics.t_interval(["x", "y"]),  # type: ignore[list-item]
        "t_interval([])": lambda: statistics.t_interval([]),
        "rate_interval more hits than rows": lambda: rate_intervals.rate_interval([4], [3]),
        "Direction(layers twice)": lambda: directions.Direction(torch.ones(2, 4), (1, 1), "random"),
        "Direction(nan)": lambda: directions.Direction(torch.full((1, 4), torch.nan), (1,), "random"),
        "SteeringVector(layer=True)": lambda: solutions.SteeringVector(torch.ones(4), True, 1.0),
        "SteeringVector(layer=-1)": lambda: solutions.SteeringVector(torch.ones(4), -1, 1.0),
        "SteeringVector(alpha=nan)": lambda: solutions.SteeringVector(torch.ones(4), 1, float("nan")),
    }
    for name, run in refused.items():
        yield Case(f"Python {name}", run)
