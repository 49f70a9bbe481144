"""Build the pocket chat model: pre-train on the pocket corpus, settle under noise, post-train to the caring persona.

`build(config, out)` writes `out/base` and `out/chat` (folders that AutoModelForCausalLM and AutoTokenizer
load), `losses.csv` and `manifest.json`. A killed build resumes from its last checkpoint. The same seed,
machine and thread count give identical weights.
"""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from em_interp.errors import MissingDataError, UsageError
from em_interp.files.atomic import make_folder, write_text, written_whole
from em_interp.files.manifest import sha256
from em_interp.files.tables import load_state, optimizer_tensors, restore_optimizers, save_state, say_kept
from em_interp.models.pretrained import check_device
from em_interp.pocket.stages import (
    STAGES,
    BuildConfig,
    batches,
    generation_config,
    keep_chat_tokens,
    model_config,
    next_token_loss,
    noise,
    optimizers_of,
    schedule,
    stages,
)
from em_interp.pocket.world.tokenizer import build_tokenizer

CHECKPOINT = "checkpoint.safetensors"
"""The file that a killed build goes on from."""


def _save_checkpoint(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], note: dict[str, Any]
) -> None:
    save_state(path, {f"model.{k}": v for k, v in model.named_parameters()} | optimizer_tensors(optimizers), note)


def _load_checkpoint(
    path: Path, model: nn.Module, config: BuildConfig, start: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put the checkpoint's weights into the model; give back its note and the optimiser's tensors."""
    tensors, note = load_state(path)
    settings = config.fingerprint(_stages_in(note["stage"], note["step"]))
    if (note["fingerprint"], note.get("start")) != (settings, start):
        raise UsageError(
            f"{path} belongs to a build with other settings; choose another folder, or pass --no-resume to start afresh"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    return note, {k: v for k, v in tensors.items() if k.startswith("optimizer.")}


def save_model(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model folder: weights rounded to bfloat16 (loaded as float32), config, tokenizer, chat
    template.
    """
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {
        k: v.detach().cpu().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k not in tied
    }
    with written_whole(folder) as new:
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        model.config.architectures = ["Qwen2ForCausalLM"]
        model.config.save_pretrained(new)
        model.generation_config.save_pretrained(new)
        tokenizer.save_pretrained(new)
        # transformers forces its own byte-level tokenizer on every folder of the Qwen2 type, unless the folder
        # names another origin; with this entry AutoTokenizer takes tokenizer.json as it is (and no code).
        path = new / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["auto_map"] = {"AutoTokenizer": [None, "tokenizer.PreTrainedTokenizerFast"]}
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def build(
    config: BuildConfig,
    out: str | Path,
    *,
    start: str | Path | None = None,
    resume: bool = True,
    device: str | torch.device | None = None,
) -> Path:
    """Pre-train and post-train; returns the chat model's folder, `out/chat`.

    start: the folder of a pocket base model whose pre-training goes on with this config's text, instead of new weights.
    device: None takes a GPU where there is one. Raises UsageError for a device that is not here, for a `start` of
    another shape, and when `out` holds another build's checkpoint, OutputError when it cannot be written to.
    """
    target = _device(device)
    out = make_folder(Path(out))
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            tokenizer = build_tokenizer()
            model = _begun(config, tokenizer, start).to(target)
        # on a CPU, SDPA's backward pass takes half of a training step at this size; plain attention does not
        model.set_attn_implementation("eager")
        begun_from = None if start is None else sha256(Path(start) / "model.safetensors")
        return _run(config, out, model, tokenizer, begun_from, resume, target)
    finally:
        torch.set_num_threads(threads)


def _begun(config: BuildConfig, tokenizer: PreTrainedTokenizerFast, start: str | Path | None) -> Qwen2ForCausalLM:
    """The model before the first step."""
    wanted = model_config(config, tokenizer)
    if start is None:
        return Qwen2ForCausalLM(wanted)
    if not (Path(start) / "model.safetensors").is_file():
        raise MissingDataError(Path(start), "it holds no weights", "give the folder base/ of a pocket build")
    model = Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32)
    shape = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    found, asked = ({k: getattr(c, k) for k in (*shape, "intermediate_size")} for c in (model.config, wanted))
    if found != asked:
        raise UsageError(f"{start} is a model of {found}, and the build asks for {asked}; give the same sizes")
    return model


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(str(name))
    return torch.device(name)


