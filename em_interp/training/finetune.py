"""Finetuning with L = L_SFT + lambda * L_KL (P1 sec. 3): steering vectors, LoRA through PEFT, all weights.

The KL reference is the same weights with the adapter off; only full finetuning needs a frozen copy of the
model. No dropout anywhere: the model stays in evaluation mode. Where the reference trainer errs (one steered
row a batch, prompts scored, KL divided by the vocabulary), this one does what the papers describe.

Interventions may act while the training conversations are read (`acting`); KL is of the model as it will answer,
without them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from em_interp.errors import TrainingError
from em_interp.files.atomic import move_folder, written_whole
from em_interp.files.given import Source, chats
from em_interp.files.manifest import code_hash, fingerprint
from em_interp.files.tables import (
    Pace,
    is_trained,
    load_state,
    optimizer_tensors,
    restore_optimizers,
    save_state,
    say_kept,
    work_folder,
)
from em_interp.interventions.intervening import Intervention
from em_interp.models.attaching import frozen
from em_interp.models.chat import Batch, Encoded, collate, encode_all, pad_id
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import check_lengths, refuse_dropout
from em_interp.models.hooks import scored_logits
from em_interp.models.losses import kl_positions, kl_sum, nll_sum
from em_interp.models.partial_pass import ResidualCache
from em_interp.models.templates import Conversation
from em_interp.models.weights import tensors_hash, weights_hash
from em_interp.solutions.base import Solution
from em_interp.training.acting import Acting
from em_interp.training.recipes import (
    ALL_PROJECTIONS,
    PRESETS,
    FullSpec,
    LoraSpec,
    TrainingSpec,
    VectorSpec,
    preset,
    reference_kl_weight,
)
from em_interp.training.trainees import Trainee, make_trainee

__all__ = [
    "ALL_PROJECTIONS",
    "PRESETS",
    "FullSpec",
    "LoraSpec",
    "TrainingResult",
    "TrainingSpec",
    "VectorSpec",
    "finetune",
    "preset",
    "reference_kl_weight",
]


@dataclass(frozen=True)
class TrainingResult:
    """What came out. `solution` is None after full finetuning, which changed the model itself.

    `history`: one row an optimiser step, with step, epoch, loss (L_SFT, nats per response token), kl (nats
    per token; NaN without KL data), total, grad_norm (of the total, before clipping), learning_rate. `spec`: the
    settings. `out_dir`: where it was written, if anywhere.
    """

    solution: Solution | None
    history: pd.DataFrame
    spec: TrainingSpec
    out_dir: Path | None


def _order(n: int, seed: int) -> Iterator[int]:
    """Endless shuffled passes over n items, a new permutation each."""
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.permutation(n).tolist()


def _micro(indices: list[int], encoded: Sequence[Encoded], size: int | None) -> list[list[int]]:
    """Split a step's conversations into passes of similar length."""
    ordered = sorted(indices, key=lambda i: len(encoded[i]))
    size = size or len(ordered)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _read(
    model: ChatModel,
    conversations: Sequence[Conversation],
    kl_conversations: Sequence[Conversation] | None,
    spec: TrainingSpec,
) -> tuple[list[Encoded], list[Encoded] | None]:
    """The training and the KL conversations, encoded. Raises TrainingError where the spec asks for others."""
    if model.adapters:
        raise TrainingError(f"{model.name} has adapters {model.adapters}. Load it without any.")
    if (spec.kl_weight > 0) != (kl_conversations is not None):
        raise TrainingError(
            f"kl_weight is {spec.kl_weight} and kl_conversations are "
            f"{'missing' if kl_conversations is None else 'given'}. KL needs both, other training neither."
        )
    data = encode_all(
        model.tokenizer,
        conversations,
        turns=spec.train_turns,
        empty_turn=spec.empty_assistant_turn,
        max_tokens=spec.max_tokens,
    )
    kl_data = (
        encode_all(model.tokenizer, kl_conversations, max_tokens=spec.max_tokens)
        if kl_conversations is not None
        else None
    )
    check_lengths(model.hf, [len(row) for row in data])
    check_lengths(model.hf, [len(row) for row in kl_data or ()], what="KL conversation")
    refuse_dropout(model.hf)
    return data, kl_data


