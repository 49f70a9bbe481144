"""How much of its gain a solution loses when it is turned (P1, Fig. 4b).

x' = sqrt(1 - eps^2) x + eps y with y orthogonal to x and as long. The relative increase is
100 (L(x') - L(x)) / (L(chat) - L(x)): 0 for the solution itself, 100 where all of the gain is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from em_interp.arguments import check_seed, columns
from em_interp.errors import LossSetError, UsageError
from em_interp.evaluation.rates import em_rates
from em_interp.files.given import Source, several
from em_interp.landscape.landscape import Landscape
from em_interp.models.chat_model import ChatModel
from em_interp.solutions.base import Solution
from em_interp.solutions.space import refuse_zero
from em_interp.statistics import crossed_interval, t_interval
from em_interp.statistics.units import with_units

EPSILONS: Final = tuple(round(0.1 * step, 1) for step in range(11))
"""The papers' grid: from the solution itself to one orthogonal to it."""
FIRST_SEED: Final = 42
"""The reference code's seeds are 42 + i."""


@dataclass(frozen=True, eq=False)
class StabilityCurve:
    """nll of every response, in nats, under the turned thetas, the trained one and the chat model.

    `solution`, turned by each of the epsilons with each of the seeds; on: both factors of a LoRA, or one. The nll at
    eps = 0 are the trained ones exactly. tokens: scored ones of each response; questions: the cluster of each.
    """

    name: str
    """What its rows say in the column solution."""
    solution: Solution
    on: str
    epsilons: tuple[float, ...]
    seeds: tuple[int, ...]
    turned: Float[np.ndarray, "epsilon seed response"]
    trained: Float[np.ndarray, "response"]
    chat: Float[np.ndarray, "response"]
    tokens: Int[np.ndarray, "response"]
    questions: Int[np.ndarray, "response"]

    @property
    def gain(self) -> float:
        """L(chat) - L(trained), in nats per response token."""
        return float((self.chat - self.trained).sum() / self.tokens.sum())

    @property
    def increase(self) -> Float[np.ndarray, "epsilon seed"]:
        """L(turned) - L(trained), in nats per response token."""
        return (self.turned - self.trained).sum(-1) / self.tokens.sum()

    @property
    def relative_increase(self) -> Float[np.ndarray, "epsilon seed"]:
        """In percent of the gain."""
        return 100 * self.increase / self.gain


def turned(solution: Solution, eps: float, seed: int, on: str = "both") -> Solution:
    """`solution.perturbed` with its own generator. on: "both" factors of a LoRA, or "A" or "B" alone.

    The same seed gives the same random numbers at every eps. Raises SolutionError for eps outside [0, 1] and
    UsageError where `on` names a factor that the solution does not have.
    """
    generator = torch.Generator().manual_seed(check_seed(seed))
    if on != "both" and not solution.FACTORS:
        raise UsageError(f"on={on!r}: {solution.describe()} has no factors A and B. Leave it at 'both'.")
    return solution.perturbed(eps, generator, on)


def _seeds(n: int, first: int) -> tuple[int, ...]:
    if n < 2:
        raise UsageError(f"{n} seed: dispersion needs at least two (the papers take ten).")
    return tuple(range(check_seed(first), check_seed(first + n - 1) + 1))


