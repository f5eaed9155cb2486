"""Which ids of a row take part in a draw."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Truncation:
    """top_k int64 [N] >= 1, top_p float32 [N] > 0, min_p float32 [N] in [0, 1]: of each row, in this order,

    - the `top_k` best ids; as many as there are ids, or more: all,
    - of these the fewest best whose share of their probability reaches `top_p` (always one); 1 or more: all,
    - of these the ones that are at least `min_p` times as probable as the best; 0: all.

    Best first, and of equal scores the lowest id. Probabilities are those at the temperature of the draw.
    """

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