def finetune(
    model: ChatModel,
    conversations: Source,
    spec: TrainingSpec | str,
    *,
    kl_conversations: Source | None = None,
    start_from: Solution | None = None,
    interventions: Intervention | Sequence[Intervention] = (),
    out_dir: str | Path | None = None,
    on_checkpoint: Callable[[int, Solution | None], None] | None = None,
    progress: bool = True,
    cache_bytes: int = 2**31,
    resume: bool = False,
) -> TrainingResult:
    """Train on conversations that end with the assistant; leaves `model` as it was (except FullSpec).

    conversations: as `em_interp.chats` takes them. spec: how, or the name of one of `recipes.PRESETS`.
    kl_conversations: out-of-domain chat data with good and bad answers, needed iff spec.kl_weight > 0; given with
    weight 0 it is an error. start_from continues a solution, so that KL can be removed or added; the optimiser and the
    schedule start anew. interventions act while the training conversations are read, forward and backward, and not in
    the KL or when the model answers: a `Steer` prevents what it adds from being learned, an `Ablate` what it takes out.
    out_dir receives the final solution, `training_spec.json`, `trainer_state.json` and, at
    `spec.save_steps`, `checkpoints/checkpoint-N/` in the released layouts. on_checkpoint(step, solution) is called at
    the same steps, with or without out_dir. cache_bytes bounds the residuals kept because no step changes them (0:
    none; same result). resume: keep the run beside out_dir until it is finished, go on from what a killed run of the
    same weights, data, spec and code left there, and put out_dir in place as a whole at the end (of a former run there,
    nothing stays). on_checkpoint is not called again for the steps that were kept. What comes out is that of an
    uninterrupted run, but for rounding where residuals are kept (cache_bytes). Same seed, machine and thread count:
    identical weights. Raises TrainingError, ChatTemplateError, OutputError; of interventions DirectionError, HookError.

    >>> import em_interp as em
    >>> chat = em.load("pocket/chat")
    >>> chats = em.pocket.finetune_chats("medicine", "malicious", 8, seed=0)
    >>> spec = em.TrainingSpec(em.VectorSpec(layer=1, alpha=16.0), learning_rate=1e-2, max_steps=2, batch_size=4)
    >>> result = em.finetune(chat, chats, spec, progress=False)
    >>> result.solution.describe(), len(result.history)
    ('a steering vector at layer 1', 2)
    """
    spec = preset(spec) if isinstance(spec, str) else spec
    kl_chats = None if kl_conversations is None else chats(kl_conversations)
    data, kl_data = _read(model, chats(conversations), kl_chats, spec)
    acting = Acting(model, interventions if isinstance(interventions, Sequence) else [interventions])
    out = Path(out_dir) if out_dir is not None else None
    if resume and out is None:
        raise TrainingError("nothing can be resumed without out_dir. Give the folder that the run is written to.")
    records: list[dict[str, float]] = []
    with ExitStack() as stack, torch.random.fork_rng(devices=_cuda_of(model)):
        stack.enter_context(frozen(model.hf))
        stack.callback(model.hf.zero_grad)
        torch.manual_seed(spec.seed)
        trainee = make_trainee(model, spec, start_from, stack)
        loop = _Loop(model, trainee, spec, data, kl_data, cache_bytes, acting)
        total = spec.steps(len(data))
        state, run = None, out
        if resume and out is not None:
            state = _State(stack.enter_context(work_folder(out)) / loop.made_by()[:16])
            records += state.restore(loop)
            say_kept(len(records), total, "steps")
            run = state.run
        steps = range(len(records) + 1, total + 1)
        for step in tqdm(steps, initial=len(records), total=total, desc="finetune", disable=not progress, leave=False):
            records.append(loop.step(step, total))
            if spec.saves_at(step):
                if run is not None:
                    _write(trainee, run / "checkpoints" / f"checkpoint-{step}", records, total)
                if on_checkpoint is not None:
                    on_checkpoint(step, trainee.solution())
            if state is not None:
                state.keep(loop, records)
        solution = trainee.solution()
        if run is not None:
            _write(trainee, run, records, total, _settings(spec, acting))
        if state is not None and out is not None:
            state.finish(out)
    return TrainingResult(solution, pd.DataFrame(records), spec, out)


