"""M-RoPE positions: every token has a (temporal, height, width) triple; text has three equal numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Grid = tuple[int, int, int]


def mrope_positions(
    token_ids: Sequence[int] | Tensor | np.ndarray,
    grids: Sequence[Grid],
    *,
    image_token_id: int,
    merge_size: int = 2,
    start: int = 0,
) -> tuple[Tensor, int]:
    """Positions of a piece of a sequence, and the position of whatever follows it.

    token_ids: [T], with one `image_token_id` per visual token. grids: (t, h, w) in patches, one per image of this
    piece, in order; images may touch. start: the `next_position` of the piece before, so that positions are
    append-only: a piece may have any length, but an image lies whole inside one piece.
    Returns int64 [3, T] on the CPU, and next_position. An image of t x h x w patches moves the next position on by
    max(h, w) / merge_size, not by its number of tokens.
    Raises ValueError where ids and grids disagree.
    """
    ids = token_ids.cpu().numpy() if isinstance(token_ids, Tensor) else np.asarray(token_ids, dtype=np.int64)
    image_at = np.flatnonzero(ids == image_token_id)
    positions = np.empty((3, len(ids)), dtype=np.int64)
    done, used, position = 0, 0, start
    for index, grid in enumerate(grids):
        tokens = _visual_tokens(grid, merge_size)
        run = image_at[used : used + tokens]
        if len(run) < tokens or run[-1] - run[0] != tokens - 1:
            raise ValueError(
                f"image {index} with grid {tuple(grid)}: needs {tokens} consecutive ids {image_token_id} in token_ids; "
                "give one grid per image, in order, and never cut an image between two pieces"
            )
        first = int(run[0])
        position = _write_text(positions, done, first, position)
        t, h, w = grid[0], grid[1] // merge_size, grid[2] // merge_size
        image = positions[:, first : first + tokens].reshape(3, t, h, w)
        image[0] = position + np.arange(t)[:, None, None]
        image[1] = position + np.arange(h)[None, :, None]
        image[2] = position + np.arange(w)
        positions[:, first : first + tokens] = image.reshape(3, tokens)
        position += max(h, w)
        done, used = first + tokens, used + tokens
    if used != len(image_at):
        raise ValueError(
            f"token_ids hold {len(image_at)} ids {image_token_id}, the {len(grids)} grids account for {used}: "
            "give one grid per image"
        )
    position = _write_text(positions, done, len(ids), position)
    return torch.from_numpy(positions), position


def _visual_tokens(grid: Grid, merge_size: int) -> int:
    t, h, w = grid
    if t < 1 or h < 1 or w < 1 or h % merge_size or w % merge_size:
        raise ValueError(
            f"grid {tuple(grid)}: (t, h, w) in patches must be positive, h and w multiples of {merge_size}"
        )
    return t * h * w // merge_size**2


def _write_text(positions: np.ndarray, begin: int, end: int, position: int) -> int:
    positions[:, begin:end] = np.arange(position, position + end - begin)
    return position + end - begin
