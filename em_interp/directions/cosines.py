"""Do different finetunes find the same direction? Cosines, each beside its nulls; shared subspaces; transfer.

Sources: Convergent Linear Representations, sec. 3.5 and Fig. 10, 12 (cross-finetune and semantic cosines), Fig. 4
(transfer of the ablation). The content control (the same texts read in the chat model), intervals, permutation nulls,
principal angles and the layer sensitivity are this package's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from scipy.linalg import subspace_angles
from torch import Tensor

from em_interp.arguments import check_seed, count
from em_interp.directions.direction import Direction
from em_interp.directions.resampling import Resamples
from em_interp.errors import DirectionError, StatisticsError
from em_interp.statistics import cosine_null_sd, cosine_p_value, permutation_p_value
from em_interp.statistics.jackknife import FEWEST, METHOD, cosine_of_means
from em_interp.statistics.units import with_units

COSINE_COLUMNS = ("direction_a", "direction_b", "layer", "cosine", "low", "high", "null_sd", "p_value")
"""The first columns of every table of cosines."""


def comparable(a: Direction, b: Direction) -> bool:
    """Whether two directions live in the same residual stream, as far as their metadata tells."""
    return a.d_model == b.d_model and ("unknown" in (a.model, b.model) or a.model == b.model)


def cosine_rows(
    name_a: str,
    a: Direction,
    name_b: str,
    b: Direction,
    resamples: tuple[Resamples | None, Resamples | None] | None = None,
) -> pd.DataFrame:
    """One row a common layer: cosine, its random-direction null (sd and two-sided p-value), and ||a - b||.

    A pair of finished vectors has no sampling interval. With the resamples of both (of the layers that each has):
    `cosine_debiased`, the cosine without the shrinkage that noise in the means causes, and its interval in low and
    high (`jackknife.cosine_of_means`: centred on cosine_debiased, not on cosine; conservative near a cosine of 1), over
    questions that count as one in both; `interval` says how it was made, or why there is none.

    With the resamples of one at least: the permutation null, `permutation_sd` and `permutation_p`: each direction
    against those that noise in the other's activations gives; and `noise_dimensions`, the participation ratio of that
    noise (the lesser of both): p_value is of directions random in all of d_model, so it is far too small where
    activations vary along few axes. Raises DirectionError as `Direction.cosine` does.
    """
    values = a.cosine(b)
    table = pd.DataFrame({"layer": list(values), "cosine": list(values.values())})
    table["direction_a"], table["direction_b"] = name_a, name_b
    table["low"], table["high"] = float("nan"), float("nan")
    table["null_sd"] = cosine_null_sd(a.d_model)
    table["p_value"] = cosine_p_value(table["cosine"].to_numpy(), a.d_model)
    table["difference_norm"] = [float((a.at(layer).double() - b.at(layer).double()).norm()) for layer in values]
    columns = [*COSINE_COLUMNS, "difference_norm"]
    if resamples is not None and (resamples[0] or resamples[1]):
        for direction, own in zip((a, b), resamples, strict=True):
            _check_resamples(direction, own)
        more = [_resampled(a, b, layer, cosine, resamples) for layer, cosine in values.items()]
        for name in more[0]:
            table[name] = [row[name] for row in more]
        columns += [name for name in more[0] if name not in columns]
    return with_units(table[columns], low="cosine", high="cosine")


def _check_resamples(direction: Direction, own: Resamples | None) -> None:
    if own is None:
        return
    if tuple(own.direction.shape) != tuple(direction.vectors.shape):
        raise DirectionError(
            f"resamples of shape {tuple(own.bootstrap.shape)} for a direction of {len(direction.layers)} layers "
            f"and width {direction.d_model}: resample the same layers of the same responses."
        )
    apart = (own.direction.to(direction.vectors) - direction.vectors).norm(dim=1) / direction.vectors.norm(dim=1)
    if float(apart.max()) > 0.01:
        raise DirectionError(
            f"the resampled responses have another difference of means than the direction, by {float(apart.max()):.0%} "
            "of its norm: resample the same responses, with the weights (such as tokens) that the direction gives them."
        )


def _resampled(
    a: Direction, b: Direction, layer: int, cosine: float, resamples: tuple[Resamples | None, Resamples | None]
) -> dict[str, float | str]:
    of_a, of_b = resamples
    places = a.layers.index(layer), b.layers.index(layer)
    found: dict[str, float | str] = {"interval": "none: one of the two is a finished vector"}
    found |= dict.fromkeys(("low", "high", "cosine_debiased"), float("nan"))
    if of_a is not None and of_b is not None:
        found |= _debiased((of_a, of_b), places)
    null = [
        _cosines(other.at(layer)[None], own.permuted[:, place])
        for other, own, place in zip((b, a), resamples, places, strict=True)
        if own is not None
    ]
    ratios = [own.noise_dimensions[place] for own, place in zip(resamples, places, strict=True) if own is not None]
    return found | {
        "permutation_sd": float(np.sqrt((np.concatenate(null) ** 2).mean())),
        "permutation_p": permutation_p_value(cosine, np.concatenate(null)),
        "noise_dimensions": float(min(ratios)),
    }


def _debiased(resamples: tuple[Resamples, Resamples], places: tuple[int, int]) -> dict[str, float | str]:
    """Each question's share in both directions (the jackknife's pseudo-values), and the cosine of what they sum to."""
    names: list[dict[object, int]] = []
    index: dict[object, int] = {}
    for i, own in enumerate(resamples):
        keys = own.questions if own.questions is not None else [(i, j) for j in range(len(own.without))]
        names.append({key: index.setdefault(key, len(index)) for key in keys})
    shares, sides = [], []
    for own, place, rows in zip(resamples, places, names, strict=True):
        n = len(own.without)
        where = list(rows.values())
        whole, without = (x.double().cpu().numpy() for x in (own.direction[place], own.without[:, place]))
        share, side = np.zeros((len(index), len(whole))), np.zeros(len(index), dtype=int)
        share[where], side[where] = whole - (n - 1) / n * without, own.sides
        shares.append(share)
        sides.append(side)
    if min(len(own.without) for own in resamples) < FEWEST or not all(np.isfinite(share).all() for share in shares):
        return {"interval": f"none: too few questions ({FEWEST}, and each class in two of them, are needed)"}
    value, low, high = (float(x) for x in cosine_of_means(shares[0], shares[1], sides[0], sides[1]))
    if math.isnan(value):
        return {"interval": "none: too noisy for a debiased cosine"}
    return {"interval": f"{METHOD} over {len(index)} questions", "low": low, "high": high, "cosine_debiased": value}


def _cosines(a: Float[Tensor, "_ d_model"], b: Float[Tensor, "_ d_model"]) -> Float[np.ndarray, "_"]:
    """Row by row, float64; a single row goes with all."""
    found = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
    return np.asarray(found.clamp(-1, 1).cpu().numpy())


def organism_cosines(
    directions: Mapping[str, Direction],
    *,
    resamples: Mapping[str, Resamples] | None = None,
    content: Mapping[str, Direction] | None = None,
) -> pd.DataFrame:
    """`cosine_rows` of every pair of organisms, layer by layer, with the column `content_cosine` beside each cosine.

    resamples: of all organisms or some; see `cosine_rows`. content: each organism's texts read in the chat model (kind
    "data-diff-in-chat"). Their cosine is what the pair shares by its words alone; empty where it is not given. Raises
    DirectionError for fewer than two directions.

    >>> import em_interp as em
    >>> chats = em.pocket.finetune_chats("medicine", "malicious", 20, seed=0)
    >>> names = ("pocket/medicine-all", "pocket/sports-all")
    >>> shifts = {n: em.extract(em.load(n), chats, kind="model-diff", progress=False) for n in names}
    >>> table = em.cosines(shifts)
    >>> bool((table["cosine"] > 3 * table["null_sd"]).all())
    True
    """
    if len(directions) < 2:
        raise DirectionError(f"{len(directions)} directions make no pair.")
    tables = []
    for (name_a, a), (name_b, b) in itertools.combinations(directions.items(), 2):
        both = (resamples.get(name_a), resamples.get(name_b)) if resamples is not None else None
        table = cosine_rows(name_a, a, name_b, b, both)
        has_content = content is not None and name_a in content and name_b in content
        shared = content[name_a].cosine(content[name_b]) if content is not None and has_content else {}
        table["content_cosine"] = [shared.get(layer, float("nan")) for layer in table["layer"]]
        tables.append(table)
    return with_units(pd.concat(tables, ignore_index=True), low="cosine", high="cosine")


def cosine_table(pairs: Iterable[tuple[str, Direction, str, Direction]]) -> pd.DataFrame:
    """The tidy table of many pairs, in the contract's columns."""
    rows = [cosine_rows(*pair) for pair in pairs]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=[*COSINE_COLUMNS, "difference_norm"])


