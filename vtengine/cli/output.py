"""OUT.jsonl on disk: appended in order, synced now and then, continued after a crash.

A run writes `OUT.jsonl.run` beside the output (the settings that decide what the rows hold) and removes it when the
last row is written, so that `--resume` can refuse to mix rows made with different settings. The output is locked
meanwhile: of two runs that write to one file, the second is refused.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from vtengine.cli.errors import CliError, UsageError, one_line, reason

SYNC_SECONDS = 2.0


def complete_rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole rows of a file with the offset of each one's end; a torn last line is left out.

    Raises UsageError for a broken line before the last: such a file was not written by `vtengine generate`.
    """
    from vtengine.rollout.records import whole_rows

    end = 0
    try:
        for row, end in whole_rows(path):
            yield row, end
    except ValueError as error:
        raise UsageError(f"--resume {one_line(error)}; is it a file of `vtengine generate`?") from None
    with path.open("rb") as file:
        if end == 0 and file.read(1) not in (b"", b"{", b"\0"):  # not even the beginning of a row
            raise UsageError(f"--resume {path}: holds no row of `vtengine generate`; is it another file?")


class OutputFile:
    """Appends rows. `resume_at` cuts the file to that many bytes first; without it an older file becomes `previous`.

    Raises UsageError when the path cannot be written. Later failures (disk full) raise CliError from `append` or
    `sync`, and leave the file with whole rows and at most one torn last line, which `--resume` cuts.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume_at: int | None = None) -> None:
        self.path = path
        self.previous: Path | None = None
        self._marker = settings_path(path)
        self._regular = not path.exists() or stat.S_ISREG(path.stat().st_mode)
        self._synced_s = time.monotonic()
        try:
            if resume_at is None and self._regular and path.exists() and path.stat().st_size:
                self.previous = free_previous(path)
                for part in _PARTS:  # of an unfinished run there are several: it can still be resumed
                    if part(path).exists():
                        part(path).replace(part(self.previous))
            self._file = path.open("ab", buffering=0)
            if self._regular:
                _lock(self._file, path)
                if resume_at is not None:
                    self._file.truncate(resume_at)
                self._marker.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"-o {path}: cannot be written: {reason(error)}") from None

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row; it is safe against a crash of this process at once, against a power cut after `sync`."""
        from vtengine.rollout.records import encode_row

        self._guarded(self._write_all, encode_row(row))
        if time.monotonic() - self._synced_s >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        if self._regular:
            self._guarded(os.fsync, self._file.fileno())
        self._synced_s = time.monotonic()

    def close(self, *, finished: bool) -> None:
        """Syncs and closes; `finished` says that every row is there and final, so nothing is left to resume."""
        try:
            self.sync()
        finally:
            self._file.close()
        if finished and self._regular:
            self._marker.unlink(missing_ok=True)

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def _guarded(self, action: Any, argument: Any) -> None:
        try:
            action(argument)
        except BrokenPipeError:
            raise CliError(f"{self.path}: writing failed: the reader has gone") from None
        except OSError as error:
            hint = "free some space, then run the same command with --resume"
            raise CliError(f"{self.path}: writing failed: {error.strerror}; {hint}") from None


def check_free(path: Path) -> None:
    """Raises UsageError while another run writes to this file; whether it can be written is not its question."""
    if not path.is_file():
        return
    try:
        file = path.open("ab")
    except OSError:
        return
    with file:
        _lock(file, path)


def _lock(file: IO[bytes], path: Path) -> None:
    if not lock(file):
        raise UsageError(f"-o {path}: another run is writing it; wait for its end, or name another file")


def lock(file: IO[bytes]) -> bool:
    """Until the file is closed, or this process ends, however. False: another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def kept_path(path: Path) -> Path:
    """Where good rows behind a failed one wait while it is tried again."""
    return path.with_name(path.name + ".kept")


def settings_path(path: Path) -> Path:
    """Where the settings of an unfinished run are kept."""
    return path.with_name(path.name + ".run")


_PARTS = (Path, kept_path, settings_path)


def free_previous(path: Path) -> Path:
    """Where an older output is kept: `.previous`, or if there is one `.previous.2`, and so on."""
    names = (f"{path.name}.previous{'' if number == 1 else f'.{number}'}" for number in itertools.count(1))
    places = (path.with_name(name) for name in names)
    return next(place for place in places if not any(part(place).exists() for part in _PARTS))


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises UsageError when the unfinished run at `path` was started with other settings."""
    try:
        before = json.loads(settings_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(before, dict):
        return
    changed = [
        f"{key} was {before.get(key)!r}, is {value!r}" for key, value in settings.items() if before.get(key) != value
    ]
    if changed:
        remedy = "give them back, or leave out --resume to begin anew"
        raise UsageError(f"--resume {path}: the run was started with other settings ({'; '.join(changed)}); {remedy}")
