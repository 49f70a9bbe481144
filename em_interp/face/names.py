"""Any name -> the model, or what a finetune trained: pocket names, folders, names on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from em_interp.errors import UsageError
from em_interp.models import pretrained
from em_interp.models.chat_model import ChatModel
from em_interp.pocket import models as pocket
from em_interp.pocket import registry
from em_interp.solutions import load as solutions
from em_interp.solutions.base import Base, Solution


def load(
    name: str | Path,
    *,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: str | Mapping[str, int | str] | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    any_base: bool = False,
) -> ChatModel:
    """A chat model by its name, with what a finetune trained active on it where the name is a finetune's.

    name: a folder or hub name of a chat model, of a full finetune, or of an adapter (its base is the one that it
    records, or `base`); `pocket/chat`, or a pocket organism such as `pocket/medicine-all`: the chat model with it.
    adapter: a finetune of `name`, or several as `{what to call it: source}`, the first active: PEFT adapters, steering
    vectors, full finetunes. One that is not called anything is called after its folder. `with model.no_adapter():` is
    the base. The other options, and the errors raised, are those of `models.pretrained.load`.

    >>> import em_interp as em
    >>> model = em.load("pocket/medicine-rank1")
    >>> model.n_layers, model.d_model, model.active is not None
    (6, 192, True)
    >>> with model.no_adapter():
    ...     print(model.active)
    None
    """
    given = adapter if isinstance(adapter, Mapping) else {} if adapter is None else {"": adapter}
    located = {key: _located(source) for key, source in given.items()}
    whole = [key for key, source in located.items() if solutions.is_model(source)]
    parts = {key: source for key, source in located.items() if key not in whole}
    if registry.is_pocket_name(str(name)):
        if base is not None:
            raise UsageError(f"base is {str(base)!r}: the pocket models bring their own. Leave it out.")
        model = pocket.load(str(name), dtype=dtype, device_map=device_map)
        for key, source in parts.items():
            called = key or pretrained.adapter_name(source, model.hf)
            model.add_adapter(called, source, any_base=any_base, activate=key == next(iter(located)))
    else:
        model = pretrained.load(
            name,
            adapter=parts.get("") or parts or None,
            base=None if base is None else _located(base),
            dtype=dtype,
            device_map=device_map,
            revision=revision,
            adapter_revision=adapter_revision,
            any_base=any_base,
        )
    for key in whole:
        called = key or pretrained.adapter_name(located[key], model.hf)
        solution = solutions.load(located[key], base=model).ready(model)
        model.add_adapter(called, solution, activate=key == next(iter(located)))
    return model


def load_solution(source: str | Path, base: Base = None) -> Solution:
    """What a finetune trained, of whichever kind: its theta, to be scaled, turned, compared and attached.

    source: a folder, a hub name, or a pocket organism. base: what it was made from, a ChatModel or a name; a full
    finetune is read against it, the others do without. Raises SolutionError.

    >>> import em_interp as em
    >>> theta = em.load_solution("pocket/medicine-rank1")
    >>> theta.describe()
    'a rank-1 LoRA on 1 module'
    >>> round(theta.scaled(0.5).norm / theta.norm, 3)
    0.5
    """
    known = _located(base) if isinstance(base, (str, Path)) else base
    return solutions.load(solutions.folder_of(_located(source)), known).read_from(source)


def _located(name: str | Path) -> str:
    """A pocket name's folder; any other name as it is."""
    return str(registry.resolve(str(name)) if registry.is_pocket_name(str(name)) else name)
