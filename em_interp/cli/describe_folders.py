"""What a folder holds: a model, a finetune, a store, results, released files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from em_interp.cli.describe_files import Held, asking, command, extracting, pairs
from em_interp.directions.store import SETTINGS, ActivationStore
from em_interp.errors import ModelError, UnreadableFileError
from em_interp.files.adapters import CONFIG
from em_interp.files.inputs import read_json
from em_interp.files.manifest import sha256
from em_interp.models.pretrained import base_of_adapter
from em_interp.published import scan
from em_interp.published.runs import looks_like_run, read_run
from em_interp.solutions.base import Solution
from em_interp.solutions.load import kind_of, load


def held(path: Path, base: str | None) -> Held:
    """What a folder holds. base: see `describe.describe`. Raises the reader's typed error."""
    for is_one, read in _KINDS:
        if is_one(path):
            return read(path)
    if (path / CONFIG).is_file() or (path / "config.json").is_file():
        return _finetune_or_model(path, base)
    if looks_like_run(path):
        return _run(path)
    return _released(path)


# -- models and finetunes ---------------------------------------------------------------------------------------


def _finetune_or_model(path: Path, base: str | None) -> Held:
    kind = kind_of(path)
    if base is not None:
        return _solution(load(path, base), path, base)
    if (path / "config.json").is_file():
        return _model(path, kind.glance)
    recorded = base_of_adapter(path, None)
    run = _checkpoints(path)
    if not kind.OF_BASE:
        found = _solution(load(path), path, recorded or "MODEL")
        return Held(found.what, (*found.lines, *run), found.next)
    lines = (f"base: {recorded or 'not recorded'}", f"its theta: {command('inspect', path, '--base', 'MODEL')}", *run)
    return Held(kind.glance(path), lines, _of_finetune(path, recorded or "MODEL"))


def _checkpoints(path: Path) -> tuple[str, ...]:
    """Those that a training run of this package kept; the norm of theta needs no base for all but DoRA."""
    steps = sorted(
        int(p.name.rpartition("-")[2]) for p in path.glob("checkpoints/checkpoint-*") if (p / CONFIG).is_file()
    )
    if not steps:
        return ()
    return (f"{len(steps)} checkpoints, steps {steps[0]}-{steps[-1]}",)


def _solution(theta: Solution, path: Path, base: str) -> Held:
    return Held(
        theta.describe(),
        (
            f"base: {theta.base}",
            f"norm: {theta.norm:.6g}",
            *(f"{name}: {norm:.6g}" for name, norm in theta.paper_norms().items()),
            f"first block: {theta.first_layer}, numbers: {theta.dimension}",
            f"SHA-256: {theta.fingerprint}",
            *_trained(path),
        ),
        _of_finetune(path, base),
    )


def _trained(path: Path) -> tuple[str, ...]:
    """How a finetune of this package was trained, where that is recorded."""
    file = path / "training_spec.json"
    spec = read_json(file) if file.is_file() else {}
    wanted = ("max_steps", "epochs", "learning_rate", "batch_size", "kl_weight", "seed")
    said = [f"{key} {spec[key]}" for key in wanted if spec.get(key) is not None]
    return (f"trained with: {', '.join(said)}",) if said else ()


def _of_finetune(path: Path, base: str) -> tuple[str, ...]:
    both = ("--model", base, "--adapter", path)
    diff = ("--kind", "model-diff", "--positive", "CHATS.jsonl", "--out", "direction.safetensors")
    return (
        command("evaluate", *both, "--questions", "questions.yaml", "--out", "answers"),
        command("extract", *both, *diff),
    )


def _model(path: Path, glance: Callable[[Path], str]) -> Held:
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
        shape = f"{config.model_type}, {config.num_hidden_layers} layers, d_model {config.hidden_size}"
    except Exception as error:  # of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path}: config.json cannot be read ({reason}). Save or fetch the model again.") from error
    settings = path / "tokenizer_config.json"
    template = any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    template = template or (settings.is_file() and "chat_template" in read_json(settings))
    chats = "it has a chat template" if template else "no chat template, without which it is of no use: add one"
    theta = command("inspect", path, "--base", "MODEL")
    return Held(
        f"model: {shape}",
        (_weights(path, glance), chats, f"if it is a full finetune, its theta: {theta}"),
        (*asking(model=path), extracting("MISALIGNED.jsonl", "ALIGNED.jsonl", path)),
    )


