"""Taking directions out of the weights: every matrix and bias that writes to the residual is made orthogonal to them.

The result is an ordinary Hugging Face checkpoint, which any engine serves without hooks.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from em_interp.errors import DirectionError, ModelError, OutputError, UsageError
from em_interp.files.atomic import written_whole
from em_interp.interventions.ablation import Ablate
from em_interp.interventions.intervening import check_direction
from em_interp.models.adapters import quiet_peft
from em_interp.models.architectures import output_axis, position_embeddings, unwrap, writes
from em_interp.models.chat import Encoded, collate, prompt_ids
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import has_our_hooks, residuals
from em_interp.models.precision import exact


class PostNormWarning(UserWarning):
    """Blocks that normalise what they write: the weights cannot do exactly what the hooks do."""


_LEFT_OVER: Final = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest component of the directions that may remain, of the residual's norm; rounding of 16-bit weights leaves 2%."""


def orthogonalised(model: ChatModel, ablation: Ablate) -> ChatModel:
    """A second model, with weights of its own, that cannot write the ablated directions to its residual stream.

    Embeddings (positions too), attention output and MLP down projection, with their biases, are projected; an active
    PEFT adapter is merged first; tied embeddings are untied, for the unembedding must stay as it is. It equals a hook
    on every write. Where a block normalises what it writes (Gemma 2 and 3), the matrix before the norm is made
    orthogonal as seen through the norm's gain: each write then has no component along the directions and is parallel to
    the hook's, but not as long, since the norm divides by the length of what is left: a PostNormWarning says so.

    ablation: one basis for all layers, that is `from_layer`, or directions with a single layer. Raises DirectionError
    for others, UsageError inside a hook context, ModelError for an architecture whose writes are not known (checked on
    a forward pass) and for an active adapter that is not weights.
    """
    layer = _single_layer(ablation)
    if has_our_hooks(model.hf) and model.active is None:
        raise UsageError("the weights cannot be copied inside a hook or solution context: orthogonalise outside it.")
    for direction in ablation.directions:
        check_direction(direction, model)
    basis = ablation.basis(layer)
    hf = _own_weights(model)
    matrices = writes(hf)
    with torch.no_grad():
        for embedding in (hf.get_input_embeddings(), *position_embeddings(hf)):
            if embedding.weight.shape[-1] != model.d_model:
                raise ModelError(
                    f"{model.name} projects embeddings of width {embedding.weight.shape[-1]} into a residual of width "
                    f"{model.d_model}: its weights cannot be made orthogonal here. Ablate with hooks."
                )
            _project(embedding.weight, basis, axis=1)
        for matrix, norm in matrices:
            _project_write(matrix, norm, basis, model.name)
    post_norm = any(norm is not None for _, norm in matrices)
    if post_norm:
        warnings.warn(
            f"{model.name} normalises what its blocks write: with these weights each write lies along the one that "
            "ablation by hooks leaves, but is longer, so answers differ from the hooks'. Ablate with hooks where the "
            "exact projection matters.",
            PostNormWarning,
            stacklevel=2,
        )
    found = ChatModel(hf, model.tokenizer, name=model.name, check=False)
    _check_nothing_left(found, basis, torch.float32 if post_norm else found.dtype)
    return found


