"""Windows, images and coordinates of packed images, against transformers on random grids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtengine.model import VisionConfig
from vtengine.model.attention import Runs
from vtengine.model.vision_plan import vision_plan

CONFIG = VisionConfig()
CPU = torch.device("cpu")
SIDE = st.integers(1, 15).map(lambda n: 2 * n)
GRIDS = st.lists(st.tuples(st.integers(1, 2), SIDE, SIDE), min_size=1, max_size=4)


def patches(tokens):
    """The four patches of each visual token."""
    return (tokens[:, None] * 4 + torch.arange(4)).reshape(-1)


def pieces(rows, runs: Runs):
    return {tuple(sorted(part.tolist())) for part in rows.split(list(runs.lengths))}


@settings(max_examples=60)
@given(grids=GRIDS)
def test_equal_transformers(grids):
    theirs = pytest.importorskip("transformers.vision_utils")
    plan = vision_plan(tuple(grids), CONFIG, CPU)
    shapes = torch.tensor(grids)
    index, offsets = theirs.get_vision_window_index(shapes, 2, CONFIG.window_size, CONFIG.patch_size)
    assert torch.equal(plan.order.sort().values, torch.arange(len(index)))
    assert torch.equal(plan.order[plan.restore], torch.arange(len(index)))

    rows = patches(plan.order)
    expected = patches(index).split(offsets.diff().tolist())
    assert pieces(rows, plan.windows) == {tuple(sorted(part.tolist())) for part in expected}

    places = theirs.get_vision_position_ids(shapes, 2)
    assert torch.equal(torch.stack((plan.rows, plan.columns), 1), places[rows])

    frames = torch.arange(len(rows)).split([h * w for t, h, w in grids for _ in range(t)])
    by_image = rows if plan.image_order is None else rows[plan.image_order]
    assert pieces(by_image, plan.images) == {tuple(part.tolist()) for part in frames}
    if plan.image_order is not None:
        assert torch.equal(plan.image_order[plan.image_restore], torch.arange(len(rows)))


def test_equal_windows_are_one_batch():
    """Four images of 3 x 4 windows of 64 patches and one narrow one: two runs, whatever the order."""
    plan = vision_plan(((1, 24, 32), (1, 24, 32), (1, 8, 2), (1, 24, 32), (1, 24, 32)), CONFIG, CPU)
    assert plan.windows.items == ((64, 48), (16, 1))
    assert plan.images.items == ((768, 4), (16, 1))


def test_one_image_needs_no_second_order():
    assert vision_plan(((1, 10, 26),), CONFIG, CPU).image_order is None


@pytest.mark.parametrize("grid", [(1, 3, 2), (0, 2, 2), (1, 2, -2), (1, 2, 0)])
def test_bad_grid(grid):
    with pytest.raises(ValueError, match="multiples of 2"):
        vision_plan((grid,), CONFIG, CPU)
