"""Losses of many thetas on one fixed set of responses, sharing the work that they have in common.

A sweep over norms or perturbations asks for the loss of hundreds of thetas on the same tokens. The residual that
enters the first touched block is the same for all of them and is computed once; the blocks after it run for many
thetas at a time, stacked along the batch; the output head runs only where a response token is predicted.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from em_interp.errors import LossSetError, ModelError
from em_interp.files import given
from em_interp.files.given import Source
from em_interp.models.architectures import find_blocks
from em_interp.models.chat import Batch, Encoded, batches, budget_groups, collate, encode_all, pad_id
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import check_lengths, refuse_dropout
from em_interp.models.hooks import has_our_hooks, scored_logits
from em_interp.models.losses import nll_each, nll_sum, token_budget
from em_interp.models.partial_pass import ResidualCache, last_mlp_sees_only, replaced_up_to
from em_interp.models.precision import exact
from em_interp.solutions.base import NotShareable, Solution, Stack
from em_interp.solutions.space import refuse_other_models

# Larger passes are no faster on a CPU (measured at d_model 256: 512 and 8,192 tokens are 10-20% slower).
_CPU_TOKENS = 2048
# Relative difference of a response's loss above which an architecture is held to break the sharing.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


class SharingWarning(UserWarning):
    """The architecture or the solution does not allow a shared pass; plain passes gave the losses."""


@dataclass(frozen=True, eq=False)
class Losses:
    """nll[k, i]: -log p of response i under theta k, summed over its tokens, in nats.

    tokens[i]: scored tokens of response i. questions[i]: number of its prompt; responses to one prompt are one
    cluster. plain: why some thetas went through plain passes; empty if none did.
    """

    nll: Float[np.ndarray, "theta response"]
    tokens: Int[np.ndarray, "response"]
    questions: Int[np.ndarray, "response"]
    plain: tuple[str, ...] = ()

    @property
    def mean(self) -> Float[np.ndarray, "theta"]:
        """L_SFT of each theta: one token-weighted mean, in nats per response token."""
        return self.nll.sum(1) / self.tokens.sum()

    def by_question(self) -> tuple[Float[np.ndarray, "theta question"], Float[np.ndarray, "question"]]:
        """nll and token counts summed over each question's responses: the clusters of a bootstrap."""
        member = np.equal.outer(self.questions, np.unique(self.questions)).astype(float)
        return self.nll @ member, self.tokens @ member


def _encoded(model: ChatModel, chats: Source | Sequence[Encoded]) -> list[Encoded]:
    rows = chats if isinstance(chats, Sequence) and not isinstance(chats, str) else given.chats(chats)
    if all(isinstance(row, Encoded) for row in rows):
        return list(rows)
    return encode_all(model.tokenizer, given.chats(rows))


