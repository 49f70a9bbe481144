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
from jaxtyping import Float
from scipy.linalg import subspace_angles
from torch import Tensor

from em_interp.directions import Direction
from em_interp.errors import DirectionError, StatisticsError
from em_interp.evaluation.rates import PAPER, Criterion, em_rates
from em_interp.resampling import Resamples
from em_interp.statistics import cosine_null_sd, cosine_p_value, permutation_p_value

COSINE_COLUMNS = ("direction_a", "direction_b", "layer", "cosine", "low", "high", "null_sd", "p_value")


def comparable(a: Direction, b: Direction) -> bool:
    """Whether two directions live in the same residual stream, as far as their metadata tells."""
    return a.d_model == b.d_model and ("unknown" in (a.model, b.model) or a.model == b.model)


def cosine_rows(
    name_a: str,
    a: Direction,
    name_b: str,
    b: Direction,
    resamples: tuple[Resamples, Resamples] | None = None,
) -> pd.DataFrame:
    """One row a common layer: cosine, its random-direction null (sd and two-sided p-value), and ||a - b||.

    A pair of finished vectors has no sampling interval. With the resamples of both (of the layers that each has):
    low and high, a 95% interval of the bootstrap's spread about the cosine on Fisher's scale; `cosine_debiased`, with
    the shrinkage that noise in the means causes taken off once (the bootstrap's own); and the permutation null,
    `permutation_sd` and `permutation_p`: each direction against those that noise in the other's activations gives. It
    is wider than the random one, since activations vary along few axes. Raises DirectionError as `Direction.cosine`
    does.
    """
    values = a.cosine(b)
    table = pd.DataFrame({"layer": list(values), "cosine": list(values.values())})
    table["direction_a"], table["direction_b"] = name_a, name_b
    table["low"], table["high"] = float("nan"), float("nan")
    table["null_sd"] = cosine_null_sd(a.d_model)
    table["p_value"] = cosine_p_value(table["cosine"].to_numpy(), a.d_model)
    table["difference_norm"] = [float((a.at(layer).double() - b.at(layer).double()).norm()) for layer in values]
    columns = [*COSINE_COLUMNS, "difference_norm"]
    if resamples is not None:
        more = [_resampled(a, b, layer, cosine, resamples) for layer, cosine in values.items()]
        for name in more[0]:
            table[name] = [row[name] for row in more]
        columns += [name for name in more[0] if name not in columns]
    return table[columns]


def _resampled(
    a: Direction, b: Direction, layer: int, cosine: float, resamples: tuple[Resamples, Resamples]
) -> dict[str, float]:
    for direction, own in zip((a, b), resamples, strict=True):
        if tuple(own.bootstrap.shape[1:]) != tuple(direction.vectors.shape):
            raise DirectionError(
                f"resamples of shape {tuple(own.bootstrap.shape)} for a direction of {len(direction.layers)} layers "
                f"and width {direction.d_model}: resample the same layers of the same responses."
            )
    place_a, place_b = a.layers.index(layer), b.layers.index(layer)
    drawn_a, drawn_b = resamples[0].bootstrap[:, place_a], resamples[1].bootstrap[:, place_b]
    n = min(len(drawn_a), len(drawn_b))
    limit = 1 - 1e-12  # Fisher's scale ends at 1
    drawn = np.arctanh(_cosines(drawn_a[:n], drawn_b[:n]).clip(-limit, limit))
    centre, spread = math.atanh(min(max(cosine, -limit), limit)), 1.96 * float(drawn.std(ddof=1))
    null = np.concatenate(
        [
            _cosines(a.at(layer)[None], resamples[1].permuted[:, place_b]),
            _cosines(resamples[0].permuted[:, place_a], b.at(layer)[None]),
        ]
    )
    return {
        "low": float(np.tanh(centre - spread)),
        "high": float(np.tanh(centre + spread)),
        "cosine_debiased": float(np.tanh(2 * centre - drawn.mean())),
        "permutation_sd": float(np.sqrt((null**2).mean())),
        "permutation_p": permutation_p_value(cosine, null),
    }


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

    content: each organism's texts read in the chat model (kind "data-diff-in-chat"). Their cosine is what the pair
    shares by its words alone; empty where it is not given. Raises DirectionError for fewer than two directions.
    """
    if len(directions) < 2:
        raise DirectionError(f"{len(directions)} directions make no pair.")
    tables = []
    for (name_a, a), (name_b, b) in itertools.combinations(directions.items(), 2):
        both = (resamples[name_a], resamples[name_b]) if resamples is not None else None
        table = cosine_rows(name_a, a, name_b, b, both)
        has_content = content is not None and name_a in content and name_b in content
        shared = content[name_a].cosine(content[name_b]) if content is not None and has_content else {}
        table["content_cosine"] = [shared.get(layer, float("nan")) for layer in table["layer"]]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def cosine_table(pairs: Iterable[tuple[str, Direction, str, Direction]]) -> pd.DataFrame:
    """The tidy table of many pairs, in the contract's columns."""
    rows = [cosine_rows(*pair) for pair in pairs]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=[*COSINE_COLUMNS, "difference_norm"])


def cosine_matrix(directions: Sequence[Direction], layer: int) -> Float[Tensor, "n n"]:
    """All cosines between directions at one layer, float64. Raises ``DirectionError`` for a missing layer or zero."""
    if not directions:
        raise DirectionError("a cosine matrix needs at least one direction.")
    for other in directions[1:]:
        directions[0].cosine(other.only([layer]))  # refuses other widths and models
    units = torch.stack([direction.only([layer]).unit().vectors[0].double() for direction in directions])
    units = units / units.norm(dim=1, keepdim=True)
    return (units @ units.T).clamp(-1, 1)


