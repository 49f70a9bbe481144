"""Bad models, files, words, numbers and outputs for extract, steer, ablate, evaluate and rates."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator

from tests.bad_inputs import REFUSED, Case, command

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
    *(
        "missing-weight",
        "narrow-vector",
        "fifo",
        "dangling",
        "q.csv",
        "d.safetensors",
        "",
        "pocket/none",
        "pocket/",
        "\ud800",
    ),
    *("a/b/c", "../tiny/config.json", "/dev/zero"),
)
DIRECTIONS = (
    *("d", "narrow.safetensors", "other.safetensors", "cut.safetensors", "tiny/model.safetensors", "a.jsonl", "tiny"),
    *("vector", "device", "loop", ""),
)
ADAPTERS = (
    *("lora", "lora-dora", "lora-zero", "lora-nan", "lora-alpha-0", "lora-rank-x", "lora-unknown-key", "lora-cut"),
    *("lora-other-targets", "lora-empty", "lora-config-cut", "lora-config-list", "lora-config-empty", "lora-fifo"),
    *("narrow-vector", "bare-vector", "tiny", "fifo", "d.safetensors"),
)
JUDGED = ("words", "outside", "fractions", "half-sweep", "no-question", "no-scores", "no-rows", "no-base", "layers-x")
JUDGES = ("absent.py:f", "q.csv:f", "mine.py", "mine.py:", ":f", "mine.py:none", "broken.py:f", "folder.py:f", "pocket")
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
    "evaluate": (["tiny"], {"--questions": "q.csv", "--out": "new", "--n": "1", "--max-new-tokens": "2"}),
}
INPUTS = {
    "extract": {"--positive": ".jsonl", "--negative": ".jsonl"},
    "steer": {"--questions": ".csv"},
    "ablate": {"--questions": ".csv"},
    "evaluate": {"--questions": ".yaml"},
}
WORDS = {
    "extract": ("--kind", "--scope", "--pooling", "--dtype", "--device-map", "--adapter", "--base"),
    "steer": ("--scope", "--judge", "--dtype", "--device-map", "--adapter", "--base"),
    "ablate": ("--judge", "--dtype", "--device-map", "--adapter", "--base"),
    "evaluate": ("--suite", "--organism", "--judge", "--dtype", "--device-map", "--adapter", "--base"),
}
COUNTS = {
    "extract": ("--layer", "--tokens-per-batch"),
    "steer": ("--layer", "-n", "--random", "--seed", "--max-new-tokens", "--tokens-per-batch"),
    "ablate": ("--layer", "-n", "--random", "--seed", "--max-new-tokens", "--tokens-per-batch", "--from-layer"),
    "evaluate": ("--n", "--seed", "--max-new-tokens", "--tokens-per-batch"),
}


def line(name: str, *, places: dict[int, str] | None = None, more: tuple[str, ...] = (), **changes: str) -> list[str]:
    """The words of a command that works, with some of them changed."""
    places_given, options = FIXED[name]
    words = [(places or {}).get(i, word) for i, word in enumerate(places_given)]
    given = options | {key.replace("_", "-").replace("+", "--"): value for key, value in changes.items()}
    return [name, *words, *(f"{k}={v}" if k.startswith("--") else f"{k}{v}" for k, v in given.items()), *more]


def working(name: str) -> list[str]:
    """The words of a command that works, with an output of its own."""
    return line(name, **{"--out": f"works-{name}{_ending(name)}"})


def case(name: str, what: str, words: list[str], expected: str = REFUSED) -> Case:
    return Case(f"{name} {what}", command(*words), expected)


def cases() -> Iterator[Case]:
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
                name,
                f"{option} '0'",
                line(name, **{option: "0"}, **{"--out": f"zero-{name}{option}{_ending(name)}"}),
                zero,
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
    for name in ("steer", "ablate"):
        words = line(name, places={0: "runs/b/checkpoint-500", 1: "of-run-a.safetensors"})
        yield case(name, "a direction of another run's checkpoint-500", words)
    again = ["evaluate", "runs/b/checkpoint-500", "--questions=q.csv", "--n=1", "--max-new-tokens=2"]
    yield case("evaluate", "another run's checkpoint-500 into the default folder", again, "each has a folder")
    for model in ("return-sequences", "return-dict", "stop-strings", "prompt-lookup", "token-healing", "dola"):
        words = line("evaluate", places={0: model}, **{"--out": f"of-{model}"})
        yield case("evaluate", f"generation_config with {model}", words, "the checkpoint's habits are not used")
    for model in ("fifo-weights", "fifo-config", "folder-config"):
        yield case("evaluate", f"model {model}", line("evaluate", places={0: model}))
    for adapter in ADAPTERS:
        expected = {"lora": "it is good", "lora-dora": "PEFT applies it", "bare-vector": "its config says all"}.get(
            adapter, REFUSED
        )
        words = line("extract", **{"--adapter": adapter, "--out": f"of-{adapter}.safetensors"})
        yield case("extract", f"--adapter {adapter}", words, expected)
    for adapter in ("lora-4bit", "lora-relative", "lora-no-base", "lora-empty", "lora-fifo"):
        yield case("evaluate", f"model {adapter}", line("evaluate", places={0: adapter}))
    for file in ("separators.jsonl", "bom.jsonl", "crlf.jsonl"):
        words = line("extract", **{"--positive": file, "--out": f"{file}.safetensors"})
        yield case("extract", f"--positive {file}", words, "lines end at line feeds, and a BOM is no text")
    for file in ("bom.csv", "asked.jsonl"):
        yield case(
            "steer", f"--questions {file}", line("steer", **{"--questions": file, "--out": f"{file}.csv"}), "good"
        )
    yield case("steer", "--questions surrogate.yaml", line("steer", **{"--questions": "surrogate.yaml"}))
    for name in ("steer", "ablate"):
        words = line(name, places={0: "positions"}, more=("--any-model", "--prompt=" + "fox " * 40))
        yield case(name, "--prompt beyond GPT-2's positions", words)
    for name in FIXED:
        yield Case(f"{name} on a full disk", full_disk(command(*line(name))))
        yield Case(f"{name} --force on a full disk", full_disk(command(*line(name, more=("--force",)))))
    save = ["ablate", "tiny", "d.safetensors", "--save=saved", "--from-layer=1"]
    yield Case("ablate --save on a full disk", full_disk(command(*save)))
    for words in (["--questions=q.csv"], ["--prompt=why"], ["--layer=9"], ["--from-layer=9"]):
        yield case("ablate", f"--save with {words[0]}", [*save, *words])
    yield case("ablate", "--save of another model's direction", [*save[:2], "other.safetensors", *save[3:]])
    yield case("extract", "--gguf equal to an input", line("extract", more=("--gguf=a.jsonl",)))
    yield case("extract", "--gguf that is there", line("extract", more=("--gguf=empty.gguf",)))
    yield case("extract", "one side only", ["extract", "tiny", "--positive=a.jsonl", "--out=new.safetensors"])
    yield case("extract", "the same chats on both sides", line("extract", **{"--negative": "a.jsonl"}))
    yield from judged_cases()


def judged_cases() -> Iterator[Case]:
    """Files that are said to be judged, and judges that are said to be there."""
    for file in (
        *(f"{name}.csv" for name in FILES),
        *(f"judged-{name}.csv" for name in JUDGED),
        "q.csv",
        "tiny",
        "a.jsonl",
    ):
        yield case("rates", file, ["rates", file])
        yield case("rates", f"{file} beside a good one", ["rates", "judged.csv", file])
        yield case("extract", f"--answers {file}", ["extract", "tiny", f"--answers={file}", "--out=new.safetensors"])
    for option in ("--aligned", "--coherent"):
        for value in ("-1", "101", "nan", "x", "", "1e400"):
            yield case("rates", f"{option} {value!r}", ["rates", "judged.csv", f"{option}={value}"])
    for option, values in {
        "--preset": ("paper", "", "x"),
        "--denominator": ("strict", ""),
        "--at-k": ("0", "-1", "x", "1.5"),
        "--decide": ("0", "2", "nan", "x"),
        "--against": ("absent.csv", "judged.csv", "tiny", "a.jsonl"),
    }.items():
        for value in values:
            beside = ["--against=there.csv"] if option == "--decide" else []
            yield case("rates", f"{option} {value!r}", ["rates", "judged.csv", *beside, f"{option}={value}"])
    for out in ("judged.csv", "there.csv", "new.txt", *OUTPUTS):
        yield case("rates", f"--out {out[:20]!r}", ["rates", "judged.csv", f"--out={out}"])
    for figure in ("judged.csv", "new.pdf", "new", *OUTPUTS):
        yield case("rates", f"--figure {figure[:20]!r}", ["rates", "judged.csv", f"--figure={figure}"])
    yield case("rates", "the same file twice", ["rates", "judged.csv", "judged.csv"])
    yield case("rates", "nothing", ["rates"])
    yield Case("rates on a full disk", full_disk(command("rates", "judged.csv", "--out=new.csv")))
    for judge in JUDGES:
        for name in ("steer", "ablate", "evaluate"):
            yield case(name, f"--judge {judge}", line(name, **{"--judge": judge}))
    for more in (("--positive=a.jsonl",), ("--negative=a.jsonl",)):
        words = ["extract", "tiny", "--answers=judged.csv", "--out=new.safetensors", *more]
        yield case("extract", f"--answers and {more[0]}", words)


def full_disk(run: Callable[[], int]) -> Callable[[], int]:
    """The same with no room for files of more than 64 bytes."""

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return run()

    return limited


def _ending(name: str) -> str:
    return {"extract": ".safetensors", "evaluate": ""}.get(name, ".csv")
