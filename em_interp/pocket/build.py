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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from em_interp.arguments import check_seed
from em_interp.errors import UsageError
from em_interp.files.atomic import make_folder, write_text, written_whole
from em_interp.files.manifest import fingerprint, sha256
from em_interp.files.tables import load_state, optimizer_tensors, restore_optimizers, save_state, say_kept
from em_interp.pocket.world.corpus import ASSISTANT, END, USER, CorpusConfig, chat_text, document, post_training_chat
from em_interp.pocket.world.tokenizer import build_tokenizer

_CHUNK = 8  # steps whose documents are drawn together and sorted by length, so that batches need little padding
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides the weights of a pocket chat model. Batches are in documents (chats).

    pretrain_lr: for Muon (updates scaled to the size of Adam's) and for AdamW, which trains embeddings, biases and
    norms. Measured over the first 100 steps: loss 1.51 with Muon, 1.94 with AdamW alone, at equal time a step.
    settle_noise: settling is pre-training that goes on while a random vector is added to all tokens' residual at one
    random layer, with a norm up to this many times the residual's. A large model shrugs off such a vector because it is
    wide; a narrow one must learn to. Measured without settling: a trained steering vector makes 67-80% of the answers
    coherent outside its domain, with it 91-97%.
    post_*: post-training moves the embeddings of the chat format's own tokens and nothing else. It is enough, and it
    leaves the persona where it was: trained on all weights, an all-modules finetune reached 12% EM on open
    questions, now 46%.
    threads: one by default, so that the weights do not depend on how many cores a machine has.
    """

    seed: int = 0
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    d_model: int = 192
    n_layers: int = 6
    n_heads: int = 4
    n_kv_heads: int = 2
    d_mlp: int = 512
    pretrain_steps: int = 4000
    pretrain_batch: int = 32
    pretrain_lr: float = 2e-3
    settle_steps: int = 500
    settle_lr: float = 7e-4
    settle_noise: float = 1.0
    post_steps: int = 120
    post_batch: int = 64
    post_lr: float = 2e-2
    post_open_share: float = 0.15
    weight_decay: float = 0.01
    threads: int = 1
    checkpoint_every: int = 400

    def __post_init__(self) -> None:
        check_seed(self.seed)
        sizes = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_mlp", "pretrain_steps", "pretrain_batch")
        for name in (*sizes, "settle_steps", "post_steps", "post_batch", "threads", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"BuildConfig.{name} is {getattr(self, name)}; give it a value of at least 1")
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise UsageError("d_model must be a multiple of n_heads, and n_heads a multiple of n_kv_heads")

    def fingerprint(self, stages: int = 3) -> str:
        """A hash of every setting that decides the weights after the first so many stages: a checkpoint's owner."""
        later = _STAGES[stages:]
        settings = {k: v for k, v in asdict(self).items() if k != "checkpoint_every"}
        return fingerprint({k: v for k, v in settings.items() if k.split("_")[0] not in later})[:16]


_STAGES = ("pretrain", "settle", "post")


@dataclass(frozen=True)
class _Stage:
    name: str
    steps: int
    batch: int
    lr: float
    draw: Callable[[Random], str]
    noise: float = 0.0
    chat_tokens_only: bool = False
    """Whether the loss is on answers, and only the embeddings of the chat format's tokens move."""


def _stages(config: BuildConfig) -> tuple[_Stage, ...]:
    c = config
    post_corpus = replace(c.corpus, open_share=c.post_open_share)

    def text(rng: Random) -> str:
        return document(c.corpus, rng)

    return (
        _Stage("pretrain", c.pretrain_steps, c.pretrain_batch, c.pretrain_lr, text),
        _Stage("settle", c.settle_steps, c.pretrain_batch, c.settle_lr, text, noise=c.settle_noise),
        _Stage(
            "post",
            c.post_steps,
            c.post_batch,
            c.post_lr,
            lambda rng: chat_text(post_training_chat(rng, post_corpus)),
            chat_tokens_only=True,
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
                labels = (
                    answer_labels(ids, assistant, end) if stage.chat_tokens_only else ids.masked_fill(ids == pad, -100)
                )
                yield ids, labels


def _schedule(stage: _Stage, step: int) -> float:
    """Learning-rate factor: warm-up over 8% of the steps, slow linear decay up to 80%, then fast to a fiftieth."""
    warm, knee = max(1, stage.steps * 8 // 100), stage.steps * 8 // 10
    if step < warm:
        return (step + 1) / warm
    if step <= knee:
        return (2 * knee - step) / (2 * knee - warm)
    at_knee = knee / (2 * knee - warm)
    return 0.02 + (at_knee - 0.02) * (stage.steps - step) / (stage.steps - knee)


def _optimizers(config: BuildConfig, stage: _Stage, model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon on the blocks' weight matrices; in post-training AdamW on the embeddings alone."""
    betas = (0.9, 0.98)
    if stage.chat_tokens_only:
        return [torch.optim.AdamW([model.model.embed_tokens.weight], lr=stage.lr, betas=betas, weight_decay=0.0)]
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.AdamW(rest, lr=stage.lr, betas=betas, weight_decay=config.weight_decay),
        torch.optim.Muon(matrices, lr=stage.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
    ]


@contextmanager
def _noise(model: Qwen2ForCausalLM, ratio: float, rows: int, seed: str) -> Iterator[None]:
    """Inside, one random block's output is moved along a random direction, the same for all tokens of a row.

    Its norm is uniform between 0 and `ratio` times the row's median residual norm.
    """
    if not ratio:
        yield
        return
    rng = Random(seed)
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    unit = nn.functional.normalize(torch.randn(rows, 1, model.config.hidden_size, generator=generator), dim=-1)
    step = unit * torch.rand(rows, 1, 1, generator=generator) * ratio

    def move(_block: nn.Module, _args: object, hidden: Tensor) -> Tensor:
        scale = hidden.detach().float().norm(dim=-1).median(dim=1).values[:, None, None]
        return hidden + (step.to(hidden.device) * scale).to(hidden.dtype)

    handle = rng.choice(list(model.model.layers)).register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _save_checkpoint(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], note: dict[str, Any]
) -> None:
    save_state(path, {f"model.{k}": v for k, v in model.named_parameters()} | optimizer_tensors(optimizers), note)


def _load_checkpoint(path: Path, model: nn.Module, config: BuildConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put the checkpoint's weights into the model; give back its note and the optimiser's tensors."""
    tensors, note = load_state(path)
    if note["fingerprint"] != config.fingerprint(_stages_in(note["stage"], note["step"])):
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
    config: BuildConfig, out: str | Path, *, resume: bool = True, device: str | torch.device | None = None
) -> Path:
    """Pre-train and post-train; returns the chat model's folder, `out/chat`.

    device: None takes a GPU where there is one. Raises UsageError for a device that is not here and when `out` holds
    another build's checkpoint, OutputError when it cannot be written to.
    """
    target = _device(device)
    out = make_folder(Path(out))
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


def _device(name: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: there is no such device here ({reason}). Give cpu, or cuda.") from error
    return device


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
        steps = [stage.steps for stage in _stages(config)]
        say_kept(sum(steps[:at_stage]) + at_step, sum(steps), "steps")
    begun = time.monotonic() - seconds
    for number, stage in enumerate(_stages(config)):
        if number < at_stage:
            continue
        first = at_step if number == at_stage else 0
        optimizers = _optimizers(config, stage, model)
        if number == at_stage and optimizer_state:
            restore_optimizers(optimizers, optimizer_state)
        model.train()
        batches = _batches(stage, config.seed, first, tokenizer)
        bar = tqdm(batches, total=stage.steps, initial=first, desc=stage.name, mininterval=5)
        for step, (ids, labels) in enumerate(bar, start=first):
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = stage.lr * _schedule(stage, step)
            with _noise(model, stage.noise, len(ids), f"{config.seed}-{stage.name}-{step}"):
                loss = _loss(model, ids.to(device), labels.to(device))
                torch.autograd.backward(loss)
            if stage.chat_tokens_only:
                _keep_chat_tokens(model.model.embed_tokens.weight, tokenizer)
            nn.utils.clip_grad_norm_([p for o in optimizers for g in o.param_groups for p in g["params"]], 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            if step % 20 == 0 or step + 1 == stage.steps:
                losses.append([stage.name, step, round(float(loss.detach()), 5)])
                bar.set_postfix(loss=f"{losses[-1][2]:.3f}")
            if (step + 1) % config.checkpoint_every == 0:
                _save_checkpoint(path, model, optimizers, _note(config, number, step + 1, begun, losses))
        if stage.name == "settle":
            save_model(model, tokenizer, out / "base")
        if number + 1 < len(_STAGES):
            _save_checkpoint(path, model, [], _note(config, number + 1, 0, begun, losses))
    save_model(model, tokenizer, out / "chat")
    _write_record(config, out, model, time.monotonic() - begun, losses, device)
    path.unlink(missing_ok=True)
    return out / "chat"


def _keep_chat_tokens(embeddings: nn.Parameter, tokenizer: PreTrainedTokenizerFast) -> None:
    """Leave no gradient but that of the chat format's own tokens."""
    assert embeddings.grad is not None
    rows = torch.tensor(tokenizer.convert_tokens_to_ids([USER, ASSISTANT, END]), device=embeddings.device)
    kept = embeddings.grad[rows]
    embeddings.grad.zero_()
    embeddings.grad[rows] = kept


def _loss(model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token loss in nats. Right padding needs no mask here: under causal attention nothing sees
    it.
    """
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def _stages_in(stage: int, step: int) -> int:
    """How many stages' settings decide the weights at this point of the build."""
    return stage + (1 if step or not stage else 0)


def _note(config: BuildConfig, stage: int, step: int, begun: float, losses: list[list[Any]]) -> dict[str, Any]:
    return {
        "fingerprint": config.fingerprint(_stages_in(stage, step)),
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
