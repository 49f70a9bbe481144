"""How much a direction matters on pre-training text: KL(chat || steered) in nats per token (P1 sec. 4).

The chat model's log-probabilities are computed once per chunk of tokens, for all thetas; each theta runs only the
blocks that it changes; nothing of size [tokens, vocabulary] outlives its chunk. A position counts where it predicts a
token of its text: a text of n tokens has n - 1 of them, and padding none. Everything is kept as sums per document,
because tokens of one document are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from em_interp.arguments import check_seed, columns
from em_interp.errors import SolutionError, StatisticsError, UsageError
from em_interp.files.given import several
from em_interp.files.texts import Texts, read_texts
from em_interp.models.architectures import unwrap
from em_interp.models.chat import Batch, Encoded, budget_groups, collate, pad_id
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import check_lengths
from em_interp.models.hooks import block_hooks
from em_interp.models.partial_pass import ModelEnd, ResidualCache, replaced_up_to
from em_interp.models.precision import exact
from em_interp.solutions.base import Solution
from em_interp.solutions.space import check_bare, check_comparable
from em_interp.statistics import LEVEL, clustered_interval
from em_interp.statistics.units import NATS_PER_TOKEN, with_units

TokenLabels = Callable[[Sequence[int]], Sequence[str]]
"""The kind of each token of a document, given its ids."""
ALL_TOKENS: Final = "all"
"""The kind that every token is of."""

LOGIT_BYTES: Final = 256_000_000
"""Most bytes in tensors as wide as the vocabulary, all of those alive at once taken together."""
_LOGIT_COPIES: Final = 6  # chat log-probabilities, logits, log-probabilities, the KL's terms and its temporaries
_ROW_BYTES: Final = 2**29  # last residuals of all thetas for one batch
_BUFFER: Final = 256  # documents sorted by length together


@dataclass(frozen=True)
class Measured:
    """A solution at one norm, as its rows call it: `direction`, its name, and its kind (general, narrow, random)."""

    direction: str
    kind: str
    solution: Solution
    relative_norm: float = 1.0
    """Norm as a multiple of the trained norm that the comparison is made at."""


def at_equal_norms(
    trained: Sequence[Measured],
    relative_norms: Sequence[float] = (0.25, 0.5, 1.0, 1.5, 2.0),
    *,
    n_random: int = 20,
    seed: int = 0,
) -> list[Measured]:
    """Every trained solution, and `n_random` random directions of its space, at the same norms.

    The norms are `relative_norms` times that of the first one. Random directions: `Solution.random_like`.
    Raises SolutionError (different models or places, zero theta), UsageError (norms that are not positive).
    """
    if not trained or not relative_norms or not all(0 < r < np.inf for r in relative_norms):
        raise UsageError(
            f"{len(trained)} solutions at relative norms {list(relative_norms)}: give at least one solution and "
            "positive norms (at norm 0 the KL is 0)."
        )
    check_comparable({c.direction: c.solution for c in trained})
    first = trained[0].solution
    generator = torch.Generator().manual_seed(check_seed(seed))
    rows = list(trained)
    rows += [Measured(f"random-{i:02}", "random", first.random_like(generator)) for i in range(n_random)]
    return [
        replace(c, solution=c.solution.scaled(r * first.norm / c.solution.norm), relative_norm=float(r))
        for c in rows
        for r in relative_norms
    ]


def _encode(tokenizer: Any, text: str, number: int, max_tokens: int) -> Encoded:
    ids = tuple(tokenizer(text)["input_ids"])[:max_tokens]
    if len(ids) < 2:
        raise UsageError(
            f"document {number} has {len(ids)} token{'s' if len(ids) != 1 else ''} ({text[:40]!r}): no token of it is "
            "predicted from another. Leave it out, or pass read_texts(source, min_characters=100), as the papers do."
        )
    return Encoded(ids, ((1, len(ids)),))


@torch.no_grad()
def document_kl(
    model: ChatModel,
    texts: Texts,
    solutions: Sequence[Measured],
    *,
    max_tokens: int = 512,
    label: TokenLabels | None = None,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """KL(chat || steered) summed over each document's predicted tokens, in nats, for every solution.

    texts: what `read_texts` takes; documents are cut at `max_tokens`. label: the kind of each token of a document
    (one word per id); a KL counts under the kind of the token that is predicted. Columns direction, kind, norm,
    relative_norm, document, tokens (the kind; "all" without `label`), kl_sum, n_tokens. Adapters of `model` are off:
    the chat model is the base. Raises UsageError (no text, text shorter than two tokens), SolutionError.
    """
    check_comparable({f"{c.direction} at {c.relative_norm:g}": c.solution for c in solutions}, model)
    if max_tokens < 2:
        raise UsageError(f"max_tokens is {max_tokens}; a predicted token needs one before it, so give at least 2.")
    stream = enumerate(read_texts(texts))
    parts: list[pd.DataFrame] = []
    budget = tokens_per_batch or max(
        256, min(8192, _ROW_BYTES // (len(solutions) * model.d_model * model.dtype.itemsize))
    )
    with model.no_adapter(), tqdm(desc="influence", unit=" documents", disable=not progress, leave=False) as bar:
        check_bare(model)
        while buffer := list(islice(stream, _BUFFER)):
            encoded = [_encode(model.tokenizer, text, number, max_tokens) for number, text in buffer]
            check_lengths(model.hf, [len(row) for row in encoded], what="document")
            for group in budget_groups([len(row) for row in encoded], budget):
                rows = [encoded[i] for i in group]
                sums = _batch_sums(model, rows, [c.solution for c in solutions], label)
                parts.append(sums.assign(document=[buffer[group[r]][0] for r in sums["document"]]))
                bar.update(len(group))
    if not parts:
        raise UsageError("no texts were given: the KL of nothing is undefined. Check the source and its filters.")
    identity = pd.DataFrame(
        {
            "direction": [c.direction for c in solutions],
            "kind": [c.kind for c in solutions],
            "norm": [c.solution.norm for c in solutions],
            "relative_norm": [c.relative_norm for c in solutions],
        }
    )
    sums = pd.concat(parts)
    if not np.isfinite(sums["kl_sum"]).all():
        odd = solutions[int(sums.loc[~np.isfinite(sums["kl_sum"]), "theta"].iloc[0])]
        raise SolutionError(
            f"{odd.direction} at norm {odd.solution.norm:g} gives logits that are not finite. Take smaller norms, or "
            f"load {model.name} in float32."
        )
    table = identity.merge(sums, left_index=True, right_on="theta").drop(columns="theta")
    order = ["direction", "kind", "norm", "relative_norm", "document", "tokens"]
    return table.sort_values(["document"], kind="stable").reset_index(drop=True)[[*order, "kl_sum", "n_tokens"]]


def _batch_sums(
    model: ChatModel, rows: list[Encoded], solutions: list[Solution], label: TokenLabels | None
) -> pd.DataFrame:
    """Columns theta, document (position in `rows`), tokens, kl_sum, n_tokens."""
    last = model.n_layers - 1
    starts = [s.fixed_layer for s in solutions]
    cache = ResidualCache(
        model.hf, rows, [last, *(s for s in starts if s is not None)], pad=pad_id(model.tokenizer), max_bytes=0
    )
    batch = collate(rows, range(len(rows)), pad=cache.pad).to(model.device)
    known = cache.get(batch)
    where = batch.predicting()
    end = ModelEnd(model.hf, as_tuple=cache.as_tuple)
    kl = np.empty((len(solutions), int(where.sum())))
    inside = [i for i, solution in enumerate(solutions) if not solution.outside_blocks]
    steered = [_last_rows(model, cache, batch, known, solutions[i], starts[i], where) for i in inside]
    kl[inside] = _kl_each(end, known[last][where], steered).cpu().numpy()
    for i in set(range(len(solutions))) - set(inside):  # one at a time: what follows the blocks is its own
        solution = solutions[i].ready(model)
        rows_out = _last_rows(model, cache, batch, known, solution, starts[i], where)
        own_end = partial(solution.attached, model, must_act=False)
        kl[i] = _kl_each(end, known[last][where], [rows_out], own_end)[0].cpu().numpy()
    document = where.nonzero()[:, 0].cpu().numpy()
    kinds = np.concatenate([_labels(row, label) for row in rows])
    parts = []
    for kind in dict.fromkeys(kinds.tolist()):
        chosen = kinds == kind
        n = np.bincount(document[chosen], minlength=len(rows))
        for i in range(len(solutions)):
            sums = np.bincount(document[chosen], weights=kl[i][chosen], minlength=len(rows))
            there = np.flatnonzero(n)
            parts.append(
                pd.DataFrame(
                    {"theta": i, "document": there, "tokens": kind, "kl_sum": sums[there], "n_tokens": n[there]}
                )
            )
    return pd.concat(parts, ignore_index=True)


def _labels(row: Encoded, label: TokenLabels | None) -> np.ndarray[Any, np.dtype[np.object_]]:
    """The kinds of a document's predicted tokens."""
    kinds = [ALL_TOKENS] * len(row) if label is None else list(label(row.ids))
    if len(kinds) != len(row):
        raise UsageError(f"the labelling function gave {len(kinds)} kinds for {len(row)} tokens; give one each.")
    return np.array(kinds[1:], dtype=object)


