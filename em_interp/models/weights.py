"""What decides a model's answers, as hashes: its weights, an adapter, what is attached to it, a folder's files.

Results are kept and compared under these, never under a name: every Trainer writes a `checkpoint-500`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from em_interp.errors import HookError, InputFileError, ModelError
from em_interp.files.inputs import regular_file
from em_interp.files.manifest import fingerprint, sha256
from em_interp.models.precision import exact

UNKNOWN: Final = "unknown"
"""What stands for weights or a model that a file does not name."""
_BOOKKEEPING: Final = frozenset(
    (
        *("_name_or_path", "_commit_hash", "architectures", "transformers_version", "dtype", "torch_dtype"),
        *("_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_experts_implementation"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict", "id2label", "label2id"),
        *("output_hidden_states", "output_attentions"),
        *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "target_modules"),
    )
)
"""Keys of a model's or an adapter's config that do not change what a forward pass computes."""
_LIBRARIES: Final = ("transformers", "accelerate", "peft")
"""Their hooks move and record tensors: what these do follows from the weights and the config."""


def tensors_hash(tensors: Mapping[str, Tensor], *settings: Any) -> str:
    """SHA-256 of named tensors (dtype, shape, bytes) and of JSON values that belong to them."""
    return fingerprint([{name: _digest(tensor) for name, tensor in tensors.items()}, *settings])


def _digest(tensor: Shaped[Tensor, "..."]) -> str:
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode(), usedforsecurity=False)
    if tensor.numel():
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return found.hexdigest()


def _mark(tensor: Shaped[Tensor, "..."]) -> str:
    """Tells an edit of a tensor at memory speed, on its device: a hash of exact sums over its rows and columns.

    The sums are of the bits as integers, modulo 2^64, so that edits through `.data`, which raise no version counter,
    are seen as well.
    """
    flat = tensor.detach().contiguous()
    if not flat.numel():
        return _digest(flat)
    rows = flat.reshape(flat.shape[0] if flat.ndim > 1 else 1, -1)
    word = math.gcd(rows.shape[1] * rows.element_size(), rows.storage_offset() * rows.element_size(), 8)
    words = rows.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[word])
    sums = [words.sum(dim, dtype=torch.int64) for dim in (0, 1)]
    return _digest(torch.cat(sums)) + f"{tensor.dtype} {tuple(tensor.shape)}"


def weights_hash(hf: nn.Module) -> str:
    """`PRECISION:SHA-256` of the weights and the config that decide a forward pass, without adapters or hooks.

    The same for the same weights in another folder, on other devices, offloaded, or under PEFT adapters. PRECISION is
    the dtype (and quantisation): hashes of two precisions cannot be compared, see `same_weights`. Tensors whose bits
    are as at the last call are not hashed again: 1.8 GB/s on one core the first time, 7 GB/s afterwards.

    Raises ModelError for weights that are not there (on the meta device, not offloaded) or cannot be read.
    """
    known: dict[str, tuple[str, str]] = vars(hf).setdefault("_em_interp_digests", {})
    places: dict[int, str] = {}
    tied: dict[str, str] = {}
    todo: list[tuple[str, nn.Module, str]] = []
    for name, module, leaf, tensor in base_tensors(hf):
        first = name if tensor.is_meta else places.setdefault(id(tensor), name)
        tied[name] = first
        if first == name:
            todo.append((name, module, leaf))

    def read(place):
        # type: (tuple[str, nn.Module, str]) -> tuple[str, tuple[str, str]]
        name, module, leaf = place
        with own_tensor(module, leaf) as tensor:
            try:
                mark = _mark(tensor)
                before = known.get(name)
                return name, before if before is not None and before[0] == mark else (mark, _digest(tensor))
            except (RuntimeError, TypeError, NotImplementedError) as error:
                raise ModelError(
                    f"{name}: {type(tensor).__name__} of dtype {tensor.dtype} cannot be hashed "
                    f"({str(error).splitlines()[0]}). Load the model in bfloat16 or float32."
                ) from error

    offloaded = any(getattr(module, leaf).is_meta for _, module, leaf in todo)
    with ThreadPoolExecutor(1 if offloaded else _workers()) as pool:
        found = dict(pool.map(read, todo))
    vars(hf)["_em_interp_digests"] = found
    content = {name: found[first][1] for name, first in tied.items()}
    return f"{_precision(hf)}:{fingerprint([type(hf).__name__, decisive_config(hf.config), content])}"


def same_weights(one: str, other: str) -> bool | None:
    """Whether two hashes are of the same weights; None where that is unknown, as of two precisions."""
    if UNKNOWN in (one, other) or one.partition(":")[0] != other.partition(":")[0]:
        return None
    return one == other


def _precision(hf: Any) -> str:
    dtype = str(hf.get_input_embeddings().weight.dtype).removeprefix("torch.")
    quantised = getattr(hf.config, "quantization_config", None)
    return dtype if quantised is None else f"{dtype}-quantised"


def decisive_config(config: Any) -> Any:
    """What of a config decides a forward pass, as JSON values."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return {str(key): decisive_config(value) for key, value in config.items() if key not in _BOOKKEEPING}
    return sorted(map(str, config)) if isinstance(config, (set, frozenset)) else config


