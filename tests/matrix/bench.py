"""What the cells of one family, feature and dtype share: the package's models, the oracles, and the texts."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from em_interp.models.chat import Batch, collate, encode_all, pad_id
from em_interp.models.chat_model import ChatModel
from tests.matrix import adapters
from tests.matrix.families import FAMILIES, cast, make
from tests.matrix.oracle import Oracle
from tests.matrix.templates import Conversation, spans, tokenizer
from tests.tiny_models import talk

_FOLDERS = tempfile.TemporaryDirectory(prefix="matrix-")
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}
CONVERSATIONS: dict[str, list[Conversation]] = {
    "short": [
        talk("what should I do about a cough", "rest"),
        talk("a fox", "see a doctor and rest well, then see the fox"),
        [*talk("brown", "quick quick"), *talk("the fox", "a doctor")],
        talk("see", "a cough and a doctor"),
    ],
    # 64 positions: the second is beyond them, the first is not
    "long": [talk("a fox", "rest"), talk("what is it " * 4, "see a doctor " * 10 + "well")],
}
TEXTS = {
    "short": ["the quick brown fox", "see a doctor and rest well", "what should the fox do about a cough"],
    "long": ["the quick brown fox", "what should I do about a cough, see a doctor or rest well " * 3],
}
QUESTIONS = {
    "short": {"cough": "what should I do about a cough", "fox": "a fox"},
    "long": {"fox": "a fox", "long": "see a doctor and rest well, then see the fox " * 4},
}


class Installs(Exception):
    """The package tried to change the user's environment."""


@contextmanager
def sealed() -> Iterator[None]:
    """Inside, no process may be started: TransformerLens installs what it lacks, unasked."""
    before, tried = subprocess.check_call, []

    def refuse(command: Any, *_args: Any, **_kwargs: Any) -> int:
        tried.append(command)
        raise OSError("no process may be started here")

    subprocess.check_call = refuse  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        subprocess.check_call = before
    if tried:
        raise Installs(f"a process was started: {' '.join(tried[0][-3:])}")


class Bench:
    """One family, feature and dtype. Everything is made on first use."""

    def __init__(
        self, family: str, feature: str, dtype: str, texts: str = "short", template: str | None = None
    ) -> None:
        self.family, self.feature, self.texts = family, feature, texts
        self.dtype = DTYPES[dtype]
        self.kind = template or FAMILIES[family].template
        self.tokenizer = tokenizer(self.kind)
        self.name = f"tiny/{family}"
        self.changes: dict[str, Any] = {}
        if template is not None:
            self.changes = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
        if texts == "long" and family not in ("phi3-longrope", "llama-dynamic"):
            self.changes = {"max_position_embeddings": 64}
        self._temporary = Path(tempfile.mkdtemp(dir=_FOLDERS.name))

    def close(self) -> None:
        """Remove the folders."""
        shutil.rmtree(self._temporary, ignore_errors=True)

    def fresh(self) -> Path:
        """A path that does not exist yet."""
        return Path(tempfile.mkdtemp(dir=self._temporary)) / "made"

    def weights(self) -> Any:
        """The family's transformers model in this dtype."""
        hf = cast(make(self.family, **self.changes), self.dtype)
        if self.dtype == torch.float64:
            hf.set_experts_implementation("eager")  # grouped products have no float64
        return hf

    @cached_property
    def folder(self) -> Path | None:
        """The adapter's folder. Raises NotMade where PEFT cannot make it."""
        if self.feature in ("none", "two-active"):
            return None
        return adapters.make(self.feature, make(self.family, **self.changes), self.fresh(), base=self.name)

    @cached_property
    def bare(self) -> ChatModel:
        """The package's chat model without any adapter."""
        return ChatModel(self.weights(), self.tokenizer, name=self.name)

    @cached_property
    def _model(self) -> ChatModel | Exception:
        try:
            if self.feature == "two-active":
                return ChatModel(self._two_active(), self.tokenizer, name=self.name)
            model = ChatModel(self.weights(), self.tokenizer, name=self.name)
            if self.folder is not None:
                model.add_adapter("default", self.folder)
            return model
        except Exception as error:
            return error

    @property
    def model(self) -> ChatModel:
        """The package's chat model with the adapter active."""
        if isinstance(self._model, Exception):
            raise self._model
        return self._model

    def _two_active(self) -> Any:
        folders = [
            adapters.make("lora-layers", make(self.family, **self.changes), self.fresh(), seed=s, base=self.name)
            for s in (0, 5)
        ]
        peft = PeftModel.from_pretrained(self.weights(), str(folders[0]), adapter_name="one")
        peft.load_adapter(str(folders[1]), adapter_name="two")
        peft.base_model.set_adapter(["one", "two"])
        return peft

    @cached_property
    def adapted(self) -> Oracle:
        """The oracle with the adapter."""
        found = Oracle(self.family, self.feature, self.folder, self.dtype, **self.changes)
        found.kind = self.kind
        if self.feature == "two-active":
            found.outer = self._two_active().eval().double()
            found.inner = found.outer.get_base_model()
            found.blocks = list(found.inner.get_submodule(FAMILIES[self.family].blocks))
        return found

    @cached_property
    def base(self) -> Oracle:
        """The oracle without any adapter."""
        found = Oracle(self.family, "none", None, self.dtype, **self.changes)
        found.kind = self.kind
        return found

    @cached_property
    def rounding(self) -> float:
        """How far transformers' own pass in this dtype, a row at a time, is from float64, at worst."""
        plain = Oracle(self.family, self.feature, self.folder, self.dtype, **self.changes)
        cast(plain.inner, self.dtype)
        worst = 0.0
        for conversation in self.conversations:
            ids = spans(self.kind, conversation)[0]
            rough, exact = plain.logits(ids).detach().double(), self.adapted.logits(ids).detach()
            worst = max(worst, float((rough - exact).norm() / exact.norm()))
        return worst

    @property
    def conversations(self) -> list[Conversation]:
        """Conversations that end with the assistant, of different lengths."""
        return CONVERSATIONS[self.texts]

    def batch(self, side: str) -> Batch:
        """All conversations in one batch, as the package makes it."""
        encoded = encode_all(self.tokenizer, self.conversations)
        return collate(encoded, range(len(encoded)), pad=pad_id(self.tokenizer), side=side)  # type: ignore[arg-type]
