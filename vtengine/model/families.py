"""Which class is the model of a config."""

from __future__ import annotations

import torch

from vtengine.model.config import ModelConfig
from vtengine.model.language import VLModel
from vtengine.model.qwen2_5_vl import Qwen2_5_VL
from vtengine.model.qwen3_vl import Qwen3_VL

MODELS: dict[str, type[Qwen2_5_VL] | type[Qwen3_VL]] = {"qwen2_5_vl": Qwen2_5_VL, "qwen3_vl": Qwen3_VL}


def meta_model(config: ModelConfig) -> VLModel:
    """A model on the meta device: names, shapes and dtypes, but no weights and no memory."""
    with torch.device("meta"):
        return MODELS[config.model_type](config)
