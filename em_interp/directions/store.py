"""Per-response mean activations on disk: safetensors shards in a folder, written as a pass goes on, resumable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from em_interp.errors import StoreError
from em_interp.files.atomic import atomic_path, make_folder, write_text
from em_interp.files.inputs import regular_file

FORMAT_VERSION: Final = 1
"""Of a store's folder; others are refused."""
SETTINGS: Final = "store.json"
"""The file that makes a folder a store."""


class ActivationStore:
    """A folder that holds one float32 vector a response, scope and layer.

    `store.json` says what was asked of which model and texts (`settings`); `shard-*.safetensors` hold `index`
    (which of the responses), `{scope}.{layer}` [rows, d_model] and `{scope}.norms` [rows, layers]. A new folder is
    made, an existing store of the same settings is continued. Raises StoreError for a store of other settings, a
    folder of something else and a damaged shard, OutputError where nothing can be written.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = {"format_version": FORMAT_VERSION, **settings}
        self._open()
        self.where: dict[int, tuple[Path, int]] = {}
        """response -> its shard and row there."""
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            for row, i in enumerate(_tensors(path, ["index"])["index"].tolist()):
                self.where[int(i)] = (path, row)

    def _open(self) -> None:
        path = self.folder / SETTINGS
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise StoreError(path, f"cannot be read ({error})", "delete the folder and collect again") from error
            ours = json.loads(json.dumps(self.settings))
            other = [key for key in sorted({*ours, *found}) if ours.get(key) != found.get(key)]
            if other == ["acts"]:
                raise StoreError(
                    path,
                    "the weights of the model or its adapter, or an intervention differs from the run that made the "
                    f"store (their hash is {found.get('acts')} there and {ours['acts']} here)",
                    "give another folder, or restore that run's model and interventions",
                )
            if other:
                told = "; ".join(f"{key} is {found.get(key)!r} there and {ours.get(key)!r} here" for key in other)
                raise StoreError(path, f"a store of other settings: {told}", "give another folder, or delete this one")
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise StoreError(
                self.folder, f"the folder is not empty and has no {SETTINGS}", "give an empty or a new folder"
            )
        make_folder(self.folder)
        write_text(path, json.dumps(self.settings, indent=1) + "\n")

    def write(self, index: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Add one shard. Atomic. Raises OutputError."""
        path = self.folder / f"shard-{min(index):08d}.safetensors"
        content = {name: x.contiguous() for name, x in tensors.items()}
        with atomic_path(path) as temporary:
            save_file({"index": torch.tensor(list(index)), **content}, temporary)
        self.where.update({i: (path, row) for row, i in enumerate(index)})

    def read(self, name: str, rows: Sequence[int]) -> Float[Tensor, "rows width"]:
        """One tensor of the given responses, in their order, float32."""
        shards = {path: _tensors(path, [name])[name] for path in {self.where[i][0] for i in rows}}
        return torch.stack([shards[path][row] for path, row in (self.where[i] for i in rows)])


def _tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    try:
        with safe_open(regular_file(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise StoreError(path, f"damaged ({error})", "delete this shard: its responses are read again") from error
