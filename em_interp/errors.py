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
        found = re.search(
            r"(?:\w+\.)+?((?:[A-Z]\w*\.)?\w+)\(\) parameter (\w+)=(.+) violates type hint (.+?), as (.+)", text
        )
        super().__init__(_said(*found.groups()) if found else text)


def _said(function: str, parameter: str, value: str, hint: str, found: str) -> str:
    """What beartype found, in words: no type hints."""
    given = re.match(r"<(?:class|protocol)[^\"]*\"(?:\w+\.)*(\w+)\">|(\w+)", found)
    kind = (given[1] or given[2]) if given else ""
    value = value.strip('"') if given and given[1] else value
    shown = value if len(value) <= _SHOWN else value[:_SHOWN] + "..."
    nested = kind in ("list", "dict", "tuple") and re.search(r" (index \d+|key) ", found)
    what = "which holds something else" if nested else _named(kind)
    digits = re.match(r"-?\d+", value)
    if kind == "int" and digits and not -(2**63) <= int(digits[0]) < 2**63:
        what = "more than 64 bits hold"
    called = re.sub(r"\.__(init__)?", lambda dunder: "" if dunder[1] else " ", function).rstrip("_")
    remedy = next((say for wanted, of, say in _REMEDIES if re.search(wanted, hint) and re.fullmatch(of, kind)), "")
    return f"{called}: {parameter} is {shown}, {what}. Give {_wanted(hint)}. {remedy}".strip()


def _named(kind: str) -> str:
    """A type, by its name, in words."""
    return _KINDS.get(kind, f"{'an' if kind[:1] in 'AEIOaeio' else 'a'} {kind}")


def _wanted(hint: str) -> str:
    """A type hint in words."""
    hint = re.sub(r"<(?:class|protocol)[^'\"]*['\"]([^'\"]+)['\"]>", r"\1", hint)
    hint = re.sub(r"(?:\b\w+\.)+(?=\w)", "", hint)
    words = (_one(part) for part in re.split(r" \| (?![^\[]*\])", hint) if part not in ("None", "NoneType"))
    return " or ".join(dict.fromkeys(words))


def _one(hint: str) -> str:
    """One type of a hint in words."""
    of = re.fullmatch(r"(\w+)\[(.+)\]", hint)
    if of is None:
        return _named(hint)
    if of[1] == "Literal":
        return of[2].replace(", ", " or ")
    if of[2] == "Mapping[str, str]":
        return "conversations"
    if of[1] in ("Mapping", "dict"):
        return f"a mapping, {{name: {_wanted(of[2].partition(', ')[2])}}}"
    if of[1] in ("Sequence", "Iterable", "list", "tuple"):
        return "a list" if of[2] == "Any" else f"a list of {re.sub('^an? ', '', _wanted(of[2]))}s"
    return _named(of[1])


_SHOWN: Final = 90
"""Characters of a value that a message shows."""
_KINDS: Final = {
    "str": "text",
    "int": "a whole number",
    "Integral": "a whole number",
    "float": "a number",
    "Real": "a number",
    "dict": "a mapping",
    "Mapping": "a mapping",
    "Sequence": "a list",
    "Iterable": "a list",
    "DataFrame": "a table",
    "PathLike": "a path",
    "Path": "a path",
    "bool": "True or False",
    "Any": "anything",
    "Module": "a torch module",
    "NoneType": "nothing at all",
    "function": "a function",
    "method": "a method",
}
"""Types in words."""
_REMEDIES: Final = (
    ("ChatModel", "str", "em.load(NAME) gives it."),
    ("ChatModel", "[A-Z].*", "em.load(NAME) gives it; em.ChatModel(hf, tokenizer) wraps a transformers model."),
    ("ChatModel", ".*", "It comes first; em.load(NAME) gives it."),
    ("Mapping.*Solution", ".*", 'For example {"general": em.load_solution(NAME)}.'),
    ("Mapping.*Direction", ".*", 'For example {"general": direction, "narrow": other}.'),
    ("Direction", "str", "em.Direction.load(FILE) reads it."),
    ("Direction", "Contrast", "Its direction() is one."),
    ("Direction", "[A-Z].*", "em.extract(...) reads one; a solution is attached: `with solution.attached(model)`."),
    ("DataFrame", "str", "pandas.read_csv(FILE) reads it."),
    ("DataFrame", "Direction", "The norms() of a contrast are such a table."),
    (
        "TrainingSpec",
        ".*",
        "em.preset(NAME) is one, and so are em.LoraSpec(rank=1, ...), em.VectorSpec and em.FullSpec.",
    ),
    ("Intervention", ".*", "em.Steer(direction, layer, coefficient) is one, and em.Ablate(direction)."),
    (r"str \| pathlib.Path", "ChatModel", "It is loaded already."),
    ("Module", "ChatModel", "It is a ChatModel already; its transformers model is model.hf."),
    (r"Mapping\[str, str\]", ".*", "em.chats(FILE) reads them."),
)
"""What is wanted, what was found, what to do: patterns of the hint and of the type's name."""


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