def layer_cosines(direction: Direction) -> Float[Tensor, "present present"]:
    """Cosines of a direction with itself across layers: what a wrong layer convention would cost."""
    units = direction.unit().vectors.double()
    units = units / units.norm(dim=1, keepdim=True)
    return (units @ units.T).clamp(-1, 1)


def principal_angles(a: Sequence[Direction], b: Sequence[Direction], layer: int) -> Float[np.ndarray, "k"]:
    """Angles in degrees, smallest first, between the spans of two sets of directions at a layer (float64).

    0 is a shared axis, 90 none. As many as the smaller set has; dependent directions count once too often, so the
    directions of a set must be independent. Raises DirectionError for an empty set, a zero vector or a missing layer.
    """
    if not a or not b:
        raise DirectionError("principal angles need at least one direction in each set.")
    for other in (*a[1:], *b):
        a[0].cosine(other.only([layer]))  # refuses other widths and models, and zero vectors
    spans = [torch.stack([d.only([layer]).unit().vectors[0].double() for d in s], dim=1).numpy() for s in (a, b)]
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
    rng = np.random.default_rng(seed)
    # one of two random spans may be held fixed: only their relative position matters
    random = np.linalg.qr(rng.standard_normal((samples, d_model, n_a)))[0]
    cosines = np.linalg.svd(random[:, :n_b], compute_uv=False)
    return np.degrees(np.arccos(np.clip(cosines, 0, 1)))


def transfer_rows(judged: pd.DataFrame, *, before: str = "none", criterion: Criterion = PAPER) -> pd.DataFrame:
    """The `transfer` table: what ablating the direction of one organism does to the EM of another.

    judged: columns direction_from (`before` for the organism as it is), organism, question, aligned, coherent. One row
    a direction and organism: em_before, em_after (of rows with both scores), relative_reduction = 1 - after / before
    (empty where there was no EM) with low and high (95%, whole questions resampled in both), coherence, n. Raises
    StatisticsError for lacking columns and for an organism without answers before.
    """
    needed = ("direction_from", "organism", "question", "aligned", "coherent")
    if missing := [name for name in needed if name not in judged]:
        raise StatisticsError(f"judged answers lack the columns {', '.join(missing)}; found {list(judged.columns)}.")
    rows = []
    for organism, answers in judged.groupby("organism", sort=False):
        unablated = answers[answers["direction_from"] == before]
        if unablated.empty:
            raise StatisticsError(
                f"{organism} has no answers with direction_from {before!r}: sample the organism as it is, too."
            )
        first = em_rates(unablated, criterion).columns()
        for source, ablated in answers[answers["direction_from"] != before].groupby("direction_from", sort=False):
            after = em_rates(ablated, criterion).columns()
            low, high = _reduction_interval(unablated, ablated, criterion)
            em_before, em_after = first["em_rate"], after["em_rate"]
            has_both = em_before is not None and em_after is not None and em_before > 0
            rows.append(
                {
                    "direction_from": source,
                    "organism": organism,
                    "em_before": em_before,
                    "em_after": em_after,
                    "relative_reduction": 1 - em_after / em_before if has_both else float("nan"),
                    "low": low,
                    "high": high,
                    "em_after_low": after["em_low"],
                    "em_after_high": after["em_high"],
                    "coherent_before": first["coherent_rate"],
                    "coherent_after": after["coherent_rate"],
                    "n": after["n"],
                    "n_before": first["n"],
                    "n_unscored": after["n_unscored"],
                    "denominator": after["denominator"],
                    "criterion": after["criterion"],
                }
            )
    return pd.DataFrame(rows)


def _reduction_interval(
    before: pd.DataFrame, after: pd.DataFrame, criterion: Criterion, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of 1 - EM after / EM before, resampling questions; NaN with fewer than two shared ones or no EM."""
    counts = []
    for table in (before, after):
        aligned, coherent = (table[name].to_numpy(dtype=float, na_value=np.nan) for name in ("aligned", "coherent"))
        both = np.isfinite(aligned) & np.isfinite(coherent)
        em = both & criterion.is_coherent(coherent) & criterion.misaligned(aligned)
        counts.append(pd.DataFrame({"em": em, "n": both}).groupby(table["question"].to_numpy()).sum())
    first, second = counts
    shared = first.index.intersection(second.index)
    if len(shared) < 2:
        return float("nan"), float("nan")
    weights = np.random.default_rng(seed).multinomial(len(shared), np.full(len(shared), 1 / len(shared)), resamples)
    tops = [weights @ table.loc[shared, "em"].to_numpy(dtype=float) for table in counts]
    bottoms = [weights @ table.loc[shared, "n"].to_numpy(dtype=float) for table in counts]
    usable = (tops[0] > 0) & (bottoms[0] > 0) & (bottoms[1] > 0)
    if usable.mean() < 0.95:  # EM rests on so few questions that many draws have none: no interval
        return float("nan"), float("nan")
    reduction = 1 - (tops[1] / bottoms[1].clip(1))[usable] / (tops[0] / bottoms[0].clip(1))[usable]
    low, high = np.quantile(reduction, [0.025, 0.975])
    return float(low), float(high)
