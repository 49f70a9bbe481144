"""Chat models: where they come from, their adapters, and the check that they behave as the methods assume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from em_interp.cards import card, short
from em_interp.errors import AdapterError, HookError, ModelError, UsageError
from em_interp.files.adapter_folders import read_lora
from em_interp.files.adapters import LoraConfig, VectorConfig
from em_interp.files.base_names import same_base
from em_interp.models.adapters import (
    _active_in,
    _set_peft,
    _tuner_layers,
    add_peft,
    check_base,
    read_adapter_config,
    unchanged_on_error,
)
from em_interp.models.architectures import find_blocks, unwrap
from em_interp.models.attaching import AddedVector, LowRank, updating
from em_interp.models.bridges import Bridged, make_bridge, unbridge
from em_interp.models.checks import check_behaviour, logits_of, probe_batch, refuse_difference, tolerance_of
from em_interp.models.hooks import has_our_hooks
from em_interp.models.templates import Tokenizer, check_template


@runtime_checkable
class Attachable(Protocol):
    """What `ChatModel.add_adapter` takes besides PEFT folders: a `Solution`, for example."""

    def attached(self, model: ChatModel) -> AbstractContextManager[None]:
        """Active inside the context."""
        ...


class ChatModel:
    """A causal chat model with its tokenizer and any number of named adapters over one copy of the weights.

    `hf` is the transformers model itself (PEFT layers, if any, are injected into it), `peft` the PeftModel around it,
    if any, `active` the adapter in use. `n_layers` blocks of width `d_model`; `name` and `revision`: where it came
    from, as directions and solutions made on it record it. A model that is already a PeftModel comes with its adapters.
    Raises ModelError or ChatTemplateError.

    >>> import em_interp as em
    >>> chat = em.load("pocket/chat")
    >>> chat.add_adapter("medicine", em.load_solution("pocket/medicine-rank1"))
    >>> chat.adapters, chat.active
    (['medicine'], 'medicine')
    >>> _, cache = chat.bridge.run_with_cache(chat.bridge.to_tokens("My knee hurts."))
    >>> cache["blocks.3.hook_out"].shape[-1]
    192
    """

    def __init__(self, hf: Any, tokenizer: Tokenizer, *, name: str | None = None, check: bool = True) -> None:
        check_template(tokenizer)
        self.hf: Any = unwrap(hf)
        self.peft: Any = hf if hf is not self.hf else None
        self.tokenizer: Any = tokenizer
        self.name = name or str(getattr(self.hf.config, "_name_or_path", "") or type(self.hf).__name__)
        self.revision: str | None = getattr(self.hf.config, "_commit_hash", None)
        self.n_layers = len(find_blocks(self.hf))
        self.d_model = int(self.hf.config.get_text_config().hidden_size)
        self.active: str | None = None
        self.sources: dict[str, str] = {}
        """Adapter -> folder or hub name that it was read from."""
        self._attachables: dict[str, Attachable] = {}
        self._entered = ExitStack()
        self._bridge: Bridged | None = None
        if self.peft is None and next(_tuner_layers(self.hf), None) is not None:
            raise ModelError(
                f"{self.name}: PEFT layers are in it already. Hand over the PeftModel itself, or the base, and add the "
                "adapter with add_adapter."
            )
        self.hf.eval()
        if self.peft is None:
            if check:
                check_behaviour(self.hf, tokenizer, self.name, self.d_model)
            return
        held = _active_in(self.peft)
        probe = probe_batch(self.hf, tokenizer, self.name).inputs()
        before = logits_of(self.peft, probe)
        if check:
            with self.no_adapter():
                check_behaviour(self.hf, tokenizer, self.name, self.d_model)
        self._activate(held)
        self._refuse_difference(logits_of(self.hf, probe), before, f"{held}: other logits than the PeftModel's")

    def __repr__(self) -> str:
        adapters = f", adapters {sorted(self.adapters)}, active {self.active!r}" if self.adapters else ""
        return f"ChatModel({self.name!r}, {self.n_layers} layers, d_model {self.d_model}{adapters})"

    def _repr_html_(self) -> str:
        numbers = sum(parameter.numel() for parameter in self.hf.parameters())
        adapters = [
            name
            + (f", from {short(self.sources[name])}" if name in self.sources else "")
            + (" (active)" if name == self.active else "")
            for name in self.adapters
        ]
        facts = {
            "size": f"{self.n_layers} layers, d_model {self.d_model}, {numbers:,} parameters",
            "weights": f"{str(self.dtype).removeprefix('torch.')} on {self.device}",
            "revision": self.revision,
            "adapters": adapters or "none: the base itself answers",
        }
        return card(f"ChatModel: {self.name} ({type(self.hf).__name__})", facts)

    def __getattr__(self, name: str) -> Any:
        hf = vars(self).get("hf")
        if not name.startswith("_") and hasattr(hf, name):
            raise AttributeError(f"a ChatModel has no {name!r}, its transformers model has: model.hf.{name}")
        raise AttributeError(f"a ChatModel has no {name!r}")

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

    def is_known_as(self, name: str) -> bool:
        """Whether a recorded model's name means this one (`adapter_config.same_base`)."""
        return same_base(name, *self.names)

    @property
    def names(self) -> tuple[str, str]:
        """What solutions and directions may record as the model that they were made on."""
        return self.name, str(getattr(self.hf.config, "_name_or_path", ""))

    def block_sets(self) -> list[list[nn.Module]]:
        """The blocks to hook: the model's own and, once a bridge was made, those under the bridge."""
        return [find_blocks(self.hf)] + ([self._bridge.blocks] if self._bridge else [])

    def module_sets(self) -> list[dict[str, nn.Module]]:
        """Modules by name: the model's own and, once a bridge was made, those under the bridge."""
        return [dict(self.hf.named_modules())] + ([dict(self._bridge.modules)] if self._bridge else [])

    def generators(self) -> list[Any]:
        """What has a `generate` of its own: the model and, once it was made, the bridge."""
        return [self.hf] + ([self._bridge.bridge] if self._bridge else [])

    def refusing_bridge(self, modules: Iterable[str] | None) -> AbstractContextManager[None]:
        """Inside, a pass through the bridge raises ModelError if it leaves out one of these modules' outputs.

        None: always, since the weights themselves are others.
        """
        return self._bridge.refusing(modules, self.name) if self._bridge else nullcontext()

    # -- adapters -------------------------------------------------------------------------------------------

    def _activate(self, name: str | None) -> None:
        if name is not None and name not in self.adapters:
            raise ModelError(
                f"{self.name} has no adapter {name!r}; it has {self.adapters or 'none'}. Add it with add_adapter."
            )
        self._entered.close()
        peft_name = name if name not in self._attachables else None
        for root in (self.hf, self._bridge.root if self._bridge else None):
            if root is not None:
                _set_peft(root, peft_name)
        self.active = name
        stack = ExitStack()
        if name in self._attachables:
            stack.enter_context(_may_stay_silent(self._attachables[name], self))
        elif name is not None:
            touched = [module for module, _, adapters in _tuner_layers(self.hf) if name in adapters]
            stack.enter_context(self.refusing_bridge(touched))
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

        A full finetune is such a thing: `solutions.load.load(folder, base=model)`.

        A folder is proved on a short padded batch: `no_adapter()` still gives the base's own logits, and the adapter
        those of PEFT's own forward pass and, where it is theta = scale * B A, of `solutions.load(folder).attached`.
        Whatever fails, the model is as before.

        Raises AdapterError if the adapter is not understood, damaged, changes nothing, or was trained on another
        base (judged by the recorded name, unless `any_base`, and always by its shapes); ModelError if the name is
        taken; UsageError inside an intervention.
        """
        if name in self.adapters or not name or "." in name:
            raise ModelError(f"the adapter name {name!r} is taken, empty, or has a dot: {self.adapters}.")
        before = self.active
        if not isinstance(source, (str, Path)):
            self._attachables[name] = source
            if read_from := str(getattr(source, "source", "")):
                self.sources[name] = read_from
            try:
                self._activate(name if activate else before)
            except BaseException:
                del self._attachables[name]
                self.sources.pop(name, None)
                self._activate(before)
                raise
            return
        folder, description = read_adapter_config(source, revision)
        if not any_base:
            check_base(folder, description.base, self.names)
        with self.no_adapter():
            if has_our_hooks(self.hf):
                raise UsageError("an adapter cannot be added inside a hook or solution context: add it before.")
            probe = probe_batch(self.hf, self.tokenizer, self.name, also=description.tokens).inputs()
            own = logits_of(self.hf, probe)
        peft, bridge = self.peft, self._bridge
        try:
            with unchanged_on_error(self.hf if peft is None else peft):
                self._add_folder(name, folder, description)
                self._prove(name, folder, probe, own)
                self._activate(name if activate else before)
            self.sources[name] = str(source)
        except BaseException:
            self.peft, self._bridge = peft, bridge
            self._attachables.pop(name, None)
            self._activate(before)
            raise
        if bridge is not None and self._bridge is not bridge:
            bridge.retire(self.name)

    def _add_folder(self, name: str, folder: Path, description: VectorConfig | LoraConfig) -> None:
        if not description.by_peft:
            self._attachables[name] = AddedVector.load(folder)
        else:
            self._activate(None)
            self.peft = add_peft(self.hf, self.peft, name, folder, model_name=self.name)
            self._bridge = None

    def _refuse_difference(self, a: Tensor, b: Tensor, what: str) -> None:
        refuse_difference(a, b, tolerance_of(self.hf) / 10, what, AdapterError)

    def _prove(self, name: str, folder: Path, probe: dict[str, Tensor], own: Float[Tensor, "real vocab"]) -> None:
        """Raise AdapterError unless adapter and base answer as they must. own: the base's logits before."""
        with self.adapter(name):
            found = logits_of(self.hf, probe)
        with self.no_adapter():
            again = logits_of(self.hf, probe)
            self._refuse_difference(again, own, f"{folder}: it changed the base: no_adapter() is not the base")
            if name not in self._attachables:
                self.peft.base_model.enable_adapter_layers()
                self.peft.set_adapter(name, inference_mode=True)
                theirs = logits_of(self.peft, probe)
                _set_peft(self.hf, None)
                self._refuse_difference(found, theirs, f"{folder}: other logits than PEFT's own")
                self._prove_theta(folder, probe, found)
        if torch.equal(found, own):
            raise AdapterError(
                f"{folder}: it changes no logit on a short batch. Its theta is zero (LoRA's B is, before training), or "
                f"too small to be seen in {self.dtype}: take a later checkpoint, or load in float32."
            )

    def _prove_theta(self, folder: Path, probe: dict[str, Tensor], found: Float[Tensor, "real vocab"]) -> None:
        """Raise AdapterError unless scale * B A gives the logits `found`."""
        try:
            a, b, config = read_lora(folder)
        except AdapterError:  # more than theta = scale * B A: PEFT's own forward is the proof
            return
        updates = {module: LowRank(a[module], b[module], config.scale_of(module)) for module in a}
        with updating(self, updates, base=config.base):
            theirs = logits_of(self.hf, probe)
        self._refuse_difference(found, theirs, f"{folder}: other logits than theta's")

    # -- TransformerLens ------------------------------------------------------------------------------------

    @property
    def bridge(self) -> Any:
        """A TransformerBridge over the same weights, made on first use: for looking (its attention is eager).

        Adapter contexts and `Solution.attached` act on it too; where it would leave out an adapter, a pass through it
        raises ModelError. Adding a PEFT adapter makes a new bridge. Raises ModelError if its logits are not the
        model's, UsageError inside an intervention.
        """
        if self._bridge is None:
            with self.no_adapter():
                if has_our_hooks(self.hf):
                    raise UsageError("the bridge cannot be made inside a hook or solution context: read it before.")
                batch = probe_batch(self.hf, self.tokenizer, self.name)
                self._bridge = make_bridge(self.hf, self.tokenizer, self.name, batch.inputs())
        return self._bridge.bridge

    @classmethod
    def from_bridge(cls, bridge: Any, tokenizer: Tokenizer, *, name: str | None = None) -> ChatModel:
        """A ChatModel over the weights of a TransformerBridge that you already hold (no copy of the weights).

        Refuses a bridge whose weights were processed (compatibility mode): they are no longer the model's.
        """
        model = cls(unbridge(bridge), tokenizer, name=name or str(bridge.cfg.model_name))
        probe = probe_batch(model.hf, tokenizer, model.name).inputs()
        refuse_difference(
            logits_of(bridge, probe),
            logits_of(model.hf, probe),
            tolerance_of(model.hf),
            "the bridge computes other logits than the model that it was booted from (its weights were processed or "
            "edited: boot it without compatibility mode)",
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
