"""Model families: all that differs between them, one entry a family, and where its modules are in a model in hand.

Layer l (0-based) is the output of block l: TransformerLens `blocks.{l}.hook_out`, Hugging Face
`hidden_states[l + 1]` for l < L - 1. Hugging Face's last entry is after the final norm and is not layer L - 1.

What a module computes is asked of the module, never told here: a norm's gain (Gemma's is 1 + w), an embedding's scale,
a soft cap, whether a block returns a tuple. What was told is proved at load, and again by whoever builds on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from torch import nn

from em_interp.errors import HookError, ModelError


@dataclass(frozen=True)
class Architecture:
    """Names of modules in transformers' causal language model of a family; the defaults are what most families use.

    body: runs the decoder blocks, embeddings to final norm, without the output head. blocks: their list, in `body`. All
    others are in a block, but for `positions`, in `body`: None where a family has no such module, or none is known.
    """

    body: str = "model"
    blocks: str = "layers"
    attention_out: str | None = "self_attn.o_proj"
    """The matrix by which attention writes to the residual."""
    mlp_out: str | None = "mlp.down_proj"
    """The one matrix by which the MLP writes to the residual."""
    post_norms: tuple[str, str] | None = None
    """Norms between those matrices and the residual: after attention, after the MLP."""
    mlp: str | None = "mlp"
    """Works on each token alone, so that the last one may be run at the scored tokens only."""
    positions: str | None = None
    """Embedding of positions that is added to the residual."""


_USUAL: Final = Architecture()
_NORMED: Final = Architecture(post_norms=("post_attention_layernorm", "post_feedforward_layernorm"))
_GLM4: Final = Architecture(post_norms=("post_self_attn_layernorm", "post_mlp_layernorm"))
_EXPERTS: Final = Architecture(mlp_out=None)
_GPT2: Final = Architecture("transformer", "h", "attn.c_proj", "mlp.c_proj", positions="wpe")
_GPTJ: Final = Architecture("transformer", "h", "attn.out_proj", "mlp.fc_out")
_BLOOM: Final = Architecture("transformer", "h", "self_attention.dense", "mlp.dense_4h_to_h")
_OPT: Final = Architecture(
    "model.decoder", "layers", "self_attn.out_proj", "fc2", mlp=None, positions="embed_positions"
)

FAMILIES: Final[dict[str, Architecture]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"), _USUAL),
    **dict.fromkeys(("granite", "cohere", "glm", "diffllama", "stablelm"), _USUAL),
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text"), _NORMED),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "beam", "muse_glimmer_text"), _NORMED),
    **dict.fromkeys(("glm4", "glm4v_text", "glm_ocr_text"), _GLM4),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"), _EXPERTS),
    "lfm2": Architecture(attention_out=None, mlp_out=None, mlp=None),
    "phi": Architecture(attention_out="self_attn.dense", mlp_out="mlp.fc2"),
    "persimmon": Architecture(attention_out="self_attn.dense", mlp_out="mlp.dense_4h_to_h"),
    "starcoder2": Architecture(mlp_out="mlp.c_proj"),
    "nanochat": Architecture(mlp_out="mlp.fc2"),
    "cosmos3_edge_text": Architecture(mlp_out="mlp.fc2"),
    "xglm": Architecture(attention_out="self_attn.out_proj", mlp_out="fc2", mlp=None),
    "gpt_neox": Architecture("gpt_neox", "layers", "attention.dense", "mlp.dense_4h_to_h"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT2),
    "openai-gpt": replace(_GPT2, positions=None),
    "gpt_neo": replace(_GPT2, attention_out=None),
    **dict.fromkeys(("gptj", "codegen"), _GPTJ),
    **dict.fromkeys(("bloom", "falcon"), _BLOOM),
    "ctrl": Architecture("transformer", "h", attention_out=None, mlp_out=None, mlp=None),
    **dict.fromkeys(("opt", "bart", "mbart", "plbart", "mvp", "pegasus", "bigbird_pegasus", "marian"), _OPT),
    **dict.fromkeys(("blenderbot", "blenderbot-small", "trocr", "whisper"), _OPT),
}
"""By the `model_type` of the text model's config. One that is not here must have the usual layout, of which only the
blocks are needed at load."""

_IN_MULTIMODAL: Final = ("model.language_model", "language_model.model")
"""The body of a family with the usual layout inside a model with other towers."""
_OTHER_LISTS: Final = ("blocks",)
"""Lists of blocks in names of modules from elsewhere: TransformerLens', and families that are refused."""
_AMBIGUOUS: Final = ("c_proj", "out_proj")
"""Last names that several modules of one block may have."""


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel (its LoRA modules stay in it), or the model itself."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def family_of(model: nn.Module) -> str:
    """The name under which a model's entry is, or would be, in `FAMILIES`."""
    config = getattr(unwrap(model), "config", None)
    return "unknown" if config is None else str(config.get_text_config().model_type)


