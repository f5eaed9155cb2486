"""How the tokens of a mini-batch add up to one loss: a weight per token, fixed before any micro-batch is cut.

The loss is the plain sum of weight x token loss, so that it is the same however the mini-batch is split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from vtengine_training.grpo.config import Aggregation


def token_weights(
    lengths: Sequence[int], groups: Sequence[int], aggregation: Aggregation, constant_length: int
) -> list[float]:
    """The weight of each token of each sequence of a mini-batch.

    lengths: trainable tokens per sequence (0 is allowed). groups: which prompt each one answers.
    sequence-mean: mean over a sequence's tokens, then over the sequences; token-mean: over all tokens; prompt-mean:
    over a prompt's tokens, then over the prompts; constant: sum over tokens / constant_length, mean over the sequences.
    """
    if len(lengths) != len(groups):
        raise ValueError(f"{len(lengths)} lengths for {len(groups)} groups: must be equally many")
    count = sum(length > 0 for length in lengths)
    if aggregation == "sequence-mean":
        return [1 / (length * count) if length else 0.0 for length in lengths]
    if aggregation == "token-mean":
        total = sum(lengths)
        return [1 / total if length else 0.0 for length in lengths]
    if aggregation == "constant":
        return [1 / (constant_length * len(lengths)) if length else 0.0 for length in lengths]
    sizes: dict[int, int] = defaultdict(int)
    for length, group in zip(lengths, groups, strict=True):
        sizes[group] += length
    prompts = sum(size > 0 for size in sizes.values())
    return [1 / (sizes[group] * prompts) if length else 0.0 for length, group in zip(lengths, groups, strict=True)]
