"""Intervals from leaving out one question at a time, for estimates that are no means over questions.

Sources: Efron and Stein (1981, the jackknife's variance), Welch (1947) and Satterthwaite (1946) for the degrees of
freedom, Hoeffding (1948) for the unbiased products of means. Which method serves which estimate was chosen by
simulation: `analyses/benchmarks/coverage_geometry.py`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from einops import einsum
from jaxtyping import Bool, Float, Int
from scipy import stats
from scipy.special import expit, logit

from em_interp.errors import StatisticsError
from em_interp.statistics import LEVEL, Interval, wilson_interval

FEWEST: Final = 3
"""Questions below which leaving one out says nothing."""
METHOD: Final = "conservative jackknife"
"""Its variance errs upwards (Efron and Stein): by a factor of up to two where second-order terms rule it."""


def jackknife_error(
    value: Float[np.ndarray, "*batch"], without: Float[np.ndarray, "*batch k"], strata: Int[np.ndarray, " k"]
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"]]:
    """Standard error of an estimate, and its degrees of freedom.

    without: the estimate without each question. strata: which samples a question has part in, such as answers of one
    class only. Where the error comes from a stratum of few questions, its degrees of freedom are few.
    """
    k = without.shape[-1]
    squares = (k - 1) / k * (without - value[..., None]) ** 2
    members = [strata == stratum for stratum in np.unique(strata)]
    parts = np.stack([squares[..., own].sum(-1) for own in members])
    per_freedom = np.stack([part**2 / max(int(own.sum()) - 1, 1) for part, own in zip(parts, members, strict=True)])
    variance = parts.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        df = np.where(variance > 0, variance**2 / per_freedom.sum(0), k - 1)
    return np.asarray(np.sqrt(variance)), np.asarray(df)


def cosine_of_means(
    a: Float[np.ndarray, "*batch k d"],
    b: Float[np.ndarray, "*batch k d"],
    sides_a: Int[np.ndarray, " k"],
    sides_b: Int[np.ndarray, " k"],
    level: float = LEVEL,
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"]]:
    """Cosine of two vectors that are known with noise, without the shrinkage that noise causes; low and high.

    a, b: the share of each question in both vectors, whose sum over questions is the vector. sides_a, sides_b: 0 where
    a question has no part in a vector (its share is zero), else 1 or 2 (answers of one class only) or 3.

    Products of a question with itself, where noise meets itself, are left out of the inner product and of both squared
    norms (U-statistics, so unbiased). The interval is Student's about that cosine, its error the jackknife's. Within
    [-1, 1]. NaN where a squared norm is not positive, with all questions or without one: the noise is as large as the
    vector.
    """
    in_a, in_b = sides_a > 0, sides_b > 0
    inner, inner_without = _product(a, b, in_a, in_b)
    aa, aa_without = _product(a, a, in_a, in_a)
    bb, bb_without = _product(b, b, in_b, in_b)
    known = (aa > 0) & (bb > 0) & (aa_without > 0).all(-1) & (bb_without > 0).all(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.where(known, inner / np.sqrt(aa * bb), np.nan)
        error, df = jackknife_error(cosine, inner_without / np.sqrt(aa_without * bb_without), sides_a + 4 * sides_b)
    half = stats.t.ppf((1 + level) / 2, df) * error
    low, high = (np.clip(end, -1, 1) for end in (cosine - half, cosine + half))
    return np.asarray(np.clip(cosine, -1, 1)), np.asarray(low), np.asarray(high)


def _product(
    a: Float[np.ndarray, "*batch k d"],
    b: Float[np.ndarray, "*batch k d"],
    in_a: Bool[np.ndarray, " k"],
    in_b: Bool[np.ndarray, " k"],
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch k"]]:
    """Mean inner product over pairs of different questions, scaled to the vectors'; and the same without each question.

    Of n_a * n_b pairs, those of a question with itself are left out.
    """
    n_a, n_b, n_both = int(in_a.sum()), int(in_b.sum()), int((in_a & in_b).sum())
    whole_a, whole_b = a.sum(-2), b.sum(-2)
    same = einsum(a, b, "... k d, ... k d -> ... k")
    whole = einsum(whole_a, whole_b, "... d, ... d -> ...")
    crossed = einsum(a, whole_b, "... k d, ... d -> ... k") + einsum(b, whole_a, "... k d, ... d -> ... k")
    own = same.sum(-1)
    pairs = (n_a - in_a) * (n_b - in_b) - (n_both - (in_a & in_b))
    with np.errstate(invalid="ignore", divide="ignore"):
        without = (whole[..., None] - crossed + same - (own[..., None] - same)) * n_a * n_b / pairs
        return np.asarray((whole - own) * n_a * n_b / (n_a * n_b - n_both)), without


def clustered_auc(
    score: Float[np.ndarray, " n"], label: Int[np.ndarray, " n"], question: Int[np.ndarray, " n"]
) -> tuple[float, Float[np.ndarray, " k"]]:
    """Probability that a score of label 1 exceeds one of label 0 (ties count half), and the same without each question.

    question: numbered from 0. NaN where no pair remains. Raises StatisticsError where a label is missing altogether.
    """
    if not {0, 1} <= set(label.tolist()):
        raise StatisticsError(f"labels {sorted(set(label.tolist()))}: an AUC needs scores of label 0 and of label 1.")
    k = int(question.max()) + 1
    ones, zeros = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    wins = np.zeros((k, k))  # wins[g, h]: pairs of a 1 in question g above a 0 in question h
    for h in range(k):
        below = np.sort(score[zeros[question[zeros] == h]])
        sides = np.searchsorted(below, score[ones], "left") + np.searchsorted(below, score[ones], "right")
        wins[:, h] = np.bincount(question[ones], weights=sides / 2, minlength=k)
    n_ones, n_zeros = (np.bincount(question[side], minlength=k) for side in (ones, zeros))
    pairs = (len(ones) - n_ones) * (len(zeros) - n_zeros)
    with np.errstate(invalid="ignore"):
        without = (wins.sum() - wins.sum(0) - wins.sum(1) + wins.diagonal()) / pairs
    return float(wins.sum() / (len(ones) * len(zeros))), without


def sides_of(label: Int[np.ndarray, " n"], question: Int[np.ndarray, " n"]) -> Int[np.ndarray, " k"]:
    """1 for questions with label 1 only, 2 with label 0 only, 3 with both; questions are numbered from 0."""
    numbers = np.arange(int(question.max()) + 1)
    return np.isin(numbers, question[label == 1]) + 2 * np.isin(numbers, question[label == 0])


def chance_interval(
    value: float,
    without: Float[np.ndarray, " k"],
    strata: Int[np.ndarray, " k"],
    *,
    level: float = LEVEL,
) -> Interval:
    """Interval of a probability whose value by chance is 1/2: an AUC, or the accuracy of a balanced probe.

    Student's on the logit scale, with the jackknife's error. A probe that is scored on answers it was not fitted on may
    come out below 1/2: the folds do not agree on its sign, which says how uncertain it is but not how far from chance
    it lies. Such an interval is mirrored at 1/2, and then conservative. Where leaving out no question changes anything
    (all answers are told apart), it is Wilson's of as many trials as there are questions in the smaller class.

    NaN for fewer than `FEWEST` questions, or a class that one question alone has. Raises StatisticsError for values
    that are not probabilities.
    """
    k = len(without)
    if k < FEWEST or not np.isfinite(without).all():
        return Interval(float("nan"), float("nan"), "none: too few questions")
    if min(value, *without) < 0 or max(value, *without) > 1:
        raise StatisticsError(f"a value of {value:g}, and {without.tolist()} without each question: no probabilities.")
    trials = int(min(np.isin(strata, (side, 3)).sum() for side in (1, 2)))
    edge = 0.5 / (k * trials)
    centre, rest = (np.asarray(logit(np.clip(x, edge, 1 - edge))) for x in (value, without))
    error, df = jackknife_error(centre, rest, strata)
    if error == 0:
        return wilson_interval(round(value * trials), trials, level)
    half = stats.t.ppf((1 + level) / 2, df) * error
    low, high = float(expit(centre - half)), float(expit(centre + half))
    return Interval(low, max(high, 1 - low) if value < 0.5 else high, f"{METHOD} over {k} questions")
