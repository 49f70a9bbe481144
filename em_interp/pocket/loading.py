"""Load a shipped pocket model by its registry name."""

from __future__ import annotations

from pathlib import Path

from em_interp import models
from em_interp.models import ChatModel
from em_interp.pocket import registry

CHAT = registry.PREFIX + "chat"


def load_chat(folder: str | Path | None = None) -> ChatModel:
    """The chat model under its registry name, which everything trained on it records as its base.

    folder: another build's chat model; the shipped one by default.
    """
    path = Path(folder) if folder is not None else registry.resolve(CHAT)
    found = models.load(path)
    return ChatModel(found.hf, found.tokenizer, name=CHAT, check=False)


def load(name: str) -> ChatModel:
    """`pocket/chat`, `pocket/base`, or an organism such as `pocket/medicine-rank1`, active as adapter "default".

    Raises RegistryError with the names there are.
    """
    folder = registry.resolve(name)
    if name == CHAT:
        return load_chat()
    if (folder / "config.json").is_file():
        return models.load(folder)
    model = load_chat()
    model.add_adapter("default", folder)
    return model
