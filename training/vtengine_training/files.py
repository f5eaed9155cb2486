"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_whole(path: Path, text: str) -> None:
    """Writes beside the place and renames, so that a reader never sees half a file. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def check_place(path: Path) -> None:
    """Raises OSError where `write_whole` could not write: to be called before anything takes time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file")
    temporary = path.with_suffix(".tmp")
    temporary.touch()
    temporary.unlink()


def save_whole(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The same for tensors, as safetensors, flushed before the file has its name. Raises OSError that names `path`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    try:
        save_file(dict(tensors), temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: cannot be written: {error}; what was saved before is as it was") from error
    finally:
        temporary.unlink(missing_ok=True)