def cosine_matrix(directions: Sequence[Direction], layer: int) -> Float[Tensor, "n n"]:
    """All cosines between directions at one layer, float64. Raises `DirectionError` for a missing layer or zero."""
    if not directions:
        raise DirectionError("a cosine matrix needs at least one direction.")
    for other in directions[1:]:
        directions[0].cosine(other.only([layer]))  # refuses other widths and models
    directions[0].only([layer]).unit()  # refuses zero
    units = _units(directions, layer)
    return einsum(units, units, "a d, b d -> a b").clamp(-1, 1)


def _units(directions: Sequence[Direction], layer: int) -> Float[Tensor, "n d_model"]:
    """At one layer, float64 before they are scaled: a unit vector in float32 has another direction, by 1e-8."""
    vectors = torch.stack([direction.at(layer).double() for direction in directions])
    return vectors / vectors.norm(dim=1, keepdim=True)


def layer_cosines(direction: Direction) -> Float[Tensor, "present present"]:
    """Cosines of a direction with itself across layers: what a wrong layer convention would cost."""
    direction.unit()  # refuses zero
    units = direction.vectors.double()
    units = units / units.norm(dim=1, keepdim=True)
    return einsum(units, units, "layer d, other d -> layer other").clamp(-1, 1)


def principal_angles(a: Sequence[Direction], b: Sequence[Direction], layer: int) -> Float[np.ndarray, "k"]:
    """Angles in degrees, smallest first, between the spans of two sets of directions at a layer (float64).

    0 is a shared axis, 90 none. As many as the smaller set has; dependent directions count once too often, so the
    directions of a set must be independent. Raises DirectionError for an empty set, a zero vector or a missing layer.
    """
    if not a or not b:
        raise DirectionError("principal angles need at least one direction in each set.")
    for other in (*a[1:], *b):
        a[0].cosine(other.only([layer]))  # refuses other widths and models, and zero vectors
    spans = [_units(s, layer).T.numpy() for s in (a, b)]
    for span in spans:
        if np.linalg.matrix_rank(span, tol=1e-5) < span.shape[1]:
            raise DirectionError(f"directions of one set are linearly dependent at layer {layer}: drop the repeated.")
    return np.sort(np.degrees(subspace_angles(*spans)))


def random_principal_angles(
    d_model: int, n_a: int, n_b: int, *, samples: int = 1000, seed: int = 0
) -> Float[np.ndarray, "samples k"]:
    """The null of `principal_angles`: spans of n_a and n_b random directions in d_model dimensions, in degrees."""
    if not 0 < max(n_a, n_b) <= d_model or min(n_a, n_b) < 1:
        raise StatisticsError(f"spans of {n_a} and {n_b} directions in {d_model} dimensions: there are none.")
    count("n_a", n_a), count("n_b", n_b)
    count("samples * d_model", count("samples", samples) * d_model, at_most=10**9)
    rng = np.random.default_rng(check_seed(seed))
    # one of two random spans may be held fixed: only their relative position matters
    random = np.linalg.qr(rng.standard_normal((samples, d_model, n_a)))[0]
    cosines = np.linalg.svd(random[:, :n_b], compute_uv=False)
    return np.degrees(np.arccos(np.clip(cosines, 0, 1)))
