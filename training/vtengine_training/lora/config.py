"""The [lora] section of a training configuration. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from vtengine_training.checks import at_least


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters are trained in place of the weights, which stay as they are. rank = 0: no adapters.

    A target's weight W becomes W + alpha / rank * B A, with A [rank, in] and B [out, rank]. dropout: of the input of A,
    while gradients are formed. targets: names of linear layers as in Hugging Face checkpoints, or how they end
    ("q_proj", "layers.0.mlp.down_proj"); empty = all linear layers, without `lm_head`, which has to be named.
    vision, merger: whether layers of the vision tower, and of the merger behind it, are among them.
    """

    rank: int = 0
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    vision: bool = False
    merger: bool = False

    def __post_init__(self) -> None:
        at_least(self, 0, "rank")
        at_least(self, 1, "alpha")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: must be from 0 to less than 1")

    @property
    def trains_vision(self) -> bool:
        """Whether gradients reach the vision tower or its merger."""
        return bool(self.rank) and (self.vision or self.merger)
