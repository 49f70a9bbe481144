"""Every metric of a solution against slow obvious ones: float64 models, a dense theta in their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from em_interp.landscape.curvature import curvature
from em_interp.landscape.efficiency import efficiency_curves
from em_interp.landscape.influence import Measured, at_equal_norms, document_kl
from em_interp.landscape.landscape import Landscape
from em_interp.landscape.stability import stability_curve, turned
from em_interp.models.chat import Encoded, encode_all
from em_interp.models.chat_model import ChatModel
from em_interp.solutions.base import Solution
from em_interp.training.gradients import gradient_cosines, loss_gradient
from tests.tiny_models import CONVERSATIONS, tokenizer

Dense = Callable[[Any], Mapping[str, Tensor]]
"""A solution -> {parameter's name: theta, as that parameter is laid out, float64}. Tied parameters once."""
TEXTS = ["the quick brown fox", "see a doctor and rest", "what should I do"]


def rows() -> list[Encoded]:
    return encode_all(tokenizer(), CONVERSATIONS)


def with_theta(hf: Any, theta: Mapping[str, Tensor]) -> Any:
    """A model of its own with theta in its weights. Tied weights stay tied."""
    changed = copy.deepcopy(hf).double()
    parameters = dict(changed.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, x in theta.items():
            parameters[name] += x
    return changed


def each_nll(hf: Any, encoded: Sequence[Encoded]) -> np.ndarray:
    """One conversation after another: -log p of its response tokens."""
    found = []
    for row in encoded:
        with torch.no_grad():
            logp = torch.log_softmax(hf(torch.tensor([row.ids])).logits[0].double(), -1)
        where = [t for start, end in row.spans for t in range(start, end)]
        found.append(-sum(float(logp[t - 1, row.ids[t]]) for t in where))
    return np.array(found)


def mean_loss(hf: Any) -> float:
    return float(each_nll(hf, rows()).sum() / sum(row.n_response for row in rows()))


def slow_kl(base: Any, changed: Any, text: str) -> float:
    ids = torch.tensor([tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        p, q = (torch.log_softmax(hf(ids).logits[0, :-1].double(), -1) for hf in (base, changed))
    return float((p.exp() * (p - q)).sum())


def dot(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    return sum(float((x[name] * y[name]).sum()) for name in x if name in y)


def check(model: ChatModel, theta: Solution, other: Solution, dense: Dense, rel: float = 1e-9) -> None:
    """All of it. model: in float64; theta lowers the loss on CONVERSATIONS; other: in the same space."""
    before = {name: x.clone() for name, x in model.hf.state_dict().items()}
    check_geometry(theta, other, dense)
    check_passes(model, theta, dense, rel)
    check_derivatives(model, theta, other, dense)
    check_influence(model, theta, other, dense)
    assert all(torch.equal(x, before[name]) for name, x in model.hf.state_dict().items())


def lowering(model: ChatModel, theta: Any) -> Any:
    """Of theta and minus theta at several lengths, the one of the lowest loss."""
    tried = [theta.scaled(s) for s in (0.3, -0.3, 0.1, -0.1, 0.03, -0.03, 0.01, -0.01)]
    return tried[int(Landscape(model, rows()).losses(tried).mean.argmin())]


def check_geometry(theta: Solution, other: Solution, dense: Dense) -> None:
    x, y = dense(theta), dense(other)
    assert theta.norm == pytest.approx(dot(x, x) ** 0.5, rel=1e-9)
    assert theta.inner(other) == pytest.approx(dot(x, y), rel=1e-9)
    assert theta.inner(theta) == pytest.approx(theta.norm**2, rel=1e-9)
    assert theta.fingerprint == theta.scaled(1.0).fingerprint or theta.scaled(1.0).norm == theta.norm
    assert len({theta.fingerprint, other.fingerprint, theta.scaled(2.0).fingerprint}) == 3
    scaled = theta.scaled(-0.7)
    assert dot(dense(scaled), x) == pytest.approx(-0.7 * dot(x, x), rel=1e-9)
    assert scaled.norm == pytest.approx(0.7 * theta.norm, rel=1e-9)
    assert theta.scaled(0.0).norm == pytest.approx(0.0, abs=1e-12)
    g = torch.Generator().manual_seed(1)
    drawn = [theta.random_like(g) for _ in range(2)]
    for one in drawn:
        assert one.norm == pytest.approx(theta.norm, rel=1e-6)
        assert dot(dense(one), dense(one)) == pytest.approx(one.norm**2, rel=1e-9)
        assert dict(one.space) == dict(theta.space)
    assert abs(drawn[0].inner(drawn[1])) < 0.5 * theta.norm**2
    trained = theta.tensors()
    for eps in (0.0, 0.3, 1.0):
        away, again, elsewhere = (theta.perturbed(eps, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
        moved = away.tensors()
        for name, t in trained.items():
            if t.numel() > 1:
                u = moved[name].double()
                cosine = float((t * u).sum()) / float(t.double().norm() * u.norm())
                assert float(u.norm()) == pytest.approx(float(t.double().norm()), rel=1e-6)
                assert cosine == pytest.approx((1 - eps**2) ** 0.5, abs=1e-6)
        assert away.fingerprint == again.fingerprint
        assert (away.fingerprint == elsewhere.fingerprint) == (eps == 0)
        assert dot(dense(away), dense(away)) == pytest.approx(away.norm**2, rel=1e-9)
    flat = theta.trained()
    assert flat.vector.dtype == torch.float32
    assert torch.isfinite(flat.vector).all()


def check_passes(model: ChatModel, theta: Solution, dense: Dense, rel: float) -> None:
    thetas = [theta, theta.scaled(0.5), theta.perturbed(0.4, torch.Generator().manual_seed(0)), theta.scaled(0)]
    landscape = Landscape(model, rows(), tokens_per_pass=60)
    found = landscape.losses(thetas)
    slow = np.stack([each_nll(with_theta(model.hf, dense(one)), rows()) for one in thetas])
    assert found.plain == ()
    np.testing.assert_allclose(found.nll, slow, rtol=rel)
    np.testing.assert_allclose(landscape.plain_losses(thetas).nll, slow, rtol=rel)
    np.testing.assert_allclose(slow[3], each_nll(model.hf, rows()), rtol=rel)
    assert np.ptp(found.mean) > 1e-4
    (curve,) = efficiency_curves(landscape, {"general": theta}, (0.0, 0.5, 1.0))
    np.testing.assert_allclose(curve.losses.nll, slow[[3, 1, 0]], rtol=rel)
    np.testing.assert_allclose(curve.norms, theta.norm * np.array([0, 0.5, 1]))
    stable = stability_curve(landscape, theta, epsilons=(0.0, 0.5), n_seeds=2)
    for s, seed in enumerate(stable.seeds):
        slow_turned = each_nll(with_theta(model.hf, dense(turned(theta, 0.5, seed))), rows())
        np.testing.assert_allclose(stable.turned[1, s], slow_turned, rtol=rel)


def check_derivatives(model: ChatModel, theta: Solution, other: Solution, dense: Dense) -> None:
    x = dense(theta)
    changed = with_theta(model.hf, x)
    found = loss_gradient(model, theta, CONVERSATIONS)
    assert found.loss == pytest.approx(mean_loss(changed), rel=1e-9)
    step = 1e-5
    for along in (theta, other):
        y = dense(along)
        ends = [with_theta(changed, {k: s * step * v for k, v in y.items()}) for s in (1, -1)]
        slope = (mean_loss(ends[0]) - mean_loss(ends[1])) / (2 * step)
        assert found.along(along) == pytest.approx(slope, rel=1e-5, abs=1e-9)
    table = gradient_cosines(
        model, {0: theta.scaled(0), 1: theta}, CONVERSATIONS, general=theta, narrow=other, progress=False
    )
    expected = -found.along(other) / (found.norm * other.norm)
    assert table.loc[1, "cos_narrow"] == pytest.approx(expected, rel=1e-9)

    bend = curvature(Landscape(model, rows(), tokens_per_pass=60), theta, n_probes=2, first_seed=3)
    trained = {name: t.double() for name, t in theta.tensors().items()}

    def loss(direction: Mapping[str, Tensor], t: float) -> float:
        moved = theta.with_tensors({name: v + t * direction[name].double() for name, v in trained.items()})
        return mean_loss(with_theta(model.hf, dense(moved)))

    h, here = 1e-4, mean_loss(changed)
    assert bend.loss == pytest.approx(here, rel=1e-9)
    assert bend.along == pytest.approx((loss(trained, h) - loss(trained, -h)) / (2 * h), rel=1e-4, abs=1e-7)
    for k in range(2):
        y = turned(theta, 1.0, 3 + k).tensors()
        second = (loss(y, h) - 2 * here + loss(y, -h)) / h**2
        assert bend.across[k] == pytest.approx(second, rel=2e-3, abs=1e-5)


def check_influence(model: ChatModel, theta: Solution, other: Solution, dense: Dense) -> None:
    candidates = [Measured("g", "general", theta), Measured("n", "narrow", other)]
    chosen = at_equal_norms(candidates, (0.5, 1.0), n_random=1)
    table = document_kl(model, TEXTS, chosen, progress=False)
    for row in table.itertuples():
        (one,) = (c.solution for c in chosen if (c.direction, c.relative_norm) == (row.direction, row.relative_norm))
        slow = slow_kl(model.hf.double(), with_theta(model.hf, dense(one)), TEXTS[row.document])
        assert row.kl_sum == pytest.approx(slow, rel=1e-7, abs=1e-12)
