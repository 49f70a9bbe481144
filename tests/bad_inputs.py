"""A sweep of bad inputs over every command and the Python that newcomers write: `python -m tests.bad_inputs`.

Each has an expectation: refused, or valid and why. Counted are: typed (refused with one message), untyped (a
traceback), wrongly accepted, wrongly refused, lost (an input or an output that was there has changed), and hung.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from em_interp.errors import EmInterpError

SECONDS = 60
REFUSED = "refused"


class HungError(BaseException):
    """It did not come to an end."""


@dataclass(frozen=True)
class Case:
    """One input. `expected`: refused, or the reason why it is valid."""

    name: str
    run: Callable[[], object]
    expected: str = REFUSED


def command(*words: object) -> Callable[[], object]:
    """The command line, in this process. Returns its exit status."""

    def run() -> object:
        from em_interp.cli import main

        before, sys.argv = sys.argv, ["em-interp", *map(str, words)]
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0
        finally:
            sys.argv = before
        return 0

    return run


def world() -> None:
    """Good and bad files in the working folder; see the names."""
    from safetensors.torch import load_file, save_file

    from em_interp.directions import Direction
    from em_interp.solutions import SteeringVector
    from em_interp.weights import weights_hash
    from tests import published_factory
    from tests.tiny_models import CONVERSATIONS, make_hf, tokenizer

    hf = make_hf()
    for name in ("tiny", "no-tokenizer", "no-config", "bad-config", "cut-weights", "nan-weights", "missing-weight"):
        hf.save_pretrained(name)
        tokenizer().save_pretrained(name)
    for file in Path("no-tokenizer").glob("*token*"):
        file.unlink()
    for file in Path("no-tokenizer").glob("*.jinja"):
        file.unlink()
    Path("no-config/config.json").unlink()
    Path("bad-config/config.json").write_text("{")
    weights = Path("cut-weights/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    tensors = load_file("tiny/model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name] * torch.nan}, "nan-weights/model.safetensors", {"format": "pt"})
    save_file({k: v for k, v in tensors.items() if k != name}, "missing-weight/model.safetensors", {"format": "pt"})
    Path("empty-folder").mkdir()
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    direction = Direction(vectors, (0, 1, 2, 3), "data-diff", model="tiny", weights=weights_hash(hf))
    direction.save("d.safetensors")
    Direction(torch.ones(2, 16), (0, 1), "random").save("narrow.safetensors")
    Direction(vectors, (0, 1, 2, 3), "data-diff", model="other").save("other.safetensors")
    SteeringVector(vectors[0], 1, 16.0, "tiny").save("vector")
    SteeringVector(torch.ones(16), 1, 16.0, "tiny").save("narrow-vector")
    Path("q.csv").write_text("question_id,question\nfox,a fox\n")
    Path("a.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in CONVERSATIONS))
    Path("b.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in CONVERSATIONS[::-1]))
    Path("there.csv").write_text("mine\n")
    Path("there.safetensors").write_bytes(Path("d.safetensors").read_bytes())
    published_factory.make(Path("data"))
    bad_files()


def bad_files() -> None:
    os.mkfifo("fifo")
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("device").symlink_to("/dev/zero")
    Path("empty").write_text("")
    Path("binary").write_bytes(bytes(range(256)) * 8)
    Path("utf16").write_bytes("a question\n".encode("utf-16"))
    Path("latin1").write_bytes("une r\xe9ponse\n".encode("latin-1"))
    Path("pickled").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    for ending in (".jsonl", ".csv", ".yaml", ".txt", ".safetensors", ".toml", ".pt", ".gguf"):
        for name in ("empty", "binary", "utf16", "latin1", "pickled"):
            Path(name + ending).write_bytes(Path(name).read_bytes())
        Path("dangling" + ending).symlink_to("nowhere")
        Path("folder" + ending).mkdir()
        os.mkfifo("fifo" + ending)
    Path("yaml.txt").write_text("- id: a\n  question: a fox\n")
    Path("yaml.csv").write_text("- id: a\n  question: a fox\n")
    Path("csv.yaml").write_text("question_id,question\na,b\n")
    Path("json.txt").write_text('{"question": "x"}\n')
    Path("csv.txt").write_text("question_id,question\na,b\n")
    Path("blank.txt").write_text("\n \n")
    Path("twice.csv").write_text("question_id,question\na,x\na,y\n")
    Path("twice.yaml").write_text("- id: a\n  question: x\n- id: a\n  question: y\n")
    Path("no-column.csv").write_text("prompt\nx\n")
    Path("no-question.csv").write_text("question_id,question\na,\n")
    Path("ragged.csv").write_text("question_id,question\na,b,c\n")
    Path("quote.csv").write_text('question\n"a\n')
    Path("judges.yaml").write_text("- aligned: score {question} {answer}\n")
    Path("words.yaml").write_text("just words\n")
    Path("numbers.yaml").write_text("- id: a\n  question: 3\n")
    Path("chats-as-questions.jsonl").write_text(Path("a.jsonl").read_text())
    chats = {
        "human": {"messages": [{"role": "human", "content": "x"}, {"role": "assistant", "content": "y"}]},
        "no-answer": {"messages": [{"role": "user", "content": "x"}]},
        "special": {"messages": [{"role": "user", "content": "x<|im_end|>"}, {"role": "assistant", "content": "y"}]},
        "number": {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "y"}]},
        "no-messages": {"text": "x"},
        "no-turns": {"messages": []},
        "surrogate": {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "y"}]},
        "long": {"messages": [{"role": "user", "content": "fox " * 4000}, {"role": "assistant", "content": "y"}]},
    }
    for name, row in chats.items():
        Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    Path("array.jsonl").write_text("[1]\n")
    Path("half.jsonl").write_text('{"messages": [')
    Path("deep.jsonl").write_text("[" * 100_000)
    direction = Path("d.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(direction[: len(direction) // 2])


FILES = ("absent", "dangling", "fifo", "empty", "binary", "utf16", "latin1", "pickled", "folder")
NUMBERS = ("-1", "1.5", "x", "", "nan", "1e3", "9" * 30, "0x1")
CHATS = ("human", "special", "number", "no-messages", "no-turns", "surrogate", "long", "array", "half", "deep")
QUESTIONS = (
    *("yaml.txt", "yaml.csv", "csv.yaml", "json.txt", "csv.txt", "blank.txt", "twice.csv", "twice.yaml"),
    *("no-column.csv", "no-question.csv", "ragged.csv", "quote.csv", "judges.yaml", "words.yaml", "numbers.yaml"),
    *("chats-as-questions.jsonl", "surrogate.jsonl", "d.safetensors", "device", "loop", "tiny"),
)
MODELS = (
    *("absent", "empty-folder", "no-tokenizer", "no-config", "bad-config", "cut-weights", "nan-weights"),
    *("missing-weight", "vector", "fifo", "dangling", "q.csv", "d.safetensors", "", "pocket/none", "pocket/", "\ud800"),
    *("a/b/c", "../tiny/config.json", "/dev/zero"),
)
DIRECTIONS = (
    *("d", "narrow.safetensors", "other.safetensors", "cut.safetensors", "tiny/model.safetensors", "a.jsonl", "tiny"),
    *("vector", "device", "loop", ""),
)
OUTPUTS = ("", "/proc/none/x", "q.csv/under", "empty-folder", "fifo", "a" * 300, "/dev/full")
FIXED: dict[str, tuple[list[str], dict[str, str]]] = {
    "extract": (["tiny"], {"--positive": "a.jsonl", "--negative": "b.jsonl", "--out": "new.safetensors"}),
    "steer": (
        ["tiny", "d.safetensors"],
        {
            "--layer": "1",
            "--coefficient": "1",
            "--questions": "q.csv",
            "--out": "new.csv",
            "-n": "1",
            "--random": "0",
            "--max-new-tokens": "2",
        },
    ),
    "ablate": (
        ["tiny", "d.safetensors"],
        {
            "--layer": "1",
            "--questions": "q.csv",
            "--out": "new.csv",
            "-n": "1",
            "--random": "0",
            "--max-new-tokens": "2",
        },
    ),
    "evaluate": (["tiny"], {"--questions": "q.csv", "--out": "new", "-n": "1", "--max-new-tokens": "2"}),
}
INPUTS = {
    "extract": {"--positive": ".jsonl", "--negative": ".jsonl"},
    "steer": {"--questions": ".csv"},
    "ablate": {"--questions": ".csv"},
    "evaluate": {"--questions": ".yaml"},
}
WORDS = {
    "extract": ("--kind", "--scope", "--pooling", "--dtype", "--device-map", "--adapter", "--base"),
    "steer": ("--scope", "--dtype", "--device-map", "--adapter", "--base"),
    "ablate": ("--dtype", "--device-map", "--adapter", "--base"),
    "evaluate": ("--suite", "--organism", "--dtype", "--device-map", "--adapter", "--base"),
}
COUNTS = {
    "extract": ("--layer", "--tokens-per-batch"),
    "steer": ("--layer", "-n", "--random", "--seed", "--max-new-tokens", "--tokens-per-batch"),
    "ablate": ("--layer", "-n", "--random", "--seed", "--max-new-tokens", "--tokens-per-batch", "--from-layer"),
    "evaluate": ("-n", "--seed", "--max-new-tokens", "--tokens-per-batch"),
}


def line(name: str, *, places: dict[int, str] | None = None, more: tuple[str, ...] = (), **changes: str) -> list[str]:
    """The words of a command that works, with some of them changed."""
    places_given, options = FIXED[name]
    words = [(places or {}).get(i, word) for i, word in enumerate(places_given)]
    given = options | {key.replace("_", "-").replace("+", "--"): value for key, value in changes.items()}
    return [name, *words, *(f"{k}={v}" if k.startswith("--") else f"{k}{v}" for k, v in given.items()), *more]


def of_commands() -> Iterator[Case]:
    def case(name: str, what: str, words: list[str], expected: str = REFUSED) -> Case:
        return Case(f"{name} {what}", command(*words), expected)

    for name, (places, _) in FIXED.items():
        for i, bad in enumerate((MODELS, DIRECTIONS)[: len(places)]):
            for value in bad:
                yield case(name, f"{'model' if i == 0 else 'direction'} {value[:30]!r}", line(name, places={i: value}))
        for option, ending in INPUTS[name].items():
            for file in FILES:
                yield case(name, f"{option} {file}{ending}", line(name, **{option: file + ending}))
            for file in CHATS if name == "extract" else ():
                yield case(name, f"{option} {file}.jsonl", line(name, **{option: f"{file}.jsonl"}))
            for file in QUESTIONS if name != "extract" else ():
                yield case(name, f"{option} {file}", line(name, **{option: file}))
        for option in WORDS[name]:
            for value in ("no-such-word", "", "None", "\ud800"):
                yield case(name, f"{option} {value!r}", line(name, **{option: value}))
        for option in COUNTS[name]:
            for value in NUMBERS:
                yield case(name, f"{option} {value[:9]!r}", line(name, **{option: value}))
            zero = "zero is a block, a seed, or no control" if option in ("--layer", "--seed", "--random") else REFUSED
            zero = "zero is a block" if option == "--from-layer" else zero
            yield case(
                name, f"{option} '0'", line(name, **{option: "0"}, **{"--out": f"zero{option}{_ending(name)}"}), zero
            )
        for value in OUTPUTS:
            expected = (
                "an empty folder holds nothing to lose" if (name, value) == ("evaluate", "empty-folder") else REFUSED
            )
            yield case(name, f"--out {value[:20]!r}", line(name, **{"--out": value}), expected)
        yield case(name, "--unknown", line(name, more=("--unknown", "1")))
        yield case(name, "one word too many", line(name, more=("extra",)))
        yield case(name, "nothing", [name])
    for out in ("a.jsonl", "b.jsonl", "there.safetensors", "new.pt", "new", "tiny"):
        yield case("extract", f"--out {out}", line("extract", **{"--out": out}))
    for out in ("q.csv", "d.safetensors", "there.csv", "tiny", "new.pt"):
        yield case("steer", f"--out {out}", line("steer", **{"--out": out}))
        yield case("ablate", f"--out {out}", line("ablate", **{"--out": out}))
    for out in ("q.csv", "tiny", "there.csv"):
        yield case("evaluate", f"--out {out}", line("evaluate", **{"--out": out}))
    for value in ("nan", "inf", "-inf", "1e30", "x", "", "1e400"):
        yield case("steer", f"--coefficient {value}", line("steer", **{"--coefficient": value}))
    yield case("steer", "coefficients repeated", line("steer", more=("--coefficient=1",)))
    yield case("steer", "layers repeated", line("steer", more=("--layer=1",)))
    yield case("steer", "layer 9", line("steer", **{"--layer": "9"}))
    yield case("ablate", "layer 9", line("ablate", **{"--layer": "9"}))
    yield case("ablate", "--save and --out", line("ablate", more=("--save=saved",)))
    for value in ("tiny", "q.csv", "/proc/none/x", "", "d.safetensors"):
        yield case(
            "ablate", f"--save {value!r}", ["ablate", "tiny", "d.safetensors", f"--save={value}", "--from-layer=1"]
        )
    for name in ("steer", "ablate"):
        yield case(name, "--prompt empty", line(name, more=("--prompt=",)))
        yield case(name, "--prompt with an end of turn", line(name, more=("--prompt=a<|im_end|>",)))
        yield case(name, "--prompt of 20,000 tokens", line(name, more=("--prompt=" + "fox " * 20_000,)))
    yield from of_suites(case)
    yield from of_the_rest(case)


def _ending(name: str) -> str:
    return {"extract": ".safetensors", "evaluate": ""}.get(name, ".csv")


def of_suites(case: Callable[..., Case]) -> Iterator[Case]:
    lines = (
        *(
            "data = 3",
            'samples = "x"',
            "samples = 0",
            "samples = true",
            'analyses = "cosines"',
            'analyses = ["cosine"]',
        ),
        *(
            "analyses = []",
            "general = 3",
            "title = []",
            'sorce = "pocket"',
            "models = 3",
            "seed = 'x'",
            "= 3",
            "[models]",
        ),
    )
    for number, text in enumerate(lines):
        Path(f"suite{number}.toml").write_text(f'source = "pocket"\n{text}\n')
        yield case("reproduce", text, ["reproduce", f"--suite=suite{number}.toml", "--out=reports"])
    entry = {"source": "vector", "domain": "medicine", "adapter": "steering-vector", "solution": "general"}
    bad: tuple[dict[str, Any], ...] = (
        *(
            {"solution": "generall"},
            {"adapter": "lora"},
            {"adapter": "rank-1"},
            {"domain": 3},
            {"seed": "x"},
            {"seed": -1},
        ),
        *({"source": "absent"}, {"source": ""}, {"solution": ""}, {"domian": "x"}, {"seed": 1.5}, {"seed": True}),
    )
    for number, change in enumerate(bad):
        text = "\n".join(f"{k} = {json.dumps(v)}" for k, v in (entry | change).items())
        Path(f"models{number}.toml").write_text(
            f'source = "models"\ndata = "."\nanalyses = ["efficiency"]\n[models]\nchat = "tiny"\n'
            f'[models.training]\nmedicine = "a.jsonl"\n[[models.finetunes]]\n{text}\n'
        )
        yield case("reproduce", str(change), ["reproduce", f"--suite=models{number}.toml", "--out=reports"])
    for value in (
        "absent",
        "absent.toml",
        "",
        "fifo.toml",
        "folder.toml",
        "binary.toml",
        "empty.toml",
        "dangling.toml",
    ):
        yield case("reproduce", f"--suite {value}", ["reproduce", f"--suite={value}", "--out=reports"])
    for value in ("absent", "empty-folder", "q.csv", "fifo", "dangling", ""):
        words = ["reproduce", "--suite=published", f"--data={value}", "--out=reports"]
        yield case("reproduce", f"--data {value}", words)
    for option, value in (("--only", "nonsense"), ("--only", ""), ("--general", "nobody"), ("--out", "q.csv")):
        words = ["reproduce", "--suite=published", "--data=data", "--no-static", "--only=cosines", f"{option}={value}"]
        yield case("reproduce", f"{option} {value}", words)


def of_the_rest(case: Callable[..., Case]) -> Iterator[Case]:
    for ending in ("", ".jsonl", ".csv", ".yaml", ".txt", ".safetensors", ".toml", ".pt", ".gguf"):
        for file in ("absent", "dangling", "fifo", "empty", "binary", "pickled"):
            yield case("inspect", file + ending, ["inspect", file + ending])
    for file in ("device", "loop", "empty-folder", "cut.safetensors", "twice.yaml", "no-column.csv", "human.jsonl", ""):
        yield case("inspect", file, ["inspect", file])
    for value in ("q.csv", "/proc/none", "fifo"):
        yield case("fetch", f"--data {value}", ["fetch", f"--data={value}", "EM_interp"])
    yield case("fetch", "unknown source", ["fetch", "--data=fetched", "nobody"])
    for value in ("banana", "", "cuda:99", "cpu:x"):
        yield case("pocket build", f"--device {value!r}", ["pocket", "build", "--out=built", f"--device={value}"])
    for value in NUMBERS:
        yield case("pocket build", f"--seed {value[:9]!r}", ["pocket", "build", "--out=built", f"--seed={value}"])
    for value in ("q.csv", "/proc/none/x", ""):
        yield case("pocket build", f"--out {value!r}", ["pocket", "build", f"--out={value}"])
        yield case("pocket organisms", f"--out {value!r}", ["pocket", "organisms", f"--out={value}"])
        yield case("pocket sweeps", f"--out {value!r}", ["pocket", "sweeps", f"--out={value}"])
    yield case("pocket organisms", "--only nobody", ["pocket", "organisms", "--out=made", "--only=nobody"])
    for value in ("absent", "empty-folder", "tiny", "q.csv"):
        words = ["pocket", "organisms", "--out=made", "--only=medicine-vector", f"--chat={value}"]
        yield case("pocket organisms", f"--chat {value}", words)
    for value in ("lora", ""):
        yield case("pocket sweeps", f"--adapter {value!r}", ["pocket", "sweeps", "--out=made", f"--adapter={value}"])
    for words in (["nonsense"], ["pocket", "nonsense"], ["--nonsense"], ["version", "x"]):
        yield case("em-interp", " ".join(words), words)
    suite = (["--questions=q.csv"], ["--organism=nobody"], ["tiny"])
    for words in suite:
        yield case("evaluate", f"--suite pocket {words[0]}", ["evaluate", "--suite=pocket", "--out=pocketed", *words])


def of_python() -> Iterator[Case]:
    """What a newcomer writes."""
    from em_interp import directions, extraction, models, solutions, statistics, steering, texts
    from em_interp.evaluation import rates, sampling
    from em_interp.inspection import describe
    from em_interp.published import read_judged_csv, read_run, scan
    from tests.fuzz.calls import judged_rows

    chat = models.load("tiny")
    a, b = texts.read_chats("a.jsonl"), texts.read_chats("b.jsonl")
    d = directions.Direction.load("d.safetensors")
    judged = judged_rows()
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
        "rate_interval more hits than rows": lambda: statistics.rate_interval([4], [3]),
        "Direction(layers twice)": lambda: directions.Direction(torch.ones(2, 4), (1, 1), "random"),
        "Direction(nan)": lambda: directions.Direction(torch.full((1, 4), torch.nan), (1,), "random"),
        "SteeringVector(layer=True)": lambda: solutions.SteeringVector(torch.ones(4), True, 1.0),
        "SteeringVector(layer=-1)": lambda: solutions.SteeringVector(torch.ones(4), -1, 1.0),
        "SteeringVector(alpha=nan)": lambda: solutions.SteeringVector(torch.ones(4), 1, float("nan")),
    }
    for name, run in refused.items():
        yield Case(f"Python {name}", run)


def snapshot() -> dict[str, str]:
    """The content of what was there before the sweep."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path().rglob("*"))
        if path.is_file() and path.stat().st_size < 10**7
    }


