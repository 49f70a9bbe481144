"""Coverage scenarios of what is measured on activations: cosines of noisy directions, their null, AUC and accuracy.

Activations of question q, class c: the class's mean, the question's effect (half of it the same in both classes) and
noise, of one covariance, isotropic or with the spectrum 1 / k. Several organisms asked the same questions have the same
effects. Truth is the population's value; of a probe, what it reaches on average on questions that it has not seen.
The methods before are kept here, for comparison alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats

from analyses.benchmarks.coverage_old import clustered_bootstrap_interval
from analyses.benchmarks.coverage_scenario import Outcomes, Scenario
from em_interp.directions.activations import Activations
from em_interp.directions.extraction import Contrast
from em_interp.directions.rank1 import _probe as l1_probe
from em_interp.directions.rank1 import _scored, separation
from em_interp.directions.reliability import separation as held_out_separation
from em_interp.directions.reliability import split_half
from em_interp.directions.resampling import resample_direction
from em_interp.errors import StatisticsError
from em_interp.statistics.jackknife import clustered_auc, cosine_of_means

Spectrum = Literal["isotropic", "1/k"]
_DRAWS: Final = 100
"""Resamples of the methods before: enough for coverage to two digits."""


def _axes(spectrum: Spectrum, d: int) -> Float[np.ndarray, " d"]:
    """Standard deviations along the axes, of total variance 1."""
    variances = np.ones(d) if spectrum == "isotropic" else 1 / np.arange(1, d + 1)
    return np.asarray(np.sqrt(variances / variances.sum()))


# -- cosines


def cosines(
    rng: np.random.Generator,
    n: int,
    *,
    questions: int,
    icc: float,
    cosine: float,
    noise: float,
    spectrum: Spectrum,
    d: int,
    shared: bool,
    each: int = 20,
) -> Outcomes:
    """Two directions from `each` responses a question, between 1 and all but one of them misaligned.

    noise: norm of the noise in a direction, as a share of the direction's. Old: 1.96 sd of a bootstrap over responses,
    on Fisher's scale, about the plain cosine; its draws are from the Gaussian that the bootstrap tends to.
    """
    found: list[list[Float[np.ndarray, " block"]]] = []
    for block in np.array_split(np.arange(n), max(1, n * max(4 * questions, _DRAWS) * d // 2_000_000)):  # 16 MB each
        found.append(_cosine_block(rng, len(block), questions, icc, cosine, noise, _axes(spectrum, d), shared, each))
    return Outcomes(np.full(n, cosine), *(np.concatenate(part) for part in zip(*found, strict=True)))


def _cosine_block(
    rng: np.random.Generator,
    n: int,
    k: int,
    icc: float,
    cosine: float,
    noise: float,
    sd: Float[np.ndarray, " d"],
    shared: bool,
    each: int,
) -> list[Float[np.ndarray, " n"]]:
    d = len(sd)
    u, v = np.linalg.qr(rng.standard_normal((d, 2)))[0].T
    effects = _effects(rng, n, k, icc, sd)
    shares: list[Float[np.ndarray, "n k d"]] = []
    drawn, plain = [], []
    for axis in (u, cosine * u + np.sqrt(1 - cosine**2) * v):
        own = effects if shared or not shares else _effects(rng, n, k, icc, sd)
        positive = 1 + rng.binomial(each - 2, rng.beta(2, 2, (n, k)))
        counts = np.stack([positive, each - positive], axis=2)[..., None]
        weights = counts[..., 0] / counts.sum(1)[..., 0][:, None]
        own_effects = icc / 2 * ((weights[..., 0] - weights[..., 1]) ** 2 + (weights**2).sum(-1)).sum(1)
        variance = own_effects + (1 - icc) * (1 / counts.sum(1)).sum((1, 2))
        norm = np.sqrt(variance.mean()) / noise
        means = own + rng.standard_normal((n, k, 2, d)) * sd * np.sqrt((1 - icc) / counts)
        means[:, :, 0] += norm * axis
        sums, total = (means * counts), counts.sum(1)
        whole = _difference(sums.sum(1), total)
        without = _difference(sums.sum(1)[:, None] - sums, total[:, None] - counts)
        shares.append(whole[:, None] - (k - 1) / k * without)
        plain.append(whole)
        spread = np.sqrt((1 / total).sum(1))
        drawn.append(whole[:, None] + spread[:, None] * sd * rng.standard_normal((n, _DRAWS, d)))
    sides = np.full(k, 3)
    if not shared:
        nothing = np.zeros_like(shares[0])
        shares = [np.concatenate(x, axis=1) for x in ((shares[0], nothing), (nothing, shares[1]))]
    sides_a, sides_b = (sides, sides) if shared else (np.repeat([3, 0], k), np.repeat([0, 3], k))
    _, low, high = cosine_of_means(shares[0], shares[1], sides_a, sides_b)
    centre, spread = np.arctanh(_cosine(*plain)), 1.96 * np.arctanh(_cosine(*drawn)).std(1, ddof=1)
    return [np.tanh(centre - spread), np.tanh(centre + spread), low, high]


def _effects(
    rng: np.random.Generator, n: int, k: int, icc: float, sd: Float[np.ndarray, " d"]
) -> Float[np.ndarray, "n k 2 d"]:
    both, own = rng.standard_normal((n, k, 1, len(sd))), rng.standard_normal((n, k, 2, len(sd)))
    return (both + own) * sd * np.sqrt(icc / 2)


def _difference(
    sums: Float[np.ndarray, "*batch 2 d"], counts: Int[np.ndarray, "*batch 2 1"]
) -> Float[np.ndarray, "*batch d"]:
    means = sums / counts
    return np.asarray(means[..., 0, :] - means[..., 1, :])


def _cosine(a: Float[np.ndarray, "*batch d"], b: Float[np.ndarray, "*batch d"]) -> Float[np.ndarray, "*batch"]:
    return np.asarray((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))


def nulls(rng: np.random.Generator, n: int, *, questions: int, spectrum: Spectrum, d: int, icc: float) -> Outcomes:
    """Two directions of nothing but noise: is their cosine in the null's central 95%? Old: random directions."""
    sd, each = _axes(spectrum, d), 10
    names = np.repeat(np.arange(questions), each).tolist()
    values, bands = np.empty(n), np.empty(n)
    for i in range(n):
        pair = []
        for _ in range(2):
            effects = _effects(rng, 1, questions, icc, sd)[0]
            sides = [
                np.repeat(effects[:, side], each, axis=0)
                + rng.standard_normal((questions * each, d)) * sd * np.sqrt(1 - icc)
                for side in (0, 1)
            ]
            rows = [torch.from_numpy(side[:, None]).float() for side in sides]
            pair.append(
                resample_direction(
                    rows[0],
                    rows[1],
                    positive_questions=names,
                    negative_questions=names,
                    resamples=2,
                    permutations=_DRAWS,
                    seed=i,
                )
            )
        a, b = (own.direction[0].double().numpy() for own in pair)
        null = [_cosine(own.permuted[:, 0].double().numpy(), x) for own, x in zip(pair, (b, a), strict=True)]
        values[i] = _cosine(a, b)
        bands[i] = np.quantile(np.abs(np.concatenate(null)), 0.95)
    random = np.full(n, np.sqrt(stats.beta.ppf(0.95, 0.5, (d - 1) / 2)))
    return Outcomes(values, -random, random, -bands, bands)


