"""A family that transformers does not have: refused by name, and with one entry known everywhere."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from em_interp.directions.activations import collect
from em_interp.directions.direction import Direction
from em_interp.directions.rank1 import write_directions
from em_interp.errors import EmInterpError, HookError, ModelError
from em_interp.interventions.ablation import Ablate
from em_interp.interventions.intervening import intervening
from em_interp.interventions.orthogonalise import PostNormWarning, orthogonalised
from em_interp.interventions.steering import Steer
from em_interp.landscape.landscape import Landscape, SharingWarning
from em_interp.models.architectures import FAMILIES, Architecture, find_blocks, layer_of, place_of
from em_interp.models.chat import collate, encode_all
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import residuals
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector
from tests.tiny_models import CONVERSATIONS, D_MODEL, small_config, tokenizer

ENTRY = Architecture("stack", "units", "mix.back", "ff.back", mlp="ff", positions="places")
POST_NORMS = ("after_mix", "after_ff")


class MadeUpConfig(PretrainedConfig):
    model_type = "made_up"
    post_norms = False


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.back = nn.Linear(D_MODEL, 3 * D_MODEL), nn.Linear(D_MODEL, D_MODEL)

    def forward(self, x, mask):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.read(x).chunk(3, -1))
        return self.back(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.back = nn.Linear(D_MODEL, 48), nn.Linear(48, D_MODEL)

    def forward(self, x):
        return self.back(F.gelu(self.up(x)))


class Unit(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mix, self.ff = Mix(), FeedForward()
        self.before_mix, self.before_ff = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
        if config.post_norms:
            self.after_mix, self.after_ff = nn.RMSNorm(D_MODEL), nn.RMSNorm(D_MODEL)
        else:
            self.after_mix = self.after_ff = lambda x: x

    def forward(self, hidden_states, mask):
        hidden = hidden_states + self.after_mix(self.mix(self.before_mix(hidden_states), mask))
        return hidden + self.after_ff(self.ff(self.before_ff(hidden)))


class MadeUpModel(PreTrainedModel):
    config_class = MadeUpConfig

    def __init__(self, config):
        super().__init__(config)
        self.tokens, self.places = nn.Embedding(config.vocab_size, D_MODEL), nn.Embedding(256, D_MODEL)
        self.units = nn.ModuleList(Unit(config) for _ in range(config.num_hidden_layers))
        self.last_norm = nn.LayerNorm(D_MODEL)
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False, **_):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.tokens(input_ids) + self.places((real.cumsum(-1) - 1).clamp_min(0))
        causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
        mask = causal & real.bool()[:, None, None] | torch.eye(real.shape[1], dtype=torch.bool)
        states = [hidden]
        for unit in self.units:
            states.append(unit(states[-1], mask))
        states[-1] = self.last_norm(states[-1])
        return BaseModelOutput(states[-1], tuple(states) if output_hidden_states else None)


class MadeUpForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MadeUpConfig
    base_model_prefix = "stack"

    def __init__(self, config):
        super().__init__(config)
        self.stack = MadeUpModel(config)
        self.head = nn.Linear(D_MODEL, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False, **_):
        out = self.stack(input_ids, attention_mask, output_hidden_states)
        return CausalLMOutput(logits=self.head(out.last_hidden_state), hidden_states=out.hidden_states)


def made_up(post_norms=False):
    torch.manual_seed(0)
    hf = MadeUpForCausalLM(MadeUpConfig(**small_config(tokenizer()), post_norms=post_norms)).eval()
    for weight in hf.parameters():
        weight.data += 0.2 * torch.randn(weight.shape)
    return hf


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setitem(FAMILIES, "made_up", ENTRY)
    return ChatModel(made_up(), tokenizer(), name="tiny-made-up")


def inputs():
    return collate(encode_all(tokenizer(), CONVERSATIONS), range(5), pad=0, side="left")


def direction():
    return Direction(torch.randn(4, D_MODEL, generator=torch.Generator().manual_seed(3)), tuple(range(4)), "random")


def lora(*names):
    g = torch.Generator().manual_seed(1)
    shapes = {name: (48 if ".ff." in name else D_MODEL) for name in names}
    a = {name: torch.randn(1, width, generator=g) for name, width in shapes.items()}
    b = {name: torch.randn(D_MODEL, 1, generator=g) for name in names}
    return LoraAdapter(a, b, 2.0, False, "tiny-made-up")


def changed_by(modules, edit, batch, hf):
    """Logits with plain hooks on some modules."""
    handles = [module.register_forward_hook(lambda _m, _a, out: edit(out)) for module in modules]
    try:
        with torch.no_grad():
            return hf(**batch.inputs()).logits
    finally:
        for handle in handles:
            handle.remove()


def test_load_and_extract(model):
    assert (model.n_layers, model.d_model) == (4, D_MODEL)
    assert find_blocks(model.hf) == list(model.hf.stack.units)
    batch, rows = inputs(), encode_all(tokenizer(), CONVERSATIONS)
    states = model.hf(**batch.inputs(), output_hidden_states=True).hidden_states
    for layer, hidden in residuals(model.hf, batch.inputs(), range(3)).items():
        torch.testing.assert_close(hidden, states[layer + 1])
    found = collect(model, CONVERSATIONS, scopes=("response",), layers=[1], progress=False)
    kept = []
    for row in rows:
        one = model.hf(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[2][0]
        kept.append(one[slice(*row.spans[-1])])
    torch.testing.assert_close(found.mean("response")[0], torch.cat(kept).double().mean(0), atol=1e-5, rtol=1e-5)


def test_steer_and_ablate(model):
    batch, d = inputs(), direction()
    v = d.at(1)
    q = v / v.norm()
    for what, blocks, edit in (
        (Steer(d, 1, 2.0), model.hf.stack.units[1:2], lambda out: out + 2 * v),
        (Ablate(d, from_layer=1), model.hf.stack.units, lambda out: out - (out @ q).unsqueeze(-1) * q),
    ):
        expected = changed_by(blocks, edit, batch, model.hf)
        with torch.no_grad(), intervening(model, [what]):
            torch.testing.assert_close(model.hf(**batch.inputs()).logits, expected, atol=1e-4, rtol=1e-4)


def test_orthogonalise(model):
    batch, d = inputs(), direction()
    q = d.at(2) / d.at(2).norm()
    found = orthogonalised(model, Ablate(d, from_layer=2))
    hf = model.hf
    written = [hf.stack.tokens, hf.stack.places, *(m for u in hf.stack.units for m in (u.mix.back, u.ff.back))]
    expected = changed_by(written, lambda out: out - (out @ q).unsqueeze(-1) * q, batch, hf)
    with torch.no_grad():
        torch.testing.assert_close(found.hf(**batch.inputs()).logits, expected, atol=1e-4, rtol=1e-4)


def test_orthogonalise_before_norms(monkeypatch):
    monkeypatch.setitem(FAMILIES, "made_up", replace(ENTRY, post_norms=POST_NORMS))
    model = ChatModel(made_up(post_norms=True), tokenizer(), name="tiny-made-up")
    with pytest.warns(PostNormWarning):
        orthogonalised(model, Ablate(direction(), from_layer=2))
    monkeypatch.setitem(FAMILIES, "made_up", ENTRY)  # an entry that forgets them is found out
    with pytest.raises(ModelError, match="not known here"):
        orthogonalised(model, Ablate(direction(), from_layer=2))


@pytest.mark.parametrize("kind", ["vector", "lora"])
def test_losses(model, kind):
    theta = SteeringVector(torch.randn(D_MODEL), 1, 1.0) if kind == "vector" else lora("stack.units.3.ff.back")
    thetas = [theta.scaled(c) for c in (0.0, 0.5, 1.0)]
    sizes = []
    landscape = Landscape(model, encode_all(tokenizer(), CONVERSATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SharingWarning)
        handle = model.hf.stack.units[3].ff.up.register_forward_hook(lambda _m, a, _o: sizes.append(a[0].shape[:2]))
        found = landscape.losses(thetas)
        handle.remove()
    torch.testing.assert_close(
        torch.tensor(found.nll), torch.tensor(landscape.plain_losses(thetas).nll), atol=1e-4, rtol=1e-4
    )
    assert sizes[-1] == (1, 3 * found.tokens.sum()), "the last MLP is run at the scored tokens only"


def test_adapters(model, tmp_path):
    adapter = lora("stack.units.1.ff.back", "stack.units.2.ff.back")
    assert adapter.first_layer == 1 and [d.layers for d in write_directions(adapter).values()] == [(1,), (2,)]
    model.add_adapter("mine", adapter.save(tmp_path))
    batch, plain = inputs(), ChatModel(made_up(), tokenizer(), name="tiny-made-up")
    with torch.no_grad(), adapter.attached(plain):
        expected = plain.hf(**batch.inputs()).logits
    with torch.no_grad():
        torch.testing.assert_close(model.hf(**batch.inputs()).logits, expected, atol=1e-4, rtol=1e-4)


def test_without_an_entry_the_check_names_what_is_missing():
    with pytest.raises(HookError, match=r"`body` and `blocks` in .*FAMILIES\['made_up'\], a new entry.*stack\.units"):
        ChatModel(made_up(), tokenizer())
    assert layer_of("stack.units.1.ff.back") is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("body", "model"),
        ("blocks", "layers"),
        ("attention_out", "self_attn.o_proj"),
        ("mlp_out", "mlp.down_proj"),
        ("mlp", "mlp"),
        ("positions", "wpe"),
        ("post_norms", ("after_mix", "after_mlp")),
    ],
)
def test_a_wrong_entry_is_named_at_load(monkeypatch, field, value):
    monkeypatch.setitem(FAMILIES, "made_up", replace(ENTRY, **{field: value}))
    with pytest.raises(EmInterpError, match=rf"Name its .*`{field}`.* in .*FAMILIES\['made_up'\]\."):
        ChatModel(made_up(post_norms=True), tokenizer())


@pytest.mark.parametrize("field", ["attention_out", "mlp_out"])
def test_what_is_not_known_is_named_where_it_is_needed(monkeypatch, field):
    monkeypatch.setitem(FAMILIES, "made_up", replace(ENTRY, **{field: None}))
    model = ChatModel(made_up(), tokenizer())
    with pytest.raises(ModelError, match=rf"Ablate with hooks.*`{field}`"):
        orthogonalised(model, Ablate(direction(), from_layer=1))


def test_the_usual_layout_needs_no_entry():
    class UnheardConfig(LlamaConfig):
        model_type = "unheard"

    torch.manual_seed(0)
    hf = LlamaForCausalLM(UnheardConfig(num_key_value_heads=2, **small_config(tokenizer()))).eval()
    found = orthogonalised(ChatModel(hf, tokenizer()), Ablate(direction(), from_layer=1))
    assert found.n_layers == 4
    hf.model.layers[2].mlp.down = hf.model.layers[2].mlp.down_proj
    del hf.model.layers[2].mlp.down_proj
    hf.model.layers[2].mlp.forward = lambda x: hf.model.layers[2].mlp.down(x.repeat(1, 1, 2)[..., :48])
    with pytest.raises(ModelError, match=r"`mlp_out` in .*\['unheard'\], a new entry"):
        orthogonalised(ChatModel(hf, tokenizer()), Ablate(direction(), from_layer=1))


@pytest.mark.parametrize(
    ("name", "layer", "text_only", "short"),
    [
        ("model.layers.3.mlp.down_proj", 3, True, "down_proj"),
        ("transformer.h.11.attn.c_proj", 11, True, "attn.c_proj"),
        ("gpt_neox.layers.0.attention.dense", 0, True, "attention.dense"),
        ("model.decoder.layers.2.self_attn.out_proj", 2, True, "self_attn.out_proj"),
        ("model.language_model.layers.1.self_attn.q_proj", 1, False, "q_proj"),
        ("layers.1.self_attn.q_proj", 1, False, "q_proj"),
        ("transformer.blocks.1.ffn.up_proj", 1, True, "up_proj"),
    ],
)
def test_places_in_names(name, layer, text_only, short):
    place = place_of(name)
    assert (place.layer, place.text_only, place.short) == (layer, text_only, short)
    assert layer_of(name) == layer


def test_names_in_no_block():
    assert place_of("lm_head") is None and layer_of("model.embed_tokens") is None
    assert layer_of("model.layers.x.mlp") is None
