"""Log-probabilities of tokens as they are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one sampled token, in nats at temperature 1: its id `token`, its `logprob`, those of the likeliest there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """Id and log-probability, the likeliest first."""


class Recorder:
    """Looks on while rows are generated, and changes nothing.

    top: how many likeliest tokens to write down. found: of each row, one entry a token.
    """

    def __init__(self, top: int, rows: int) -> None:
        self.top = top
        self.found: list[list[TokenLogprobs]] = [[] for _ in range(rows)]
        self._rows: Sequence[int] = ()
        self._last: Float[Tensor, "rows vocab"] | None = None

    def of(self, rows: Sequence[int]) -> Recorder:
        """For the next `generate`, which has these rows alone."""
        self._rows = rows
        return self

    def __call__(
        self, input_ids: Int[Tensor, "rows token"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        """A logits processor of transformers: the token that was chosen last is the end of `input_ids`."""
        self.settle(input_ids[:, -1])
        self._last = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def settle(self, chosen: Int[Tensor, " rows"]) -> None:
        """Write down what was chosen at the last step, if it is still open."""
        if self._last is None:
            return
        of_chosen = self._last.gather(1, chosen[:, None])[:, 0].tolist()
        values, ids = self._last.topk(self.top, dim=-1) if self.top else (self._last[:, :0], self._last[:, :0].long())
        for place, row in enumerate(self._rows):
            top = tuple(zip(ids[place].tolist(), values[place].tolist(), strict=True))
            self.found[row].append(TokenLogprobs(int(chosen[place]), of_chosen[place], top))
        self._last = None
