"""Taking a direction out of the residual stream while a model runs: projection, or LEACE.

h' = h - Q Q^T h at block outputs (Convergent Linear Representations, sec. 3.3); `orthogonalise` does it in the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from em_interp.arguments import check_seed
from em_interp.cards import bars, card, ranges
from em_interp.directions.direction import Direction, random_directions
from em_interp.errors import DirectionError, UsageError
from em_interp.files.given import Source, several
from em_interp.interventions.intervening import Project, answers_by_arm, check_direction, check_scope
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import check_layer
from em_interp.models.precision import widest


@dataclass(frozen=True, eq=False, repr=False)
class Ablate:
    """Project a direction, or the span of several, out of the output of `layers` at the tokens in `scope`.

    layers: by default all that the directions have. from_layer: take the vectors of this one layer at every layer
    (then `layers` is by default the whole model), instead of each layer's own. Several directions are orthonormalised.
    Raises DirectionError for a zero vector and for directions that are linearly dependent at a layer.

    >>> import torch
    >>> import em_interp as em
    >>> v = em.Direction(torch.ones(2, 4), layers=(0, 1), kind="random")
    >>> em.Ablate(v).own_layers()
    (0, 1)
    >>> em.Ablate(v, from_layer=1).basis(1).shape
    torch.Size([4, 1])
    """

    direction: Direction | Sequence[Direction]
    layers: Sequence[int] | None = None
    from_layer: int | None = None
    scope: str = "all"

    def __post_init__(self) -> None:
        check_scope(self.scope)
        if not self.directions or (self.layers is not None and not len(self.layers)):
            raise DirectionError("an ablation needs at least one direction and one layer.")
        for layer in self.own_layers() if self.from_layer is None else (self.from_layer,):
            self.basis(layer)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The directions whose span is removed."""
        return (self.direction,) if isinstance(self.direction, Direction) else tuple(self.direction)

    def __repr__(self) -> str:
        return f"Ablate({self._what()})"

    def _what(self) -> str:
        kinds = ", ".join(dict.fromkeys(direction.kind for direction in self.directions))
        if self.from_layer is None:
            where = ranges(sorted(self.own_layers()))
        else:
            at = "every layer" if self.layers is None else ranges(sorted(self.layers))
            where = f"{at} with the vector of layer {self.from_layer}"
        return f"{kinds} at {where}, {self.scope} tokens"

    def _repr_html_(self) -> str:
        sources = [source for direction in self.directions for source in direction.sources]
        facts = {"made on": self.directions[0].model, "from": sources}
        chosen = self.own_layers() if self.from_layer is None else [self.from_layer]
        plot = bars(self.directions[0].norms(), "norm of the direction", chosen=chosen)
        return card(f"Ablate: take out {self._what()}", facts, plot)

    def own_layers(self) -> tuple[int, ...]:
        """The layers asked for, or those that all the directions have."""
        if self.layers is not None:
            return tuple(self.layers)
        common = [layer for layer in self.directions[0].layers if all(layer in d.layers for d in self.directions)]
        if not common:
            raise DirectionError("the directions have no layer in common: bring them to the same ones.")
        return tuple(common)

    def basis(self, layer: int) -> Float[Tensor, "d_model k"]:
        """Orthonormal basis, in float64, of what is removed with the vectors of `layer`."""
        self.directions[0].only([layer]).unit()
        for other in self.directions[1:]:
            self.directions[0].cosine(other.only([layer]))  # refuses other widths, models, and zero vectors
        units = torch.stack([d.only([layer]).unit().vectors[0].double() for d in self.directions], dim=1)
        q, r = torch.linalg.qr(units)
        if float(r.diagonal().abs().min()) < 1e-5:
            raise DirectionError(f"the directions are linearly dependent at layer {layer}: drop those that repeat.")
        return q

    def edits(self, model: ChatModel) -> dict[int, Project]:
        """The projection at each layer. Raises as `intervening` says."""
        for direction in self.directions:
            check_direction(direction, model)
        if self.from_layer is None:
            sources = {layer: layer for layer in self.own_layers()}
        else:
            everywhere = self.layers if self.layers is not None else range(model.n_layers)
            sources = dict.fromkeys(everywhere, check_layer(self.from_layer, model.n_layers))
        found = {}
        for layer, source in sources.items():
            q = self.basis(source).to(model.device, widest(model.device))
            found[check_layer(layer, model.n_layers)] = Project(q, q.T, self.scope)
        return found