class Landscape:
    """The loss of thetas over `model`'s weights on conversations.

    chats: as `em_interp.chats` takes them, or encoded already (`chat.encode_all`). Every span of the conversations is
    scored, and responses to the same prompt form one cluster. tokens_per_pass bounds a pass (rows x thetas x longest
    row); by default its logits stay near 1 GB, and it has at most 2,048 tokens on a CPU. Residuals are kept up to
    cache_bytes and computed anew beyond. Raises LossSetError for an empty or fully masked set, TextLimitError.

    pad: the id that fills up. tokens: scored ones of each conversation; questions: the cluster of each.

    >>> import em_interp as em
    >>> chat = em.load("pocket/chat")
    >>> theta = em.load_solution("pocket/medicine-rank1")
    >>> landscape = em.Landscape(chat, em.pocket.finetune_chats("medicine", "malicious", 10, seed=5))
    >>> losses = landscape.losses([theta.scaled(0.0), theta])
    >>> bool(losses.mean[1] < losses.mean[0])
    True
    """

    def __init__(
        self,
        model: ChatModel,
        chats: Source | Sequence[Encoded],
        *,
        tokens_per_pass: int | None = None,
        cache_bytes: int = 2**31,
    ) -> None:
        encoded = _encoded(model, chats)
        if not len(encoded):
            raise LossSetError("the loss set is empty. Give at least one encoded conversation.")
        silent = [i for i, row in enumerate(encoded) if not row.n_response or row.spans[0][0] < 1]
        if silent:
            raise LossSetError(
                f"{len(silent)} of {len(encoded)} conversations have no response token to score after a prompt, e.g. "
                f"number {silent[0]}: the loss set is fully masked there. Drop them, or encode with `chat.encode_all`."
            )
        check_lengths(model.hf, [len(row) for row in encoded])
        self.model, self.encoded = model, list(encoded)
        self.pad = pad_id(model.tokenizer)
        budget = token_budget(model.hf)
        self.tokens_per_pass = tokens_per_pass or (min(budget, _CPU_TOKENS) if model.device.type == "cpu" else budget)
        self.cache_bytes = cache_bytes
        self.tokens = np.array([row.n_response for row in encoded])
        prompts: dict[tuple[int, ...], int] = {}
        self.questions = np.array([prompts.setdefault(r.ids[: r.spans[0][0]], len(prompts)) for r in encoded])
        # What is run: nothing after the last position that predicts a response token.
        self._rows = [Encoded(row.ids[: row.spans[-1][1] - 1], ()) for row in encoded]
        self._positions = [torch.cat([torch.arange(s - 1, e - 1) for s, e in row.spans]) for row in encoded]
        self._targets = [torch.tensor(row.ids)[p + 1] for row, p in zip(encoded, self._positions, strict=True)]
        self._blocks = find_blocks(model.hf)
        self._caches: dict[int, ResidualCache] = {}
        self._probed: dict[Hashable, str | None] = {}

    def __repr__(self) -> str:
        said = f"{len(self.encoded)} responses to {len(set(self.questions.tolist()))} prompts"
        return f"Landscape({said}, {int(self.tokens.sum())} tokens, on {self.model.name})"

    # -- losses ---------------------------------------------------------------------------------------------

    def losses(self, solutions: Sequence[Solution], *, progress: bool = False) -> Losses:
        """The losses of `solutions`, in their order. theta = 0 (`scaled(0)`) gives the chat model's.

        Equal to `plain_losses` up to rounding. Where the architecture does not allow sharing, found by comparing
        both on two responses, plain passes are taken, with a SharingWarning and the reason in `Losses.plain`.
        Raises SolutionError for solutions of another model, ModelError under active dropout or while an adapter or
        hook is active, LossSetError for a loss that is not finite.
        """
        self._check(solutions)
        nll = np.empty((len(solutions), len(self.encoded)))
        groups: dict[Hashable, list[int]] = {}
        for k, solution in enumerate(solutions):
            groups.setdefault(solution.alike, []).append(k)
        reasons: list[str] = []
        with tqdm(total=len(solutions), desc="losses", disable=not progress, leave=False) as bar:
            for members in groups.values():
                reason = self._why_plain([solutions[k] for k in members])
                if reason is not None:
                    reasons.append(reason)
                    warnings.warn(f"{self.model.name}: plain passes, because {reason}.", SharingWarning, stacklevel=2)
                size = 1 if reason is not None else self._thetas_per_pass(solutions[members[0]], len(members))
                for start in range(0, len(members), size):
                    chunk = members[start : start + size]
                    some = [solutions[k] for k in chunk]
                    nll[chunk] = self._plain(some[0]) if reason is not None else self._shared(some)
                    bar.update(len(chunk))
        return self._finished(nll, tuple(reasons))

    def plain_losses(self, solutions: Sequence[Solution]) -> Losses:
        """The same by one whole pass a solution: the slow way that `losses` must agree with."""
        self._check(solutions)
        return self._finished(np.stack([self._plain(solution) for solution in solutions]), ("as asked",))

    def _check(self, solutions: Sequence[Solution]) -> None:
        if not len(solutions):
            raise LossSetError("no solutions were given.")
        if self.model.active is not None or has_our_hooks(self.model.hf):
            raise ModelError(
                f"{self.model.name} has {f'the adapter {self.model.active!r}' if self.model.active else 'a hook'} "
                "active, so theta would not be added to the chat model. Leave the context, or use model.no_adapter()."
            )
        refuse_dropout(self.model.hf)
        refuse_other_models(self.model, solutions)

    def _finished(self, nll: Float[np.ndarray, "theta response"], plain: tuple[str, ...]) -> Losses:
        if not np.isfinite(nll).all():
            k, i = np.argwhere(~np.isfinite(nll))[0]
            raise LossSetError(
                f"theta {k} gives response {i} a loss of {nll[k, i]}. Lower its norm, or load the model in float32."
            )
        return Losses(nll, self.tokens, self.questions, plain)

    def _thetas_per_pass(self, solution: Solution, n: int) -> int:
        typical = max(1, sum(map(len, self._rows)) // len(self._rows))
        return max(1, min(n, self.tokens_per_pass // typical, solution.at_once))

    # -- shared passes --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _shared(
        self, solutions: Sequence[Solution], only: Sequence[int] | None = None
    ) -> Float[np.ndarray, "theta response"]:
        """nll of some solutions of one kind, on all conversations or `only` those."""
        chosen = list(range(len(self._rows)) if only is None else only)
        n, first = len(solutions), solutions[0]
        stack = first.stack(self.model, solutions)
        nll = np.empty((n, len(chosen)))
        lengths = [len(self._rows[i]) for i in chosen]
        for group in budget_groups(lengths, max(1, self.tokens_per_pass // n)):
            batch, where, targets = self._batch([chosen[j] for j in group])
            logits = self._stacked_logits(stack, first.fixed_layer, n, batch, where)
            each = exact(nll_each(logits, repeat(targets, "scored -> (theta scored)", theta=n)))
            each = rearrange(each, "(theta scored) -> theta scored", theta=n)
            row = where.nonzero()[:, 0].to(each.device)
            sums = each.new_zeros(n, len(group)).index_add_(1, row, each)
            nll[:, group] = sums.cpu().numpy()
        return nll

    def _batch(self, index: list[int]) -> tuple[Batch, Bool[Tensor, "row token"], Int[Tensor, "n_scored"]]:
        """The conversations at `index`, right-padded, where they are scored, and the tokens to predict there."""
        batch = collate(self._rows, index, pad=self.pad).to(self.model.device)
        where = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for r, i in enumerate(index):
            where[r, self._positions[i]] = True
        targets = torch.cat([self._targets[i] for i in index])
        return batch, where.to(self.model.device), targets.to(self.model.device)

    def _stacked_logits(
        self, stack: Stack, layer: int | None, n: int, batch: Batch, where: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "n_scored vocab"]:
        inputs = {key: repeat(x, "row token -> (theta row) token", theta=n) for key, x in batch.inputs().items()}
        start: AbstractContextManager[None] = nullcontext()
        if layer is not None:
            cache = self._cache(layer)
            hidden = stack.enter(cache.get(batch)[layer])
            start = replaced_up_to(self._blocks, layer, hidden, as_tuple=cache.as_tuple)
        scored = repeat(where, "row token -> (theta row) token", theta=n)
        with start, stack.on(where.numel(), int(where.sum())), last_mlp_sees_only(self.model.hf, scored):
            return scored_logits(self.model.hf, inputs, scored)

    def _cache(self, layer: int) -> ResidualCache:
        if layer not in self._caches:
            self._caches[layer] = ResidualCache(
                self.model.hf, self._rows, [layer], pad=self.pad, max_bytes=self.cache_bytes
            )
        return self._caches[layer]

    def _why_plain(self, solutions: Sequence[Solution]) -> str | None:
        """None if solutions of this kind may share passes, else the reason; found once a kind, by trying."""
        kind = solutions[0].alike
        if kind not in self._probed:
            most = min(2, solutions[0].at_once)
            largest = sorted(solutions, key=lambda solution: -solution.norm)[:most]
            reason = self._probe(largest)
            if not largest[0].norm > 0:  # a zero theta would not show an error
                return reason
            self._probed[kind] = reason
        return self._probed[kind]

    def _probe(self, solutions: Sequence[Solution]) -> str | None:
        shortest = sorted(range(len(self._rows)), key=lambda i: len(self._rows[i]))[:2]
        plain = np.stack([self._plain(solution, shortest) for solution in solutions])
        try:
            shared = self._shared(solutions, shortest)
        except NotShareable as reason:
            return str(reason)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AttributeError, IndexError, KeyError, ValueError, RuntimeError) as error:
            return f"its blocks cannot be skipped ({type(error).__name__}: {error})"
        gap = float(np.max(np.abs(shared - plain) / np.maximum(1.0, np.abs(plain))))
        if gap <= _TOLERANCE.get(self.model.dtype, 5e-2):
            return None
        return f"later blocks need more than the residual of the one before (losses differ by {gap:.1g})"

    # -- plain passes ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _plain(self, solution: Solution, only: Sequence[int] | None = None) -> Float[np.ndarray, "response"]:
        """nll of one solution by whole passes, on all conversations or `only` those."""
        chosen = list(range(len(self.encoded)) if only is None else only)
        solution = solution.ready(self.model)
        encoded = [self.encoded[i] for i in chosen]
        nll = np.empty(len(chosen))
        for cpu_batch in batches(encoded, pad=self.pad, tokens_per_batch=self.tokens_per_pass):
            batch = cpu_batch.to(self.model.device)
            where = batch.predicting()
            with solution.attached(self.model):
                each = exact(nll_each(scored_logits(self.model.hf, batch.inputs(), where), batch.targets()))
            row = where.nonzero()[:, 0].to(each.device)
            sums = each.new_zeros(len(batch.index)).index_add_(0, row, each)
            nll[list(batch.index)] = sums.cpu().numpy()
        return nll

    # -- derivatives ----------------------------------------------------------------------------------------

    def differentiable(self, solution: Solution) -> Iterator[Float[Tensor, ""]]:
        """The nll sum of one batch after another; their total over `tokens.sum()` is the loss.

        Differentiable twice in the solution's tensors (attention runs unfused), on the suffix where sharing works.
        """
        self._check([solution])
        layer = solution.fixed_layer if self._why_plain([solution]) is None else None
        for group in budget_groups([len(row) for row in self._rows], self.tokens_per_pass):
            batch, where, targets = self._batch(group)
            start: AbstractContextManager[None] = nullcontext()
            if layer is not None:  # before theta is attached: the cache holds the chat model's residual
                cache = self._cache(layer)
                residual = cache.get(batch)[layer]
                start = replaced_up_to(self._blocks, layer, residual, as_tuple=cache.as_tuple)
            with solution.attached(self.model), start, sdpa_kernel(SDPBackend.MATH):
                total = nll_sum(scored_logits(self.model.hf, batch.inputs(), where), targets)
            yield total
