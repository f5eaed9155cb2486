"""What can be wrong with an image, as stable codes for records."""

from __future__ import annotations

from typing import Literal, get_args

ImageCode = Literal[
    "image_not_found",
    "image_unreachable",
    "image_is_directory",
    "image_empty",
    "image_too_large_bytes",
    "image_too_many_pixels",
    "image_unsupported_format",
    "image_truncated",
    "image_corrupt",
    "image_outside_root",
    "image_url_not_allowed",
    "image_aspect_ratio",
    "image_bad_box",
]
IMAGE_CODES: tuple[ImageCode, ...] = get_args(ImageCode)


class ImageError(ValueError):
    """The image cannot be used. `code` is one of IMAGE_CODES; `message` names the value and the remedy.

    image_unreachable is the fault of a network or a disk, and may be over later; all others stay as they are.
    """

    def __init__(self, code: ImageCode, message: str) -> None:
        super().__init__(message)
        self.code: ImageCode = code
        self.message = message

    def __reduce__(self) -> tuple[type[ImageError], tuple[ImageCode, str]]:
        return type(self), (self.code, self.message)
