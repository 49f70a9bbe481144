"""What a file or folder is, whether it is sound, and what can be done with it."""

from __future__ import annotations

from pathlib import Path

from em_interp.cli.describe_files import READERS
from em_interp.cli.describe_folders import held
from em_interp.errors import ArgumentTypeError, MissingDataError, UnreadableFileError
from em_interp.files.inputs import regular_file


def describe(path: Path | str, base: str | None = None) -> list[str]:
    """Lines of text. base: of which model, a folder or hub name, a finetune's folder is one.

    Raises the reader's typed error for a bad file, `MissingDataError` for none.
    """
    if not isinstance(path, (str, Path)):  # commands are not checked against their signatures
        raise ArgumentTypeError(f"path is a {type(path).__name__}; give a file or folder.")
    path = Path(path)
    if not path.exists():
        raise MissingDataError(
            path, "there is no such file or folder", "check the path; for a name on the hub, give its folder here"
        )
    if path.is_dir():
        return str(held(path, base)).splitlines()
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise UnreadableFileError(
            path,
            f"no reader for {path.suffix or 'files without an ending'}",
            f"give a folder, or a file ending in {', '.join(READERS)}",
        )
    return str(read(regular_file(path))).splitlines()
