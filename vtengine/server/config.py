"""What one request and all of them together may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vtengine.vision.decode import PILLOW_MAX_PIXELS

MIB = 1 << 20


@dataclass(frozen=True)
class ServerLimits:
    """Bytes of the request body and of one encoded image, pixels of one image, image parts, characters of text.

    max_choices: the largest `n`; each choice is an episode of its own.
    max_running: episodes at a time; max_waiting: those that wait for one of those places, more get status 429.
    max_held_bytes: of all bodies in memory at once, more get status 429 as well.
    request_timeout_s: from the first byte of a request to the last of its reply. drain_s: how long running requests
    may go on after the signal to stop. max_text_events_per_s: of all streams together; where tokens come faster,
    several share an event. keep_alive_s: the longest silence in a stream before a comment is sent.
    retry_after_s: what a refused client is told to wait.
    """

    max_body_bytes: int = 32 * MIB
    max_image_bytes: int = 20 * MIB
    max_image_pixels: int = 89_478_485
    max_images: int = 8
    max_text_chars: int = 100_000
    max_choices: int = 16
    max_running: int = 32
    max_waiting: int = 128
    max_held_bytes: int = 1024 * MIB
    request_timeout_s: float = 300.0
    drain_s: float = 30.0
    max_text_events_per_s: int = 200
    keep_alive_s: float = 15.0
    retry_after_s: int = 1

    def __post_init__(self) -> None:
        for name in (
            "max_body_bytes",
            "max_image_bytes",
            "max_image_pixels",
            "max_images",
            "max_text_chars",
            "max_choices",
        ):
            self._require(name, 1)
        if self.max_image_pixels > PILLOW_MAX_PIXELS:
            raise ValueError(f"max_image_pixels = {self.max_image_pixels}: must be <= {PILLOW_MAX_PIXELS}")
        self._require("max_running", 1)
        self._require("max_waiting", 0)
        if self.max_held_bytes < self.max_body_bytes:
            bound = f"max_body_bytes (= {self.max_body_bytes})"
            raise ValueError(f"max_held_bytes = {self.max_held_bytes}: must be at least {bound}")
        self._require("retry_after_s", 0)
        self._require("max_text_events_per_s", 1)
        for name in ("request_timeout_s", "keep_alive_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be > 0 seconds")
        if not 0 <= self.drain_s < math.inf:
            raise ValueError(f"drain_s = {self.drain_s}: must be >= 0 seconds, and finite")

    def _require(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value < least:
            raise ValueError(f"{name} = {value}: must be >= {least}")
