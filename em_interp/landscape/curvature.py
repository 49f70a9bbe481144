"""Why a solution is stable or not: the curvature of the loss across theta, by Hessian-vector products.

To second order in eps, x' = sqrt(1 - eps^2) x + eps y with random y orthogonal to x and as long raises the loss by
(sqrt(1 - eps^2) - 1) g.x + eps^2 / 2 E[y' H y], where g and H are the gradient and Hessian at x, and, for one vector
of d entries, E[y' H y] = ||x||^2 / (d - 1) tr(P H P) with P the projection off x. So a few y of the sampled curve's
own kind are Hutchinson's probes of that trace, and the result predicts the small-eps end of the curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from em_interp.arguments import check_seed, count
from em_interp.errors import SolutionError
from em_interp.landscape.landscape import Landscape
from em_interp.landscape.stability import turned
from em_interp.models.attaching import frozen
from em_interp.models.precision import exact
from em_interp.solutions.base import Solution
from em_interp.statistics import t_interval


@dataclass(frozen=True, eq=False)
class Curvature:
    """Derivatives of the mean loss (nats per response token) at a solution.

    along: g.x, the derivative with respect to log scale of the turned tensors (0 at the optimum norm). across: y' H y
    of each probe. traces: each probe's estimate of the trace of H over the directions orthogonal to each turned
    tensor: theta for a steering vector, the factors A and B for a LoRA. on: which of these were turned.
    """

    solution: Solution
    on: str
    loss: float
    along: float
    across: Float[np.ndarray, "probe"]
    traces: Float[np.ndarray, "probe"]

    def columns(self) -> dict[str, str | float | int]:
        """One row of a table: means over probes, with intervals (Student) over them."""
        across, trace = t_interval(self.across), t_interval(self.traces)
        return {
            "on": self.on,
            "loss": self.loss,
            "along": self.along,
            "across": float(self.across.mean()),
            "across_low": across.low,
            "across_high": across.high,
            "trace": float(self.traces.mean()),
            "trace_low": trace.low,
            "trace_high": trace.high,
            "n_probes": len(self.across),
        }

    def predicted(self, epsilons: Sequence[float], gain: float) -> pd.DataFrame:
        """The mean relative increase that it predicts, in percent of `gain` (nats per token), with its interval.

        Columns: epsilon, predicted_percent, low, high. Good where eps is small: the next order is eps^4. Raises
        SolutionError for an eps outside [0, 1] and for a gain that is not positive.
        """
        eps = np.array(epsilons, dtype=float)
        if not ((eps >= 0) & (eps <= 1)).all() or not gain > 0:
            raise SolutionError(f"eps {list(epsilons)} and gain {gain}: eps is in [0, 1] and the gain above 0.")
        interval = t_interval(self.across)
        inward = (np.sqrt(1 - eps**2) - 1) * self.along

        def percent(across):
            # type: (float) -> Float[np.ndarray, 'epsilon']
            return 100 * (inward + eps**2 / 2 * across) / gain

        return pd.DataFrame(
            {
                "epsilon": eps,
                "predicted_percent": percent(float(self.across.mean())),
                "low": percent(interval.low),
                "high": percent(interval.high),
            }
        )


def curvature(
    landscape: Landscape,
    solution: Solution,
    *,
    n_probes: int = 32,
    first_seed: int = 0,
    on: str = "both",
    progress: bool = False,
) -> Curvature:
    """Hutchinson's estimate of the curvature across a solution, one Hessian-vector product a probe and batch.

    The model is differentiated twice, from the solution's first layer on. Raises StatisticsError (in the intervals) for
    fewer than two probes.
    """
    device = landscape.model.device
    leaves = {key: x.detach().to(device).requires_grad_() for key, x in solution.tensors(on).items()}
    live = solution.with_tensors(leaves)
    n_probes = count("n_probes", n_probes)
    across = np.zeros(n_probes)
    traces = np.zeros(n_probes)
    loss, along = 0.0, 0.0
    first_seed = check_seed(first_seed)
    probes = [turned(solution, 1.0, first_seed + k, on) for k in range(n_probes)]  # y: turned all the way
    lengths = {key: float(exact(x.detach()).norm()) * solution.unit for key, x in leaves.items()}
    weights = {key: (x.numel() - 1) / lengths[key] ** 2 for key, x in leaves.items()}
    with frozen(landscape.model.hf):
        batches = landscape.differentiable(live)
        for total in tqdm(batches, desc="curvature", disable=not progress, leave=False):
            gradients = torch.autograd.grad(total, list(leaves.values()), create_graph=True, materialize_grads=True)
            loss += float(total.detach())
            along += sum(_dot(g, x) for g, x in zip(gradients, leaves.values(), strict=True))
            for k, probe in enumerate(probes):
                y = probe.tensors(on)
                directions = [y[key].to(x) for key, x in leaves.items()]
                products = _products(gradients, list(leaves.values()), directions)
                for key, direction, product in zip(leaves, directions, products, strict=True):
                    across[k] += _dot(direction, product)
                    traces[k] += weights[key] * _dot(direction, product)
    n = float(landscape.tokens.sum())
    return Curvature(solution, on, loss / n, along / n, across / n, traces / n)


def _products(
    gradients: Sequence[Tensor], leaves: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The Hessian times `directions`; tensors that no text comes to have neither gradient nor curvature."""
    live = [(g, direction) for g, direction in zip(gradients, directions, strict=True) if g.requires_grad]
    return torch.autograd.grad(
        [g for g, _ in live], leaves, [direction for _, direction in live], retain_graph=True, materialize_grads=True
    )


def _dot(x: Tensor, y: Tensor) -> float:
    return float((exact(x.detach()) * exact(y.detach())).sum())
