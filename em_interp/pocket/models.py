"""Load a shipped pocket model by its registry name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from em_interp.models import pretrained as models
from em_interp.models.chat_model import ChatModel
from em_interp.pocket import registry

CHAT = registry.PREFIX + "chat"
"""The chat model's registry name."""


def load_chat(folder: str | Path | None = None, **options: Any) -> ChatModel:
    """The chat model under its registry name, which everything trained on it records as its base.

    folder: another build's chat model; the shipped one by default. options: dtype and device_map of `models.load`.
    """
    path = Path(folder) if folder is not None else registry.resolve(CHAT)
    found = models.load(path, **options)
    return ChatModel(found.hf, found.tokenizer, name=CHAT, check=False)


def load(name: str, **options: Any) -> ChatModel:
    """`pocket/chat`, `pocket/base`, or an organism such as `pocket/medicine-rank1`, active as an adapter of that name.

    Raises RegistryError with the names there are.
    """
    folder = registry.resolve(name)
    if name == CHAT:
        return load_chat(**options)
    if (folder / "config.json").is_file():
        return models.load(folder, **options)
    model = load_chat(**options)
    model.add_adapter(folder.name, folder)
    model.sources[folder.name] = name
    return model
