"""What a file holds, in a few lines, after its reader has checked it, and what can be done with it."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from em_interp.directions.direction import Direction
from em_interp.directions.gguf import read_gguf
from em_interp.errors import MissingDataError, UnreadableFileError
from em_interp.evaluation.criteria import REFERENCE_CODE
from em_interp.evaluation.rates import em_rates
from em_interp.files.directions import METADATA_KEY
from em_interp.files.inputs import open_text, read_json
from em_interp.files.texts import QuestionSet, chats_read, json_lines, read_chats, read_questions, read_texts
from em_interp.published.activations import CELL_FILE, read_activation_cell
from em_interp.published.judged import SCORES, canonical, read_judged_csv
from em_interp.published.questions import read_yaml
from em_interp.published.runs import read_lora_checkpoint
from em_interp.published.torchfile import load_torch


@dataclass(frozen=True)
class Held:
    """What something is, what is in it, and commands that take it."""

    what: str
    lines: tuple[str, ...] = ()
    next: tuple[str, ...] = ()

    def __str__(self) -> str:
        then = ("next:", *(f"  {line}" for line in self.next)) if self.next else ()
        return "\n".join([self.what, *(f"  {line}" for line in self.lines), *then])


def command(*words: str | Path) -> str:
    """A line to copy."""
    return f"em-interp {shlex.join(map(str, words))}"


def pairs(values: Mapping[str, object]) -> tuple[str, ...]:
    """A line for each."""
    return tuple(f"{key}: {value}" for key, value in values.items())


def asking(questions: str | Path = "QUESTIONS.yaml", model: str | Path = "MODEL") -> tuple[str, ...]:
    """Commands that ask a model questions."""
    ask = ("--questions", questions)
    steer = ("DIRECTION.safetensors", "--layer", "LAYER", "--coefficient", "1", *ask, "--out", "steered.csv")
    return command("evaluate", model, *ask, "--out", "answers"), command("steer", model, *steer)


def extracting(positive: str | Path, negative: str | Path, model: str | Path = "MODEL") -> str:
    """The command that reads a direction from two files of chats."""
    sides = ("--positive", positive, "--negative", negative)
    return command("extract", model, *sides, "--out", "direction.safetensors")


def _safetensors(path: Path) -> Held:
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            sizes = {name: file.get_slice(name).get_shape() for name in names}
    except (SafetensorError, OSError) as error:
        raise UnreadableFileError(
            path, f"not a whole safetensors file ({error})", "copy or download it again"
        ) from error
    folder = command("inspect", path.parent)
    if METADATA_KEY in metadata or re.fullmatch(r"layer\.\d+", names[0] if names else ""):
        return _direction(path)
    if path.name == "adapter_model.safetensors":
        checkpoint = read_lora_checkpoint(path, 0)
        ranks = tuple(f"{m}: rank {b.shape[1]}, writes {b.shape[0]}" for m, b in checkpoint.B.items())
        return Held("LoRA adapter", ranks, (folder,))
    if not names:
        raise UnreadableFileError(path, "it holds no tensor", "copy or download it again")
    shown = tuple(f"{name}: {list(size)}" for name, size in list(sizes.items())[:6])
    more = (f"and {len(names) - 6} more",) if len(names) > 6 else ()
    return Held(f"{len(names)} tensors, of a model's or a finetune's folder", (*shown, *more), (folder,))


def _direction(path: Path) -> Held:
    direction = Direction.load(path)
    model = "MODEL" if direction.model == "unknown" else direction.model
    layer = str(direction.layers[len(direction.layers) // 2])
    ask = ("--questions", "questions.yaml")
    steer = command("steer", model, path, "--layer", layer, "--coefficient", "1", *ask, "--out", "steered.csv")
    ablate = ("ablate", model, path, "--from-layer", layer)
    return Held(
        direction.describe(),
        pairs(direction.metadata()),
        (
            steer,
            command(*ablate, *ask, "--out", "ablated.csv"),
            command(*ablate, "--save", "without"),
        ),
    )


def _gguf(path: Path) -> Held:
    model_type, vectors = read_gguf(path)
    lines = [f"layer {layer}: norm {float(x.norm()):.4g}" for layer, x in vectors.items()]
    width = len(next(iter(vectors.values())))
    what = f"control vector for llama.cpp: {len(vectors)} layers of width {width}, for {model_type}"
    return Held(what, tuple(lines), (f"llama-cli -m MODEL.gguf --control-vector-scaled {shlex.quote(str(path))} 1.0",))


def _csv(path: Path) -> Held:
    with open_text(path, newline="") as file:
        header = [canonical(name) for name in next(csv.reader(file), [])]
    if "question" in header and (any(score in header for score in SCORES)):
        rates = em_rates(read_judged_csv(path), REFERENCE_CODE)
        out = path.with_name(f"{path.stem}-rates.csv")
        extract = command("extract", "MODEL", "--adapter", "FINETUNE", "--answers", path)
        return Held(
            f"judged answers, {rates.n} rows, {rates.n_questions} questions",
            pairs(rates.columns()),
            (command("rates", path, "--out", out), f"{extract} --out direction.safetensors"),
        )
    if "question" in header and "answer" in header:
        return _answers(path)
    if "question" in header or ("em_rate" not in header and len(header) < 2):
        return _questions(path)
    return _table(path)


def _answers(path: Path) -> Held:
    from em_interp.files.results import read_table

    table = read_table(path)
    kinds = {"coefficient": "of a sweep of steering", "arm": "of an ablation"}
    kind = next((said for column, said in kinds.items() if column in table), "of a model as it is")
    return Held(
        f"answers {kind} that nobody has judged: {len(table)}, to {table['question'].nunique()} questions",
        (f"columns: {', '.join(table.columns)}", "have a judge add aligned and coherent (0-100) to this file, then:"),
        (command("rates", path, "--out", path.with_name(f"{path.stem}-rates.csv")),),
    )


def _table(path: Path) -> Held:
    from em_interp.files.results import read_table

    table = read_table(path)
    if table.empty:
        raise MissingDataError(path, "it has a header and no rows", "make it again")
    return Held(
        f"table {path.stem}: {len(table)} rows",
        (f"columns: {', '.join(table.columns)}",),
        (f'python -c "import pandas; print(pandas.read_csv({str(path)!r}))"',),
    )


def _questions(path: Path) -> Held:
    found = read_questions(path)
    shown = [question.id for question in found.questions[:20]]
    more = [f"and {len(found.questions) - 20} more"] if len(found.questions) > 20 else []
    return Held(f"questions: {found}", (*shown, *more), asking(path))


def _yaml(path: Path) -> Held:
    content = read_yaml(path)
    if isinstance(content, QuestionSet):
        return _questions(path)
    said = (f"{judge.name}: {'; '.join(judge.contradictions()) or 'ok'}" for judge in content)
    return Held(f"{len(content)} judges", tuple(said))


def _json_lines(path: Path) -> Held:
    first = next((row for _, row in json_lines(path)), None)
    if first is None:
        raise MissingDataError(path, "it holds no line", "write it again")
    if "text" in first:
        return _texts(path)
    turns = first.get("messages")
    if turns is None or (turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "user"):
        return _questions(path)
    chats = read_chats(path)
    ends = sum(chat[-1]["role"] != "assistant" for chat in chats)
    lines = [f"{ends} of them do not end with an answer"] if ends else ["each ends with an answer"]
    lines.append("a suite file takes the chats that finetunes were trained on: [models.training] DOMAIN = FILE")
    return Held(chats_read(path, chats), tuple(lines), (extracting(path, "ALIGNED.jsonl"),))


def _text(path: Path) -> Held:
    held = _questions(path)
    return Held(f"plain text, one a line ({held.what}), or {_texts(path).what}", held.lines, held.next)


def _texts(path: Path) -> Held:
    lengths = [len(text) for text in read_texts(path)]
    if not lengths:
        raise MissingDataError(path, "it holds no text", "write documents with a blank line between them")
    long_enough = sum(length >= 100 for length in lengths)
    return Held(
        f"{len(lengths)} documents, {long_enough} of them of at least 100 characters",
        ("a suite file takes them as texts, under [models]: influence is measured on them",),
    )


def _torch(path: Path) -> Held:
    if CELL_FILE.fullmatch(path.name):
        cell = read_activation_cell(path)
        return Held(
            f"mean activations: {cell.means.shape[0]} layers of width {cell.means.shape[1]}",
            (),
            (command("inspect", path.parent),),
        )
    content = load_torch(path)
    if isinstance(content, dict):
        shown = {k: tuple(v.shape) if hasattr(v, "shape") else v for k, v in content.items()}
        return Held("torch file with", pairs(shown))
    return Held(f"torch file with {tuple(content.shape) if hasattr(content, 'shape') else type(content).__name__}")


def _suite(path: Path) -> Held:
    from analyses.suite import Suite

    suite = Suite.load(str(path))
    data = () if suite.data is None else (f"data: {suite.data}{'' if suite.data.is_dir() else ', which is not there'}",)
    lines = [f"source: {suite.source}", *data, f"analyses: {', '.join(suite.analyses)}"]
    if suite.models is not None and suite.data is not None and suite.data.is_dir():
        found = suite.finetunes
        lines.append(f"chat model: {found.chat_path}")
        lines += [
            f"finetune {o.name}: {o.adapter}, {o.solution}, {o.domain}{'' if o.path.is_dir() else ', from the hub'}"
            for o in found.organisms
        ]
        lines += [f"left out: {why}" for name in suite.analyses if (why := suite.lacking(name)) is not None]
    needs_data = () if suite.data is not None or suite.source == "pocket" else ("--data", "DIR")
    return Held(f"suite: {suite.title}", tuple(lines), (command("reproduce", "--suite", path, *needs_data),))


def _json(path: Path) -> Held:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UnreadableFileError(path, f"JSON with a {type(content).__name__}", "give the folder that it belongs to")
    known = {
        "manifest.json": "what made the files beside it, with their hashes",
        "adapter_config.json": "the settings of the adapter beside it",
        "config.json": "the settings of the model beside it",
        "training_spec.json": "how the finetune beside it was trained",
        "trainer_state.json": "the log of a training run",
        "store.json": "the settings of the activations beside it",
        "pca_results.json": "stored projections of released runs",
    }
    said = known.get(path.name, "JSON that this package neither reads nor writes")
    return Held(said, (f"keys: {', '.join(list(content)[:20])}",), (command("inspect", path.parent),))


def _page(path: Path) -> Held:
    with open_text(path) as file:
        start = file.read(20_000)
    title = re.search(r"<title>(.*?)</title>", start, flags=re.S)
    if "<html" not in start.lower():
        raise UnreadableFileError(path, "no HTML page", "make it again")
    what = "figure" if title is None else f"page: {' '.join(title[1].split())}"
    return Held(what, (), (f"open it in a browser: file://{path.resolve()}",))


READERS: Final[dict[str, Callable[[Path], Held]]] = {
    ".safetensors": _safetensors,
    ".gguf": _gguf,
    ".csv": _csv,
    **dict.fromkeys((".yaml", ".yml"), _yaml),
    **dict.fromkeys((".jsonl", ".ndjson"), _json_lines),
    ".txt": _text,
    **dict.fromkeys((".pt", ".pth"), _torch),
    ".toml": _suite,
    ".json": _json,
    ".html": _page,
}
"""By a file's ending, in small letters."""