# -- probes


def _answers(
    rng: np.random.Generator, questions: int, icc: float, auc: float, modules: int, constant: bool, each: int = 10
) -> tuple[Float[np.ndarray, "n modules"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Scalars, of which the first differs between classes; labels; questions. constant: one class a question."""
    question = np.repeat(np.arange(questions), each)
    while True:
        share = rng.permutation(np.arange(questions) % 2) if constant else rng.beta(2, 2, questions)
        label = (rng.random(len(question)) < share[question]).astype(int)
        if min(len(set(question[label == side])) for side in (0, 1)) >= 2:
            break
    effects = rng.standard_normal((questions, modules))[question]
    scalars = np.sqrt(icc) * effects + np.sqrt(1 - icc) * rng.standard_normal((len(question), modules))
    scalars[:, 0] += np.sqrt(2) * stats.norm.ppf(auc) * label
    return scalars, label, question


def _probe(scalars: Float[np.ndarray, "n modules"], label: Int[np.ndarray, " n"]) -> Float[np.ndarray, " modules"]:
    """Difference of standardised means: of one scalar, every probe is a sign and an offset."""
    sd = scalars.std(0)
    return np.asarray((scalars[label == 1].mean(0) - scalars[label == 0].mean(0)) / sd**2)


def _cross_validated(
    scalars: Float[np.ndarray, "n modules"],
    label: Int[np.ndarray, " n"],
    question: Int[np.ndarray, " n"],
    rng: np.random.Generator,
) -> Float[np.ndarray, " n"]:
    """Scores of probes on the folds that they were not fitted on; folds of questions with like shares of class 1."""
    k = int(question.max()) + 1
    shares = np.bincount(question, weights=label) / np.bincount(question)
    spread = min(len(set(question[label == side])) for side in (0, 1))
    folds = min(5, spread)
    fold = np.empty(k, dtype=int)
    fold[np.lexsort((rng.random(k), shares))] = np.arange(k) % folds
    score = np.full(len(label), np.nan)
    for own in range(folds):
        fit, held_out = fold[question] != own, fold[question] == own
        if len(set(label[fit])) < 2:
            raise StatisticsError("all answers of one class fall into one fold.")
        weights = _probe(scalars[fit], label[fit])
        middle = (scalars[fit & (label == 1)].mean(0) + scalars[fit & (label == 0)].mean(0)) / 2
        score[held_out] = (scalars[held_out] - middle) @ weights
    return score


def probes(
    rng: np.random.Generator,
    n: int,
    *,
    questions: int,
    icc: float,
    auc: float,
    constant: bool = False,
    modules: int = 1,
    of: Literal["auc", "accuracy"] = "auc",
    logistic: bool = False,
) -> Outcomes:
    """AUC or accuracy of cross-validated probes. auc: what the first scalar's is between questions; others are noise.

    logistic: the package's own probe, otherwise differences of means. Old: percentiles over resampled questions.
    """
    truth, bounds = [], []
    shift = np.sqrt(2) * stats.norm.ppf(auc)
    names = ("low", "high") if of == "auc" else ("accuracy_low", "accuracy_high")
    for seed in range(n):
        while True:
            scalars, label, question = _answers(rng, questions, icc, auc, modules, constant)
            try:
                score = _cross_validated(scalars, label, question, rng)
                break
            except StatisticsError:
                continue
        weights = _probe(scalars, label)
        if logistic:
            scaler, fitted = (step for _, step in l1_probe(1.0).fit(scalars, label).steps)
            weights = fitted.coef_[0] / scaler.scale_
        distance = weights[0] * shift / max(float(np.linalg.norm(weights)), 1e-12)
        truth.append(stats.norm.cdf(distance / (np.sqrt(2) if of == "auc" else 2)))
        new = _scored(score, label, question)
        if logistic:
            new = separation(scalars, label.astype(float), question.tolist(), comparison="simulated", seed=seed)
        old = _resampled_auc if of == "auc" else _resampled_accuracy
        bounds.append((*old(score, label, question, seed), new[names[0]], new[names[1]]))
    return Outcomes(np.full(n, np.mean(truth)), *np.array(bounds).T)


def _resampled_auc(
    score: Float[np.ndarray, " n"], label: Int[np.ndarray, " n"], question: Int[np.ndarray, " n"], seed: int
) -> tuple[float, float]:
    """The method before: percentiles of the AUC over resampled questions, the probes held fixed."""
    k = int(question.max()) + 1
    above = (score[:, None] > score[None]) + 0.5 * (score[:, None] == score[None])
    member = (question[None] == np.arange(k)[:, None]).astype(float)
    ones, zeros = member * label, member * (1 - label)
    wins = ones @ above @ zeros.T
    weights = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=_DRAWS * 4).astype(float)
    pairs = (weights @ ones.sum(1)) * (weights @ zeros.sum(1))
    drawn = ((weights @ wins) * weights).sum(1)[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _resampled_accuracy(
    score: Float[np.ndarray, " n"], label: Int[np.ndarray, " n"], question: Int[np.ndarray, " n"], seed: int
) -> tuple[float, float]:
    right = ((score > 0) == (label == 1)).astype(float)
    hits, counts = np.bincount(question, weights=right), np.bincount(question).astype(float)
    found = clustered_bootstrap_interval(hits, counts, resamples=_DRAWS * 4, seed=seed)
    return found.low, found.high


# -- reliability of a direction


def _contrast(rows: list[Float[np.ndarray, "n d"]], names: list[str]) -> Contrast:
    def side(own: Float[np.ndarray, "n d"]) -> Activations:
        kept = torch.from_numpy(own)[None].float()
        mean, ones = kept.double().mean(1), torch.ones(1).double()
        scope = "response"
        return Activations(
            "simulated",
            (0,),
            {scope: mean},
            {scope: mean},
            {scope: ones},
            {scope: torch.ones(len(own), dtype=torch.long)},
            tuple(names),
            "0" * 64,
            {scope: kept},
        )

    return Contrast(side(rows[0]), side(rows[1]), "data-diff", "response", None, (), True)


def reliability(
    rng: np.random.Generator,
    n: int,
    *,
    questions: int,
    icc: float,
    shift: float,
    of: Literal["split_half", "separation"],
    d: int = 32,
    each: int = 5,
    splits: int = 20,
) -> Outcomes:
    """`each` responses of either class to every question; the classes' means are `shift` apart, total variance is d.

    Truth: the mean over data sets (of separation under the null: .5). Old: for split_half, the method in use; for
    separation, percentiles over splits of redrawn questions.
    """
    estimates, bounds = [], []
    column = "cosine" if of == "split_half" else "auroc"
    names = [f"q{q}" for q in range(questions) for _ in range(each)]
    sd = np.ones(d)
    for seed in range(n):
        effects = _effects(rng, 1, questions, icc, sd)[0]
        rows = [
            np.repeat(effects[:, side], each, axis=0)
            + np.sqrt(1 - icc) * rng.standard_normal((questions * each, d))
            + (0.5 - side) * shift * np.eye(d)[0]
            for side in (0, 1)
        ]
        contrast = _contrast(rows, names)
        method = split_half if of == "split_half" else held_out_separation
        found = method(contrast, splits=splits, seed=seed).iloc[0]
        new = (found["low"], found["high"])
        old = new if of == "split_half" else _redrawn(rng, np.stack(rows), each, splits)
        estimates.append(found[column])
        bounds.append((*old, *new))
    truth = 0.5 if of == "separation" and shift == 0 else float(np.mean(estimates))
    return Outcomes(np.full(n, truth), *np.array(bounds, dtype=float).T)


def _redrawn(rng: np.random.Generator, rows: Float[np.ndarray, "2 n d"], each: int, splits: int) -> tuple[float, float]:
    """The method before: percentiles over splits in which the held-out questions are drawn with replacement."""
    k, d = rows.shape[1] // each, rows.shape[2]
    by_question = rows.reshape(2, k, each, d)
    values = np.zeros(splits)
    for r in range(splits):
        order = rng.permutation(k)
        for fitted, scored in ((order[: k // 2], order[k // 2 :]), (order[k // 2 :], order[: k // 2])):
            mean = by_question[:, fitted].mean((1, 2))
            again = rng.choice(scored, len(scored))
            score = by_question[:, again] @ (mean[0] - mean[1])
            values[r] += clustered_auc(score.reshape(-1), np.repeat([1, 0], score[0].size), np.zeros(score.size, int))[
                0
            ]
    low, high = np.quantile(values / 2, [0.025, 0.975])
    return float(low), float(high)


# -- the rows


def _rows() -> tuple[Scenario, ...]:
    found: list[Scenario] = []

    def add(interval: str, setting: str, questions: int, simulate: Callable[..., Outcomes], icc: float) -> None:
        found.append(Scenario(interval, setting, questions, simulate, icc=icc, conservative="null" not in interval))

    def cosine(
        value: float, questions: int, icc: float, noise: float, spectrum: Spectrum, d: int, shared: bool
    ) -> None:
        of = (
            f"true {value:g}, noise {noise:g} of the norm, {spectrum} in {d}, {'same' if shared else 'other'} questions"
        )
        simulate = partial(
            cosines,
            questions=questions, icc=icc, cosine=value, noise=noise, spectrum=spectrum, d=d, shared=shared,
        )  # fmt: skip
        add("cosine", of, questions, simulate, icc)

    for value in (0.0, 0.3, 0.5, 0.9, 0.98):
        for questions in (4, 8, 20, 40):
            for icc in (0.1, 0.4):
                cosine(value, questions, icc, 0.5, "1/k", 64, True)
        for questions in (8, 40):
            cosine(value, questions, 0.4, 0.25, "1/k", 64, True)
            cosine(value, questions, 0.4, 1.0, "1/k", 64, True)
            cosine(value, questions, 0.4, 0.5, "isotropic", 64, False)
        cosine(value, 8, 0.4, 0.5, "isotropic", 512, True)
    for spectrum in ("isotropic", "1/k"):
        simulate = partial(nulls, questions=8, spectrum=spectrum, d=64, icc=0.4)
        add("null of a cosine", f"two directions of noise, {spectrum} in 64", 8, simulate, 0.4)
    for auc in (0.5, 0.6, 0.75, 0.9):
        for questions in (4, 8, 20, 40):
            for icc in (0.1, 0.4):
                for constant in (False, True)[: 1 + (questions == 8)]:
                    setting = f"AUC {auc:g}, {'one class a question' if constant else 'both classes'}"
                    simulate = partial(probes, questions=questions, icc=icc, auc=auc, constant=constant)
                    add("AUC of probes", setting, questions, simulate, icc)
    for auc in (0.5, 0.75):
        for questions in (8, 20, 40):
            simulate = partial(probes, questions=questions, icc=0.4, auc=auc, of="accuracy")
            add("accuracy of probes", f"AUC {auc:g}, both classes", questions, simulate, 0.4)
        simulate = partial(probes, questions=8, icc=0.1, auc=auc, modules=9, logistic=True)
        add("AUC of probes", f"AUC {auc:g} in one of nine, L1 logistic", 8, simulate, 0.1)
    for questions in (8, 20):
        for icc in (0.1, 0.4):
            for shift in (0.0, 2.0):
                simulate = partial(reliability, questions=questions, icc=icc, shift=shift, of="separation")
                add("held-out separation", f"means {shift:g} sd apart, of 32", questions, simulate, icc)
        simulate = partial(reliability, questions=questions, icc=0.4, shift=2.0, of="split_half")
        add("split-half cosine", "means 2 sd apart, of 32", questions, simulate, 0.4)
    return tuple(found)


SCENARIOS: Final = _rows()