def save_orthogonalised(model: ChatModel, ablation: Ablate, folder: str | Path, *, replace: bool = False) -> Path:
    """`orthogonalised`, written as a Hugging Face checkpoint with its tokenizer; returns the folder.

    Raises as `orthogonalised` does, and OutputError for a folder that cannot be written or holds something already.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not replace):
        raise OutputError(f"{path}: there is something already; nothing was changed. Give a new folder.")
    with written_whole(
        path, replace=replace
    ) as temporary:  # before the work: a folder that cannot be written is refused at once
        found = orthogonalised(model, ablation)
        found.hf.save_pretrained(str(temporary))
        found.tokenizer.save_pretrained(str(temporary))
    return path


def _single_layer(ablation: Ablate) -> int:
    if ablation.scope != "all" or (ablation.layers is not None and ablation.from_layer is not None):
        raise DirectionError("weights act at every token and layer: drop `scope` and `layers` from the ablation.")
    layers = ablation.own_layers() if ablation.from_layer is None else (ablation.from_layer,)
    if len(layers) != 1:
        raise DirectionError(
            f"directions of {len(layers)} layers cannot all be taken out of the weights: what one block writes stays "
            "in the residual of the next. Choose one with from_layer (--from-layer), or ablate by hooks (--out)."
        )
    return layers[0]


def _own_weights(model: ChatModel) -> Any:
    """A copy of the transformers model with the active PEFT adapter merged into it, and embeddings and head untied.

    Untied before the merge: an adapter on one of them does not change the other.
    """
    if model.active is not None and (model.peft is None or model.active not in model.peft.peft_config):
        raise ModelError(
            f"the active adapter {model.active!r} acts by hooks and is no part of the weights. Switch it off with "
            "model.no_adapter(), or use a LoRA adapter in PEFT's format."
        )
    own = copy.deepcopy(model.hf if model.peft is None else model.peft)
    _untie(unwrap(own))
    if model.peft is None:
        return own
    try:
        with quiet_peft():
            return own.unload() if model.active is None else own.merge_and_unload(adapter_names=[model.active])
    except Exception as error:
        raise ModelError(
            f"{model.name}: PEFT cannot merge {model.active!r} into the weights ({type(error).__name__}: {error}). "
            "Ablate with hooks."
        ) from error


def _bare(module: Any) -> Any:
    """The layer within PEFT's wrappers."""
    module = getattr(module, "original_module", module)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _untie(hf: Any) -> None:
    head, embeddings = (_bare(end) for end in (hf.get_output_embeddings(), hf.get_input_embeddings()))
    if head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in {id(c): c for c in (hf.config, hf.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def _gain(norm: nn.Module, width: int, like: Tensor, model_name: str) -> Float[Tensor, " d_model"]:
    """Factor of each coordinate in an RMS norm, up to a common one, in float64."""
    gain = exact(norm(torch.ones(1, 1, width, device=like.device, dtype=like.dtype))[0, 0])
    if getattr(norm, "bias", None) is not None or not bool(torch.isfinite(gain).all()) or float(gain.abs().min()) == 0:
        raise ModelError(
            f"{model_name}: {type(norm).__name__} after a write has a bias or a zero gain, so no matrix before it can "
            "keep a direction out of the residual. Ablate with hooks instead."
        )
    return gain


def _project(weight: Tensor, basis: Float[Tensor, "d_model k"], axis: int) -> None:
    """Remove the span of `basis` from `weight` along `axis`, in place, computed in float64."""
    _replace(weight, lambda w: w - _within(w, basis.to(w)), axis)


def _within(rows: Float[Tensor, "... d_model"], basis: Float[Tensor, "d_model k"]) -> Float[Tensor, "... d_model"]:
    """The part of each row that lies in the span of an orthonormal basis."""
    return einsum(einsum(rows, basis, "... d, d k -> ... k"), basis, "... k, d k -> ... d")


def _replace(weight: Tensor, change: Callable[[Tensor], Tensor], axis: int, rows: int = 8192) -> None:
    """weight <- change(weight), with the residual's coordinates last, a piece at a time to save memory."""
    turned = weight.detach().movedim(axis, -1)
    flat = turned if turned.ndim == 2 else turned.unsqueeze(0)
    for start in range(0, len(flat), rows):
        piece = flat[start : start + rows]
        piece.copy_(change(exact(piece)).to(piece.dtype))


def _project_write(matrix: Any, norm: nn.Module | None, basis: Float[Tensor, "d_model k"], model_name: str) -> None:
    """x -> W x + b, and the norm's gain g: W <- g^-1 (I - Q Q^T) g W, so that g W x has no component along Q."""
    d_model = basis.shape[0]
    gain = torch.ones(d_model, dtype=torch.float64) if norm is None else _gain(norm, d_model, matrix.weight, model_name)

    def change(w):
        # type: (Tensor) -> Tensor
        g, q = gain.to(w), basis.to(w)
        return w - _within(w * g, q) / g

    _replace(matrix.weight, change, axis=output_axis(matrix))
    if getattr(matrix, "bias", None) is not None:
        _replace(matrix.bias, change, axis=0)


@torch.no_grad()
def _check_nothing_left(model: ChatModel, basis: Float[Tensor, "d_model k"], precision: torch.dtype) -> None:
    """Refuse an architecture that writes to the residual in a way that was missed.

    precision: in which what is written is computed; transformers' RMS norms work in float32 in float64 models too.
    """
    ids = prompt_ids(model.tokenizer, [{"role": "user", "content": "Hello there, how are you?"}])
    batch = collate([Encoded(ids, ())], [0], pad=0).to(model.device)
    allowed = _LEFT_OVER.get(precision if model.dtype == torch.float64 else model.dtype, 2e-2)
    for layer, hidden in residuals(model.hf, batch.inputs(), range(model.n_layers)).items():
        wide = exact(hidden)
        left = (wide @ basis.to(wide.device)).norm(dim=-1) / wide.norm(dim=-1)
        if not float(left.max()) <= allowed:
            raise ModelError(
                f"{model.name}: after orthogonalisation {float(left.max()):.2g} of the residual at layer {layer} is "
                f"still along the directions (at most {allowed:g} is rounding): {type(model.hf).__name__} writes to "
                "the residual in a way that is not known here. Ablate with hooks instead."
            )
