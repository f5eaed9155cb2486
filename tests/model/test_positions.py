"""M-RoPE positions: equal transformers' on random sequences, append-only, errors where ids and grids disagree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtengine.model import mrope_positions

IMAGE, START, END = 310, 312, 313
GRIDS = st.tuples(st.integers(1, 2), st.integers(1, 8).map(lambda n: 2 * n), st.integers(1, 8).map(lambda n: 2 * n))
# Pieces: some text, then perhaps an image; the text may be empty (markers still stand between images).
PIECES = st.lists(st.tuples(st.integers(0, 30), st.none() | GRIDS), min_size=1, max_size=6)


def piece_ids(text, grid):
    image = [] if grid is None else [START, *[IMAGE] * (grid[0] * grid[1] * grid[2] // 4), END]
    return [*[7] * text, *image]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=PIECES)
def test_equal_transformers_and_append_only(small_pair, pieces):
    ids = [x for piece in pieces for x in piece_ids(*piece)]
    grids = [grid for _, grid in pieces if grid is not None]
    if not ids:
        return
    positions, following = mrope_positions(ids, grids, image_token_id=IMAGE)
    tokens = torch.tensor([ids])
    kinds = (tokens == IMAGE).int()
    shapes = torch.tensor(grids) if grids else None
    expected, delta = small_pair[1].model.get_rope_index(tokens, kinds, image_grid_thw=shapes)
    assert torch.equal(positions, expected[:, 0])
    if all(grid[0] <= max(grid[1:]) // 2 for grid in grids):
        assert following == len(ids) + delta.item() == positions.max() + 1

    appended, start = [], 0
    for text, grid in pieces:
        part, start = mrope_positions(piece_ids(text, grid), [grid] if grid else [], image_token_id=IMAGE, start=start)
        appended.append(part)
    assert torch.equal(torch.cat(appended, 1), positions)
    assert start == following


def test_worked_example():
    """Two words, a 2 x 3 token image, two words: the text after it goes on at 2 + max(2, 3)."""
    positions, following = mrope_positions([1, 2, *[IMAGE] * 6, 3, 4], [(1, 4, 6)], image_token_id=IMAGE)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert following == 7


def test_touching_images_are_told_apart_by_their_grids():
    touching, following = mrope_positions([IMAGE] * 3, [(1, 2, 4), (1, 2, 2)], image_token_id=IMAGE)
    assert touching.tolist() == [[0, 0, 2], [0, 0, 2], [0, 1, 2]]
    assert following == 3


def test_tensors_and_empty_pieces():
    positions, following = mrope_positions(torch.tensor([5, 6]), [], image_token_id=IMAGE, start=9)
    assert positions.tolist() == [[9, 10]] * 3
    assert following == 11
    empty, following = mrope_positions([], [], image_token_id=IMAGE, start=4)
    assert empty.shape == (3, 0)
    assert following == 4


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([1, IMAGE, IMAGE], [(1, 2, 2)], "hold 2 ids 310, the 1 grids account for 1"),
        ([1, IMAGE], [], "account for 0"),
        ([1, IMAGE, 2, IMAGE], [(1, 2, 4)], "2 consecutive ids"),
        ([1, IMAGE], [(1, 2, 4)], "2 consecutive ids"),
        ([1], [(1, 2, 2)], "consecutive"),
        ([1, IMAGE], [(1, 3, 2)], "multiples of 2"),
        ([1], [(1, 0, 2)], "must be positive"),
    ],
)
def test_disagreement_is_an_error(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        mrope_positions(ids, grids, image_token_id=IMAGE)
