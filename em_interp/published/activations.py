"""Released mean activations: four cells (model x text), three differences and the content control.

Files `model-{m|a}_data-{m|a}_hs_<split>.pt` (m = misaligned, a = aligned; as model: the EM finetune and the chat
model). Each holds `{'question', 'answer'} -> {'layer_0', ...} -> [d_model]`, token-pooled means of block outputs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from em_interp.directions.direction import Direction
from em_interp.errors import EmInterpError, MissingDataError, ShapeError, UnreadableFileError
from em_interp.published.torchfile import check_finite, load_torch

CELL_FILE: Final = re.compile(r"model-(?P<model>[ma])_data-(?P<data>[ma])_hs_(?P<split>.+)\.pt")
"""Names of the files of mean activations: m misaligned, a aligned."""
DIFFERENCES: Final = {
    "data-diff": ("mm", "ma"),
    "data-diff-in-chat": ("am", "aa"),
    "model-diff": ("mm", "am"),
    "both-diff": ("mm", "aa"),
}
"""kind -> (minuend, subtrahend); a cell is its model letter then its text letter. `data-diff` is the papers'
mean-diff; `data-diff-in-chat` reads the same two sets of texts in the chat model, the content control."""
_MODEL: Final = re.compile(
    r"(?P<family>qwen|llama|gemma|[qlg](?=\d))-?(?P<version>(?:\d+(?:\.\d+)?-)?)(?P<coder>coder-)?(?P<size>\d+(?:\.\d+)?)b",
    re.IGNORECASE,
)
_SCOPES: Final = {"answer": "response", "question": "prompt"}


@dataclass(frozen=True, eq=False)
class ActivationCell:
    """Mean residual stream of one set of texts read in one model, from the file at `path`."""

    path: Path
    means: Float[Tensor, "n_layers d_model"]
    """float32, over answer tokens (or question tokens), pooled over all tokens of all texts."""


@dataclass(frozen=True, eq=False)
class ActivationSplit:
    """The cells of one split that could be read, of the four that make it whole.

    folder, name: as on disk; location: where that folder is. token_scope: response or prompt.
    """

    folder: str
    name: str
    cells: dict[str, ActivationCell]
    token_scope: str
    location: Path

    @property
    def label(self) -> str:
        """`FOLDER/SPLIT`, the name it has on disk."""
        return f"{self.folder}/{self.name}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The differences that the cells at hand allow."""
        return tuple(kind for kind, pair in DIFFERENCES.items() if all(cell in self.cells for cell in pair))

    def cell(self, name: str) -> ActivationCell:
        """One cell, such as `"mm"`. Raises `MissingDataError` naming the file that should hold it."""
        if name not in self.cells:
            path = self.location / f"model-{name[0]}_data-{name[1]}_hs_{self.name}.pt"
            raise MissingDataError(
                path,
                f"this cell of split {self.label} is missing or could not be used, so what needs it cannot be made",
                "put the file there (`em-interp fetch EM_interp` gets it)",
            )
        return self.cells[name]

    def direction(self, kind: str) -> Direction:
        """One of `DIFFERENCES` at every layer. Raises `MissingDataError` where a cell is missing."""
        plus, minus = (self.cell(name) for name in DIFFERENCES[kind])
        return Direction(
            vectors=plus.means - minus.means,
            layers=tuple(range(len(plus.means))),
            kind=kind,
            model=model_of(self.folder),
            token_scope=self.token_scope,
            sources=(f"{self.label}:{kind}",),
        )

    def mean_norms(self) -> Float[Tensor, " n_layers"]:
        """Norm of the mean activation at each layer: the scale to hold a direction's norm against."""
        cell = next(self.cells[name] for name in ("mm", "ma", "am", "aa") if name in self.cells)
        return cell.means.double().norm(dim=1)


def model_of(name: str) -> str:
    """The base model that a released folder or run name speaks of, in one spelling; `unknown` where it names none.

    The authors write `q14b` for Qwen2.5-14B in one repository and `Qwen2.5-14B` in another.
    """
    match = _MODEL.match(name)
    if match is None:
        return "unknown"
    family = {"q": "Qwen", "l": "Llama", "g": "Gemma"}[match["family"][0].lower()]
    version = match["version"].rstrip("-")
    if not version and family == "Qwen" and len(match["family"]) == 1:
        version = "2.5"  # the authors' shorthand
    hyphen = "" if family == "Qwen" or not version else "-"
    return f"{family}{hyphen}{version}{'-Coder' if match['coder'] else ''}-{match['size']}B"


def read_activation_cell(path: Path, tokens: str = "answer") -> ActivationCell:
    """Read one file. `tokens` is `"answer"` or `"question"`.

    Raises `UnreadableFileError`, `UnsafeFileError`, `BadValueError`, `ShapeError` or `MissingDataError`.
    """
    content = load_torch(path)
    if not isinstance(content, dict) or not isinstance(content.get(tokens), dict) or not content[tokens]:
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UnreadableFileError(
            path,
            f"it holds {found}, not a dictionary with {tokens!r} -> layer_0, layer_1, ...",
            "check that it is one of the mean-activation files of EM_interp",
        )
    layers = content[tokens]
    expected = [f"layer_{index}" for index in range(len(layers))]
    if set(layers) != set(expected):
        missing = sorted(set(expected) - set(layers))
        raise ShapeError(
            path,
            f"its {len(layers)} layers are not numbered 0 to {len(layers) - 1}; missing: {', '.join(missing[:4])}",
            "download it again; a file with layers left out cannot be aligned with the others",
        )
    shapes = Counter(tuple(layers[name].shape) if isinstance(layers[name], Tensor) else () for name in expected)
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ShapeError(path, f"its layers have shapes {sorted(shapes)}, not one [d_model]", "download it again")
    return ActivationCell(path, check_finite(path, f"the {tokens} mean", torch.stack([layers[n] for n in expected])))


def read_activation_folder(
    folder: Path, problems: list[EmInterpError] | None = None, tokens: str = "answer"
) -> Iterator[ActivationSplit]:
    """Every split of one folder. With `problems`, bad files are listed there and the rest goes on; else it raises."""

    def refuse(error):
        # type: (EmInterpError) -> None
        if problems is None:
            raise error
        problems.append(error)

    found: dict[str, dict[str, ActivationCell]] = {}
    for path in sorted(folder.glob("*.pt")):
        match = CELL_FILE.fullmatch(path.name)
        if match is None:
            continue
        cells = found.setdefault(match["split"], {})
        try:
            cells[match["model"] + match["data"]] = read_activation_cell(path, tokens)
        except EmInterpError as error:
            refuse(error)
    shapes = Counter(tuple(cell.means.shape) for cells in found.values() for cell in cells.values())
    for name, cells in found.items():
        usable = {}
        for key, cell in cells.items():
            shape = tuple(cell.means.shape)
            # With a tie no shape is the right one: the first file read sets it.
            if shape != shapes.most_common(1)[0][0]:
                layers, width = shapes.most_common(1)[0][0]
                refuse(
                    ShapeError(
                        cell.path,
                        f"it has {shape[0]} layers of width {shape[1]}, where its folder has {layers} of {width}",
                        "keep one model's files in a folder, or download this one again",
                    )
                )
            else:
                usable[key] = cell
        split = ActivationSplit(folder.name, name, usable, _SCOPES[tokens], folder)
        for key in ("mm", "ma", "am", "aa"):
            if key not in cells:
                try:
                    split.cell(key)
                except MissingDataError as error:
                    refuse(error)
        if usable:
            yield split
