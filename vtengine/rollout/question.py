"""What an episode starts from: a question about images, and the sizes their views would have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtengine.protocol.messages import Exchange, View, ViewSize
from vtengine.vision.pipeline import SourceImage
from vtengine.vision.plan import ViewPlan, plan_scale


@dataclass(frozen=True)
class Question:
    """image: path under `root`, data: URL, or http(s) where allowed; None: the question is about text alone.

    carried: keys copied into the records. history: what was asked before, oldest first. more_images: those after the
    first, in order. places: for each image, the number of the question that it stands with, the oldest being 0; empty:
    all stand with that one.
    """

    id: str | int
    image: str | None
    text: str
    root: Path = Path(".")
    carried: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Exchange, ...] = ()
    more_images: tuple[str, ...] = ()
    places: tuple[int, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        return () if self.image is None else (self.image, *self.more_images)


@dataclass(frozen=True)
class ImageGeometry:
    """The protocol's Geometry of opened images."""

    images: tuple[SourceImage, ...]

    def plan(self, view: View) -> ViewPlan:
        """How to make the view. Raises ImageError (a ValueError) for a box that holds no pixel."""
        image = self.images[view.image]
        if view.kind == "low":
            return image.low
        if view.kind == "high":
            return image.high
        if view.kind == "scale":
            assert view.scale is not None
            return plan_scale(image.high, view.scale)
        assert view.box is not None
        return image.crop(view.box)

    def size(self, view: View) -> ViewSize:
        plan = self.plan(view)
        return ViewSize(plan.width, plan.height, plan.patch)
