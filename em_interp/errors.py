"""Typed errors (`EmInterpError`). Every message says what was wrong, what was found, and what to do."""

from __future__ import annotations

import re
from os import PathLike
from typing import Final


class EmInterpError(Exception):
    """Base of every error that em_interp raises on purpose."""


class InputFileError(EmInterpError):
    """A file that was given cannot be used. Carries its `path`, the `problem` and the `remedy`."""

    def __init__(self, path: str | PathLike[str], problem: str, remedy: str) -> None:
        self.path = str(path)
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{self.path}: {problem}. To fix it: {remedy}.")

    def __reduce__(self) -> tuple[type[InputFileError], tuple[str, str, str]]:
        return type(self), (self.path, self.problem, self.remedy)


class UnreadableFileError(InputFileError):
    """Truncated, not the expected format, or not permitted to be read."""


class UnsafeFileError(InputFileError):
    """A pickle that carries code. It was not executed."""


class BadValueError(InputFileError):
    """NaN, infinite or non-numeric values where numbers are needed."""


class ShapeError(InputFileError):
    """A tensor of another width, or another number of layers, than its companions."""


class MissingDataError(InputFileError):
    """Something that should be there is not: a cell, a column, a checkpoint, a folder's content."""


class AmbiguousDataError(InputFileError):
    """Two things claim the same place: duplicate checkpoint numbers, two reference runs."""


class DirectionError(EmInterpError):
    """A Direction that cannot be made, combined, or used with this model or layer."""


class StatisticsError(EmInterpError):
    """A statistic asked of data that cannot give it: no rows, NaN, a probability outside [0, 1]."""


class OutputError(EmInterpError):
    """A result could not be written. What was there before is untouched."""


class UsageError(EmInterpError):
    """A command or call that does not say enough, or contradicts itself."""


class ArgumentTypeError(UsageError, TypeError):
    """An argument of another type than the signature says. Raised by the check that `em_interp` puts on every call."""

    def __init__(self, message: str) -> None:
        text = " ".join(message.split())
        found = re.match(
            r"(?:Function|Method) (?:\w+\.)+?((?:[A-Z]\w*\.)?\w+)\(\) parameter (.+) violates type hint", text
        )
        said = f"{found[1]}({found[2]}): not of type {text[found.end() :].strip()}" if found else text
        remedy = next((remedy for word, remedy in _REMEDIES.items() if found and word in text[found.end() :]), "")
        super().__init__(f"{said} {remedy}".strip())


_REMEDIES: Final = {
    "Sequence[collections.abc.Mapping[str, str]]": "Give conversations: files.texts.read_chats(FILE) reads them.",
    "ChatModel": "Give the ChatModel that models.pretrained.load(NAME) returns.",
    "Direction": "Give a Direction: Direction.load(FILE) reads one.",
    "collections.abc.Sequence": "Give a list.",
}


class ModelError(EmInterpError):
    """A model, tokenizer or adapter that cannot be loaded or does not behave as it must."""


class ChatTemplateError(EmInterpError):
    """A conversation that the tokenizer's chat template cannot turn into prompt and response."""


class TextLimitError(EmInterpError):
    """Text beyond the longest that the model was made for."""


class HookError(EmInterpError):
    """A hook that has no place to go, or that never fired."""


class ActivationError(EmInterpError):
    """Activations that cannot be collected or were not kept: no conversations, no such scope, NaN."""


class MemoryLimitError(EmInterpError):
    """A single sequence does not fit into memory."""


class StoreError(InputFileError):
    """A folder of stored activations that is damaged, or belongs to another model, other texts or settings."""


class SolutionError(EmInterpError):
    """A trained solution (steering vector, LoRA) that is malformed or does not fit the model in hand."""


class TrainingError(EmInterpError):
    """A finetune that cannot start, or that produced numbers which are not finite."""


class LossSetError(EmInterpError):
    """A set of responses on which no loss can be taken, or on which the loss says nothing."""


class AdapterError(SolutionError, ModelError):
    """An adapter that cannot be read, is not understood, or does not do what its files say."""