@dataclass(frozen=True, eq=False, repr=False)
class Erase:
    """An affine eraser at each layer, at the tokens in `scope`: h - left @ right @ (h - bias). Made by `leace`."""

    left: Mapping[int, Float[Tensor, "d_model _"]]
    right: Mapping[int, Float[Tensor, "_ d_model"]]
    bias: Mapping[int, Float[Tensor, " d_model"]]
    scope: str = "all"

    def __repr__(self) -> str:
        return f"Erase(LEACE at {ranges(sorted(self.left))}, {self.scope} tokens)"

    def _repr_html_(self) -> str:
        ranks = {layer: left.shape[1] for layer, left in self.left.items()}
        return card(f"Erase: LEACE at {ranges(sorted(self.left))}, {self.scope} tokens", {"rank": max(ranks.values())})

    def edits(self, model: ChatModel) -> dict[int, Project]:
        """The eraser at each layer. Raises DirectionError where it was fitted on another width."""
        found = {}
        for layer, left in self.left.items():
            if left.shape[0] != model.d_model:
                raise DirectionError(
                    f"an eraser of width {left.shape[0]} for {model.name} with d_model {model.d_model}. Fit it on "
                    "activations of this model."
                )
            parts = (x.to(model.device, widest(model.device)) for x in (left, self.right[layer], self.bias[layer]))
            left, right, bias = parts
            found[check_layer(layer, model.n_layers)] = Project(left, right, self.scope, bias)
        return found


def leace(
    positive: Float[Tensor, "n_positive n_layers d_model"],
    negative: Float[Tensor, "n_negative _ _"],
    *,
    layers: Sequence[int] | None = None,
    scope: str = "all",
) -> Erase:
    """The least-squares eraser of "positive or negative?" at each layer, by the library `concept-erasure`.

    positive, negative: activations, or means of responses, of both classes; `layers` says which layers they are (by
    default 0, 1, ...). After it, no linear classifier tells the classes of this data apart (Belrose et al., "LEACE",
    2023, arXiv 2306.03819). Each layer is fitted on the model without intervention, in float64. Raises UsageError
    where the library is missing and DirectionError for NaN, too few rows or widths that differ.
    """
    library = _concept_erasure()
    numbers = tuple(range(positive.shape[1])) if layers is None else tuple(layers)
    if positive.shape[1:] != negative.shape[1:] or len(numbers) != positive.shape[1]:
        raise DirectionError(
            f"activations of shapes {tuple(positive.shape)} and {tuple(negative.shape)} for {len(numbers)} layers: "
            "give [rows, layers, d_model] of one model, both with the same layers."
        )
    both = torch.cat([positive, negative]).detach().cpu().double()
    if min(len(positive), len(negative)) < 2 or not bool(torch.isfinite(both).all()):
        raise DirectionError(
            f"LEACE needs at least two finite rows of each class; found {len(positive)} and {len(negative)}."
        )
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    left, right, bias = {}, {}, {}
    for place, layer in enumerate(numbers):
        eraser = library.LeaceEraser.fit(both[:, place], labels)
        left[layer], right[layer], bias[layer] = eraser.proj_left, eraser.proj_right, eraser.bias
    return Erase(left, right, bias, scope)


def _concept_erasure() -> Any:
    try:
        import concept_erasure
    except ImportError as error:
        raise UsageError(
            "LEACE needs the library concept-erasure, which is not installed: pip install 'em_interp[leace]'."
        ) from error
    return concept_erasure


def ablate(
    model: ChatModel,
    direction: Direction,
    questions: Source,
    *,
    n: int,
    layers: int | Sequence[int] | None = None,
    from_layer: int | None = None,
    random_arms: int = 3,
    seed: int = 0,
    max_new_tokens: int = 600,
    temperature: float = 1.0,
    progress: bool = True,
) -> pd.DataFrame:
    """n answers a question of the model as it is, without the direction, and without random ones: `answers_by_arm`.

    The counterpart of `steering.sweep`. layers, from_layer: as for `Ablate`. Columns arm (none; layerwise, or single
    with from_layer; random 0, ...) and those of `sample`. Raises as `Ablate` and `sample`.

    >>> import em_interp as em
    >>> model = em.load("pocket/medicine-rank1")
    >>> bad = em.pocket.finetune_chats("medicine", "malicious", 20, seed=0)
    >>> shift = em.extract(model, bad, kind="model-diff", progress=False)
    >>> asked = em.pocket.open_questions(4)
    >>> answers = em.ablate(model, shift, asked, n=1, random_arms=1, max_new_tokens=20, progress=False)
    >>> answers["arm"].unique().tolist()
    ['none', 'layerwise', 'random 0']
    """
    chosen = None if layers is None else several(layers)
    return answers_by_arm(
        model,
        arms(direction, layers=chosen, from_layer=from_layer, random_arms=random_arms, seed=seed),
        questions,
        n,
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        progress=progress,
    )


def arms(
    direction: Direction,
    *,
    layers: Sequence[int] | None = None,
    from_layer: int | None = None,
    random_arms: int = 3,
    seed: int = 0,
) -> dict[str, list[Ablate]]:
    """Arms for `answers_by_arm`: the model as it is ("none"), the ablation, and the same of random directions.

    The ablation's arm is named after its mode: "layerwise", or "single" with `from_layer`.
    """
    controls = random_directions(direction, random_arms, torch.Generator().manual_seed(check_seed(seed)))
    mode = "layerwise" if from_layer is None else "single"
    return {
        "none": [],
        mode: [Ablate(direction, layers, from_layer)],
        **{f"random {i}": [Ablate(control, layers, from_layer)] for i, control in enumerate(controls)},
    }
