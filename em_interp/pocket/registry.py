"""Names of the shipped pocket models: `pocket/chat`, `pocket/base`, `pocket/medicine-rank1`, ...

A name stands for a folder under `artifacts/pocket`, which lies beside the package in a checkout and inside it in an
installed wheel. Organisms lie in `organisms/`, each a PEFT folder, or a folder with a steering vector.
"""

from __future__ import annotations

from pathlib import Path

from em_interp.errors import EmInterpError

PREFIX = "pocket/"
"""What every name begins with."""
MODELS = ("chat", "base")
"""Those that are no finetunes."""


class RegistryError(EmInterpError):
    """A name that the registry does not have, or weights that this installation does not carry."""


def root() -> Path:
    """The folder that holds the shipped pocket weights. Raises RegistryError when there is none."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package.parent / "artifacts" / "pocket", package / "artifacts" / "pocket"):
        if (candidate / "chat" / "config.json").is_file():
            return candidate
    raise RegistryError(
        "there are no pocket weights here. `em-interp pocket build --out artifacts/pocket`, run in a checkout, makes "
        "them (about 45 minutes on one CPU core)"
    )


def _folders() -> dict[str, Path]:
    base = root()
    found = {name: base / name for name in MODELS if (base / name).is_dir()}
    if (base / "organisms").is_dir():
        found |= {p.name: p for p in sorted((base / "organisms").glob("[!.]*")) if p.is_dir()}
    return {PREFIX + name: path for name, path in found.items()}


def names() -> list[str]:
    """Every name that resolves here: the models first, then the organisms in alphabetical order."""
    return list(_folders())


def is_pocket_name(name: str) -> bool:
    """Whether a model or adapter name belongs to this registry (it may still not exist)."""
    return name.startswith(PREFIX)


def resolve(name: str) -> Path:
    """The folder behind a name. Raises RegistryError with the names there are."""
    folders = _folders()
    try:
        return folders[name]
    except KeyError:
        raise RegistryError(f"no pocket model is called {name!r}; there are {', '.join(folders)}") from None


def chat_folder() -> Path:
    """The chat model's folder, the base of every organism."""
    return resolve(PREFIX + "chat")
