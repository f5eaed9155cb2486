"""What keeps ranks in step: micro-batches without effect, where one rank has fewer than another, or has no image.

A sharded model is gathered layer by layer on all ranks together, so every rank needs equally many passes, and each pass
has to reach every layer of the language model and of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vtengine.engine.base import ImageInput
from vtengine.rollout.transcript import ImageSpan
from vtengine_training.trainer.policy import Policy
from vtengine_training.trainer.trajectory import Trajectory

TOKENS = 3
VERSION = -1
"""No weights have sampled it: it is in no comparison."""


def padding(policy: Policy) -> Trajectory:
    """The shortest sequence there is: an image of one visual token, and one trainable token. Give it weight 0."""
    config = policy.model.config
    target = next(token for token in range(config.text.vocab_size) if token not in policy.banned)
    side = config.vision.spatial_merge_size
    pixels = torch.zeros(side * side, config.vision.compact_dim)
    image = ImageInput("padding", (1, side, side), pixels, config.vision.patch_size)
    return Trajectory(
        token_ids=np.array([config.vision_start_token_id, config.image_token_id, target]),
        positions=torch.arange(TOKENS).expand(3, TOKENS).contiguous(),
        trainable=np.array([False, False, True]),
        logprobs=np.zeros(TOKENS, dtype=np.float32),
        images=(ImageSpan(1, 2, image),),
        version=VERSION,
        advantage=0.0,
        facts={},
    )


def needs_padding(members: Sequence[Trajectory]) -> bool:
    """Whether these trajectories alone would leave the vision tower out."""
    return not any(one.images for one in members)
