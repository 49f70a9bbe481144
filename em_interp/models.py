"""Chat models: where they come from, their adapters, and the check that they behave as the methods assume."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from em_interp.adapter_files import (
    add_peft,
    base_of_adapter,
    boot_bridge,
    check_base,
    load_weights,
    read_adapter_config,
    unbridge,
)
from em_interp.chat import Tokenizer, check_template
from em_interp.errors import HookError, ModelError, UsageError
from em_interp.hooks import find_blocks, has_our_hooks, unwrap
from em_interp.probe import check_behaviour


@runtime_checkable
class Attachable(Protocol):
    """What `ChatModel.add_adapter` takes besides PEFT folders: a `Solution`, for example."""

    def attached(self, model: ChatModel) -> AbstractContextManager[None]:
        """Active inside the context."""
        ...


def _tuner_layers(root: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in root.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield module


def _set_peft(root: nn.Module, name: str | None) -> None:
    """Make PEFT adapter `name` the active one in `root`, frozen; None switches all of them off."""
    for layer in _tuner_layers(root):
        if name is not None:
            layer.set_adapter(name, inference_mode=True)
            layer._disable_adapters = False  # enable_adapters(True) would also make the adapter trainable
        else:
            layer.enable_adapters(False)


class ChatModel:
    """A causal chat model with its tokenizer and any number of named adapters over one copy of the weights.

    `hf` is the transformers model itself (PEFT layers, if any, are injected into it), `active` the adapter in
    use. A model that is already a PeftModel comes with its adapters. Raises ModelError or ChatTemplateError.
    """

    def __init__(self, hf: Any, tokenizer: Tokenizer, *, name: str | None = None, check: bool = True) -> None:
        check_template(tokenizer)
        self.hf: Any = unwrap(hf)
        self.peft: Any = hf if hf is not self.hf else None
        self.tokenizer: Any = tokenizer
        self.name = name or str(getattr(self.hf.config, "_name_or_path", "") or type(self.hf).__name__)
        self.revision: str | None = getattr(self.hf.config, "_commit_hash", None)
        self.n_layers = len(find_blocks(self.hf))
        self.d_model = int(self.hf.get_input_embeddings().weight.shape[-1])
        self.active: str | None = None
        self._attachables: dict[str, Attachable] = {}
        self._entered = ExitStack()
        self._bridge: Any = None
        self._bridge_root: nn.Module | None = None
        self._bridge_modules: dict[str, nn.Module] = {}
        self._bridge_blocks: list[nn.Module] = []
        self.hf.eval()
        if check:
            with self.no_adapter():
                check_behaviour(self.hf, tokenizer, self.name)
        if self.peft is not None:
            self._activate(str(next(iter(self.peft.peft_config))))

    def __repr__(self) -> str:
        adapters = f", adapters {sorted(self.adapters)}, active {self.active!r}" if self.adapters else ""
        return f"ChatModel({self.name!r}, {self.n_layers} layers, d_model {self.d_model}{adapters})"

    @property
    def device(self) -> torch.device:
        """Where the input ids go."""
        device: torch.device = self.hf.get_input_embeddings().weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        dtype: torch.dtype = self.hf.get_input_embeddings().weight.dtype
        return dtype

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters, active or not."""
        return [*(self.peft.peft_config if self.peft is not None else ()), *self._attachables]

    def attachable(self, name: str) -> Attachable | None:
        """What was given to `add_adapter` under a name, where that was no PEFT adapter."""
        return self._attachables.get(name)

    def block_sets(self) -> list[list[nn.Module]]:
        """The blocks to hook: the model's own and, once a bridge was made, those under the bridge."""
        return [find_blocks(self.hf)] + ([self._bridge_blocks] if self._bridge_blocks else [])

    def module_sets(self) -> list[dict[str, nn.Module]]:
        """Modules by name: the model's own and, once a bridge was made, those under the bridge."""
        return [dict(self.hf.named_modules())] + ([self._bridge_modules] if self._bridge_modules else [])

    def generators(self) -> list[Any]:
        """What has a `generate` of its own: the model and, once it was made, the bridge."""
        return [self.hf] + ([self._bridge] if self._bridge is not None else [])

    # -- adapters -------------------------------------------------------------------------------------------

    def _activate(self, name: str | None) -> None:
        if name is not None and name not in self.adapters:
            raise ModelError(
                f"{self.name} has no adapter {name!r}; it has {self.adapters or 'none'}. Add it with add_adapter."
            )
        self._entered.close()
        peft_name = name if name not in self._attachables else None
        for root in (self.hf, self._bridge_root):
            if root is not None:
                _set_peft(root, peft_name)
        self.active = name
        if name in self._attachables:
            stack = ExitStack()
            stack.enter_context(_may_stay_silent(self._attachables[name], self))
            self._entered = stack

    @contextmanager
    def adapter(self, name: str) -> Iterator[ChatModel]:
        """Inside, only the adapter `name` is active; what was active before returns afterwards."""
        before = self.active
        self._activate(name)
        try:
            yield self
        finally:
            self._activate(before)

    @contextmanager
    def no_adapter(self) -> Iterator[ChatModel]:
        """Inside, the base weights alone answer (bit for bit as before any adapter was added)."""
        before = self.active
        self._activate(None)
        try:
            yield self
        finally:
            self._activate(before)

    def add_adapter(
        self,
        name: str,
        source: str | Path | Attachable,
        *,
        revision: str | None = None,
        any_base: bool = False,
        activate: bool = True,
    ) -> None:
        """Add a PEFT folder or hub name, a steering-vector folder, or anything with `attached(model)`.

        Raises ModelError if the name is taken, the folder is empty, or the adapter was trained on another
        base (judged by the recorded name, unless `any_base`, and always by its shapes).
        """
        if name in self.adapters or not name or "." in name:
            raise ModelError(f"the adapter name {name!r} is taken, empty, or has a dot: {self.adapters}.")
        if not isinstance(source, (str, Path)):
            self._attachables[name] = source
        else:
            from em_interp.solutions import SteeringVector  # solutions build on models

            folder, config = read_adapter_config(source, revision)
            if not any_base:
                own_name = str(getattr(self.hf.config, "_name_or_path", ""))
                check_base(folder, config, (self.name, own_name))
            if config.get("adapter_type") == "steering_vector":
                self._attachables[name] = SteeringVector.load(folder)
            else:
                self.peft = add_peft(self.hf, self.peft, name, folder, config, model_name=self.name)
                self._drop_bridge()
        before = self.active
        try:
            self._activate(name if activate else before)
        except Exception:
            self._attachables.pop(name, None)
            self._activate(before)
            raise

    # -- TransformerLens ------------------------------------------------------------------------------------

    @property
    def bridge(self) -> Any:
        """A TransformerBridge over the same weights, made on first use: for looking (its attention is eager).

        Adapter contexts and `Solution.attached` act on it too. Adding a PEFT adapter makes a new bridge.
        """
        if self._bridge is None:
            with self.no_adapter():
                if has_our_hooks(self.hf):
                    raise UsageError("the bridge cannot be made inside a hook or solution context: read it before.")
                shared = {id(x): x for x in (*self.hf.parameters(), *self.hf.buffers())}
                root = copy.deepcopy(self.hf, shared)
                blocks, modules = find_blocks(root), dict(root.named_modules())
                self._bridge = boot_bridge(root, self.tokenizer, self.name, self.dtype)
                self._bridge_root, self._bridge_blocks, self._bridge_modules = root, blocks, modules
        return self._bridge

    def _drop_bridge(self) -> None:
        self._bridge = self._bridge_root = None
        self._bridge_modules, self._bridge_blocks = {}, []

    @classmethod
    def from_bridge(cls, bridge: Any, tokenizer: Tokenizer, *, name: str | None = None) -> ChatModel:
        """A ChatModel over the weights of a TransformerBridge that you already hold (no copy of the weights).

        Refuses a bridge whose weights were processed (compatibility mode): they are no longer the model's.
        """

        model = cls(unbridge(bridge), tokenizer, name=name or str(bridge.cfg.model_name))
        ids = torch.arange(1, 6, device=model.device).unsqueeze(0) % model.hf.config.get_text_config().vocab_size
        with torch.no_grad():
            ours, theirs = model.hf(ids).logits.float(), bridge(ids).float()
        if not torch.allclose(ours, theirs, atol=1e-2, rtol=1e-2):
            raise ModelError(
                "the bridge computes other logits than the model that it was booted from: its weights were "
                "processed "
                "or edited. Boot it without compatibility mode."
            )
        return model


