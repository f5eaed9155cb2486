"""Episodes as JSON lines: the row of the public contract, writing, tolerant reading."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from vtengine.protocol.messages import ErrorInfo
from vtengine.rollout.episode import Episode, Turn

Row = dict[str, Any]

SECONDS_DIGITS = 6


def episode_row(episode: Episode, sample: int) -> Row:
    """The row of one episode. Carried keys follow; one that has the name of ours is left out."""
    own: Row = {
        "id": episode.question.id,
        "sample": sample,
        "status": episode.status,
        "error": None if episode.error is None else episode.error.row(),
        "answer": episode.answer,
        "upscaled": episode.is_upscaled,
        "turns": [turn_row(turn) for turn in episode.turns],
        "visual_tokens": episode.visual_tokens,
        "visual_tokens_full": episode.visual_tokens_full,
        "latency_s": _seconds(episode.latency_s),
        "logprob_sum": _finite(episode.transcript.logprob_sum),
    }
    return own | {key: value for key, value in episode.question.carried.items() if key not in own}


def rejected_row(row_id: str | int, sample: int, error: ErrorInfo, carried: Mapping[str, Any] | None = None) -> Row:
    """The row of an input that never became an episode."""
    own: Row = {
        "id": row_id,
        "sample": sample,
        "status": "rejected",
        "error": error.row(),
        "answer": None,
        "upscaled": False,
        "turns": [],
        "visual_tokens": 0,
        "visual_tokens_full": 0,
        "latency_s": 0.0,
        "logprob_sum": 0.0,
    }
    return own | {key: value for key, value in (carried or {}).items() if key not in own}


def turn_row(turn: Turn) -> Row:
    """One element of `turns`."""
    completion = turn.completion
    return {
        "text": turn.text,
        "finish": completion.finish,
        "action": turn.action,
        "prompt_tokens": completion.prompt_tokens,
        "cached_tokens": completion.cached_tokens,
        "prefill_tokens": completion.prefill_tokens,
        "completion_tokens": len(completion.token_ids),
        "images": [asdict(image) for image in turn.images],
        "latency_s": _seconds(completion.latency_s),
        "ttft_s": _seconds(completion.ttft_s),
    }


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line of JSON, ASCII, with its newline. Raises ValueError for NaN and infinity."""
    return json.dumps(row, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def read_rows(path: Path) -> Iterator[Row]:
    """The whole rows of a file; a torn last line is left out. Raises ValueError for a broken line before the last."""
    for row, _ in whole_rows(path):
        yield row


class RowWriter:
    """A new file of rows; each is handed to the operating system at once, so a killed process tears at most the last.

    Raises OSError as the file does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb", buffering=0)

    def append(self, row: Mapping[str, Any]) -> None:
        rest = memoryview(encode_row(row))
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Waits until the rows are on the disk."""
        if not self._file.closed:
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def whole_rows(path: Path) -> Iterator[tuple[Row, int]]:
    """(row, offset of its end) for every line that ends in a newline; the last such line may be broken too."""
    end = 0
    broken: int | None = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if broken is not None:
                raise ValueError(f"{path}: line {broken} is not a row of JSON, and it is not the last one")
            row = _parse(line)
            if row is None:
                broken = number
                continue
            end += len(line)
            yield row, end


def _parse(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _seconds(value: float) -> float:
    return round(value, SECONDS_DIGITS)


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