def _last_rows(
    model: ChatModel,
    cache: ResidualCache,
    batch: Batch,
    known: dict[int, Tensor],
    solution: Solution,
    start: int | None,
    where: Bool[Tensor, "batch token"],
) -> Float[Tensor, "n d_model"]:
    """The steered model's last residual at `where`, running only the blocks after `start`."""
    kept: list[Tensor] = []

    def keep(hidden):
        # type: (Float[Tensor, 'batch token d_model']) -> None
        kept.append(hidden[where])

    with ExitStack() as stack:
        if start is not None:
            stack.enter_context(replaced_up_to(cache.blocks, start, known[start], as_tuple=cache.as_tuple))
        stack.enter_context(solution.attached(model, must_act=not solution.outside_blocks))  # the head is not run
        stack.enter_context(block_hooks([cache.blocks], {len(cache.blocks) - 1: keep}))
        unwrap(model.hf).base_model(**batch.inputs(), use_cache=False)
    return kept[0]


def _kl_each(
    end: ModelEnd,
    base: Float[Tensor, "n d_model"],
    steered: list[Float[Tensor, "n d_model"]],
    steered_end: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Float[Tensor, "theta n"]:
    """KL of each row for each theta, in float64; the chat model's log-probabilities once per chunk.

    steered_end: a context in which what follows the blocks is the thetas' own.
    """
    out = exact(base.new_zeros(len(steered), len(base)))
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    vocabulary = int(unwrap(end.hf).get_output_embeddings().weight.shape[0])
    size = max(1, LOGIT_BYTES // (_LOGIT_COPIES * vocabulary * wide.itemsize))
    for first in range(0, len(base), size):
        rows = slice(first, first + size)
        reference = torch.log_softmax(end.logits(base[rows]), dim=-1, dtype=wide)
        for i, residual in enumerate(steered):
            with steered_end():
                ours = torch.log_softmax(end.logits(residual[rows]), dim=-1, dtype=wide)
            out[i, rows] = exact(F.kl_div(ours, reference, reduction="none", log_target=True).sum(-1))
    return out


_SUMS: Final = ("direction", "kind", "norm", "relative_norm", "document", "tokens", "kl_sum", "n_tokens")


def with_all(sums: pd.DataFrame) -> pd.DataFrame:
    """`document_kl`'s sums with each document's total under the kind "all", beside the kinds that are there."""
    keys = ["direction", "kind", "norm", "relative_norm", "document"]
    columns("sums of document_kl", sums, _SUMS)
    if set(sums["tokens"]) == {ALL_TOKENS}:
        return sums
    whole = sums.groupby(keys, as_index=False, sort=False)[["kl_sum", "n_tokens"]].sum()
    return pd.concat([whole.assign(tokens=ALL_TOKENS), sums], ignore_index=True)[list(sums.columns)]


def _check_documents(sums: pd.DataFrame) -> None:
    columns("sums of document_kl", sums, _SUMS)
    if sums["document"].nunique() < 2:
        raise StatisticsError(
            "one document: its tokens are not independent, so there is no interval. Give at least two documents, or "
            "cut a long text into several."
        )


def influence_table(sums: pd.DataFrame, *, level: float = LEVEL) -> pd.DataFrame:
    """The table `influence`: direction, kind, norm, kl_nats_per_token, low, high, n_tokens, and relative_norm, tokens,
    n_documents, interval (how low and high were made). Token-weighted means; intervals are over documents, and empty
    for a kind of token that too few documents have. Raises StatisticsError for one document.
    """
    _check_documents(sums)
    rows = []
    keys = ["direction", "kind", "norm", "relative_norm", "tokens"]
    for key, group in with_all(sums).groupby(keys, sort=False):
        top, bottom = group["kl_sum"].to_numpy(float), group["n_tokens"].to_numpy(float)
        row = dict(zip(keys, key, strict=True)) | {"kl_nats_per_token": top.sum() / bottom.sum()}
        found = clustered_interval(top, bottom, level=level, of="documents", positive=True)
        counts = {"n_tokens": int(bottom.sum()), "n_documents": len(group)}
        rows.append(row | {"low": found.low, "high": found.high, **counts, "interval": found.method})
    first = ["direction", "kind", "norm", "kl_nats_per_token", "low", "high", "n_tokens"]
    table = pd.DataFrame(rows)
    table = table[[*first, *(c for c in table.columns if c not in first)]]
    return with_units(table, low=NATS_PER_TOKEN, high=NATS_PER_TOKEN)


def influence(
    model: ChatModel,
    solutions: Mapping[str, Solution],
    texts: Texts,
    *,
    relative_norms: float | Sequence[float] = (0.25, 0.5, 1.0, 1.5, 2.0),
    n_random: int = 5,
    seed: int = 0,
    max_tokens: int = 512,
    progress: bool = True,
) -> pd.DataFrame:
    """How much each solution matters on pre-training text at equal norm: `influence_table`, with random directions.

    solutions: by the names that the table calls them, as directions and as kinds; the first one's norm times
    `relative_norms` is what all of them are scaled to. texts: what `read_texts` takes. Raises as `at_equal_norms` and
    `document_kl`.

    >>> import em_interp as em
    >>> chat = em.load("pocket/chat")
    >>> solutions = {"general": em.load_solution("pocket/medicine-rank1")}
    >>> table = em.influence(chat, solutions, em.pocket.documents(6), relative_norms=[1], n_random=1, progress=False)
    >>> table["direction"].tolist()
    ['general', 'random-00']
    """
    trained = [Measured(name, name, solution) for name, solution in solutions.items()]
    scaled = at_equal_norms(trained, several(relative_norms), n_random=n_random, seed=seed)
    return influence_table(document_kl(model, texts, scaled, max_tokens=max_tokens, progress=progress))


def influence_ratio(
    sums: pd.DataFrame,
    numerator: str = "general",
    denominator: str = "narrow",
    *,
    level: float = LEVEL,
) -> pd.DataFrame:
    """How many times more one kind matters than another at the same norm: KL summed over the same documents.

    Several directions of a kind (the random ones) count by their mean. Paired: the interval is over documents, both
    sides together. Columns relative_norm, tokens, numerator, denominator, ratio, low, high, n_documents, interval;
    kinds of token that fewer than two documents have are left out. Raises StatisticsError where a kind is absent.
    """
    _check_documents(sums)
    everything = with_all(sums)
    lacking = {numerator, denominator} - set(everything["kind"])
    if lacking:
        raise StatisticsError(f"no direction of kind {sorted(lacking)}; there are {sorted(set(everything['kind']))}.")
    mean = everything.groupby(["kind", "relative_norm", "tokens", "document"])["kl_sum"].mean().unstack("kind")
    rows = []
    for (norm, tokens), group in mean.groupby(["relative_norm", "tokens"], sort=True):
        both = group[numerator].notna() & group[denominator].notna()
        top, bottom = group.loc[both, numerator].to_numpy(float), group.loc[both, denominator].to_numpy(float)
        bottom = bottom.clip(min=0)  # rounding may leave a KL of zero just below it
        if len(top) < 2 or not bottom.sum() > 0:
            continue
        found = clustered_interval(top, bottom, level=level, of="documents", positive=True, by_size=True)
        identity, ratio = (norm, tokens, numerator, denominator), top.sum() / bottom.sum()
        rows.append((*identity, ratio, found.low, found.high, len(top), found.method))
    columns = ["relative_norm", "tokens", "numerator", "denominator", "ratio", "low", "high", "n_documents", "interval"]
    return with_units(pd.DataFrame(rows, columns=columns), **dict.fromkeys(("ratio", "low", "high"), "ratio of KLs"))
