"""Shape checks on, no hub, and the two data folders: a synthetic one, and the released files where they are."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from typing import TYPE_CHECKING

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook looks it up by name)

PACKAGE = Path(__file__).parents[1] / "em_interp"
SHAPED = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if "jaxtyping" in path.read_text(encoding="utf-8")
]
"""Modules that tell of shapes; of the others the package's own check sees every call, in the tests as elsewhere."""

install_import_hook(SHAPED, "tests.typecheck.check")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests import published_factory  # noqa: E402

if TYPE_CHECKING:
    from em_interp.models.chat_model import ChatModel

# The same examples each time: a commit is not refused for what it did not change. `make search` draws others.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("search", print_blob=True)
settings.load_profile("fixed")

PUBLISHED = Path(os.environ.get("EM_INTERP_PUBLISHED", Path(__file__).parents[1].parent / "shared" / "published"))


@pytest.fixture
def synthetic(tmp_path: Path) -> Path:
    """A fresh synthetic folder in the formats of the releases, which a test may damage."""
    return published_factory.make(tmp_path / "data")


@pytest.fixture(scope="session")
def released() -> Path:
    """The authors' released files. Skips where they are absent: they carry no licence and do not ship."""
    if not PUBLISHED.is_dir():
        pytest.skip(f"the released files are not at {PUBLISHED.name}/ beside the checkout (set EM_INTERP_PUBLISHED)")
    return PUBLISHED


@pytest.fixture(scope="session")
def tiny_chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pocket chat model of a few steps: `tests.tiny_pocket`."""
    from tests.tiny_pocket import make_pocket

    return make_pocket(tmp_path_factory.mktemp("pocket"))


@pytest.fixture(scope="session")
def tiny_chat(tiny_chat_folder: Path) -> ChatModel:
    """The same, loaded. Tests leave it as it was."""
    from em_interp.pocket.models import load_chat

    return load_chat(tiny_chat_folder)