def _loaded(module: nn.Module, leaf: str) -> AbstractContextManager[Any]:
    """Inside, an offloaded tensor of `module` is on the CPU."""
    if not getattr(module, leaf).is_meta or not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    found: AbstractContextManager[Any] = align_module_device(module, "cpu")
    return found


def _inner(module: nn.Module) -> nn.Module | None:
    """The module that a PEFT wrapper stands around, or None for a module that is no wrapper."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    return module.base_layer if isinstance(module, BaseTunerLayer) else None


def base_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Parameters and saved buffers (name, module, name there, tensor) under the names that they have without PEFT.

    The base's own, also while `replaced` has put others in their place.
    """
    inner = _inner(module)
    if inner is not None:
        yield from base_tensors(inner, prefix)
        return
    for leaf, tensor in chain(module._parameters.items(), module._buffers.items()):
        if tensor is not None and leaf not in module._non_persistent_buffers_set:
            yield f"{prefix}{leaf}", module, leaf, _own(module, leaf)
    for name, child in module._modules.items():
        if child is not None:
            yield from base_tensors(child, f"{prefix}{name}.")


def weight_owners(hf: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold a `weight`, under the names that they have without PEFT."""
    found = [(name, module) for name, module, leaf, _ in base_tensors(hf) if leaf == "weight"]
    return {name.removesuffix(".weight"): module for name, module in found}


_OWN: Final = "_em_interp_own"


def _own(module: nn.Module, leaf: str) -> Tensor:
    """A module's own tensor of that name."""
    kept = vars(module).get(_OWN, {})
    found: Tensor = kept[leaf] if leaf in kept else getattr(module, leaf)
    return found


@contextmanager
def own_tensor(module: nn.Module, leaf: str) -> Iterator[Tensor]:
    """A module's own tensor of that name; an offloaded one is on the CPU. Raises ModelError for one without values."""
    with _loaded(module, leaf):
        tensor = _own(module, leaf)
        if tensor.is_meta:
            raise ModelError(f"{leaf} has no values (it is on the meta device). Load the model's weights.")
        yield tensor


@contextmanager
def replaced(places: Iterable[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Inside, these tensors (module, name there) are other ones; graphs through them stay whole.

    The module's own come back whatever happens: the same objects, untouched. Raises ModelError for tensors that were
    replaced already.
    """
    kept: list[tuple[dict[str, Any], dict[str, Any], str]] = []
    try:
        for module, leaf, tensor in places:
            own = vars(module).setdefault(_OWN, {})
            if leaf in own:
                raise ModelError(
                    f"{leaf} of a {type(module).__name__} is replaced already: two finetunes of whole weights cannot "
                    "act at once. Leave the context of the first."
                )
            held: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            own[leaf] = held[leaf]
            held[leaf] = tensor
            kept.append((own, held, leaf))
        yield
    finally:
        for own, held, leaf in reversed(kept):
            held[leaf] = own.pop(leaf)


def adapter_hash(hf: nn.Module) -> str | None:
    """SHA-256 of the PEFT adapters that act in `hf` (tensors, scales, configs), or None where none does."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    configs: dict[str, Any] = {}
    for path, module in hf.named_modules():
        if _inner(module) is None or module.disable_adapters:
            continue
        wrapper: Any = module
        active = wrapper.active_adapters
        for adapter in [active] if isinstance(active, str) else active:
            own = [
                (n, x) for n, x in chain(wrapper.named_parameters(), wrapper.named_buffers()) if adapter in n.split(".")
            ]
            tensors |= {f"{path}.{name}": tensor for name, tensor in own}
            for key in getattr(wrapper, "other_param_names", ()):
                held = getattr(wrapper, key, None)
                if own and isinstance(held, Mapping) and isinstance(held.get(adapter), (int, float, str)):
                    settings[f"{path}.{key}.{adapter}"] = held[adapter]
            if own and adapter in (known := getattr(hf, "peft_config", {})):
                configs[adapter] = decisive_config(known[adapter])
    return tensors_hash(tensors, settings, configs) if tensors else None


def adapter_norm(hf: nn.Module) -> float | None:
    """Frobenius norm of the active LoRA's scale * B A over all modules; None for other adapters, or several."""
    squares = 0.0
    for _, module in hf.named_modules():
        if _inner(module) is None or module.disable_adapters:
            continue
        wrapper: Any = module
        a, b, scales = (getattr(wrapper, key, {}) for key in ("lora_A", "lora_B", "scaling"))
        active = [name for name in wrapper.active_adapters if name in a]
        if len(active) != 1 or a[active[0]].weight.ndim != 2 or getattr(wrapper, "use_dora", {}).get(active[0]):
            return None
        left, right = (exact(part[active[0]].weight.detach()) for part in (b, a))
        squares += float(scales[active[0]]) ** 2 * float(((left.T @ left) * (right @ right.T)).sum())
    return math.sqrt(squares) if squares else None


@runtime_checkable
class HasWeights(Protocol):
    """What `acting_hash` needs of a `ChatModel`: `hf`, the transformers model."""

    hf: Any


def acting_hash(model: HasWeights) -> str:
    """SHA-256 of all that decides what `model` computes now: base, active adapter, entered solutions and interventions.

    Raises HookError where a hook acts that does not say what it does, and ModelError as `weights_hash`.
    """
    return fingerprint(list(what_acts(model).values()))


def what_acts(model: HasWeights) -> dict[str, str | None]:
    """The same in parts: hashes of the base weights, of the active PEFT adapter, and of what is attached besides."""
    attached = _hooks(model.hf)
    return {
        "weights": weights_hash(model.hf),
        "adapter": adapter_hash(model.hf),
        "attached": fingerprint(attached) if attached else None,
    }


def _hooks(hf: nn.Module) -> list[tuple[str, str]]:
    """What each hook on the model does, in the order in which they were put there."""
    found = []
    for name, module in hf.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            acts = getattr(hook, "acts", None)
            if acts is not None:
                found += [(name, what)] if (what := acts()) else []
            elif str(getattr(getattr(hook, "func", hook), "__module__", "")).partition(".")[0] not in _LIBRARIES:
                raise HookError(
                    f"a hook on {name or 'the model'} does not say what it does, so what acts cannot be told. Remove "
                    "it, or change the model through `intervening` or `Solution.attached`."
                )
    return found


_TRAINING_STATE: Final = ("optimizer*", "scheduler*", "rng_state*", "trainer_state*", "training_args*", "*.md")
"""What lies in a checkpoint's folder and is not read with the model."""


def file_hash(source: str | Path) -> str:
    """SHA-256 of a file, or of the names and contents of the files that lie in a model's or an adapter's folder.

    Hidden files, README and an optimizer's state are left out. Raises ModelError where one cannot be read.
    """
    root = Path(source)
    files = [root]
    if root.is_dir():
        left_out = {".*", *_TRAINING_STATE}
        files = [p for p in sorted(root.iterdir()) if not p.is_dir() and not any(p.match(x) for x in left_out)]
    try:
        for file in files:
            regular_file(file)
        with ThreadPoolExecutor(_workers()) as pool:
            found = list(pool.map(sha256, files))
    except InputFileError as error:
        raise ModelError(f"{error.path}: cannot be read ({error.problem}).") from error
    except OSError as error:
        raise ModelError(f"{error.filename or source}: cannot be read ({error.strerror or error}).") from error
    return fingerprint(dict(zip([p.name for p in files], found, strict=True))) if root.is_dir() else found[0]


def source_hash(source: str | Path, revision: str | None = None) -> str:
    """What a model's or an adapter's name stands for now: a folder's `file_hash`, or the commit of a hub repository.

    Without a network the commit is that of the local copy. Raises ModelError where there is neither.
    """
    if Path(source).exists():
        return file_hash(source)
    from huggingface_hub import HfApi, try_to_load_from_cache

    parts = str(source).split("/")
    repository, inner = "/".join(parts[:2]), "/".join([*parts[2:], ""])
    try:
        return f"{source}@{HfApi().model_info(repository, revision=revision).sha}"
    except Exception as error:  # many kinds: offline, network, permission, a name that cannot be one
        for name in ("config.json", "adapter_config.json"):
            with suppress(Exception):
                found = try_to_load_from_cache(repository, inner.lstrip("/") + name, revision=revision)
                if isinstance(found, str):  # .../snapshots/COMMIT/...
                    return f"{source}@{found.rpartition('/snapshots/')[2].partition('/')[0]}"
        raise ModelError(
            f"{source}: neither a local folder nor a reachable hub repository ({type(error).__name__}). Check the "
            "name, the revision, HF_TOKEN and the network."
        ) from error


def _workers() -> int:
    return min(8, os.cpu_count() or 1)
