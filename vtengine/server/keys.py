"""API keys: read once, kept as digests, compared in constant time, never logged."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from vtengine.server.errors import ApiError

MIN_LENGTH = 8


class ApiKeys:
    """No key at all means that everybody is let in."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Raises ValueError, without quoting it, for a key that is too short or no plain ASCII."""
        keys = tuple(keys)
        for number, key in enumerate(keys, start=1):
            if len(key) < MIN_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(f"API key {number}: must be {MIN_LENGTH} or more printable ASCII characters, no blank")
        self._digests = tuple(_digest(key) for key in keys)

    @classmethod
    def load(cls, file: Path | None = None, variable: str | None = None) -> ApiKeys:
        """One key per line of `file` (blank lines and lines from # on are passed over) and that of an environment
        variable. Raises ValueError when a source that is named holds none; OSError when the file cannot be read.
        """
        keys: list[str] = []
        if file is not None:
            try:
                lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
            except UnicodeDecodeError:
                raise ValueError(f"{file}: is not text") from None
            found = [line for line in lines if line and not line.startswith("#")]
            if not found:
                raise ValueError(f"{file}: holds no key; write one per line")
            keys += found
        if variable is not None:
            key = os.environ.get(variable, "").strip()
            if not key:
                raise ValueError(f"environment variable {variable}: is not set or empty")
            keys.append(key)
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> None:
        """`authorization`: the header's value. Raises ApiError 401; every key is compared, whichever matches."""
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "invalid_api_key", "no API key: send the header Authorization: Bearer <key>")
        offered = _digest(key.strip())
        matches = [hmac.compare_digest(offered, digest) for digest in self._digests]
        if not any(matches):
            raise ApiError(401, "invalid_api_key", "the API key is not one of this server's")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
