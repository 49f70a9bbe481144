from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from em_interp.directions.activations import collect
from em_interp.directions.rank1 import mean_scalars
from em_interp.errors import EmInterpError, ModelError, TextLimitError
from em_interp.evaluation.logprobs import answer_logprobs
from em_interp.evaluation.sampling import sample
from em_interp.interventions.steering import residual_norms
from em_interp.landscape.influence import Measured, document_kl
from em_interp.landscape.landscape import Landscape
from em_interp.models.architectures import find_blocks, text_limit
from em_interp.models.chat import encode, encode_all, prompt_ids
from em_interp.models.chat_model import ChatModel
from em_interp.models.losses import response_loss
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.training.finetune import finetune
from em_interp.training.gradients import loss_gradient
from em_interp.training.recipes import TrainingSpec, VectorSpec
from tests.theta import make_theta
from tests.tiny_models import CONVERSATIONS, make_hf, talk, tokenizer

LIMIT = 40
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": len(tokenizer())}
IDS = {"bos_token_id": None, "eos_token_id": tokenizer().eos_token_id, "pad_token_id": 0, "initializer_range": 0.2}
QUIET = {"progress": False}


def learned(family: str) -> Any:
    torch.manual_seed(0)
    common = {**SMALL, **IDS}
    if family == "opt":
        config = OPTConfig(**common, max_position_embeddings=LIMIT, ffn_dim=32, word_embed_proj_dim=16)
        return OPTForCausalLM(config)
    if family == "gpt-neo":
        kinds = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2}
        return GPTNeoForCausalLM(GPTNeoConfig(**common | kinds, max_position_embeddings=LIMIT, intermediate_size=32))
    if family == "gpt-j":
        renamed = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": LIMIT, "rotary_dim": 4, "n_inner": 32}
        return GPTJForCausalLM(GPTJConfig(vocab_size=len(tokenizer()), tie_word_embeddings=False, **renamed, **IDS))
    return make_hf(family, max_position_embeddings=LIMIT)


def scaled(rope: dict[str, Any], **changes: Any) -> Any:
    return make_hf("llama", max_position_embeddings=LIMIT, rope_parameters={"rope_theta": 1e4, **rope}, **changes)


