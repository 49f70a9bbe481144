from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from em_interp.errors import HookError, LossSetError, ModelError, SolutionError
from em_interp.landscape.curvature import curvature
from em_interp.landscape.landscape import Landscape, SharingWarning
from em_interp.models.architectures import find_blocks
from em_interp.models.chat import Encoded, collate, encode_all
from em_interp.models.hooks import block_hooks
from em_interp.models.losses import response_loss
from em_interp.solutions.base import Solution
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.training.gradients import loss_gradient
from tests.theta import KINDS, linear_modules, make_theta
from tests.tiny_models import CONVERSATIONS, MORE_FAMILIES, make_chat, talk, tokenizer

MORE = [*CONVERSATIONS, talk("a fox", "rest"), talk("brown", "see the doctor and the fox")]
MULTI = [*talk("see", "a cough"), *talk("and then", "rest well")]


@pytest.fixture(autouse=True)
def no_silent_fallback():
    with warnings.catch_warnings():
        warnings.simplefilter("error", SharingWarning)
        yield


def encoded(conversations=None):
    return encode_all(tokenizer(), MORE if conversations is None else conversations)


def slow_nll(model, solution, rows, side):
    """One response after another in a batch of all, float64 log-softmax over the whole logits."""
    batch = collate(rows, range(len(rows)), pad=0, side=side)
    with torch.no_grad(), solution.attached(model):
        logp = torch.log_softmax(model.hf(**batch.inputs()).logits.double(), -1)
    out = []
    for r in range(len(rows)):
        where = [t for t in range(1, batch.input_ids.shape[1]) if batch.answer_mask[r, t]]
        out.append(-sum(float(logp[r, t - 1, batch.input_ids[r, t]]) for t in where))
    return np.array(out)


def family_of(solution, n=2):
    g = torch.Generator().manual_seed(1)
    return [solution, *(solution.perturbed(0.1 * k, g) for k in range(1, n)), solution.scaled(-1.5), solution.scaled(0)]


@pytest.mark.parametrize(
    ("family", "kind"),
    [(f, k) for f in MORE_FAMILIES for k in KINDS if k != "all-modules" or f in ("gemma2", "gpt_neox", "gpt2")],
)
def test_equal_to_slow_plain_passes_on_every_architecture(family, kind):
    model = make_chat(family)
    thetas = family_of(make_theta(model, kind))
    found = Landscape(model, encoded(), tokens_per_pass=90).losses(thetas)
    assert found.plain == () and found.nll.shape == (len(thetas), len(MORE)) and found.nll.dtype == np.float64
    for side in ("left", "right"):
        slow = np.stack([slow_nll(model, theta, encoded(), side) for theta in thetas])
        np.testing.assert_allclose(found.nll, slow, rtol=1e-5)
    assert np.ptp(found.mean) > 0.01  # the thetas do differ


@pytest.mark.parametrize("kind", KINDS)
def test_equal_in_float64_to_its_precision_whatever_the_budget_and_order(kind):
    model = make_chat(dtype=torch.float64)
    thetas = family_of(make_theta(model, kind))
    rows = [*encoded(), *encode_all(tokenizer(), [MULTI], turns="all")]
    slow = np.stack([slow_nll(model, theta, rows, "right") for theta in thetas])
    for budget in (1, 100):
        found = Landscape(model, rows, tokens_per_pass=budget, cache_bytes=20_000).losses(thetas)
        np.testing.assert_allclose(found.nll, slow, rtol=1e-11)
    plain = Landscape(model, rows).plain_losses(thetas)
    np.testing.assert_allclose(plain.nll, slow, rtol=1e-11)
    assert plain.plain == ("as asked",)
    order = [3, 0, 7, 5, 1, 2, 6, 4]
    again = Landscape(model, [rows[i] for i in order]).losses(thetas[::-1])
    np.testing.assert_allclose(again.nll, slow[::-1][:, order], rtol=1e-11)


def test_half_precision_models_and_mixed_kinds_at_once():
    model = make_chat(dtype=torch.bfloat16)
    thetas = [make_theta(model, kind) for kind in (*KINDS, *KINDS[::-1])]
    landscape = Landscape(model, encoded())
    np.testing.assert_allclose(landscape.losses(thetas).nll, landscape.plain_losses(thetas).nll, rtol=0.05)
    exact = make_chat()
    thetas = [make_theta(exact, kind) for kind in (*KINDS, *KINDS[::-1])]
    landscape = Landscape(exact, encoded())
    mixed = landscape.losses(thetas, progress=True)
    np.testing.assert_allclose(mixed.nll, landscape.plain_losses(thetas).nll, rtol=1e-5)


