"""What a file or folder holds, in a few lines, after the reader that belongs to it has checked it."""

from __future__ import annotations

from pathlib import Path

from em_interp.directions.direction import Direction
from em_interp.errors import ArgumentTypeError, MissingDataError, UnreadableFileError
from em_interp.evaluation.rates import REFERENCE_CODE, em_rates
from em_interp.files.adapters import CONFIG
from em_interp.files.texts import QuestionSet
from em_interp.published import scan
from em_interp.published.activations import CELL_FILE, read_activation_cell
from em_interp.published.judged import read_judged_csv
from em_interp.published.questions import read_yaml
from em_interp.published.runs import looks_like_run, read_lora_checkpoint, read_run
from em_interp.published.torchfile import load_torch
from em_interp.solutions.base import Solution
from em_interp.solutions.load import kind_of, load


def describe(path: Path | str, base: str | None = None) -> list[str]:
    """Lines of text. base: of which model, a folder or hub name, a finetune's folder is one.

    Raises the reader's typed error for a bad file, `MissingDataError` for none.
    """
    if not isinstance(path, (str, Path)):  # commands are not checked against their signatures
        raise ArgumentTypeError(f"path is a {type(path).__name__}; give a file or folder.")
    path = Path(path)
    if not path.exists():
        raise MissingDataError(path, "there is no such file or folder", "check the path")
    if path.is_dir():
        return _folder(path, base)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix == ".csv":
        rates = em_rates(read_judged_csv(path), REFERENCE_CODE)
        return [f"judged answers, {rates.n} rows, {rates.n_questions} questions", *_pairs(rates.columns())]
    if path.suffix in (".yaml", ".yml"):
        content = read_yaml(path)
        if isinstance(content, QuestionSet):
            return [f"{len(content.questions)} questions", *(f"  {q.id}" for q in content.questions)]
        return [f"{len(content)} judges", *(f"  {j.name}: {'; '.join(j.contradictions()) or 'ok'}" for j in content)]
    if path.suffix == ".pt":
        return _torch(path)
    raise UnreadableFileError(
        path, f"no reader for {path.suffix or 'files without an ending'}", "see `em-interp inspect --help`"
    )


def _folder(path: Path, base: str | None) -> list[str]:
    if any((path / name).is_file() for name in (CONFIG, "config.json")):
        kind = kind_of(path)
        if base is not None:
            return _solution(load(path, base))
        if kind.OF_BASE:
            return [kind.glance(path), f"  its theta: em-interp inspect {path} --base MODEL"]
    if looks_like_run(path):
        lines = []
        for t in read_run(path).trajectories:
            norms = t.norms()
            lines.append(f"{t.parameter} run {t.name}: {len(t.steps)} checkpoints, steps {t.steps[0]}-{t.steps[-1]}")
            lines.append(f"  width {t.d}, layer {t.layer}, raw norm at the end {float(t.raw_norms()[-1]):.4g}")
            lines.append(
                f"  effective norm at the end {float(norms[-1]):.4g}" if norms is not None else "  alpha unknown"
            )
        return lines
    data = scan(path, progress=False)
    return [
        f"{len(data.splits)} activation splits, {len(data.trajectories)} runs, {len(data.judged)} judged files, "
        f"{len(data.question_sets)} question sets, {len(data.problems)} problems",
        *(f"  split {s.label}: {', '.join(s.kinds) or 'no complete pair of cells'}" for s in data.splits),
        *(f"  run {t.name}: {len(t.steps)} checkpoints" for t in data.trajectories),
        *(f"  problem: {problem}" for problem in data.problems),
    ]


def _solution(theta: Solution) -> list[str]:
    return [
        theta.describe(),
        f"  base: {theta.base}",
        f"  norm: {theta.norm:.6g}",
        *(f"  {name}: {norm:.6g}" for name, norm in theta.paper_norms().items()),
        f"  first block: {theta.first_layer}, numbers: {theta.dimension}",
        f"  SHA-256: {theta.fingerprint}",
    ]


def _safetensors(path: Path) -> list[str]:
    if path.name == "adapter_model.safetensors":
        checkpoint = read_lora_checkpoint(path, 0)
        return ["LoRA adapter", *(f"  {m}: rank {b.shape[1]}, writes {b.shape[0]}" for m, b in checkpoint.B.items())]
    direction = Direction.load(path)
    return [direction.describe(), *_pairs(direction.metadata())]


def _torch(path: Path) -> list[str]:
    if CELL_FILE.fullmatch(path.name):
        cell = read_activation_cell(path)
        return [f"mean activations: {cell.means.shape[0]} layers of width {cell.means.shape[1]}"]
    content = load_torch(path)
    if isinstance(content, dict):
        return [
            "torch file with",
            *(f"  {k}: {tuple(v.shape) if hasattr(v, 'shape') else v}" for k, v in content.items()),
        ]
    return [f"torch file with {tuple(content.shape) if hasattr(content, 'shape') else type(content).__name__}"]


def _pairs(values: dict[str, object]) -> list[str]:
    return [f"  {key}: {value}" for key, value in values.items()]
