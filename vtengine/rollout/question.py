"""What an episode starts from: a question about an image, and the sizes its views would have."""

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
    """image: path under `root`, data: URL, or http(s) where allowed. `carried`: keys copied into the records.

    history: what was asked about this image before, oldest first.
    """

    id: str | int
    image: str
    text: str
    root: Path = Path(".")
    carried: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Exchange, ...] = ()


@dataclass(frozen=True)
class ImageGeometry:
    """The protocol's Geometry of an opened image."""

    image: SourceImage

    def plan(self, view: View) -> ViewPlan:
        """How to make the view. Raises ImageError (a ValueError) for a box that holds no pixel."""
        if view.kind == "low":
            return self.image.low
        if view.kind == "high":
            return self.image.high
        if view.kind == "scale":
            assert view.scale is not None
            return plan_scale(self.image.high, view.scale)
        assert view.box is not None
        return self.image.crop(view.box)

    def size(self, view: View) -> ViewSize:
        plan = self.plan(view)
        return ViewSize(plan.width, plan.height)