def longrope() -> Any:
    """Phi-3's: a limit of 160 on top of 40, and other frequencies beyond 40 for every row of a batch."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 16.0, 64.0]}
    config = Phi3Config(
        **SMALL | {"hidden_size": 16},
        **IDS,
        intermediate_size=32,
        max_position_embeddings=4 * LIMIT,
        original_max_position_embeddings=LIMIT,
        rope_parameters={**rope, "rope_theta": 1e4, "original_max_position_embeddings": LIMIT},
    )
    return Phi3ForCausalLM(config)


def model_of(hf: Any) -> ChatModel:
    return ChatModel(hf.eval(), tokenizer(), name="tiny")


@pytest.mark.parametrize(
    ("hf", "limit"),
    [
        (lambda: learned("qwen2"), LIMIT),
        (lambda: learned("gpt2"), LIMIT),
        (lambda: learned("opt"), LIMIT),
        (lambda: learned("gpt-neo"), LIMIT),
        (lambda: learned("gpt-j"), LIMIT),
        (lambda: scaled({"rope_type": "linear", "factor": 2.0}), LIMIT),
        (lambda: scaled({"rope_type": "dynamic", "factor": 4.0}), LIMIT),
        (longrope, LIMIT),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)), None),
        (lambda: FalconForCausalLM(FalconConfig(alibi=True, **SMALL)), None),
        (lambda: FalconForCausalLM(FalconConfig(alibi=False, max_position_embeddings=LIMIT, **SMALL)), LIMIT),
    ],
)
def test_the_limit(hf, limit):
    assert text_limit(hf()) == limit


LONG = talk("fox " * LIMIT, "see a doctor")
USES = {
    "collect": lambda m: collect(m, [LONG], **QUIET),
    "sample": lambda m: sample(m, {"q": LONG[0]["content"]}, 1, max_new_tokens=2, **QUIET),
    "answer_logprobs": lambda m: answer_logprobs(
        m, pd.DataFrame({"question": [LONG[0]["content"]], "answer": ["rest"]})
    ),
    "response_loss": lambda m: response_loss(m.hf, [encode(m.tokenizer, LONG)], pad=0),
    "landscape": lambda m: Landscape(m, [encode(m.tokenizer, LONG)]),
    "residual_norms": lambda m: residual_norms(m, {"q": LONG[0]["content"]}),
    "gradients": lambda m: loss_gradient(m, SteeringVector(torch.ones(m.d_model), 0, 1.0), [LONG]),
    "finetune": lambda m: finetune(m, [LONG], TrainingSpec(VectorSpec(1), learning_rate=1e-3, max_steps=1), **QUIET),
    "finetune's KL": lambda m: finetune(
        m,
        [talk("a", "rest")],
        TrainingSpec(VectorSpec(1), learning_rate=1e-3, max_steps=1, kl_weight=1.0),
        kl_conversations=[LONG],
        **QUIET,
    ),
    "influence": lambda m: document_kl(
        m,
        [LONG[0]["content"]],
        [Measured("d", "general", SteeringVector(torch.ones(m.d_model), 0, 1.0))],
        **QUIET,
    ),
    "token scalars": lambda m: mean_scalars(m, make_theta(m, "rank-1"), [LONG]),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_text_beyond_the_limit_is_refused_everywhere_in_one_wording(family, use):
    """Rotary models went on silently, learned positions ended in an IndexError."""
    model = model_of(learned(family))
    with pytest.raises(TextLimitError, match=rf"0 has \d+ tokens.*reads {LIMIT}: .*Shorten it or leave it out"):
        USES[use](model)


@pytest.mark.parametrize("family", ["opt", "gpt-neo", "gpt-j"])
def test_learned_positions_are_read_to_their_last(family):
    model = model_of(learned(family))
    room = LIMIT - len(prompt_ids(tokenizer(), talk("")))
    words = "x" * room
    assert len(prompt_ids(tokenizer(), talk(words))) == LIMIT
    residual_norms(model, {"q": words})
    for use in ("sample", "response_loss", "landscape"):
        with pytest.raises(TextLimitError):
            USES[use](model)
    with pytest.raises(TextLimitError, match=rf"question 0 has {LIMIT} tokens before its answer"):
        sample(model, {"q": words}, 1, **QUIET)
    (found,) = sample(model, {"q": words[1:]}, 1, **QUIET).itertuples()
    assert found.n_tokens == 1


def test_an_answer_ends_where_the_model_does_whatever_its_company():
    model = model_of(learned("gpt2"))
    model.hf.lm_head.weight.data[tokenizer().eos_token_id] = -100 * model.hf.lm_head.weight.data.abs().max()
    questions = {"short": "x", "long": "x" * 20}
    both = sample(model, questions, 2, max_new_tokens=30, **QUIET)
    for key, rows in both.groupby("question_id"):
        alone = sample(model, {key: questions[key]}, 2, max_new_tokens=30, **QUIET)
        assert list(alone["answer"]) == list(rows["answer"])
        room = min(30, LIMIT - len(prompt_ids(tokenizer(), talk(questions[key]))))
        assert (rows["n_tokens"] == room).all() or rows["finished"].any()


@pytest.mark.parametrize("hf", [longrope, lambda: scaled({"rope_type": "dynamic", "factor": 4.0})])
def test_rows_up_to_the_limit_do_not_depend_on_their_company(hf):
    """Frequencies that change with the longest row: within the limit, every row equals itself alone, in float64."""
    model = model_of(hf().double())
    chats = [*CONVERSATIONS[:3], talk("x" * 17, "rest")]
    chats = [c for c in chats if len(encode(tokenizer(), c)) <= LIMIT]
    assert len(chats) >= 2
    with torch.no_grad():
        alone = []
        for row in encode_all(tokenizer(), chats):
            states = hf().double().eval()(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
            alone.append(states[1][0, slice(*row.spans[0])].mean(0))
    found = collect(model, chats, layers=[0], keep=True, **QUIET).each("response", 0)
    torch.testing.assert_close(found.double(), torch.stack(alone), rtol=1e-5, atol=1e-6)
    with pytest.raises(TextLimitError):
        collect(model, [*chats, talk("x" * 2 * LIMIT, "rest")], **QUIET)


def live(model: ChatModel) -> ChatModel:
    for block in find_blocks(model.hf):
        block.self_attn.attention_dropout = 0.1
    model.hf.train()
    return model


SHORT = talk("a", "rest")
QUICK = {
    "collect": lambda m: collect(m, [SHORT], **QUIET),
    "sample": lambda m: sample(m, {"q": "a"}, 1, max_new_tokens=2, **QUIET),
    "answer_logprobs": lambda m: answer_logprobs(m, pd.DataFrame({"question": ["a"], "answer": ["rest"]})),
    "response_loss": lambda m: response_loss(m.hf, [encode(m.tokenizer, SHORT)], pad=0),
    "landscape": lambda m: Landscape(m, [encode(m.tokenizer, SHORT)]).losses(
        [SteeringVector(torch.ones(m.d_model), 0, 1.0)]
    ),
    "residual_norms": lambda m: residual_norms(m, {"q": "a"}),
    "gradients": lambda m: loss_gradient(m, SteeringVector(torch.ones(m.d_model), 0, 1.0), [SHORT]),
    "finetune": lambda m: finetune(m, [SHORT], TrainingSpec(VectorSpec(1), learning_rate=1e-3, max_steps=1), **QUIET),
    "influence": lambda m: document_kl(
        m, ["a fox"], [Measured("d", "general", SteeringVector(torch.ones(m.d_model), 0, 1.0))], **QUIET
    ),
    "token scalars": lambda m: mean_scalars(m, make_theta(m, "rank-1"), [SHORT]),
}


@pytest.mark.parametrize("use", QUICK)
def test_live_dropout_is_refused_everywhere(use):
    model = live(model_of(make_hf()))
    with pytest.raises(EmInterpError, match=r"dropout is active in 4 modules.*hf\.eval\(\)"):
        QUICK[use](model)
    model.hf.eval()
    QUICK[use](model)


def test_layer_drop_and_bare_rates_count_as_dropout():
    hf = learned("opt")
    hf.config.layerdrop = 0.0
    model = model_of(hf)
    for module in hf.modules():
        for name in ("dropout", "layerdrop", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    hf.train()
    QUICK["collect"](model)
    hf.model.decoder.layerdrop = 0.1
    with pytest.raises(ModelError, match=r"1 modules, e\.g\. model\.decoder"):
        QUICK["collect"](model)