def architecture_of(model: nn.Module) -> Architecture:
    """A model's entry, or the usual layout where it has none."""
    return FAMILIES.get(family_of(model), _USUAL)


# -- in a model in hand -----------------------------------------------------------------------------------------


def body_name(model: nn.Module) -> str:
    """Name of the module that runs the decoder blocks: embeddings to final norm, without the output head.

    Raises HookError where the blocks are not where the family's entry, or the usual layout, has them.
    """
    base, entry = unwrap(model), architecture_of(model)
    for body in (entry.body, *_IN_MULTIMODAL):
        found = _submodule(base, f"{body}.{entry.blocks}")
        if isinstance(found, nn.ModuleList) and len(found):
            return body
    lists = [name for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    raise HookError(
        f"{type(base).__name__}: no decoder blocks at {entry.body}.{entry.blocks}. Name its `body` and `blocks` in "
        f"{_entry(model)}. Its lists of modules: {', '.join(lists[:4]) or 'none'}."
    )


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a transformers model (or a PeftModel over one), first to last. Raises as `body_name`."""
    return list(unwrap(model).get_submodule(f"{body_name(model)}.{architecture_of(model).blocks}"))


def check_architecture(model: nn.Module) -> None:
    """Raise HookError or ModelError, naming the field, unless a model has all that its family's entry says.

    A family without an entry needs its blocks where they usually are; what else of the usual layout it lacks is named
    where it is needed.
    """
    blocks, base = find_blocks(model), unwrap(model)
    if family_of(model) not in FAMILIES:
        return
    entry = architecture_of(model)
    after_attention, after_mlp = entry.post_norms or (None, None)
    inside = {"attention_out": entry.attention_out, "mlp_out": entry.mlp_out, "mlp": entry.mlp}
    told = [(field, path, block) for field, path in inside.items() for block in blocks]
    told += [("post_norms", path, block) for path in (after_attention, after_mlp) for block in blocks]
    told.append(("positions", entry.positions, base.get_submodule(body_name(model))))
    for field, path, root in told:
        if path is not None and _submodule(root, path) is None:
            raise ModelError(
                f"{type(base).__name__}: no module {path} in {type(root).__name__}. Name its `{field}` in "
                f"{_entry(model)}."
            )


def writes(model: nn.Module) -> list[tuple[Any, nn.Module | None]]:
    """(matrix that writes to the residual, norm between them or None) of attention and MLP of every block.

    Raises ModelError, naming the field, where a block lacks one.
    """
    entry, found = architecture_of(model), []
    norms = entry.post_norms or (None, None)
    parts = (("attention", "attention_out", entry.attention_out), ("MLP", "mlp_out", entry.mlp_out))
    for block in find_blocks(model):
        for (what, field, path), norm in zip(parts, norms, strict=True):
            matrix: Any = path and _submodule(block, path)
            if not matrix or getattr(matrix, "weight", None) is None or matrix.weight.ndim != 2:
                raise ModelError(
                    f"{type(block).__name__} has no single {what} output matrix{f' at {path}' if path else ''}. Ablate "
                    f"with hooks, or, if there is one, name it as `{field}` in {_entry(model)}."
                )
            found.append((matrix, None if norm is None else block.get_submodule(norm)))
    return found


def output_axis(matrix: nn.Module) -> int:
    """Which axis of a matrix's weight is its output: GPT-2's Conv1D stores [in, out], linear layers [out, in]."""
    return 1 if type(matrix).__name__ == "Conv1D" else 0


def position_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """Embeddings of positions that are added to the residual: one or none."""
    path = architecture_of(model).positions
    found = None if path is None else _submodule(unwrap(model).get_submodule(body_name(model)), path)
    return [found] if isinstance(found, nn.Embedding) else []


def last_mlp(model: nn.Module) -> nn.Module | None:
    """The last block's MLP, where it may be run at some tokens only."""
    path = architecture_of(model).mlp
    return None if path is None else _submodule(find_blocks(model)[-1], path)


def text_limit(model: nn.Module) -> int | None:
    """Tokens of the longest text that the model was made for; None where position is told by distance alone (ALiBi).

    With LongRoPE the original length: beyond it every row of a batch is computed with frequencies that depend on the
    batch's longest row. The same holds of dynamic NTK beyond `max_position_embeddings`, which is the limit there.
    """
    config = unwrap(model).config.get_text_config()
    if getattr(config, "alibi", False):
        return None
    known = [getattr(config, "max_position_embeddings", None), *_longrope_lengths(config)]
    return min((int(limit) for limit in known if limit and limit > 0), default=None)


def _longrope_lengths(config: Any) -> list[int]:
    """The original lengths of a configuration's LongRoPE settings, of which there may be one set a kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [part for part in (rope, *rope.values()) if isinstance(part, Mapping)]
    return [part["original_max_position_embeddings"] for part in kinds if part.get("rope_type") == "longrope"]


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    here: Any = root
    for name in path.split("."):
        here = getattr(here, name, None)
    return here if isinstance(here, nn.Module) else None


def _entry(model: nn.Module) -> str:
    family = family_of(model)
    return f"{__name__}.FAMILIES[{family!r}]{'' if family in FAMILIES else ', a new entry'}"


# -- in the name of a module, without a model -------------------------------------------------------------------


class Place(NamedTuple):
    """Where a module is: its name is `prefix`, the blocks' name, the block's number `layer`, and `rest`, with dots."""

    prefix: str
    layer: int
    rest: str

    @property
    def text_only(self) -> bool:
        """Whether no other tower's blocks can answer to the same layer and rest."""
        return self.prefix in {entry.body for entry in (_USUAL, *FAMILIES.values())}

    @property
    def short(self) -> str:
        """`rest` as short as it can be without meaning another module too (GPT-2 has two c_proj)."""
        leaf = self.rest.rpartition(".")[2]
        return leaf if leaf.endswith("_proj") and leaf not in _AMBIGUOUS else self.rest


def place_of(module: str) -> Place | None:
    """The place that a module's name says, None if it is in no block."""
    lists = sorted({entry.blocks for entry in (_USUAL, *FAMILIES.values())}.union(_OTHER_LISTS))
    match = re.match(rf"(?:(.*?)\.)?(?:{'|'.join(map(re.escape, lists))})\.(\d+)\.(.+)$", module)
    return Place(match[1] or "", int(match[2]), match[3]) if match else None


def layer_of(module: str) -> int | None:
    """The block that a module's name puts it in."""
    place = place_of(module)
    return None if place is None else place.layer


def writes_to_residual(module: str) -> bool:
    """Whether a module of that name writes to the residual stream, in any family."""
    paths = {path for entry in (_USUAL, *FAMILIES.values()) for path in (entry.attention_out, entry.mlp_out) if path}
    return layer_of(module) is not None and module.rpartition(".")[2] in {path.rpartition(".")[2] for path in paths}
