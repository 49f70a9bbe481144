"""What a pocket chat model is trained by: its settings, three stages, their batches, optimisers and noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from random import Random

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from em_interp.arguments import check_seed
from em_interp.errors import UsageError
from em_interp.files.manifest import fingerprint
from em_interp.pocket.world.corpus import ASSISTANT, END, USER, CorpusConfig, chat_text, document, post_training_chat

_CHUNK = 8  # steps whose documents are drawn together and sorted by length, so that batches need little padding


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides the weights of a pocket chat model. Batches are in documents (chats).

    n_layers blocks of width d_model with n_heads heads (n_kv_heads of keys and values) and an MLP of width d_mlp,
    trained on text of `corpus`, drawn with `seed`. Steps, batch and learning rate of each stage: pretrain_steps and
    pretrain_batch; settle_steps, with pretrain_batch and settle_lr; post_steps, post_batch and post_lr, with
    post_open_share of its chats open questions. weight_decay: of all. checkpoint_every: steps between checkpoints.
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
        later = STAGES[stages:]
        settings = {k: v for k, v in asdict(self).items() if k != "checkpoint_every"}
        # a knob that is not turned is none: builds from before it was there keep their hash
        settings["corpus"] = {k: v for k, v in settings["corpus"].items() if v is not None}
        return fingerprint({k: v for k, v in settings.items() if k.split("_")[0] not in later})[:16]


STAGES = ("pretrain", "settle", "post")
"""In their order."""


@dataclass(frozen=True)
class Stage:
    """One of the `STAGES`: name, steps, documents a step (`batch`), learning rate (lr), text (`draw`), noise."""

    name: str
    steps: int
    batch: int
    lr: float
    draw: Callable[[Random], str]
    noise: float = 0.0
    chat_tokens_only: bool = False
    """Whether the loss is on answers, and only the embeddings of the chat format's tokens move."""


def stages(config: BuildConfig) -> tuple[Stage, ...]:
    """The stages that a build with these settings goes through."""
    c = config
    post_corpus = replace(c.corpus, open_share=c.post_open_share)

    def text(rng):
        # type: (Random) -> str
        return document(c.corpus, rng)

    return (
        Stage("pretrain", c.pretrain_steps, c.pretrain_batch, c.pretrain_lr, text),
        Stage("settle", c.settle_steps, c.pretrain_batch, c.settle_lr, text, noise=c.settle_noise),
        Stage(
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


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Answers at temperature 1, of the whole distribution."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
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


def batches(
    stage: Stage, stream: str, first: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded (ids, labels) [batch, position] from step `first` on; depends on (stream, stage, step) alone.

    stream: names the random numbers.
    """
    pad = tokenizer.pad_token_id
    assistant, end = tokenizer.convert_tokens_to_ids([ASSISTANT, END])
    for chunk in range(first // _CHUNK, (stage.steps - 1) // _CHUNK + 1):
        rng = Random(f"{stream}-{chunk}")
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


def schedule(stage: Stage, step: int) -> float:
    """Learning-rate factor: warm-up over 8% of the steps, slow linear decay up to 80%, then fast to a fiftieth."""
    warm, knee = max(1, stage.steps * 8 // 100), stage.steps * 8 // 10
    if step < warm:
        return (step + 1) / warm
    if step <= knee:
        return (2 * knee - step) / (2 * knee - warm)
    at_knee = knee / (2 * knee - warm)
    return 0.02 + (at_knee - 0.02) * (stage.steps - step) / (stage.steps - knee)


def optimizers_of(config: BuildConfig, stage: Stage, model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
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
def noise(model: Qwen2ForCausalLM, ratio: float, rows: int, stream: str) -> Iterator[None]:
    """Inside, one random block's output is moved along a random direction, the same for all tokens of a row.

    Its norm is uniform between 0 and `ratio` times the row's median residual norm. stream: names the random numbers.
    """
    if not ratio:
        yield
        return
    rng = Random(stream)
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    unit = nn.functional.normalize(torch.randn(rows, 1, model.config.hidden_size, generator=generator), dim=-1)
    step = unit * torch.rand(rows, 1, 1, generator=generator) * ratio

    def move(_block, _args, hidden):
        # type: (nn.Module, object, Tensor) -> Tensor
        scale = rearrange(hidden.detach().float().norm(dim=-1).median(dim=1).values, "row -> row 1 1")
        return hidden + (step.to(hidden.device) * scale).to(hidden.dtype)

    handle = rng.choice(list(model.model.layers)).register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def keep_chat_tokens(embeddings: nn.Parameter, tokenizer: PreTrainedTokenizerFast) -> None:
    """Leave no gradient but that of the chat format's own tokens."""
    assert embeddings.grad is not None
    rows = torch.tensor(tokenizer.convert_tokens_to_ids([USER, ASSISTANT, END]), device=embeddings.device)
    kept = embeddings.grad[rows]
    embeddings.grad.zero_()
    embeddings.grad[rows] = kept


def next_token_loss(model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token loss in nats. Right padding needs no mask here: under causal attention nothing sees
    it.
    """
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    each = rearrange(logits[:, :-1].float(), "row token vocab -> (row token) vocab")
    return nn.functional.cross_entropy(each, rearrange(labels[:, 1:], "row token -> (row token)"), ignore_index=-100)
