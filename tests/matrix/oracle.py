"""The slow obvious way: float64, one conversation at a time, no batch, no cache, plain hooks, plain loops."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.matrix import adapters
from tests.matrix.families import FAMILIES, N_LAYERS, cast, make
from tests.matrix.templates import TEMPLATES, Conversation, prompt_text, spans, tokenizer

Edits = Mapping[int, Callable[[Tensor], Tensor]]
"""Layer -> what becomes of its output [token, d_model]."""


class Oracle:
    """The family's weights, with the adapter in `folder` as PEFT itself puts it on."""

    def __init__(self, family: str, feature: str, folder: Path | None, dtype: torch.dtype, **changes: Any) -> None:
        self.kind = FAMILIES[family].template
        self.inner: Any = cast(make(family, **changes), dtype)
        self.inner.set_experts_implementation("eager")  # grouped products have no float64
        self.outer: Any = self.inner
        self.vector = feature in adapters.VECTORS
        if folder is not None and not self.vector:
            self.outer = PeftModel.from_pretrained(self.inner, str(folder)).eval()
        self.outer.double()  # at last: some adapters cannot be made in float64
        self.blocks = list(self.inner.get_submodule(FAMILIES[family].blocks))

    @contextmanager
    def edited(self, edits: Edits) -> Iterator[None]:
        """Inside, each layer's output is what `edits` makes of it."""

        def hook(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
            def run(_module: nn.Module, _args: object, output: Any) -> Any:
                if isinstance(output, tuple):
                    return (change(output[0][0]).unsqueeze(0), *output[1:])
                return change(output[0]).unsqueeze(0)

            return run

        handles = []
        if self.vector:  # part of the model: it acts before what is done to the residual
            theta = adapters.ALPHA * adapters.vector_of().double()
            handles.append(self.blocks[adapters.LAYER].register_forward_hook(hook(lambda h: h + theta)))
        handles += [self.blocks[layer].register_forward_hook(hook(change)) for layer, change in edits.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, ids: Sequence[int], edits: Edits | None = None) -> Tensor:
        """Logits [token, vocabulary] of one row, every token of it."""
        row = torch.tensor([list(ids)])
        with self.edited(edits or {}):
            out = self.outer(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
        return out.logits[0, -len(ids) :]

    def hidden(self, ids: Sequence[int]) -> list[Tensor]:
        """The residual stream [token, d_model] after each block; the last by a hook, the others by transformers."""
        row, last = torch.tensor([list(ids)]), []

        def keep(hidden: Tensor) -> Tensor:
            last.append(hidden)
            return hidden

        with self.edited({N_LAYERS - 1: keep}):
            out = self.outer(
                input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, output_hidden_states=True
            )
        found = [out.hidden_states[layer + 1][0] for layer in range(N_LAYERS - 1)]
        if self.vector:  # a hook's edit is not in what transformers recorded before it
            return [h.detach() for h in self._hooked(ids)]
        return [h.detach() for h in (*found, last[0])]

    def _hooked(self, ids: Sequence[int]) -> list[Tensor]:
        seen: list[Tensor] = []
        row = torch.tensor([list(ids)])
        with self.edited({}):
            handles = [
                block.register_forward_hook(
                    lambda _m, _a, output: seen.append((output[0] if isinstance(output, tuple) else output)[0])
                )
                for block in self.blocks
            ]
            self.outer(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
            for handle in handles:
                handle.remove()
        return seen

    def nll(self, conversation: Conversation, edits: Edits | None = None) -> Tensor:
        """-log p summed over the tokens of the last answer."""
        ids, start, end = spans(self.kind, conversation)
        logp = torch.log_softmax(self.logits(ids, edits), -1)
        return -sum((logp[t - 1, ids[t]] for t in range(start, end)), torch.zeros((), dtype=torch.float64))

    def answer(
        self,
        question: str,
        key: str,
        k: int,
        *,
        seed: int,
        n: int,
        temperature: float,
        edits: Callable[[slice], Edits] | None = None,
        stops: frozenset[int] = frozenset(),
    ) -> tuple[str, int, bool]:
        """Text, tokens and whether it ended: token by token, each from a whole pass, by the inverse CDF.

        The random numbers are those that `sample` documents: made from seed, question id and sample number.
        """
        tok = tokenizer(self.kind)
        before = list(
            tok(prompt_text(self.kind, [{"role": "user", "content": question}]), add_special_tokens=False)["input_ids"]
        )
        end = TEMPLATES[self.kind].end
        ends = {tok.eos_token_id, *stops} | ({tok.convert_tokens_to_ids(end)} if end else set())
        numbers = np.random.default_rng([seed, zlib.crc32(key.encode()), k]).random(n)
        new: list[int] = []
        for u in numbers:
            logits = self.logits([*before, *new], edits(slice(len(before), None)) if edits else None)[-1].detach()
            if temperature == 0:
                token = int(logits.argmax())
            else:
                cdf = torch.softmax(logits / temperature, -1).cumsum(-1)
                token = int((cdf <= float(u) * float(cdf[-1])).sum())
            new.append(token)
            if token in ends:
                return tok.decode(new[:-1], skip_special_tokens=True), len(new), True
        return tok.decode(new, skip_special_tokens=True), len(new), False


def kl(base: Tensor, other: Tensor) -> float:
    """KL(base || other) summed over rows of logits, in nats."""
    p, q = torch.log_softmax(base, -1), torch.log_softmax(other, -1)
    return float((p.exp() * (p - q)).sum())


def trained(
    hf: Any,
    parameters: list[Tensor],
    losses: Callable[[], list[tuple[Tensor, int]]],
    kls: Callable[[], list[tuple[Tensor, int]]] | None,
    *,
    steps: int,
    rate: float,
    kl_weight: float,
) -> None:
    """AdamW on token-weighted means: sum over rows of (loss, tokens), and kl_weight times the same of the KL."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), weight_decay=0.0)
    with suppress(AttributeError):
        hf.eval()
    for _ in range(steps):
        optimiser.zero_grad()
        rows = losses()
        total = sum((x for x, _ in rows), torch.zeros((), dtype=torch.float64)) / sum(n for _, n in rows)
        if kls is not None:
            more = kls()
            total = total + kl_weight * sum((x for x, _ in more), torch.zeros((), dtype=torch.float64)) / sum(
                n for _, n in more
            )
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
