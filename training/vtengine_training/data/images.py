"""Encoded images out of tables, each kept once as a file named after its content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from vtengine.vision.decode import DecodeLimits
from vtengine.vision.header import sniff

MAX_BYTES = DecodeLimits().max_bytes


class ImageStore:
    """A folder of images. Several processes may fill it at the same time; what is there is not written again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, encoded: bytes) -> str:
        """The path below `folder`, such as ab/abcd….png. Nothing is decoded. Raises OSError as the disk does."""
        digest = hashlib.sha256(encoded).hexdigest()
        kind = sniff(encoded)
        name = f"{digest[:2]}/{digest}.{'bin' if kind is None else kind.lower()}"
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != len(encoded):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_bytes(encoded)
            temporary.replace(path)
        return name
