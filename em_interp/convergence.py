"""Do different finetunes find the same direction? Cosines layer by layer, each beside its null.

Sources: Convergent Linear Representations, sec. 3.5 and Fig. 10, 12 (cross-finetune and semantic cosines). The content
control (the same texts read in the chat model) and the layer sensitivity are this package's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from em_interp.directions import Direction
from em_interp.errors import DirectionError
from em_interp.statistics import cosine_null_sd, cosine_p_value

COSINE_COLUMNS = ("direction_a", "direction_b", "layer", "cosine", "low", "high", "null_sd", "p_value")


def comparable(a: Direction, b: Direction) -> bool:
    """Whether two directions live in the same residual stream, as far as their metadata tells."""
    return a.d_model == b.d_model and ("unknown" in (a.model, b.model) or a.model == b.model)


def cosine_rows(name_a: str, a: Direction, name_b: str, b: Direction) -> pd.DataFrame:
    """One row a common layer: cosine, its random-direction null (sd and two-sided p-value), and ||a - b||.

    ``low`` and ``high`` are empty here: a pair of finished vectors has no sampling interval.
    Raises ``DirectionError`` as ``Direction.cosine`` does.
    """
    values = a.cosine(b)
    table = pd.DataFrame({"layer": list(values), "cosine": list(values.values())})
    table["direction_a"], table["direction_b"] = name_a, name_b
    table["low"], table["high"] = float("nan"), float("nan")
    table["null_sd"] = cosine_null_sd(a.d_model)
    table["p_value"] = cosine_p_value(table["cosine"].to_numpy(), a.d_model)
    table["difference_norm"] = [float((a.at(layer).double() - b.at(layer).double()).norm()) for layer in values]
    return table[[*COSINE_COLUMNS, "difference_norm"]]


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
