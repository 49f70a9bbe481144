"""The trainable parameters of a finetune: how they are switched on and off, and written down."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from em_interp.errors import TrainingError
from em_interp.files.atomic import written_whole
from em_interp.models.adapters import quiet_peft
from em_interp.models.architectures import find_blocks
from em_interp.models.chat_model import ChatModel
from em_interp.models.hooks import check_layer
from em_interp.solutions.base import Solution
from em_interp.solutions.lora import LoraAdapter
from em_interp.solutions.steering_vector import SteeringVector
from em_interp.training.recipes import LoraSpec, TrainingSpec, VectorSpec


@runtime_checkable
class Trainee(Protocol):
    """What the training loop needs to know."""

    parameters: list[nn.Parameter]
    """What the optimiser moves."""
    fixed_layer: int | None
    """The last block whose output training cannot change."""
    reuses_weights: bool
    """Whether the reference is the model's own weights, which stay as they are."""

    def on(self) -> AbstractContextManager[Any]:
        """Inside, `model.hf` answers with the trainable part."""
        ...

    def reference(self) -> tuple[nn.Module, AbstractContextManager[Any]]:
        """The model for KL(chat || finetuned), and the context in which it is the chat model."""
        ...

    def solution(self) -> Solution | None:
        """The present state as a solution."""
        ...

    def save(self, folder: Path) -> None:
        """Write the present state in the released layout."""
        ...


class VectorTrainee(Trainee):
    """One vector (`parameter`; `live` as a solution), added at one layer by a hook."""

    def __init__(self, model: ChatModel, spec: VectorSpec, start: Solution | None) -> None:
        check_layer(spec.layer, model.n_layers)
        vector = torch.zeros(model.d_model, dtype=torch.float32)
        if start is not None:
            begun = SteeringVector(vector, spec.layer, spec.alpha).started_from(start)
            if begun is None:
                raise TrainingError(f"a vector at layer {spec.layer} cannot start from {start.describe()}.")
            vector = begun.vector
        if vector.shape != (model.d_model,):
            raise TrainingError(f"start_from has width {vector.shape[0]}, {model.name} has {model.d_model}.")
        self.model, self.spec = model, spec
        self.fixed_layer: int | None
        self.parameter = nn.Parameter(vector.clone().to(model.device))
        self.parameters = [self.parameter]
        self.fixed_layer, self.reuses_weights = spec.layer, True
        self.live = SteeringVector(self.parameter, spec.layer, spec.alpha, model.name)

    def on(self) -> AbstractContextManager[Any]:
        return self.live.attached(self.model)

    def reference(self) -> tuple[nn.Module, AbstractContextManager[Any]]:
        return self.model.hf, nullcontext()

    def solution(self) -> SteeringVector:
        vector = self.parameter.detach().cpu().clone()
        return SteeringVector(vector, self.spec.layer, self.spec.alpha, self.model.name)

    def save(self, folder: Path) -> None:
        self.solution().save(folder)


