"""Image file -> pixels. Every limit is checked on the header, before a pixel is decoded; a cut file is an error."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import get_args

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vtengine.vision.errors import ImageError
from vtengine.vision.header import Format, end_is_missing, sniff, stated_size

PILLOW_MAX_PIXELS = 178_956_970  # Pillow itself refuses more, whatever our limit says
WHITE = (255, 255, 255, 255)
ORIENTATION = 0x0112  # EXIF and TIFF tag
TILE_WIDTH, TILE_HEIGHT = 322, 323  # TIFF tags: a tile may be larger than its image
_CUT = re.compile(r"truncat|unexpected end|not enough|end of file|eof", re.IGNORECASE)


@dataclass(frozen=True)
class DecodeLimits:
    """max_bytes: of the file; max_pixels: width x height in the header (the default is 8192x8192 and some more)."""

    max_bytes: int = 64 << 20
    max_pixels: int = 89_478_485
    formats: tuple[Format, ...] = get_args(Format)

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"decode.max_bytes = {self.max_bytes}: must be >= 1")
        if not 1 <= self.max_pixels <= PILLOW_MAX_PIXELS:
            raise ValueError(f"decode.max_pixels = {self.max_pixels}: must be in 1..{PILLOW_MAX_PIXELS}")
        if unknown := set(self.formats) - set(get_args(Format)):
            raise ValueError(f"decode.formats has {sorted(unknown)}: must be among {', '.join(get_args(Format))}")


def decode_image(data: bytes, limits: DecodeLimits) -> np.ndarray:
    """Pixels of the first frame, upright: uint8 [H, W, 3] RGB, C-contiguous, read-only.

    EXIF orientation is applied, transparency is laid over white, CMYK and palettes become RGB, 16-bit channels keep
    their high byte, colour profiles are ignored. Raises ImageError, nothing else, for anything wrong with `data`.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on in this process: a cut file would decode to half an image; "
            "turn it off (another library has set it)"
        )
    name = _check_bytes(data, limits)
    try:
        with _open(data, name, limits) as image:
            image.load()
            _check_pixels(*image.size, limits)
            return _to_rgb(_upright(image), name)
    except ImageError:
        raise
    except Exception as fault:  # Pillow's plugins raise anything at all on a bad file
        raise _fault(data, name, fault) from fault


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """As `decode_image` gives them, of an image that Pillow has opened or made. Raises ImageError, and what Pillow's
    plugins raise on a bad file.
    """
    image.load()
    return _to_rgb(_upright(image), image.format or "a picture of Pillow's")


def _check_bytes(data: bytes, limits: DecodeLimits) -> Format:
    if not data:
        raise ImageError("image_empty", "the image has 0 bytes")
    if len(data) > limits.max_bytes:
        raise ImageError(
            "image_too_large_bytes", f"the image has {len(data)} bytes: at most {limits.max_bytes} are accepted"
        )
    name = sniff(data)
    if name is None or name not in limits.formats:
        found = name or f"unknown (first bytes {data[:8]!r})"
        raise ImageError(
            "image_unsupported_format", f"the image's format is {found}: must be one of {', '.join(limits.formats)}"
        )
    return name


def _check_pixels(width: int, height: int, limits: DecodeLimits) -> None:
    if width * height > limits.max_pixels:
        raise ImageError(
            "image_too_many_pixels",
            f"the image has {width}x{height} pixels: at most {limits.max_pixels} are accepted; scale it down first",
        )


def _open(data: bytes, name: Format, limits: DecodeLimits) -> Image.Image:
    """The image with its header read and checked, no pixel decoded."""
    if size := stated_size(data, name):
        _check_pixels(*size, limits)
    try:
        image = Image.open(io.BytesIO(data), formats=(name,))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as bomb:
        raise ImageError(
            "image_too_many_pixels", f"{bomb}; at most {limits.max_pixels} are accepted; scale the image down first"
        ) from bomb
    _check_pixels(*image.size, limits)
    if name == "TIFF":
        tags = getattr(image, "tag_v2", {})
        _check_pixels(int(tags.get(TILE_WIDTH, 1)), int(tags.get(TILE_HEIGHT, 1)), limits)
    return image


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; an unreadable EXIF block turns nothing."""
    try:
        turned = image.getexif().get(ORIENTATION, 1) != 1
    except Exception:  # a broken EXIF block does not make the pixels wrong
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode in ("F", "I") and not (image.mode == "I" and name == "PNG"):
        raise ImageError(
            "image_unsupported_format", f"{name} with 32-bit pixels (mode {image.mode}): save it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        return _gray16_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, WHITE), rgba)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


def _gray16_to_rgb(image: Image.Image) -> np.ndarray:
    """High bytes of 16-bit gray, which Pillow's own conversion would clip at 255; one gray value may be transparent."""
    gray = np.asarray(image)
    high = (gray >> 8).clip(0, 255).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        high[gray == clear] = 255
    pixels = np.repeat(high[:, :, None], 3, axis=2)
    pixels.flags.writeable = False
    return pixels


def _fault(data: bytes, name: Format, fault: Exception) -> ImageError:
    """Pillow's exception as ours. UnidentifiedImageError carries no reason, so the file's end is looked at too."""
    if isinstance(fault, ValueError) and "not supported" in str(fault):
        return ImageError("image_unsupported_format", f"{name} with pixels that cannot become RGB: {fault}")
    if _CUT.search(str(fault)) or isinstance(fault, EOFError) or end_is_missing(data, name):
        return ImageError("image_truncated", f"the {name} file of {len(data)} bytes is cut short; copy it again")
    reason = str(fault) or type(fault).__name__
    if isinstance(fault, UnidentifiedImageError):  # its text holds an address in memory
        reason = "its header is not valid"
    return ImageError("image_corrupt", f"the {name} file cannot be decoded: {reason}")
