"""Verdicts on disk: SQLite in WAL mode. A killed process loses at most its last verdicts, never the file."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import time
from pathlib import Path

from vtengine_training.rewards.judge.config import JudgeConfig
from vtengine_training.rewards.judge.prompt import PROMPT_VERSION, Query

log = logging.getLogger(__name__)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict INTEGER, query TEXT, model TEXT, time_s REAL)
"""


class VerdictCache:
    """A dictionary, with a file under it if `path` is not empty. Several processes may share the file.

    `errors` counts writes that failed (disk full): the verdict is then kept in memory only.
    """

    def __init__(self, path: str) -> None:
        self.errors = 0
        self._memory: dict[str, bool] = {}
        self._file: sqlite3.Connection | None = None
        if not path:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            # Used from the event loop's thread only; a run may end on another one.
            self._file = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute(_SCHEMA)
            self._file.execute("SELECT key, verdict FROM verdicts LIMIT 1")
        except sqlite3.Error as error:
            raise ValueError(f"reward.judge.cache = {path!r}: no verdict cache: {error}; name another file") from None

    def get(self, key: str) -> bool | None:
        if key in self._memory:
            return self._memory[key]
        if self._file is None:
            return None
        try:
            row = self._file.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            self._note(error)
            return None
        if row is None or row[0] not in (0, 1):
            return None
        self._memory[key] = bool(row[0])
        return self._memory[key]

    def put(self, key: str, verdict: bool, query: Query, model: str) -> None:
        """The first verdict on a key stays."""
        self._memory.setdefault(key, verdict)
        if self._file is None:
            return
        row = (key, int(verdict), query.to_json(), model, time.time())
        try:
            self._file.execute("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            self._note(error)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _note(self, error: sqlite3.Error) -> None:
        if self.errors == 0:
            log.warning("judge cache: %s; verdicts are kept in memory", error)
        self.errors += 1


def cache_key(query: Query, config: JudgeConfig) -> str:
    """SHA-256 of all that a verdict depends on: question, references, answer, judge, its parameters and our prompt."""
    judge = [config.url, config.model, config.max_tokens, config.extra_body, PROMPT_VERSION]
    return hashlib.sha256(f"{json.dumps(judge, sort_keys=True, default=str)}\n{query.to_json()}".encode()).hexdigest()
