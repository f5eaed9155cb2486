"""Qwen3-VL, the dense models: normed heads, interleaved M-RoPE, and a tower that speaks to the first layers too."""

from __future__ import annotations

import torch
from torch import Tensor

from vtengine.model.config import ModelConfig
from vtengine.model.language import TextAttention, VLModel
from vtengine.model.layers import RMSNorm
from vtengine.model.qwen3_config import Qwen3VisionConfig
from vtengine.model.qwen3_tower import Qwen3Tower
from vtengine.model.sizes import TextSizes


class Qwen3Attention(TextAttention):
    """q and k of every head go through an RMS norm before they are turned; no biases."""

    def __init__(self, config: TextSizes) -> None:
        super().__init__(config, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def normed(self, qk: Tensor) -> Tensor:
        q, k = qk.split((self.heads, self.kv_heads), 1)
        q, k = (norm(x.flatten(0, 1)).view(x.shape) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        return torch.cat((q, k), 1)


class Qwen3_VL(VLModel):
    nested_names = True
    head_norms = ("q_norm", "k_norm")

    def __init__(self, config: ModelConfig) -> None:
        assert isinstance(config.vision, Qwen3VisionConfig)
        super().__init__(config, Qwen3Tower(config.vision), lambda: Qwen3Attention(config.text))

    @staticmethod
    def rotary_axes(section: tuple[int, int, int]) -> Tensor:
        """Temporal, height, width, temporal, and so on; where height or width has had its share, temporal."""
        axes = torch.zeros(sum(section), dtype=torch.long)
        for axis in (1, 2):
            axes[axis : 3 * section[axis] : 3] = axis
        return axes