def test_loss_is_the_training_loss_and_zero_is_the_chat_model():
    model = make_chat()
    landscape = Landscape(model, encoded())
    for kind in KINDS:
        theta = make_theta(model, kind)
        with theta.attached(model):
            trained = response_loss(model.hf, encoded(), pad=0)
        found = landscape.losses([theta, theta.scaled(0)]).mean
        assert found == pytest.approx([trained, response_loss(model.hf, encoded(), pad=0)], rel=1e-5)
        # eps = 0 and scale = 1 are the same theta, bit for bit, and scale = 0 is the chat model's pass
        g = torch.Generator().manual_seed(0)
        same = landscape.plain_losses([theta, theta.scaled(1), theta.perturbed(0, g)]).nll
        assert (same == same[0]).all()
    zeros = landscape.plain_losses([make_theta(model, kind).scaled(0) for kind in KINDS])
    assert (zeros.nll == zeros.nll[0]).all()
    assert zeros.mean[0] == pytest.approx(response_loss(model.hf, encoded(), pad=0), rel=1e-6)


def test_losses_know_tokens_and_questions():
    found = Landscape(make_chat(), encoded()).losses([make_theta(make_chat(), "vector")])
    assert found.tokens.tolist() == [row.n_response for row in encoded()]
    assert found.questions.tolist() == [0, 1, 2, 3, 4, 1, 2]
    nll, tokens = found.by_question()
    assert nll[0, 1] == pytest.approx(found.nll[0, 1] + found.nll[0, 5]) and nll.shape == (1, 5)
    assert found.mean[0] == pytest.approx(nll.sum() / tokens.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_an_mlp_that_takes_the_residual_too_is_shared(kind):
    """BLOOM's second argument has as many tokens as its first."""
    model = make_chat("bloom")
    landscape = Landscape(model, encoded())
    thetas = [make_theta(model, kind, seed) for seed in range(2)]
    found = landscape.losses(thetas)
    assert not found.plain
    np.testing.assert_allclose(found.nll, landscape.plain_losses(thetas).nll, rtol=1e-5)


def test_falls_back_where_a_late_block_reads_an_early_one_and_says_so():
    model = make_chat(dtype=torch.float64)
    blocks, early = find_blocks(model.hf), {}
    blocks[0].register_forward_hook(lambda _m, _a, output: early.update(hidden=output))
    blocks[3].register_forward_hook(lambda _m, _a, output: output + 0.3 * early["hidden"])
    landscape = Landscape(model, encoded())
    thetas = family_of(make_theta(model, "vector"))
    with pytest.warns(SharingWarning, match="plain passes, because later blocks need more"):
        found = landscape.losses(thetas)
    assert len(found.plain) == 1
    np.testing.assert_allclose(found.nll, np.stack([slow_nll(model, t, encoded(), "right") for t in thetas]), rtol=1e-9)


@dataclass(frozen=True)
class Wrapped(Solution):
    """A solution of the user's own, with the least that a kind must say."""

    wrapped: SteeringVector
    first_layer: int = 0
    space = property(lambda self: self.wrapped.space)
    fingerprint = property(lambda self: self.wrapped.fingerprint)

    def delta(self, place):
        return self.wrapped.delta(place)

    def scaled(self, factor):
        return replace(self, wrapped=self.wrapped.scaled(factor))

    def tensors(self, on="both"):
        return self.wrapped.tensors(on)

    def with_tensors(self, tensors):
        return replace(self, wrapped=self.wrapped.with_tensors(tensors))

    def random_like(self, generator):
        return replace(self, wrapped=self.wrapped.random_like(generator))

    def attached(self, model, *, must_act=True):
        return self.wrapped.attached(model, must_act=must_act)

    def tracked(self, model):
        return self.wrapped.tracked(model)

    def save(self, path):
        return self.wrapped.save(path)


def test_a_kind_of_the_users_own_is_measured_as_the_others_are():
    model = make_chat(dtype=torch.float64)
    vector = make_theta(model, "vector")
    own = Wrapped(vector)
    assert own.norm == pytest.approx(vector.norm) and own.dimension == vector.dimension == model.d_model
    assert own.inner(vector) == pytest.approx(vector.norm**2) and own.paper_norms() == {}
    landscape = Landscape(model, encoded())
    g = [torch.Generator().manual_seed(3) for _ in range(2)]
    thetas = [[x, x.scaled(2), x.perturbed(0.4, generator)] for x, generator in zip((own, vector), g, strict=True)]
    found = landscape.losses(thetas[0])
    assert found.plain == ()
    np.testing.assert_allclose(found.nll, landscape.losses(thetas[1]).nll, rtol=1e-9)
    curves = [curvature(landscape, x, n_probes=2) for x in (own, vector)]
    np.testing.assert_allclose(curves[0].across, curves[1].across, rtol=1e-6)
    found = loss_gradient(model, own, MORE)
    assert found.along(own) == pytest.approx(loss_gradient(model, vector, MORE).along(vector), rel=1e-9)


def test_falls_back_for_kinds_that_say_wrong_and_for_modules_that_see_some_tokens_only():
    model = make_chat()
    inner = make_theta(model, "vector")
    landscape = Landscape(model, encoded())
    with pytest.warns(SharingWarning, match="later blocks need more"):
        found = landscape.losses([Wrapped(inner, first_layer=3)])  # it acts after block 1
    np.testing.assert_allclose(found.nll, landscape.losses([inner]).nll, rtol=1e-5)

    mlp = find_blocks(model.hf)[2].mlp
    whole = type(mlp).forward

    def by_expert(x):  # two experts' worth of tokens, one after the other
        flat = x.reshape(-1, x.shape[-1])
        return torch.cat([whole(mlp, half) for half in flat.tensor_split(2)]).view_as(x)

    mlp.forward = by_expert
    lora = make_theta(model, "rank-1")
    with pytest.warns(SharingWarning, match="not run on every token"):
        found = Landscape(model, encoded()).losses([lora, lora.scaled(2)])
    np.testing.assert_allclose(found.nll[0], slow_nll(model, lora, encoded(), "left"), rtol=1e-5)


def test_bad_loss_sets_are_refused():
    model = make_chat()
    with pytest.raises(LossSetError, match="empty"):
        Landscape(model, [])
    with pytest.raises(LossSetError, match="fully masked"):
        Landscape(model, [*encoded(), Encoded((5, 6, 7), ())])
    with pytest.raises(LossSetError, match="after a prompt"):
        Landscape(model, [Encoded((5, 6, 7), ((0, 2),))])
    with pytest.raises(LossSetError, match="no solutions"):
        Landscape(model, encoded()).losses([])
    broken = make_chat()
    with torch.no_grad():
        find_blocks(broken.hf)[3].mlp.down_proj.weight[0, 0] = math.inf
    with pytest.raises(LossSetError, match="loss of nan"):
        Landscape(broken, encoded()).plain_losses([make_theta(broken, "vector")])


def test_bad_solutions_and_states_are_refused():
    model = make_chat()
    landscape, theta = Landscape(model, encoded()), make_theta(model, "vector")
    with pytest.raises(SolutionError, match=r"trained on org/Other-7B cannot be compared on tiny-qwen2.*replace"):
        landscape.losses([theta, replace(theta, base="org/Other-7B")])
    landscape.losses([replace(theta, base="unsloth/Tiny-Qwen2"), replace(theta, base=None)])
    with pytest.raises(SolutionError, match="width 8"):
        landscape.losses([theta, SteeringVector(torch.ones(8), 1, 1.0)])
    with pytest.raises(HookError, match="layer 9"):
        landscape.losses([replace(theta, layer=9)])
    with pytest.raises(SolutionError, match="no module"):
        landscape.losses([neox()])
    touching = block_hooks([find_blocks(model.hf)], {1: lambda hidden: hidden}, must_fire=False)
    with touching, pytest.raises(ModelError, match="a hook active"):
        landscape.losses([theta])
    model.add_adapter("mine", theta)
    with pytest.raises(ModelError, match="adapter 'mine' active"):
        landscape.losses([theta])
    with model.no_adapter():
        landscape.losses([theta])


def neox():
    return replace(make_theta(make_chat("gpt_neox"), "rank-1"), base=None)


def test_active_dropout_is_refused_in_models_and_adapters():
    from peft import LoraConfig, get_peft_model

    from em_interp.models.adapters import quiet_peft

    model = make_chat()
    theta = make_theta(model, "vector")
    model.hf.train()  # this architecture's dropout rates are 0
    Landscape(model, encoded()[:2]).losses([theta])
    model.hf.config.attention_dropout = 0.1
    for block in find_blocks(model.hf):
        block.self_attn.attention_dropout = 0.1
    with pytest.raises(ModelError, match=r"dropout is active in 4 modules.*hf\.eval\(\)"):
        Landscape(model, encoded()).losses([theta])
    with pytest.raises(ModelError, match="dropout is active"), theta.attached(model):
        pass
    model.hf.eval()
    Landscape(model, encoded()[:2]).losses([theta])

    adapted = make_chat()
    with quiet_peft():
        get_peft_model(adapted.hf, LoraConfig(r=2, lora_dropout=0.1, target_modules=["down_proj"])).train()
    for each in (theta, make_theta(model, "rank-1")):
        with pytest.raises(ModelError, match=r"dropout is active in \d+ modules, e\.g\. .*lora_dropout"):
            Landscape(adapted, encoded()).losses([each])


def test_the_first_layer_is_shared_work():
    """Blocks up to the solution's layer run once a response, not once a theta."""
    model = make_chat()
    calls = dict.fromkeys(range(model.n_layers), 0)
    for layer, block in enumerate(find_blocks(model.hf)):
        block.input_layernorm.register_forward_hook(
            lambda _m, args, _o, layer=layer: calls.__setitem__(layer, calls[layer] + args[0].shape[0])
        )
    landscape = Landscape(model, encoded())
    theta = make_theta(model, "vector")
    landscape.losses([theta])  # the probe and the residuals
    calls.update(dict.fromkeys(calls, 0))
    landscape.losses([theta.scaled(0.1 * k) for k in range(22)])
    assert (calls[0], calls[1]) == (0, 0) and calls[2] == calls[3] == 22 * len(MORE)
    assert linear_modules(model)