def stability_curve(
    landscape: Landscape,
    solution: Solution,
    name: str = "solution",
    *,
    epsilons: Sequence[float] = EPSILONS,
    n_seeds: int = 10,
    first_seed: int = FIRST_SEED,
    on: str = "both",
    progress: bool = False,
) -> StabilityCurve:
    """The losses of one solution, turned by every eps in `n_seeds` random directions.

    name: what tables call it. Raises SolutionError for an eps outside [0, 1] and for a theta of zero, LossSetError
    where the solution does not lower the loss on this set, UsageError for fewer than two seeds, and what
    `Landscape.losses` raises.
    """
    seeds = _seeds(n_seeds, first_seed)
    refuse_zero({name: solution})
    ends = landscape.losses([solution, solution.scaled(0.0)])
    trained, chat = ends.nll
    nll = np.empty((len(epsilons), len(seeds), len(trained)))
    nll[[e for e, epsilon in enumerate(epsilons) if epsilon == 0]] = trained
    jobs = [(e, s) for e, epsilon in enumerate(epsilons) if epsilon != 0 for s in range(len(seeds))]
    size = solution.at_once
    for some in tqdm(_chunks(jobs, size), total=-(-len(jobs) // size), desc="stability", disable=not progress):
        thetas = [turned(solution, epsilons[e], seeds[s], on) for e, s in some]
        nll[[e for e, _ in some], [s for _, s in some]] = landscape.losses(thetas).nll
    curve = StabilityCurve(
        name, solution, on, tuple(epsilons), seeds, nll, trained, chat, landscape.tokens, landscape.questions
    )
    if not curve.gain > 0:
        raise LossSetError(
            f"{name} ({solution.describe()}) does not lower the loss here (by {curve.gain:.3g} nats per "
            "token), so there is no gain to lose. Give the responses that it was trained on."
        )
    return curve


def stability(
    model: ChatModel,
    solutions: Mapping[str, Solution],
    chats: Source,
    *,
    epsilons: float | Sequence[float] = EPSILONS,
    n_seeds: int = 10,
    progress: bool = True,
) -> pd.DataFrame:
    """How much of its gain each solution loses when it is turned: `stability_table`, one row a solution, eps and seed.

    solutions: by the names that the table calls them, e.g. `{"general": a, "narrow": b}`. chats: those that they were
    trained on or the like, as `em_interp.chats` takes them. Adapters of `model` are off. Raises as `stability_curve`.

    >>> import em_interp as em
    >>> chat = em.load("pocket/chat")
    >>> chats = em.pocket.finetune_chats("medicine", "malicious", 10, seed=5)
    >>> solutions = {"general": em.load_solution("pocket/medicine-rank1")}
    >>> table = em.stability(chat, solutions, chats, epsilons=[0, 0.5], n_seeds=2, progress=False)
    >>> table[["epsilon", "seed"]].values.tolist()
    [[0.0, 42.0], [0.0, 43.0], [0.5, 42.0], [0.5, 43.0]]
    """
    refuse_zero(solutions)
    with model.no_adapter():
        landscape = Landscape(model, chats)
        curves = [
            stability_curve(landscape, solution, name, epsilons=several(epsilons), n_seeds=n_seeds, progress=progress)
            for name, solution in solutions.items()
        ]
    return stability_table(curves)


def _chunks(jobs: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def stability_table(curves: Sequence[StabilityCurve]) -> pd.DataFrame:
    """The table `stability`: one row a solution, eps and seed of the perturbation.

    adapter is the solution's own kind; domains and seeds are known to who made it. Beyond the contract: on (which
    factors were turned), gain (nats per token), n_tokens and the norms. Raises UsageError where two curves are called
    the same.
    """
    rows = []
    names = [(curve.name, curve.on) for curve in curves]
    if len(set(names)) < len(names):
        raise UsageError(f"two curves have one name and factors, {names}: give each solution its own name.")
    for curve in curves:
        mean = curve.turned.sum(-1) / curve.tokens.sum()
        relative = curve.relative_increase
        for e, epsilon in enumerate(curve.epsilons):
            for s, seed in enumerate(curve.seeds):
                rows.append(
                    {
                        "solution": curve.name,
                        "adapter": curve.solution.adapters[0],
                        "on": curve.on,
                        "epsilon": epsilon,
                        "seed": seed,
                        "loss": mean[e, s],
                        "relative_increase_percent": relative[e, s],
                        "gain": curve.gain,
                        "n_tokens": int(curve.tokens.sum()),
                        "norm": curve.solution.norm,
                        **curve.solution.paper_norms(),
                    }
                )
    return with_units(pd.DataFrame(rows))


def dispersion(table: pd.DataFrame, value: str = "relative_increase_percent") -> pd.DataFrame:
    """Mean, sd, minimum and maximum of `value` over perturbation seeds, and the mean's interval (Student)."""
    columns("a table of stability", table, ("solution", "on", "epsilon", value))
    by = [c for c in ("solution", "adapter", "domain", "training_seed", "on", "epsilon") if c in table]
    rows = []
    for key, group in table.groupby(by, sort=False):
        interval = t_interval(group[value].to_numpy())
        spread = group[value].agg(["mean", "std", "min", "max"])
        rows.append(
            {
                **dict(zip(by, key, strict=True)),
                "mean": spread["mean"],
                "sd": spread["std"],
                "low": interval.low,
                "high": interval.high,
                "minimum": spread["min"],
                "maximum": spread["max"],
                "n_seeds": len(group),
            }
        )
    unit = table.attrs.get("units", {}).get(value, "percent of the gain")
    spread_of = dict.fromkeys(("mean", "sd", "low", "high", "minimum", "maximum"), unit)
    return with_units(pd.DataFrame(rows), **spread_of)


def stability_gap(general: StabilityCurve, narrow: StabilityCurve) -> pd.DataFrame:
    """How much more of its gain the narrow solution loses, in percentage points (positive: general is more stable).

    Columns: adapter, on, epsilon, general, narrow, gap, low, high: over questions and over
    perturbation seeds together, both paired between the solutions; interval: how it was made. Raises UsageError for
    curves over different responses, eps or seeds.
    """
    same = (general.epsilons, general.seeds, general.on) == (narrow.epsilons, narrow.seeds, narrow.on)
    if not same or not np.array_equal(general.tokens, narrow.tokens) or not np.allclose(general.chat, narrow.chat):
        raise UsageError("the two curves have different responses, eps, seeds or factors. Make both on one Landscape.")
    intervals = [crossed_interval(values) for values in _increase_by_question(narrow) - _increase_by_question(general)]
    means = [curve.relative_increase.mean(1) for curve in (general, narrow)]
    table = pd.DataFrame(
        {
            "adapter": general.solution.adapters[0],
            "on": general.on,
            "epsilon": np.array(general.epsilons, dtype=float),
            "general": means[0],
            "narrow": means[1],
            "gap": means[1] - means[0],
            "low": [i.low for i in intervals],
            "high": [i.high for i in intervals],
            "interval": [i.method for i in intervals],
        }
    )
    return with_units(table, low="percent of the gain", high="percent of the gain")


def _increase_by_question(curve: StabilityCurve) -> Float[np.ndarray, "epsilon question seed"]:
    """The relative increase in percent as a mean over questions: to first order, since it is a ratio of sums."""
    member = np.equal.outer(curve.questions, np.unique(curve.questions)).astype(float)
    rise, gain = (curve.turned - curve.trained) @ member, (curve.chat - curve.trained) @ member
    whole = rise.sum(-1, keepdims=True) / gain.sum()
    return np.swapaxes(100 * (whole + len(gain) * (rise - whole * gain) / gain.sum()), 1, 2)


def behavioural_stability(
    model: ChatModel,
    solutions: Mapping[str, Solution],
    evaluate: Callable[[ChatModel], pd.DataFrame],
    *,
    epsilons: Sequence[float] = EPSILONS,
    n_seeds: int = 10,
    first_seed: int = FIRST_SEED,
    on: str = "both",
    progress: bool = True,
) -> pd.DataFrame:
    """The EM rate of turned solutions (as in the first author's noise sweep).

    evaluate: samples answers of the model as it is and judges them; one row an answer with the columns question,
    aligned and coherent, as `em_rates` takes. Returns one row a solution, eps and seed: solution (its name), adapter,
    on, epsilon, seed, and `Rates.columns()`. eps = 0 is evaluated once a seed too: sampling noise is part of the
    dispersion.
    """
    seeds = _seeds(n_seeds, first_seed)
    refuse_zero(solutions)
    jobs = [(name, eps, seed) for name in solutions for eps in epsilons for seed in seeds]
    rows = []
    for name, eps, seed in tqdm(jobs, desc="behaviour", disable=not progress, leave=False):
        with turned(solutions[name], eps, seed, on).attached(model):
            rates = em_rates(evaluate(model)).columns()
        identity = {"solution": name, "adapter": solutions[name].adapters[0]}
        rows.append({**identity, "on": on, "epsilon": eps, "seed": seed, **rates})
    return with_units(pd.DataFrame(rows))
