"""The nouns of the protocol: views of an image, the parts of a prompt, statuses. No tokens, no pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol, get_args

ViewKind = Literal["low", "high", "scale", "crop"]
Resolution = Literal["adaptive", "low", "high"]
Blame = Literal["request", "setup", "unclear"]
"""Whose fault a refusal is: of what was asked (text, image, length); of settings, server or this program, whatever is
asked; or a server's refusal that may be either."""
Status = Literal["answered", "malformed", "truncated", "turn_limit", "rejected", "failed"]
RESOLUTIONS: tuple[Resolution, ...] = get_args(Resolution)


@dataclass(frozen=True)
class View:
    """One way to look at an image of the conversation; `image` counts them from 0.

    low, high: the two standard views. scale: the high view with both sides times `scale`.
    crop: `box` = (x1, y1, x2, y2) in pixels of the low view, cut from the original image.
    """

    kind: ViewKind
    scale: Fraction | None = None
    box: tuple[int, int, int, int] | None = None
    image: int = 0


LOW = View("low")
HIGH = View("high")


@dataclass(frozen=True)
class ViewSize:
    """Pixels given to the model; a visual token is two by two patches of `patch` pixels per side."""

    width: int
    height: int
    patch: int = 14

    @property
    def visual_tokens(self) -> int:
        return self.width * self.height // (2 * self.patch) ** 2


class Geometry(Protocol):
    """What a conversation must know of its images: how large each view would be."""

    def size(self, view: View) -> ViewSize:
        """Raises ValueError when the view does not exist (a box outside the low view)."""
        ...


@dataclass(frozen=True)
class Text:
    """A piece of prompt text. Only trusted text (ours) may name special tokens; the user's text never does."""

    text: str
    trusted: bool = True


@dataclass(frozen=True)
class ImagePart:
    """The place of one view's visual tokens. The markers around it are text of the profile."""

    view: View


Part = Text | ImagePart


@dataclass(frozen=True)
class Exchange:
    """A question that was asked before, and its answer. Both are text of the user's side, untrusted."""

    question: str
    answer: str


@dataclass(frozen=True)
class Ask:
    """What is appended to the context before the model's reply number `turn` (from 0)."""

    parts: tuple[Part, ...]
    turn: int

    @property
    def views(self) -> tuple[View, ...]:
        return tuple(part.view for part in self.parts if isinstance(part, ImagePart))

    def text(self, image: str = "<|image_pad|>") -> str:
        """The prompt as one string, `image` standing for the visual tokens of each view."""
        return "".join(part.text if isinstance(part, Text) else image for part in self.parts)


@dataclass(frozen=True)
class ErrorInfo:
    """Why an episode did not end with an answer. `code` is stable; `message` is for people. blame: of a rejection."""

    code: str
    message: str
    blame: Blame = "request"

    def row(self) -> dict[str, str]:
        """As records have it."""
        return {"code": self.code, "message": self.message}


def merged(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Neighbouring texts of equal trust joined, empty ones dropped."""
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        if isinstance(part, Text):
            if not part.text:
                continue
            if isinstance(last, Text) and last.trusted == part.trusted:
                result[-1] = Text(last.text + part.text, part.trusted)
                continue
        result.append(part)
    return tuple(result)
