"""Qwen2.5-VL and Qwen3-VL in plain torch: config, vision tower, language model, checkpoints, attention contexts."""

from vtengine.model.attention import AttentionContext, PackedCausal, PackedTree, plain_attention
from vtengine.model.checkpoint import Checkpoint
from vtengine.model.config import ModelConfig, ModelLoadError
from vtengine.model.families import meta_model
from vtengine.model.language import VLModel
from vtengine.model.layers import store_aligned
from vtengine.model.linear import store_by_column
from vtengine.model.names import checkpoint_name, hf_tensors, hf_views
from vtengine.model.positions import mrope_positions
from vtengine.model.qwen2_5_config import TextConfig, VisionConfig
from vtengine.model.qwen2_5_vl import Qwen2_5_VL
from vtengine.model.qwen3_config import Qwen3TextConfig, Qwen3VisionConfig
from vtengine.model.qwen3_vl import Qwen3_VL
from vtengine.model.weights import load_model, load_rows, load_tensors, save_model

__all__ = [
    "AttentionContext",
    "Checkpoint",
    "ModelConfig",
    "ModelLoadError",
    "PackedCausal",
    "PackedTree",
    "Qwen2_5_VL",
    "Qwen3TextConfig",
    "Qwen3VisionConfig",
    "Qwen3_VL",
    "TextConfig",
    "VLModel",
    "VisionConfig",
    "checkpoint_name",
    "hf_tensors",
    "hf_views",
    "load_model",
    "load_rows",
    "load_tensors",
    "meta_model",
    "mrope_positions",
    "plain_attention",
    "save_model",
    "store_aligned",
    "store_by_column",
]
