"""Seeds made from seeds: one per sample and turn, the same on every machine and in every order of work."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *path: int | str) -> int:
    """A 63-bit seed from a seed and the path to what it is for, such as (question id, sample) or (turn,)."""
    text = repr((seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1
