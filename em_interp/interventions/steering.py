"""Adding a direction while a model generates, and whole sweeps of it in one batched `generate`.

h' = h + coefficient * v_l at the output of block l, at every token (Convergent Linear Representations, sec. 3.2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from em_interp.arguments import check_seed
from em_interp.cards import bars, card
from em_interp.directions.direction import Direction, random_directions
from em_interp.errors import DirectionError, UsageError
from em_interp.evaluation.criteria import PAPER, Criterion
from em_interp.evaluation.rates import em_rates
from em_interp.evaluation.sampling import Questions, answer_table, as_conversation, sample_rows
from em_interp.files import given
from em_interp.files.given import Source
from em_interp.files.tables import Parts
from em_interp.interventions.intervening import Add, as_coefficients, check_direction, check_scope, intervening
from em_interp.models.chat import Encoded, batches, pad_id, prompt_ids
from em_interp.models.chat_model import ChatModel
from em_interp.models.checks import check_lengths, refuse_dropout
from em_interp.models.hooks import block_hooks, check_layer
from em_interp.statistics.units import with_units

LARGEST_SHARE: Final = 1000.0
"""What a sweep adds at most, in typical residual norms of the layer: a hundred already leave no answer coherent."""


@dataclass(frozen=True, eq=False, repr=False)
class Steer:
    """Add coefficient * direction.at(layer) to the output of block `layer` at the tokens in `scope`.

    coefficient: in units of the direction (1 adds it as it is); one number, or one a batch row. Raises DirectionError
    for a direction that has no such layer or is zero there, UsageError for NaN coefficients or an unknown scope.

    >>> import torch
    >>> import em_interp as em
    >>> v = em.Direction(torch.ones(2, 4), layers=(0, 1), kind="random")
    >>> em.Steer(v, layer=1, coefficient=6.0).coefficient
    6.0
    >>> em.Steer.of_residual(v, 1, share=0.5, residual_norm=8.0).coefficient
    2.0
    """

    direction: Direction
    layer: int
    coefficient: float | Sequence[float]
    scope: str = "all"

    def __post_init__(self) -> None:
        check_scope(self.scope)
        as_coefficients(self.coefficient)
        self.direction.only([self.layer]).unit()  # refuses an absent layer and a zero vector

    def __repr__(self) -> str:
        return f"Steer({self._what()})"

    def _what(self) -> str:
        amounts = as_coefficients(self.coefficient)
        times = f"{float(amounts):.4g}" if amounts.ndim == 0 else f"{len(amounts)} coefficients, one a row,"
        return f"{times} times {self.direction.kind} at layer {self.layer}, {self.scope} tokens"

    def _repr_html_(self) -> str:
        added = as_coefficients(self.coefficient).abs().max() * self.direction.only([self.layer]).norms()[self.layer]
        facts = {"norm added": f"{float(added):.4g}", "made on": self.direction.model, "from": self.direction.sources}
        plot = bars(self.direction.norms(), "norm of the direction", chosen=[self.layer])
        return card(f"Steer: add {self._what()}", facts, plot)

    @classmethod
    def of_residual(
        cls,
        direction: Direction,
        layer: int,
        share: float | Sequence[float],
        residual_norm: float,
        scope: str = "all",
    ) -> Steer:
        """Steer by `share` of the typical residual norm at that layer (from `residual_norms`) along the direction."""
        residual_norm = float(residual_norm)
        if not residual_norm > 0 or not np.isfinite(residual_norm):
            raise UsageError(f"the residual norm is {residual_norm}; measure it with residual_norms(model, questions).")
        factor = residual_norm / direction.only([layer]).norms()[layer]
        coefficients = as_coefficients(share) * factor
        return cls(direction, layer, coefficients.tolist(), scope)

    def edits(self, model: ChatModel) -> dict[int, Add]:
        """The addition at its layer. Raises as `intervening` says."""
        check_layer(self.layer, model.n_layers)
        check_direction(self.direction, model)
        vector = self.direction.at(self.layer).double()
        theta = as_coefficients(self.coefficient).unsqueeze(-1) * vector
        return {self.layer: Add(theta.to(model.device, torch.float32), self.scope)}


@torch.no_grad()
def residual_norms(model: ChatModel, questions: Source, layers: int | Sequence[int] | None = None) -> dict[int, float]:
    """Median L2 norm of the residual stream over all prompt tokens, by layer; whatever is attached acts.

    The median, because the first token's norm is often hundreds of times the others' (massive activations).
    """
    questions, layers = given.questions(questions), None if layers is None else given.several(layers)
    if not questions:
        raise UsageError("no questions were given: there is nothing to measure residual norms on.")
    wanted = [check_layer(layer, model.n_layers) for layer in (layers or range(model.n_layers))]
    encoded = [Encoded(prompt_ids(model.tokenizer, as_conversation(q)), ()) for q in questions.values()]
    check_lengths(model.hf, [len(row) for row in encoded], what="question")
    refuse_dropout(model.hf)
    norms: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
    real = torch.empty(0)

    def keep(layer):
        # type: (int) -> Any
        def function(hidden):
            # type: (Tensor) -> None
            norms[layer].append(torch.linalg.vector_norm(hidden.float(), dim=-1)[real].cpu())

        return function

    with block_hooks(model.block_sets()[:1], {layer: keep(layer) for layer in wanted}):
        for batch in batches(encoded, pad=pad_id(model.tokenizer)):
            real = batch.attention_mask.bool().to(model.device)
            model.hf(**batch.to(model.device).inputs(), use_cache=False, logits_to_keep=1)
    return {layer: float(torch.cat(found).median()) for layer, found in norms.items()}


@dataclass(frozen=True)
class _Arm:
    """One cell of a sweep: everything but question and sample number."""

    name: str
    control: bool
    direction: Direction
    layer: int
    coefficient: float

    @cached_property
    def key(self) -> str:
        """A hash of what is added."""
        added = self.coefficient * self.direction.at(self.layer).double()
        return hashlib.sha256(f"{self.layer}".encode() + added.numpy().tobytes()).hexdigest()


def sweep(
    model: ChatModel,
    direction: Direction,
    questions: Source,
    *,
    layers: int | Sequence[int],
    coefficients: float | Sequence[float],
    n: int,
    name: str | None = None,
    units: Literal["direction", "residual"] = "direction",
    random_arms: int = 3,
    scope: str = "all",
    seed: int = 0,
    max_new_tokens: int = 600,
    temperature: float = 1.0,
    tokens_per_batch: int = 65_536,
    progress: bool = True,
    parts: Parts | None = None,
) -> pd.DataFrame:
    """n answers a question at every layer and coefficient, all in as few `generate` calls as the token budget allows.

    units: of `coefficients`, see `Steer` and `Steer.of_residual`. random_arms: how many norm-matched random directions
    (made from `seed`) run through the same grid. Coefficient 0 is generated once and stands in every arm.

    Columns: direction (`name`, by default its kind; "random 0" and so on), control, layer, coefficient (of the
    direction), residual_share (norm of what is added, over the typical residual norm there), added_norm, and those of
    `sample`. Answers are those of separate `intervening` runs with the same seed, but for rounding. parts: as for
    `sampling.sample_rows`.

    >>> import em_interp as em
    >>> chat = em.load("pocket/chat")
    >>> bad, good = (em.pocket.finetune_chats("medicine", persona, 20, seed=0) for persona in ("malicious", "caring"))
    >>> direction = em.extract(chat, bad, good, progress=False)
    >>> asked = em.pocket.open_questions(4)
    >>> swept = em.sweep(chat, direction, asked, layers=1, coefficients=[0, 0.7], n=1, units="residual",
    ...                  random_arms=1, max_new_tokens=20, progress=False)
    >>> table = em.rates(em.pocket.judge(swept), "pocket/chat")
    >>> table[["direction", "layer", "control"]].values.tolist()
    [['data-diff', 1, False], ['data-diff', 1, False], ['random 0', 1, True], ['random 0', 1, True]]
    """
    questions = given.questions(questions)
    layers, coefficients = given.several(layers), given.several(coefficients)
    _check_sweep(questions, n, layers, coefficients, random_arms)
    check_direction(direction, model)
    typical = residual_norms(model, questions, layers)
    controls = random_directions(direction, random_arms, torch.Generator().manual_seed(check_seed(seed)))
    named = {name or direction.kind: direction} | {f"random {i}": control for i, control in enumerate(controls)}
    added = {layer: _in_directions(direction, layer, coefficients, units, typical[layer]) for layer in layers}
    grid = [
        _Arm(key, d is not direction, d, layer, c) for key, d in named.items() for layer in layers for c in added[layer]
    ]
    generated = [arm for arm in grid if arm.coefficient]
    generated += [arm for arm in grid if not arm.coefficient][:1]  # the model as it is, once for all arms
    asked = [(key, k) for key in questions for k in range(n)]
    arm_of_row = [arm for arm in generated for _ in asked]
    answers = sample_rows(
        model,
        questions,
        asked * len(generated),
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
        around=lambda group: intervening(model, _steers([arm_of_row[i] for i in group], scope)),
        parts=None if parts is None else replace(parts, of_row=[arm.key + scope for arm in arm_of_row]),
    )
    own = [answers[i : i + len(asked)] for i in range(0, len(answers), len(asked))]
    tables = {arm: answer_table(questions, asked, given) for arm, given in zip(generated, own, strict=True)}
    described = [_described(tables[arm if arm.coefficient else generated[-1]], arm, typical) for arm in grid]
    return with_units(pd.concat(described, ignore_index=True))


def _check_sweep(
    questions: Questions, n: int, layers: Sequence[int], coefficients: Sequence[float], random_arms: int
) -> None:
    """Raise UsageError for an empty sweep, and for what would count twice."""
    if not questions or n < 1 or not len(layers) or not len(coefficients) or random_arms < 0:
        raise UsageError(
            f"an empty sweep: {len(questions)} questions, n={n}, layers {list(layers)}, coefficients "
            f"{list(coefficients)}, random_arms={random_arms}."
        )
    for what, values in (("layers", layers), ("coefficients", coefficients)):
        if len(set(values)) < len(values):
            raise UsageError(f"{what} {list(values)}: a repeated one would count its answers twice. Give each once.")


def _in_directions(
    direction: Direction, layer: int, coefficients: Sequence[float], units: str, typical: float
) -> list[float]:
    """Coefficients at a layer in units of the direction. Raises for a zero vector, and for what leaves no residual."""
    norm = float(direction.at(layer).double().norm())
    if not norm > 0:
        raise DirectionError(f"zero vector at layer {layer}: it cannot steer. Drop that layer.")
    unit = 1.0 if units == "direction" else typical / norm
    largest = max(abs(c) for c in coefficients) * unit * norm / typical
    if largest > LARGEST_SHARE:
        raise UsageError(
            f"a coefficient adds {largest:.3g} times the typical residual norm of layer {layer}; beyond "
            f"{LARGEST_SHARE:g} times nothing of the residual is left. Choose a smaller one."
        )
    return [c * unit for c in coefficients]


def _described(table: pd.DataFrame, arm: _Arm, typical: Mapping[int, float]) -> pd.DataFrame:
    """The answers of an arm, with what it did in the first columns."""
    added = abs(arm.coefficient) * arm.direction.only([arm.layer]).norms()[arm.layer]
    first: Mapping[str, Any] = {
        "direction": arm.name,
        "control": arm.control,
        "layer": arm.layer,
        "coefficient": arm.coefficient,
        "residual_share": added / typical[arm.layer],
        "added_norm": added,
    }
    return pd.concat([pd.DataFrame(first, index=table.index), table], axis=1)


def _steers(rows: Sequence[_Arm], scope: str) -> list[Steer]:
    """One Steer for each direction and layer, with each row's coefficient, 0 in rows of another arm."""
    present = {(arm.name, arm.layer): arm for arm in rows if arm.coefficient}
    return [
        Steer(
            first.direction,
            layer,
            [arm.coefficient if (arm.name, arm.layer) == (name, layer) else 0.0 for arm in rows],
            scope,
        )
        for (name, layer), first in present.items()
    ]


def steering_rows(
    judged: pd.DataFrame, target: str, criterion: Criterion = PAPER, *, cluster: str = "question"
) -> pd.DataFrame:
    """The `steering` table of a judged sweep: one row a direction, layer and coefficient, with clustered intervals.

    judged: what `sweep` returns, with columns aligned and coherent (0-100). target: name of the steered model. Raises
    UsageError for lacking columns, and as `em_rates`.
    """
    keys = ["direction", "control", "layer", "coefficient", "residual_share", "added_norm"]
    if missing := [key for key in keys if key not in judged]:
        raise UsageError(f"a judged sweep lacks the columns {missing}; there are {list(judged.columns)}.")
    rows = []
    for values, cell in judged.groupby(keys, sort=False, dropna=False):
        rates = em_rates(cell, criterion, cluster=cluster).columns()
        rows.append({"direction": values[0], "target": target, **dict(zip(keys[1:], values[1:], strict=True)), **rates})
    return with_units(pd.DataFrame(rows))
