"""Step directories that are there whole or not at all: written beside, flushed, listed with hashes, then renamed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)
LATEST = "latest"
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8})")
_BLOCK = 1 << 20
HASHED_AT_ONCE = 8
Sealed = dict[str, dict[str, Any]]
"""Size and SHA-256 of files by their names below the checkpoint's folder: what its manifest holds. JSON data."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the remedy."""


def step_name(step: int) -> str:
    """The folder of a step."""
    return f"step-{step:08d}"


def write_checkpoint(root: Path, step: int, write: Callable[[Path], Sealed], keep: int) -> Path:
    """Calls `write(folder)` with an empty folder, then makes it the step's checkpoint and the latest one.

    write: returns what it has sealed; the other files are sealed here.
    At every moment `latest` names a whole checkpoint, or does not exist; a kill leaves at most a hidden folder, which
    the next write removes. Older checkpoints are removed at the end, down to `keep`. Raises OSError (disk full) with
    everything as it was.
    """
    root.mkdir(parents=True, exist_ok=True)
    clean(root)
    folder = root / f".writing-{os.getpid()}"
    target = root / step_name(step)
    try:
        folder.mkdir()
        sealed = write(folder)
        sealed |= seal(folder, [name for name in files_below(folder) if name not in sealed])
        _write_manifest(folder, step, sealed)
        _share(folder)
        _sync_folders(folder)
        if target.exists():  # an earlier process wrote this step, and another one has reached it again
            target.replace(root / f".stale-{os.getpid()}")
        folder.replace(target)
        _sync_folder(root)
        _write_latest(root, target.name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    for old in [path for _, path in _steps(root) if path != target][: -(keep - 1) or None]:
        # Hidden first: a half-removed folder must not look like a checkpoint.
        hidden = root / f".stale-{old.name}"
        old.replace(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    clean(root)
    return target


def find_latest(root: Path) -> Path | None:
    """The checkpoint to go on from, or None if there is none: the one that `latest` names, else the newest whole one.

    Raises CheckpointError when there are checkpoints, and none of them is whole.
    """
    candidates = [path for _, path in reversed(_steps(root))]
    try:
        named = root / (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        named = None
    if named in candidates:
        candidates.remove(named)
        candidates.insert(0, named)
    faults = []
    for path in candidates:
        fault = check(path)
        if fault is None:
            return path
        log.warning("checkpoint passed over: %s", fault)
        faults.append(fault)
    if faults:
        raise CheckpointError(f"{root}: no whole checkpoint: {'; '.join(faults)}; delete them to begin anew")
    return None


def check(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file of the manifest there, with its size and hash."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        paths = [folder / name for name in files]
        for path, facts in zip(paths, files.values(), strict=True):
            if path.stat().st_size != facts["bytes"]:
                return f"{path} has {path.stat().st_size} bytes, the manifest says {facts['bytes']}"
        for path, facts, digest in zip(paths, files.values(), _several(_hash, paths), strict=True):
            if digest != facts["sha256"]:
                return f"{path} is not what was written (its hash differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder}: {error!r}"
    return None


def clean(root: Path) -> None:
    """Removes what an interrupted write left behind."""
    for pattern in (".writing-*", ".stale-*", ".latest-*"):
        for path in root.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _steps(root: Path) -> list[tuple[int, Path]]:
    """Step folders, oldest first."""
    if not root.is_dir():
        return []
    found = [(_STEP.fullmatch(path.name), path) for path in root.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def seal(folder: Path, names: Sequence[str]) -> Sealed:
    """Flushes files of a folder to the disk, and hashes them. Raises OSError."""
    facts = _several(_flushed, [folder / name for name in names])
    return dict(zip(names, facts, strict=True))


def _flushed(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _hash(path)}


def _several(work: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    """At a time: all ranks wait, and the checkpoint of a large model has a hundred gigabytes in many files."""
    with ThreadPoolExecutor(min(HASHED_AT_ONCE, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, paths))


def files_below(folder: Path) -> list[str]:
    """Their names, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _write_manifest(folder: Path, step: int, files: Sealed) -> None:
    _write_flushed(folder / MANIFEST, json.dumps({"step": step, "files": dict(sorted(files.items()))}, indent=1) + "\n")


def _share(folder: Path) -> None:
    """Every file as readable as the process's files usually are; the safetensors library makes them private."""
    mode = (folder / MANIFEST).stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _write_latest(root: Path, name: str) -> None:
    temporary = root / f".latest-{os.getpid()}"
    _write_flushed(temporary, name + "\n")
    temporary.replace(root / LATEST)
    _sync_folder(root)


def _write_flushed(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sync_folders(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
