"""A geometry with round figures: low 10 x 10, high 20 x 20 visual tokens, a crop costs 50."""

from __future__ import annotations

import pytest

from vtengine.protocol.messages import View, ViewSize


class SquareGeometry:
    def size(self, view: View) -> ViewSize:
        if view.kind == "crop":
            assert view.box is not None
            if view.box[0] >= 280 or view.box[1] >= 280:
                raise ValueError("the box holds no pixel of the 280x280 view")
            return ViewSize(280, 140)
        if view.kind == "scale":
            assert view.scale is not None
            side = 28 * round(20 * view.scale)
            return ViewSize(side, side)
        return ViewSize(280, 280) if view.kind == "low" else ViewSize(560, 560)


@pytest.fixture
def geometry() -> SquareGeometry:
    return SquareGeometry()