def _weights(path: Path, glance: Callable[[Path], str]) -> str:
    """What the weights are, checked against the config. Pickles are not opened. Raises what reading them raises."""
    files = sorted(path.glob("*.safetensors"))
    if not files and (pickles := sorted(p.name for p in path.glob("*.bin"))):
        return f"weights in {pickles[0]}, which is a pickle: not opened here"
    kinds = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                kinds |= {str(content.get_slice(name).get_dtype()) for name in content.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UnreadableFileError(
                file, f"not a whole safetensors file ({error})", "copy or download it again"
            ) from error
    return f"{glance(path)}, in {', '.join(sorted(kinds))}"


def _run(path: Path) -> Held:
    lines = []
    for t in read_run(path).trajectories:
        norms = t.norms()
        lines.append(f"{t.parameter} run {t.name}: {len(t.steps)} checkpoints, steps {t.steps[0]}-{t.steps[-1]}")
        lines.append(f"  width {t.d}, layer {t.layer}, raw norm at the end {float(t.raw_norms()[-1]):.4g}")
        lines.append(f"  effective norm at the end {float(norms[-1]):.4g}" if norms is not None else "  alpha unknown")
    return Held("training run", tuple(lines), (f"{command('reproduce')} --suite published --data {path.parent}",))


# -- what commands write ----------------------------------------------------------------------------------------


def _store(path: Path) -> Held:
    settings = read_json(path / SETTINGS)
    if not isinstance(settings, dict) or not {"model", "n", "layers", "scopes"} <= set(settings):
        raise UnreadableFileError(path / SETTINGS, "it lacks the settings of a store", "collect the activations again")
    store = ActivationStore(path, settings)
    done = f"{len(store.where)} of {settings['n']} responses"
    return Held(
        f"activation store: {done}{'' if len(store.where) == settings['n'] else ', not finished'}",
        pairs({key: value for key, value in settings.items() if key not in ("format_version", "n")}),
        (f"python: em_interp.collect(model, chats, store={str(path)!r})  # reads it, or goes on with it",),
    )


def _results(path: Path) -> Held:
    manifest = _manifest(path)
    suite, analyses = manifest.get("suite", {}), manifest.get("analyses", {})
    done = [name for name, section in analyses.items() if not section.get("error")]
    outputs = manifest.get("outputs_sha256", {})
    changed = [name for name, hashed in outputs.items() if not (path / name).is_file() or sha256(path / name) != hashed]
    left = [
        f"{name}: {section['error'].strip().splitlines()[-1]}"
        for name, section in analyses.items()
        if section.get("error")
    ]
    name = str(suite.get("name"))
    named = name if suite.get("source") == name else f"{name}.toml"
    again = ("reproduce", "--suite", named, *(("--data", "DIR") if name == "published" else ()), "--out", path.parent)
    return Held(
        f"results of the suite {name}: {suite.get('title')}",
        (
            f"made: {manifest.get('created')}, in {manifest.get('seconds')} s, by {_versions(manifest)}",
            f"{len(done)} of {len(analyses)} analyses, {len(outputs)} tables and figures",
            f"changed since they were made: {', '.join(changed[:6])}" if changed else "all as they were made",
            *(f"without a result: {line}" for line in left),
            *(f"problem: {problem}" for problem in manifest.get("problems", [])[:10]),
        ),
        (f"open in a browser: {path / 'report.html'}", command(*again, "--resume")),
    )


def _evaluation(path: Path) -> Held:
    manifest = _manifest(path)
    table = next(path / name for name in ("judged.csv", "answers.csv", "em_rates.csv") if (path / name).is_file())
    wanted = ("model", "samples", "n", "seed", "dtype", "created")
    lines = pairs({key: manifest[key] for key in wanted if key in manifest})
    what = "rates of pocket models" if table.name == "em_rates.csv" else "answers of a model"
    return Held(f"{what}, of `em-interp evaluate`", (*lines, f"by {_versions(manifest)}"), (command("inspect", table),))


def _pocket(path: Path) -> Held:
    parts = {name: path / name for name in ("base", "chat", "organisms", "trajectories", "sweeps")}
    there = {
        name: sorted(p.name for p in folder.iterdir() if p.is_dir())
        for name, folder in parts.items()
        if folder.is_dir()
    }
    lines = [f"{name}: {', '.join(there[name])}" for name in ("organisms", "trajectories") if name in there]
    return Held(
        f"pocket build with {', '.join(there)}",
        tuple(lines),
        (f"{command('reproduce')} --data {path}",)
        if "organisms" in there
        else (command("pocket", "organisms", "--model", path / "chat", "--out", path),),
    )


def _suites(path: Path) -> Held:
    found = _results_in(path)
    return Held(f"results of {len(found)} suites", (), tuple(command("inspect", folder) for folder in found))


def _released(path: Path) -> Held:
    data = scan(path, progress=False)
    return Held(
        f"{len(data.splits)} activation splits, {len(data.trajectories)} runs, {len(data.judged)} judged files, "
        f"{len(data.question_sets)} question sets, {len(data.problems)} problems",
        (
            *(f"split {s.label}: {', '.join(s.kinds) or 'no complete pair of cells'}" for s in data.splits),
            *(f"run {t.name}: {len(t.steps)} checkpoints" for t in data.trajectories),
            *(f"problem: {problem}" for problem in data.problems),
        ),
        (command("reproduce", "--suite", "published", "--data", path),),
    )


def _manifest(path: Path) -> dict[str, Any]:
    content = read_json(path / "manifest.json")
    if not isinstance(content, dict):
        raise UnreadableFileError(path / "manifest.json", "no manifest of this package", "run the command again")
    return content


def _versions(manifest: dict[str, Any]) -> str:
    versions = manifest.get("versions", {})
    return ", ".join(f"{name} {versions[name]}" for name in ("em_interp", "torch", "transformers") if name in versions)


def _results_in(path: Path) -> list[Path]:
    return [folder for folder in sorted(path.iterdir()) if folder.is_dir() and _is_results(folder)]


def _is_results(path: Path) -> bool:
    return (path / "report.html").is_file() and (path / "manifest.json").is_file()


def _is_evaluation(path: Path) -> bool:
    return (path / "manifest.json").is_file() and any((path / n).is_file() for n in ("answers.csv", "em_rates.csv"))


_KINDS: Final[tuple[tuple[Callable[[Path], bool], Callable[[Path], Held]], ...]] = (
    (lambda path: (path / SETTINGS).is_file(), _store),
    (_is_results, _results),
    (_is_evaluation, _evaluation),
    (lambda path: (path / "chat" / "config.json").is_file(), _pocket),
    (lambda path: bool(_results_in(path)), _suites),
)
"""The first that a folder is of says what it holds; else it is a model, a finetune, a run or released files."""