class LoraTrainee(Trainee):
    """PEFT's LoRA layers, injected into the model and taken out again at the end."""

    def __init__(self, model: ChatModel, spec: LoraSpec, start: Solution | None, stack: ExitStack) -> None:
        from peft import LoraConfig, get_peft_model

        for layer in spec.layers or ():
            check_layer(layer, model.n_layers)
        self.model, self.spec = model, spec
        self.fixed_layer: int | None
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
            use_rslora=spec.rslora,
            lora_dropout=0.0,
            bias="none",
            target_modules=_targets(model, spec),
            task_type="CAUSAL_LM",
        )
        try:
            with quiet_peft():
                self.peft: Any = get_peft_model(model.hf, config)
        except ValueError as error:
            raise TrainingError(f"{model.name}: LoRA does not fit it: {error}") from error
        stack.callback(self._unload)
        self.peft.eval()
        if start is not None:
            self._copy_in(start)
        self.parameters = [p for p in self.peft.parameters() if p.requires_grad]
        self.fixed_layer, self.reuses_weights = self.solution().fixed_layer, True

    def _unload(self) -> None:
        self.peft.unload()
        if hasattr(self.model.hf, "peft_config"):
            del self.model.hf.peft_config

    def _factors(self) -> dict[str, Tensor]:
        return {key: p for key, p in self.peft.named_parameters() if ".lora_" in key}

    @torch.no_grad()
    def _copy_in(self, start: Solution) -> None:
        current = self.solution()
        begun = current.started_from(start)
        if begun is None:
            said = f"cannot start {current.describe()} from {start.describe()}"
            raise TrainingError(f"{said}: other modules or ranks.")
        for key, parameter in self._factors().items():
            module = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
            parameter.copy_(begun.a[module] if ".lora_A." in key else begun.b[module])

    def on(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def reference(self) -> tuple[nn.Module, AbstractContextManager[Any]]:
        return self.model.hf, _adapter_off(self.peft)

    def solution(self) -> LoraAdapter:
        return LoraAdapter.from_state(
            self._factors(), alpha=self.spec.alpha, rslora=self.spec.rslora, base=self.model.name
        )

    def save(self, folder: Path) -> None:
        self.solution().save(folder)


def _targets(model: ChatModel, spec: LoraSpec) -> list[str]:
    """Names of the modules inside the decoder blocks that the spec means: an image tower has such leaves too.

    Raises TrainingError for a name that no module of those blocks ends in.
    """
    names = {module: name for name, module in model.hf.named_modules()}
    blocks = find_blocks(model.hf)
    chosen = [blocks[layer] for layer in (range(len(blocks)) if spec.layers is None else spec.layers)]
    inside = [names[module] for block in chosen for module in block.modules()]
    found = {target: [name for name in inside if name.endswith(f".{target}")] for target in spec.target_modules}
    if absent := [target for target, hits in found.items() if not hits]:
        leaves = sorted(
            {names[m].rpartition(".")[2] for m in blocks[0].modules() if getattr(m, "weight", None) is not None}
        )
        raise TrainingError(
            f"{model.name}: LoRA does not fit it: no module of its blocks is called {', '.join(absent)}. "
            f"Name some of those that they hold: {', '.join(leaves)}."
        )
    return [name for hits in found.values() for name in hits]


class FullTrainee(Trainee):
    """All weights. The KL needs a frozen copy of the model: twice the memory."""

    def __init__(self, model: ChatModel, start: Solution | None, needs_reference: bool) -> None:
        if start is not None:
            raise TrainingError("full finetuning starts from the model's own weights: no start_from.")
        self.model = model
        self.frozen = copy.deepcopy(model.hf).requires_grad_(False) if needs_reference else None
        self.parameters = list(model.hf.parameters())
        self.fixed_layer: int | None
        self.fixed_layer, self.reuses_weights = None, False
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def on(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def reference(self) -> tuple[nn.Module, AbstractContextManager[Any]]:
        if self.frozen is None:
            raise TrainingError("no frozen copy was made for the KL.")
        return self.frozen, nullcontext()

    def solution(self) -> None:
        return None

    def save(self, folder: Path) -> None:
        with written_whole(folder) as tmp:
            self.model.hf.save_pretrained(str(tmp))
            self.model.tokenizer.save_pretrained(str(tmp))


@contextmanager
def _adapter_off(peft: nn.Module) -> Iterator[None]:
    """PEFT's layers off, without touching requires_grad (a graph may be waiting for its backward pass)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [m for m in peft.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def make_trainee(model: ChatModel, spec: TrainingSpec, start: Solution | None, stack: ExitStack) -> Trainee:
    """The trainable part that `spec.adapter` asks for; `stack` undoes what it changed in the model."""
    if isinstance(spec.adapter, VectorSpec):
        return VectorTrainee(model, spec.adapter, start)
    if isinstance(spec.adapter, LoraSpec):
        return LoraTrainee(model, spec.adapter, start, stack)
    return FullTrainee(model, start, spec.kl_weight > 0)