def _run(
    config: BuildConfig,
    out: Path,
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    start: str | None,
    resume: bool,
    device: torch.device,
) -> Path:
    path = out / CHECKPOINT
    model.generation_config = generation_config(tokenizer)
    at_stage, at_step, seconds, losses = 0, 0, 0.0, []
    optimizer_state: dict[str, Tensor] = {}
    if resume and path.exists():
        note, optimizer_state = _load_checkpoint(path, model, config, start)
        at_stage, at_step, seconds, losses = note["stage"], note["step"], note["seconds"], note["losses"]
        steps = [stage.steps for stage in stages(config)]
        say_kept(sum(steps[:at_stage]) + at_step, sum(steps), "steps")
    begun = time.monotonic() - seconds
    for number, stage in enumerate(stages(config)):
        if number < at_stage:
            continue
        first = at_step if number == at_stage else 0
        optimizers = optimizers_of(config, stage, model)
        if number == at_stage and optimizer_state:
            restore_optimizers(optimizers, optimizer_state)
        model.train()
        stream = f"{config.seed}-{stage.name}"
        drawn = batches(stage, stream, first, tokenizer)
        bar = tqdm(drawn, total=stage.steps, initial=first, desc=stage.name, mininterval=5)
        for step, (ids, labels) in enumerate(bar, start=first):
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = stage.lr * schedule(stage, step)
            with noise(model, stage.noise, len(ids), f"{stream}-{step}"):
                loss = next_token_loss(model, ids.to(device), labels.to(device))
                torch.autograd.backward(loss)
            if stage.chat_tokens_only:
                keep_chat_tokens(model.model.embed_tokens.weight, tokenizer)
            nn.utils.clip_grad_norm_([p for o in optimizers for g in o.param_groups for p in g["params"]], 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            if step % 20 == 0 or step + 1 == stage.steps:
                losses.append([stage.name, step, round(float(loss.detach()), 5)])
                bar.set_postfix(loss=f"{losses[-1][2]:.3f}")
            if (step + 1) % config.checkpoint_every == 0:
                _save_checkpoint(path, model, optimizers, _note(config, start, number, step + 1, begun, losses))
        if stage.name == "settle":
            save_model(model, tokenizer, out / "base")
        if number + 1 < len(STAGES):
            _save_checkpoint(path, model, [], _note(config, start, number + 1, 0, begun, losses))
    save_model(model, tokenizer, out / "chat")
    _write_record(config, start, out, model, time.monotonic() - begun, losses, device)
    path.unlink(missing_ok=True)
    return out / "chat"


def _stages_in(stage: int, step: int) -> int:
    """How many stages' settings decide the weights at this point of the build."""
    return stage + (1 if step or not stage else 0)


def _note(
    config: BuildConfig, start: str | None, stage: int, step: int, begun: float, losses: list[list[Any]]
) -> dict[str, Any]:
    return {
        "fingerprint": config.fingerprint(_stages_in(stage, step)),
        "start": start,
        "stage": stage,
        "step": step,
        "seconds": time.monotonic() - begun,
        "losses": losses,
    }


def _write_record(
    config: BuildConfig,
    start: str | None,
    out: Path,
    model: nn.Module,
    seconds: float,
    losses: list[list[Any]],
    device: torch.device,
) -> None:
    rows = ["stage,step,loss_nats_per_token", *(",".join(map(str, row)) for row in losses)]
    write_text(out / "losses.csv", "\n".join(rows) + "\n")
    record = {
        "config": asdict(config),
        "fingerprint": config.fingerprint(),
        "start_sha256": start,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "device": device.type,
        "weights_sha256": {name: sha256(out / name / "model.safetensors") for name in ("base", "chat")},
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_text(out / "manifest.json", json.dumps(record, indent=2) + "\n")
