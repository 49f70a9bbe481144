"""TransformerBridges over a model's own weights, and proof of what acts through them."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from em_interp.errors import ModelError
from em_interp.models.architectures import find_blocks
from em_interp.models.checks import logits_of, refuse_difference, tolerance_of

_MISSED = 0.25  # of the effect on the model's logits: rounding is far below, a module that is not run at 1


def _kind(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


@dataclass(frozen=True)
class Bridged:
    """A bridge, the copy of the model's modules that it rewired, and the kinds of modules that it does not run.

    root: that copy; blocks and modules: of it, the modules by name as the model has them; dropped: those kinds.

    A bridge computes fused projections (Phi-3, GPT-NeoX, GPT-2, Falcon, BLOOM) from slices of their weights: what is
    added to such a module's output, as LoRA is, would be missing from its logits.
    """

    bridge: Any
    root: nn.Module
    blocks: list[nn.Module]
    modules: Mapping[str, nn.Module]
    dropped: frozenset[str]

    @contextmanager
    def refusing(self, names: Iterable[str] | None, model_name: str) -> Iterator[None]:
        """Inside, a pass through the bridge raises ModelError if it would leave out one of these modules.

        None: always, as where weights are replaced, of which the bridge holds some and has cut up others.
        """
        lost = sorted(name for name in names or () if _kind(name) in self.dropped)

        def refuse(*_):
            # type: (*object) -> None
            if names is None:
                raise ModelError(
                    f"the bridge of {model_name} holds the base's weights, so it would leave out the full finetune. "
                    "Pass the tokens through model.hf, as every function of this package does."
                )
            raise ModelError(
                f"the bridge of {model_name} does not run {lost[0]} (it computes fused projections from slices of "
                f"their weights), so it would leave out the active adapter there, {len(lost)} modules in all. Pass the "
                "tokens through model.hf, as every function of this package does."
            )

        handle = self.blocks[0].register_forward_pre_hook(refuse) if lost or names is None else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def retire(self, model_name: str) -> None:
        """From now on every pass through this bridge raises ModelError: its modules lack a newer adapter."""

        def refuse(*_):
            # type: (*object) -> None
            raise ModelError(
                f"an adapter was added to {model_name} after this bridge was made. Read model.bridge again."
            )

        self.blocks[0].register_forward_pre_hook(refuse)


def make_bridge(hf: Any, tokenizer: Any, name: str, batch: Mapping[str, Tensor]) -> Bridged:
    """A bridge over the weights of `hf`, proved on `batch`: the same logits, and which modules it does not run.

    Raises ModelError if TransformerLens does not know the architecture, its logits are others, or it does not run the
    blocks.
    """
    shared = {id(x): x for x in (*hf.parameters(), *hf.buffers())}
    root = copy.deepcopy(hf, shared)
    blocks, modules = find_blocks(root), dict(root.named_modules())
    try:
        bridge = _boot(root, tokenizer, name, next(hf.parameters()).dtype)
        logits_of(bridge, batch)
    except Exception as error:  # of many kinds: an architecture that it does not know, or cuts in the wrong places
        raise ModelError(
            f"{name}: TransformerLens makes no bridge over {type(hf).__name__} that runs ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}). Use model.hf: every function of this package works through it."
        ) from error
    made = Bridged(bridge, root, blocks, modules, _dropped(hf, bridge, modules, batch, name))
    with made.refusing((n for n, module in modules.items() if module in blocks), name):
        logits_of(bridge, batch)
    return made


def _hookable(root: nn.Module) -> Iterator[str]:
    """Names of the blocks and of the modules that an adapter may sit on, in `root`."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    inside: set[nn.Module] = set()
    blocks = set(find_blocks(root))
    for name, module in root.named_modules():
        if module in inside:
            continue
        if isinstance(module, wrappers):
            inside.update(module.modules())
        weight = getattr(module, "weight", None)
        if module in blocks or isinstance(module, wrappers) or (isinstance(weight, Tensor) and weight.ndim == 2):
            yield name


def _turned(_module: nn.Module, _args: object, output: Any) -> Any:
    """A forward hook that changes a module's output at every token and feature."""
    first = output[0] if isinstance(output, tuple) else output
    pattern = torch.randn(first.shape[-1], generator=torch.Generator().manual_seed(0))
    changed = first * (1 + 0.5 * pattern).to(first.device, first.dtype)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _dropped(
    hf: Any, bridge: Any, modules: Mapping[str, nn.Module], batch: Mapping[str, Tensor], name: str
) -> frozenset[str]:
    """Kinds of modules whose output, when changed, changes the model's logits but not the bridge's in the same way."""

    def both():
        # type: () -> tuple[Tensor, Tensor]
        return logits_of(hf, batch), logits_of(bridge, batch)

    plain, through = both()
    refuse_difference(through, plain, tolerance_of(hf), f"{name}: the bridge computes other logits than the model")
    ours: dict[str, nn.Module] = dict(hf.named_modules())
    kinds: dict[str, list[str]] = defaultdict(list)
    for found in _hookable(hf):
        kinds[_kind(found)].append(found)
    dropped = set()
    for kind, names in kinds.items():
        handles = [where[n].register_forward_hook(_turned) for n in names for where in (ours, modules)]
        try:
            a, b = both()
        finally:
            for handle in handles:
                handle.remove()
        effect = a - plain
        if not float((b - through - effect).norm()) <= _MISSED * float(effect.norm()):
            dropped.add(kind)
    return frozenset(dropped)


def _boot(root: nn.Module, tokenizer: Any, name: str, dtype: torch.dtype) -> Any:
    """A TransformerBridge on `root`, which it rewires in place.

    TransformerLens reloads and edits the tokenizer (missing special tokens), so it gets one of its own. It picks its
    adapter by the class that a checkpoint's config names; a model built in memory names none. For a multimodal model it
    would install torchvision with pip.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources.transformers import helpers
    from transformers import AutoTokenizer

    config: Any = root.config
    config.architectures = config.architectures or [type(root).__name__]
    nothing_installed = patch.object(helpers, "_ensure_torchvision", return_value=False, create=True)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), nothing_installed:
        warnings.simplefilter("ignore")
        tokenizer.save_pretrained(folder)
        own = AutoTokenizer.from_pretrained(folder)
        return TransformerBridge.boot_transformers(name, hf_model=root, tokenizer=own, dtype=dtype)


def unbridge(bridge: Any) -> nn.Module:
    """A plain transformers model (SDPA attention where it has it) over the tensors of a TransformerBridge's model."""
    from accelerate import init_empty_weights

    wrapped = bridge.original_model
    config = copy.deepcopy(wrapped.config)
    config._attn_implementation = "sdpa" if type(wrapped)._supports_sdpa else "eager"
    with init_empty_weights(include_buffers=False):
        plain: nn.Module = type(wrapped)(config)
    tensors = {
        key.replace("._original_component", ""): value
        for key, value in wrapped.named_parameters(remove_duplicate=False)
    }
    for key, _ in list(plain.named_parameters(remove_duplicate=False)):
        if key not in tensors:
            raise ModelError(
                f"the bridge over {type(wrapped).__name__} keeps {key} in another place than transformers does. "
                "Load the model with em_interp.models.pretrained.load and use its .bridge."
            )
        owner, _, leaf = key.rpartition(".")
        setattr(plain.get_submodule(owner), leaf, tensors[key])
    return plain.to(next(iter(tensors.values())).device).eval()
