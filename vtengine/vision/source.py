"""Where an image comes from -> its bytes: a path confined to a folder, a `data:` URL, or http(s) where allowed."""

from __future__ import annotations

import base64
import binascii
import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from vtengine.vision.errors import ImageCode, ImageError
from vtengine.vision.http_source import fetch

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?=//)")  # a URL; `a:b.png` is a file name
_PASSING = frozenset(
    (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT)
)  # what disks, file servers and a full table of files say for a while
_SHOWN = 120  # characters of a source in messages


@dataclass(frozen=True)
class SourceLimits:
    """max_bytes: of the encoded image. http(s) is off by default; hosts on private networks need a second yes."""

    max_bytes: int = 64 << 20
    allow_http: bool = False
    allow_private_hosts: bool = False
    timeout_s: float = 20.0

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"source.max_bytes = {self.max_bytes}: must be >= 1")
        if not self.timeout_s > 0:
            raise ValueError(f"source.timeout_s = {self.timeout_s}: must be > 0 seconds")


def is_data_url(source: str) -> bool:
    """Whether it holds the image itself."""
    return source[:5].lower() == "data:"


def is_url(source: str) -> bool:
    """Whether it is a URL, a `data:` one included, and no path."""
    return _SCHEME.match(source) is not None or is_data_url(source)


def fetched_from(source: str) -> str | None:
    """Host and port of an http(s) URL, as far as it names them; None for what comes over no network."""
    scheme = _SCHEME.match(source)
    if scheme is None or scheme[0].lower() not in ("http:", "https:"):
        return None
    return re.split(r"[/?#]", source[scheme.end() + 2 :], maxsplit=1)[0].rpartition("@")[2].lower()


def read_image_source(source: str, root: Path, limits: SourceLimits | None = None) -> bytes:
    """The encoded image, at least one byte. Relative paths start at `root`; nothing outside it is read, symlinks
    included. Blocks; raises ImageError for anything wrong with the source.
    """
    limits = limits or SourceLimits()
    scheme = _SCHEME.match(source)
    if is_data_url(source):
        data = _read_data_url(source, limits)
    elif scheme is None:
        data = _read_path(source, root, limits)
    elif scheme[0].lower() in ("http:", "https:") and limits.allow_http:
        data = fetch(source, limits.max_bytes, limits.timeout_s, limits.allow_private_hosts)
    else:
        allowed = "a path or a data: URL" + (" or http(s)" if limits.allow_http else "; http(s) only with --allow-http")
        raise ImageError("image_url_not_allowed", f"image {_short(source)}: must be {allowed}")
    if not data:
        raise ImageError("image_empty", f"image {_short(source)} has 0 bytes")
    return data


def _read_data_url(source: str, limits: SourceLimits) -> bytes:
    header, comma, body = source[5:].partition(",")
    media, *parameters = header.split(";")
    if not comma or "base64" not in (p.strip().lower() for p in parameters[-1:]):
        raise ImageError("image_corrupt", f"image {_short(source)}: must be data:image/<type>;base64,<data>")
    if not media.strip().lower().startswith("image/"):
        raise ImageError("image_unsupported_format", f"image {_short(source)}: the media type must be image/*")
    if len(body) // 4 * 3 > limits.max_bytes + 2:
        raise _too_large(source, len(body) // 4 * 3, limits)
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as fault:
        raise ImageError("image_corrupt", f"image {_short(source)}: the base64 data is not valid: {fault}") from fault
    if len(data) > limits.max_bytes:
        raise _too_large(source, len(data), limits)
    return data


def _read_path(source: str, root: Path, limits: SourceLimits) -> bytes:
    if not source or "\0" in source:
        raise ImageError("image_not_found", f"image {_short(source)}: must be the path of a file")
    inside = os.path.realpath(root)
    path = os.path.realpath(os.path.join(inside, source))
    if os.path.commonpath((inside, path)) != inside:
        found = f"image {_short(source)} is outside the image root {_short(str(root))}"
        raise ImageError("image_outside_root", f"{found}; move it there, or name a root that holds it")
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
        with open(descriptor, "rb") as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise ImageError("image_not_found", f"image {_short(source)} is not a regular file")
            if info.st_size > limits.max_bytes:
                raise _too_large(source, info.st_size, limits)
            data = file.read(limits.max_bytes + 1)
    except OSError as fault:
        if isinstance(fault, IsADirectoryError) or os.path.isdir(path):
            raise ImageError("image_is_directory", f"image {_short(source)} is a directory") from fault
        code: ImageCode = "image_unreachable" if fault.errno in _PASSING else "image_not_found"
        place = "" if os.path.isabs(source) else f" (relative to {_short(str(root))})"
        raise ImageError(code, f"image {_short(source)}: {fault.strerror or fault}{place}") from fault
    if len(data) > limits.max_bytes:
        raise _too_large(source, len(data), limits)
    return data


def _too_large(source: str, size: int, limits: SourceLimits) -> ImageError:
    return ImageError(
        "image_too_large_bytes", f"image {_short(source)} has {size} bytes: at most {limits.max_bytes} are accepted"
    )


def _short(source: str) -> str:
    return repr(source if len(source) <= _SHOWN else source[: _SHOWN - 3] + "...")