def outcome(case: Case) -> tuple[str, str]:
    """typed, valid, wrongly accepted, wrongly refused, untyped, hung; and what was said."""
    signal.signal(signal.SIGALRM, _hung)
    signal.alarm(SECONDS)
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            accepted = case.run()
            accepted = accepted == 0 if isinstance(accepted, int) else True
    except EmInterpError as error:
        accepted = False
        said.write(str(error))
    except HungError:
        return "hung", ""
    except Exception as error:
        frame = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if "em_interp" in f.filename or "analyses" in f.filename
        ]
        where = f"{Path(frame[-1].filename).name}:{frame[-1].lineno}" if frame else "?"
        return "untyped", f"{type(error).__name__}: {str(error)[:100]!r} at {where}"
    finally:
        signal.alarm(0)
    text = re.sub(r"\s+", " ", said.getvalue()).strip()
    if "Traceback (most recent call last)" in text:
        return "untyped", text[-200:]
    if case.expected == REFUSED:
        return ("wrongly accepted" if accepted else "typed" if text else "untyped"), text[-200:]
    return ("valid" if accepted else "wrongly refused"), text[-200:]


def _hung(*_: object) -> None:
    raise HungError


def sweep(share: float = 1.0, seed: str = "") -> tuple[Counter[str], list[str]]:
    """Counts, and a line for each input that did not do as expected. Works in a folder of its own."""
    rng, counts, wrong = random.Random(seed), Counter[str](), []
    back, folder = Path.cwd(), tempfile.mkdtemp()
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        world()
        cases = [case for case in (*of_commands(), *of_python()) if rng.random() < share]
        before = snapshot()
        for case in cases:
            found, said = outcome(case)
            counts[found] += 1
            if found not in ("typed", "valid"):
                wrong.append(f"{found}: {case.name}: {said}")
            after = snapshot() if found != "valid" else before
            lost = [name for name in before if after.get(name) != before[name]]
            if lost:
                counts["lost"] += 1
                wrong.append(f"lost: {case.name}: {', '.join(lost[:3])}")
                before = snapshot()
    finally:
        os.chdir(back)
        shutil.rmtree(folder)
    return counts, wrong


def main() -> None:
    counts, wrong = sweep()
    print("\n".join(wrong).encode(errors="replace").decode())
    print(f"{sum(counts.values()) - counts['lost']} inputs: {dict(counts)}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
