"""Bad suites and options for reproduce, and bad input for inspect, fetch and pocket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bad_inputs import REFUSED, Case
from tests.bad_inputs.commands import NUMBERS, case


def cases() -> Iterator[Case]:
    yield from _suite_files()
    yield from _finetunes()
    yield from _released()
    yield from _others()


def _suite_files() -> Iterator[Case]:
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


ENTRY = {"source": "vector", "domain": "medicine", "adapter": "steering-vector", "solution": "general"}
NARROW = ENTRY | {"source": "narrow-of-two", "solution": "narrow"}
MODELS = {"chat": "tiny", "judged": "judged-good-scores"}


def _models_suite(
    number: int, entry: dict[str, Any], models: dict[str, str], analysis: str, training: str = "a.jsonl"
) -> str:
    def table(content: dict[str, Any]) -> str:
        return "\n".join(f"{key} = {json.dumps(value)}" for key, value in content.items())

    Path(f"models{number}.toml").write_text(
        f'source = "models"\ndata = "."\nanalyses = ["{analysis}"]\n[models]\n{table(models)}\n'
        f'[models.training]\nmedicine = "{training}"\n'
        f"[[models.finetunes]]\n{table(entry)}\n[[models.finetunes]]\n{table(NARROW)}\n"
    )
    return f"models{number}.toml"


def _finetunes() -> Iterator[Case]:
    good: tuple[dict[str, Any], ...] = ({}, {"source": "bare-vector"})
    bad: tuple[dict[str, Any], ...] = (
        *({"solution": "generall"}, {"adapter": "lora"}, {"adapter": "rank-1"}, {"domain": 3}, {"seed": "x"}),
        *({"source": "absent"}, {"source": ""}, {"solution": ""}, {"domian": "x"}, {"seed": 1.5}, {"seed": True}),
        *({"seed": -1}, {"source": "narrow-of-two"}, {"source": "narrow-vector"}, {"source": "tiny"}),
        *({"source": "lora-nan", "adapter": "all-modules"}, {"domain": "nobody"}),
    )
    numbers = iter(range(100))
    for change in (*good, *bad):
        file = _models_suite(next(numbers), ENTRY | change, MODELS, "efficiency")
        words = ["reproduce", f"--suite={file}", "--out=partly", "--no-static"]
        yield case("reproduce", f"a finetune of {change}", words, "right" if change in good else "refused")
    for key, value in (
        *(("chat", "absent"), ("chat", "vector"), ("chat", "q.csv"), ("chat", "missing-weight"), ("chat", "../tiny")),
        *(
            ("judged", "q.csv"),
            ("judged", "fifo"),
            ("judged", "dangling"),
            ("judged", "../judged"),
            ("texts", "absent"),
        ),
        *(("texts", "binary.txt"), ("texts", "fifo.txt"), ("texts", "a.jsonl"), ("texts", "empty.txt"), ("chats", "x")),
        *(("judged", f"judged-{name}") for name in ("unit-scores", "word-scores", "beyond-scores", "no-aligned")),
    ):
        analysis = {"judged": "em_rates", "texts": "influence"}.get(key, "efficiency")
        file = _models_suite(next(numbers), ENTRY, MODELS | {key: value}, analysis)
        words = ["reproduce", f"--suite={file}", "--out=partly", "--no-static"]
        yield case("reproduce", f"[models] {key} = {value}", words)
    for training in (
        "absent.jsonl",
        "human.jsonl",
        "fifo.jsonl",
        "half.jsonl",
        "empty.jsonl",
        "../a.jsonl",
        "long.jsonl",
    ):
        file = _models_suite(next(numbers), ENTRY, MODELS, "efficiency", training)
        words = ["reproduce", f"--suite={file}", "--out=partly", "--no-static"]
        yield case("reproduce", f"[models.training] {training}", words)


def _released() -> Iterator[Case]:
    for value in ("absent", "empty-folder", "q.csv", "fifo", "dangling", ""):
        words = ["reproduce", "--suite=published", f"--data={value}", "--out=reports"]
        yield case("reproduce", f"--data {value}", words)
    for option, value in (
        ("--only", "nonsense"),
        ("--only", ""),
        ("--out", "q.csv"),
    ):
        words = ["reproduce", "--suite=published", "--data=data", "--no-static", "--only=cosines", f"{option}={value}"]
        yield case("reproduce", f"{option} {value}", words)
    for role in ("--general", "--narrow"):
        # the other analyses are made and reported, with status 1
        words = ["reproduce", "--suite=published", "--data=data", "--no-static", "--only=cosines", "--out=partly"]
        yield case("reproduce", f"{role} nobody", [*words, f"{role}=nobody"])
    run = "Tiny_steering_vector_general_cooking"
    words = ["reproduce", "--suite=published", "--data=data", "--out=partly", f"--general={run}", f"--narrow={run}"]
    yield case("reproduce", "--general equal to --narrow", words)
    for name in ("dangling", "fifo", "folder", "cut", "nan", "pickled"):
        words = [
            "reproduce",
            "--suite=published",
            f"--data=data-{name}",
            "--no-static",
            "--only=cosines",
            "--out=partly",
        ]
        expected = "an absent cell is named, and the others are used" if name == "dangling" else REFUSED
        yield case("reproduce", f"a {name} file among the released", words, expected)


def _others() -> Iterator[Case]:
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
        yield case("pocket pairs", f"--out {value!r}", ["pocket", "pairs", f"--out={value}"])
    words = ["pocket", "organisms", "--out=otherchat", "--only=medicine-vector"]
    yield case("pocket organisms", "a second chat model into one folder", words)
    for file in ("unit-scores.csv", "word-scores.csv", "beyond-scores.csv", "no-aligned.csv"):
        yield case("inspect", file, ["inspect", file])
    yield case("pocket organisms", "--only nobody", ["pocket", "organisms", "--out=made", "--only=nobody"])
    for value in ("absent", "empty-folder", "tiny", "q.csv"):
        words = ["pocket", "organisms", "--out=made", "--only=medicine-vector", f"--chat={value}"]
        yield case("pocket organisms", f"--chat {value}", words)
    for value in ("lora", ""):
        yield case("pocket sweeps", f"--adapter {value!r}", ["pocket", "sweeps", "--out=made", f"--adapter={value}"])
    for option in ("--only=lora", "--domain=", "--task=x", "--seeds=99", "--seeds=x", "--n=0", "--model=q.csv"):
        yield case("pocket pairs", option, ["pocket", "pairs", "--out=made", option])
    for words in (["absent.toml"], ["q.csv"], ["q.csv", "--only=nobody"]):
        yield case("pocket worlds", " ".join(words), ["pocket", "worlds", "--out=made", *words])
    for words in (["nonsense"], ["pocket", "nonsense"], ["--nonsense"], ["version", "x"]):
        yield case("em-interp", " ".join(words), words)
    suite = (["--questions=q.csv"], ["--organism=nobody"], ["tiny"])
    for words in suite:
        yield case("evaluate", f"--suite pocket {words[0]}", ["evaluate", "--suite=pocket", "--out=pocketed", *words])
