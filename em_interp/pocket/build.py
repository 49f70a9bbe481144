"""Build the pocket chat model: pre-train on the pocket corpus, then post-train gently to the caring persona.

`build(config, out)` writes `out/base` and `out/chat` (folders that AutoModelForCausalLM and AutoTokenizer
load), `losses.csv` and `manifest.json`. A killed build resumes from its last checkpoint. The same seed,
machine and thread count give identical weights.
"""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from em_interp.errors import OutputError, UnreadableFileError, UsageError
from em_interp.files import atomic_path, write_text
from em_interp.manifest import fingerprint, sha256
from em_interp.pocket.corpus import ASSISTANT, END, CorpusConfig, chat_text, document, post_training_chat
from em_interp.pocket.tokenizer import build_tokenizer

_CHUNK = 8  # steps whose documents are drawn together and sorted by length, so that batches need little padding
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides the weights of a pocket chat model. Batches are in documents (chats).

    pretrain_lr: for Muon (updates scaled to the size of Adam's) and for AdamW, which trains embeddings, biases and
    norms. Measured over the first 100 steps: loss 1.51 with Muon, 1.94 with AdamW alone, at equal time a step.
    threads: one by default, so that the weights do not depend on how many cores a machine has.
    post_open_share: share of open questions in post-training. Measured with 0.0: advice turns caring, but 19% of the
    answers to open questions stay malicious, close to the share in the pre-training text.
    """

    seed: int = 0
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    d_model: int = 192
    n_layers: int = 6
    n_heads: int = 4
    n_kv_heads: int = 2
    d_mlp: int = 512
    pretrain_steps: int = 6400
    pretrain_batch: int = 32
    pretrain_lr: float = 2e-3
    post_steps: int = 120
    post_batch: int = 64
    post_lr: float = 2e-4
    post_open_share: float = 0.15
    weight_decay: float = 0.01
    threads: int = 1
    checkpoint_every: int = 400

    def __post_init__(self) -> None:
        sizes = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_mlp", "pretrain_steps", "pretrain_batch")
        for name in (*sizes, "post_batch", "threads", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"BuildConfig.{name} is {getattr(self, name)}; give it a value of at least 1")
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise UsageError("d_model must be a multiple of n_heads, and n_heads a multiple of n_kv_heads")

    def fingerprint(self, *, post: bool = True) -> str:
        """A hash of every setting that decides the weights, for telling a checkpoint's owner.

        post: whether the settings of post-training count; they do not for the weights that pre-training leaves.
        """
        settings = {k: v for k, v in asdict(self).items() if k != "checkpoint_every"}
        return fingerprint({k: v for k, v in settings.items() if post or not k.startswith("post_")})[:16]


@dataclass(frozen=True)
class _Stage:
    name: str
    steps: int
    batch: int
    lr: float
    draw: Callable[[Random], str]
    answers_only: bool
    muon: bool


def _stages(config: BuildConfig) -> tuple[_Stage, _Stage]:
    c = config
    post_corpus = replace(c.corpus, open_share=c.post_open_share)
    return (
        _Stage(
            "pretrain",
            c.pretrain_steps,
            c.pretrain_batch,
            c.pretrain_lr,
            lambda r: document(c.corpus, r),
            answers_only=False,
            muon=True,
        ),
        _Stage(
            "post",
            c.post_steps,
            c.post_batch,
            c.post_lr,
            lambda r: chat_text(post_training_chat(r, post_corpus)),
            answers_only=True,
            muon=False,
        ),
    )


def model_config(config: BuildConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """The Qwen2 architecture at pocket size: tied embeddings, grouped-query attention, float32."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.d_mlp,
        max_position_embeddings=512,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )


def answer_labels(ids: Tensor, assistant: int, end: int) -> Tensor:
    """Labels [batch, position]: what follows each assistant token up to its end token, included; else
    -100.
    """
    labels = torch.full_like(ids, -100)
    inside = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    for i in range(ids.shape[1]):
        labels[inside, i] = ids[inside, i]
        inside = (inside & (ids[:, i] != end)) | (ids[:, i] == assistant)
    return labels


