"""Files that are there whole or not at all; and a folder for one run at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vtengine.cli.output import free_previous, lock

if TYPE_CHECKING:
    from torch import Tensor


LOCK = ".lock"


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Makes the output folder; inside, no other run can have it. A run that was killed has it no more.

    Raises ValueError where another one has it, OSError where it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("ab") as file:
        if not lock(file):
            raise ValueError(
                f"output = {folder}: another run is writing there; wait for its end, or use another output"
            )
        yield


def write_whole(path: Path, text: str) -> None:
    """Writes beside the place and renames, so that a reader never sees half a file. Raises OSError."""
    _written_beside(path, text).replace(path)


def write_new(path: Path, text: str) -> Path | None:
    """The same, but keeps an older file: returns the name that it has now. Raises OSError, the older one in place."""
    temporary = _written_beside(path, text)
    previous = free_previous(path) if path.exists() else None
    if previous is not None:
        path.replace(previous)
    temporary.replace(path)
    return previous


def _written_beside(path: Path, text: str) -> Path:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    return temporary


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