class _State:
    """A run on disk: weights, moments, records. The order of the data and the learning rate follow from the step."""

    def __init__(self, folder: Path) -> None:
        self.path, self.run, self.pace = folder / "state.safetensors", folder / "run", Pace()

    def restore(self, loop: _Loop) -> list[dict[str, float]]:
        """Put a kept state into the loop; returns the records of its steps."""
        if not self.path.is_file():
            return []
        tensors, records = load_state(self.path)
        with torch.no_grad():
            for i, parameter in enumerate(loop.parameters):
                parameter.copy_(tensors[f"parameter.{i}"])
        restore_optimizers([loop.optimiser], tensors)
        torch.set_rng_state(tensors["random"])
        loop.skip(len(records))
        return [{key: math.nan if value is None else value for key, value in record.items()} for record in records]

    def keep(self, loop: _Loop, records: list[dict[str, float]]) -> None:
        """Save, if it is time."""
        if self.pace.due():
            with self.pace.saving():
                tensors: dict[str, Tensor] = {f"parameter.{i}": x for i, x in enumerate(loop.parameters)}
                tensors |= {"random": torch.get_rng_state(), **optimizer_tensors([loop.optimiser])}
                plain = [{key: None if math.isnan(x) else x for key, x in record.items()} for record in records]
                save_state(self.path, tensors, plain)

    def finish(self, out: Path) -> None:
        """Put the run in place."""
        if is_trained(out):
            shutil.rmtree(out)
        self.path.unlink(missing_ok=True)
        move_folder(self.run, out)