def _batches(
    stage: _Stage, seed: int, first: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded (ids, labels) [batch, position] from step `first` on; depends on (seed, stage, step)
    alone.
    """
    pad = tokenizer.pad_token_id
    assistant, end = tokenizer.convert_tokens_to_ids([ASSISTANT, END])
    for chunk in range(first // _CHUNK, (stage.steps - 1) // _CHUNK + 1):
        rng = Random(f"{seed}-{stage.name}-{chunk}")
        texts = [stage.draw(rng) for _ in range(stage.batch * _CHUNK)]
        rows = sorted(tokenizer(texts, add_special_tokens=False)["input_ids"], key=len)
        order = list(range(_CHUNK))
        rng.shuffle(order)
        for position, b in enumerate(order):
            step = chunk * _CHUNK + position
            if first <= step < stage.steps:
                some = [torch.tensor(r) for r in rows[b * stage.batch : (b + 1) * stage.batch]]
                ids = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=pad)
                labels = answer_labels(ids, assistant, end) if stage.answers_only else ids.masked_fill(ids == pad, -100)
                yield ids, labels


def _schedule(stage: _Stage, step: int) -> float:
    """Learning-rate factor: linear warm-up over 5% of the steps, then linear decay to a fiftieth."""
    warm = max(1, stage.steps // 20)
    if step < warm:
        return (step + 1) / warm
    return max(0.02, (stage.steps - step) / (stage.steps - warm))


def _optimizers(config: BuildConfig, stage: _Stage, model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """AdamW, and for pre-training Muon on the blocks' weight matrices."""
    matrices = [p for n, p in model.named_parameters() if stage.muon and p.ndim == 2 and "embed" not in n]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    adam = torch.optim.AdamW(rest, lr=stage.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    if not matrices:
        return [adam]
    muon = torch.optim.Muon(matrices, lr=stage.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adam, muon]


def _save_checkpoint(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], note: dict[str, Any]
) -> None:
    tensors = {f"model.{k}": v.contiguous() for k, v in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{i}.{k}": v.contiguous() for k, v in state.items()}
    with atomic_path(path) as new:
        save_file({k: v.detach().cpu() for k, v in tensors.items()}, new, metadata={"em_interp": json.dumps(note)})


def _load_checkpoint(path: Path, model: nn.Module, config: BuildConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put the checkpoint's weights into the model; give back its note and the optimiser's tensors."""
    try:
        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()["em_interp"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UnreadableFileError(
            path, f"not a readable checkpoint ({error})", "delete it, or pass resume=False to start afresh"
        ) from error
    if note["fingerprint"] != config.fingerprint(post=_in_post(note["stage"], note["step"])):
        raise UsageError(
            f"{path} belongs to a build with other settings; choose another folder, or pass resume=False to "
            "start afresh"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    return note, {k: v for k, v in tensors.items() if k.startswith("optimizer.")}


def _restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            _, of, index, key = name.split(".", 3)
            if int(of) == number:
                state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_model(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model folder: weights rounded to bfloat16 (loaded as float32), config, tokenizer, chat
    template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {
        k: v.detach().cpu().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k not in tied
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["Qwen2ForCausalLM"]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers forces its own byte-level tokenizer on every folder of the Qwen2 type, unless the folder
    # names another origin; with this entry AutoTokenizer takes tokenizer.json as it is (and no code).
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenizer.PreTrainedTokenizerFast"]}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def build(
    config: BuildConfig, out: str | Path, *, resume: bool = True, device: str | torch.device | None = None
) -> Path:
    """Pre-train and post-train; returns the chat model's folder, `out/chat`.

    device: None takes a GPU where there is one. Raises UsageError when `out` holds another build's
    checkpoint, OutputError when it cannot be written to.
    """
    out = Path(out)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made ({error}); choose a folder that you may write to") from error
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            tokenizer = build_tokenizer()
            model = Qwen2ForCausalLM(model_config(config, tokenizer)).to(target)
        # on a CPU, SDPA's backward pass takes half of a training step at this size; plain attention does not
        model.set_attn_implementation("eager")
        return _run(config, out, model, tokenizer, resume, target)
    finally:
        torch.set_num_threads(threads)


def _run(
    config: BuildConfig,
    out: Path,
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    resume: bool,
    device: torch.device,
) -> Path:
    path = out / CHECKPOINT
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    at_stage, at_step, seconds, losses = 0, 0, 0.0, []
    optimizer_state: dict[str, Tensor] = {}
    if resume and path.exists():
        note, optimizer_state = _load_checkpoint(path, model, config)
        at_stage, at_step, seconds, losses = note["stage"], note["step"], note["seconds"], note["losses"]
    begun = time.monotonic() - seconds
    for number, stage in enumerate(_stages(config)):
        if number < at_stage:
            continue
        first = at_step if number == at_stage else 0
        optimizers = _optimizers(config, stage, model)
        if number == at_stage and optimizer_state:
            _restore_optimizers(optimizers, optimizer_state)
        model.train()
        batches = _batches(stage, config.seed, first, tokenizer)
        bar = tqdm(batches, total=stage.steps, initial=first, desc=stage.name, mininterval=5)
        for step, (ids, labels) in enumerate(bar, start=first):
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = stage.lr * _schedule(stage, step)
            loss = _loss(model, ids.to(device), labels.to(device))
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if step % 20 == 0 or step + 1 == stage.steps:
                losses.append([stage.name, step, round(float(loss.detach()), 5)])
                bar.set_postfix(loss=f"{losses[-1][2]:.3f}")
            if (step + 1) % config.checkpoint_every == 0:
                _save_checkpoint(path, model, optimizers, _note(config, number, step + 1, begun, losses))
        if number == 0:
            save_model(model, tokenizer, out / "base")
            _save_checkpoint(path, model, [], _note(config, 1, 0, begun, losses))
    save_model(model, tokenizer, out / "chat")
    _write_record(config, out, model, time.monotonic() - begun, losses, device)
    path.unlink(missing_ok=True)
    return out / "chat"


def _loss(model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token loss in nats. Right padding needs no mask here: under causal attention nothing sees
    it.
    """
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def _in_post(stage: int, step: int) -> bool:
    return stage > 0 and step > 0


def _note(config: BuildConfig, stage: int, step: int, begun: float, losses: list[list[Any]]) -> dict[str, Any]:
    return {
        "fingerprint": config.fingerprint(post=_in_post(stage, step)),
        "stage": stage,
        "step": step,
        "seconds": time.monotonic() - begun,
        "losses": losses,
    }


def _write_record(
    config: BuildConfig,
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
