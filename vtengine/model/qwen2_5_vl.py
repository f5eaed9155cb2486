"""Qwen2.5-VL: a tower with window attention, biased q, k and v, and M-RoPE in three blocks of frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine.model.config import ModelConfig
from vtengine.model.language import TextAttention, VLModel
from vtengine.model.qwen2_5_config import VisionConfig
from vtengine.model.vision_tower import VisionTower


class Qwen2_5_VL(VLModel):
    nested_names = False

    def __init__(self, config: ModelConfig) -> None:
        assert isinstance(config.vision, VisionConfig)
        super().__init__(config, VisionTower(config.vision), lambda: TextAttention(config.text))

    @staticmethod
    def rotary_axes(section: tuple[int, int, int]) -> Tensor:
        """The first frequencies turn with the temporal position, then come height and width."""
        return torch.repeat_interleave(torch.arange(3), torch.tensor(section))