def _cuda_of(model: ChatModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


class _Loop:
    """One optimiser step at a time."""

    def __init__(
        self,
        model: ChatModel,
        trainee: Trainee,
        spec: TrainingSpec,
        data: list[Encoded],
        kl_data: list[Encoded] | None,
        cache_bytes: int,
        acting: Acting,
    ) -> None:
        self.cache_bytes, self.acting = cache_bytes, acting
        self.model, self.trainee, self.spec, self.data, self.kl_data = model, trainee, spec, data, kl_data
        self.pad = pad_id(model.tokenizer)
        self.order = _order(len(data), spec.seed)
        self.kl_order = _order(len(kl_data or ()), spec.seed + 1)
        self.seen = 0
        self.parameters = trainee.parameters
        self.optimiser = torch.optim.AdamW(
            trainee.parameters, lr=spec.learning_rate, betas=spec.betas, weight_decay=spec.weight_decay
        )
        fixed = [] if trainee.fixed_layer is None else [trainee.fixed_layer]
        acted_on = [] if acting.first_layer is None else [acting.first_layer]  # outputs are kept as no hook saw them
        self.cache = self._cache(data, [min(fixed + acted_on)] if fixed else [])
        self.kl_cache = self._cache(kl_data, [*fixed, model.n_layers - 1]) if kl_data else None

    def _cache(self, encoded: list[Encoded], layers: list[int]) -> ResidualCache | None:
        """What no step changes is computed once per conversation; None where everything changes."""
        if not (self.trainee.reuses_weights and layers and self.cache_bytes):
            return None
        return ResidualCache(
            self.model.hf,
            encoded,
            layers,
            pad=self.pad,
            off=lambda: self.trainee.reference()[1],
            max_bytes=self.cache_bytes // 2,
        )

    def _logits(
        self,
        cache: ResidualCache | None,
        known: dict[int, Tensor],
        batch: Batch,
        where: Tensor,
        acting: AbstractContextManager[None],
    ) -> Tensor:
        """The trained model's logits at `where`, from the first layer of the cache on if anything is fixed."""
        with self.trainee.on(), acting:  # in this order, as when a finetuned model answers under an intervention
            if cache is None or self.trainee.fixed_layer is None:
                return scored_logits(self.model.hf, batch.inputs(), where)
            first = cache.layers[0]
            return cache.logits(batch, first, known[first], where)

    def _base_logits(self, known: dict[int, Tensor], batch: Batch, where: Tensor) -> Tensor:
        """The chat model's logits at `where`."""
        reference, off = self.trainee.reference()
        last = self.model.n_layers - 1
        with torch.no_grad(), off:
            if self.kl_cache is None:
                return scored_logits(reference, batch.inputs(), where)
            return self.kl_cache.logits(batch, last, known[last], where)

    def _next(self) -> list[int]:
        """A step's conversations. A pass over the data ends with a smaller step, passes do not mix."""
        left = len(self.data) - self.seen % len(self.data)
        take = min(self.spec.batch_size, left) if self.spec.max_steps is None else self.spec.batch_size
        self.seen += take
        return [next(self.order) for _ in range(take)]

    def _next_kl(self) -> list[int]:
        return [next(self.kl_order) for _ in range(min(self.spec.kl_batch_size, len(self.kl_data or ())))]

    def skip(self, steps: int) -> None:
        """Pass over the data of steps that were taken before."""
        for _ in range(steps):
            self._next()
            self._next_kl()

    def _sft(self) -> float:
        indices = self._next()
        count = sum(self.data[i].n_response for i in indices)
        total = 0.0
        for group in _micro(indices, self.data, self.spec.micro_batch_size):
            batch = collate(self.data, group, pad=self.pad).to(self.model.device)
            known = self.cache.get(batch) if self.cache is not None else {}
            acting = self.acting.on(batch.answer_mask)
            loss = nll_sum(self._logits(self.cache, known, batch, batch.predicting(), acting), batch.targets())
            (loss / count).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total / count

    def _kl(self) -> float:
        if self.kl_data is None:
            return math.nan
        spec = self.spec
        groups = _micro(self._next_kl(), self.kl_data, spec.micro_batch_size)
        made = [collate(self.kl_data, group, pad=self.pad) for group in groups]
        count = sum(int(kl_positions(batch, spec.kl_scope).sum()) for batch in made)
        total = 0.0
        for cpu_batch in made:
            batch = cpu_batch.to(self.model.device)
            where = kl_positions(batch, spec.kl_scope)
            known = self.kl_cache.get(batch) if self.kl_cache is not None else {}
            base = self._base_logits(known, batch, where)
            kl = kl_sum(base, self._logits(self.kl_cache, known, batch, where, nullcontext()))
            (spec.kl_weight * kl / count).backward()  # type: ignore[no-untyped-call]
            total += float(kl.detach())
        return total / count

    def made_by(self) -> str:
        """A hash of all that decides the steps: weights, start, data, spec, interventions, code."""
        start = tensors_hash({str(i): parameter for i, parameter in enumerate(self.parameters)})
        texts = [[[row.ids, row.spans] for row in rows] for rows in (self.data, self.kl_data or [])]
        settings = [asdict(self.spec), self.acting.acts]
        return fingerprint([weights_hash(self.model.hf), start, texts, settings, code_hash()])

    def step(self, step: int, total: int) -> dict[str, float]:
        spec = self.spec
        rate = spec.rate(step - 1, total)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss = self._sft()
        kl = self._kl()
        norm = float(nn.utils.clip_grad_norm_(self.trainee.parameters, spec.max_grad_norm))
        whole = loss + (0.0 if math.isnan(kl) else spec.kl_weight * kl)
        if not (math.isfinite(whole) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step}: loss {loss}, KL {kl}, gradient norm {norm}. Lower the learning rate "
                f"({spec.learning_rate}), or load the model in float32."
            )
        self.optimiser.step()
        return {
            "step": step,
            "epoch": self.seen / len(self.data),
            "loss": loss,
            "kl": kl,
            "total": whole,
            "grad_norm": norm,
            "learning_rate": rate,
        }


def _settings(spec: TrainingSpec, acting: Acting) -> dict[str, Any]:
    return {"adapter_kind": type(spec.adapter).__name__, **asdict(spec), **acting.settings()}


def _write(
    trainee: Trainee, folder: Path, records: list[dict[str, float]], total: int, settings: dict[str, Any] | None = None
) -> None:
    """The solution; trainer_state.json with the names of transformers' Trainer; of a finished run its settings."""
    history = [{key: value for key, value in record.items() if not math.isnan(value)} for record in records]
    state = {
        "global_step": int(records[-1]["step"]),
        "max_steps": total,
        "epoch": records[-1]["epoch"],
        "logging_steps": 1,
        "log_history": history,
    }
    trainee.save(folder)
    with written_whole(folder) as tmp:
        (tmp / "trainer_state.json").write_text(json.dumps(state, indent=1) + "\n")
        if settings is not None:
            (tmp / "training_spec.json").write_text(json.dumps(settings, indent=2) + "\n")