@contextmanager
def _may_stay_silent(source: Attachable, model: ChatModel) -> Iterator[None]:
    """A persistent adapter may be switched off again before any forward pass; that is no error."""
    entered = source.attached(model)
    entered.__enter__()
    try:
        yield
    finally:
        with suppress(HookError):
            entered.__exit__(None, None, None)


def load(
    name_or_path: str | Path,
    *,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: str | Mapping[str, int | str] | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    any_base: bool = False,
    name: str | None = None,
    check: bool = True,
) -> ChatModel:
    """A ChatModel from a local folder or a hub name, with one adapter or several (`{name: source}`).

    A single adapter is named "default" and is active, of several the first. An adapter's folder or repository
    may be given alone: its base is read from its config. dtype "auto" is the checkpoint's own. `name`: what
    solutions trained on the model record as their base (default: name_or_path). Raises ModelError with what
    is missing, ChatTemplateError where the tokenizer has no chat template.
    """

    base = base_of_adapter(name_or_path, revision)
    if base is not None:
        if adapter is not None:
            raise UsageError(f"{name_or_path} is itself an adapter. Give its base model's name, and it as `adapter`.")
        name_or_path, adapter, adapter_revision, revision = base, name_or_path, revision, None
    hf, tokenizer = load_weights(name_or_path, dtype=dtype, device_map=device_map, revision=revision)
    model = ChatModel(hf, tokenizer, name=name or str(name_or_path), check=check)
    if adapter is not None:
        named = adapter if isinstance(adapter, Mapping) else {"default": adapter}
        for position, (key, source) in enumerate(named.items()):
            model.add_adapter(key, source, revision=adapter_revision, any_base=any_base, activate=position == 0)
    return model
