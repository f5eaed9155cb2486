"""Pairs of the same random model: ours, and transformers' reading of the checkpoint that ours wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_model import config_of
from vtengine.model import ModelConfig, TextConfig, VisionConfig, VLModel, hf_tensors
from vtengine.model.families import MODELS
from vtengine.model.names import transformers_name

SMALL = config_of(
    vision=VisionConfig(
        depth=4,
        hidden_size=128,
        intermediate_size=200,
        num_heads=4,
        out_hidden_size=128,
        fullatt_block_indexes=(1, 3),
    ),
    text=TextConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_layers=4,
        num_heads=2,
        num_kv_heads=1,
        mrope_section=(8, 12, 12),
        max_position_embeddings=4096,
    ),
)


def _build(config: ModelConfig, seed: int) -> VLModel:
    """Random weights with biases and norms that matter (a fresh model has biases 0 and norms 1)."""
    model = MODELS[config.model_type].build(config, seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.2, generator=generator)
    return model


def _head_layout(heads: int, kv_heads: int, seed: int) -> ModelConfig:
    """Heads as in a released checkpoint (text head size 128, vision 80), two layers, narrow feed-forward."""
    vision = VisionConfig(depth=2, intermediate_size=256, out_hidden_size=heads * 128, fullatt_block_indexes=(1,))
    text = TextConfig(
        vocab_size=320,
        hidden_size=heads * 128,
        intermediate_size=256,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
    )
    return dataclasses.replace(SMALL, vision=vision, text=text, tie_word_embeddings=seed == 3)


def _to_transformers(model: VLModel) -> Any:
    """The transformers model over the same weights in memory (no disk)."""
    import transformers

    family = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[model.config.model_type]
    config = getattr(transformers, f"{family}Config")(**model.config.to_json())
    config._attn_implementation = "eager"
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    state = {transformers_name(name): tensor.clone() for name, tensor in hf_tensors(model).items()}
    left = theirs.load_state_dict(state, strict=False, assign=True)
    assert left.unexpected_keys == []
    assert left.missing_keys in ([], ["lm_head.weight"])
    theirs.tie_weights()
    text, visual = theirs.model.language_model, theirs.model.visual
    text.rotary_emb = type(text.rotary_emb)(theirs.config.text_config)
    visual.rotary_pos_emb = type(visual.rotary_pos_emb)(theirs.config.vision_config)
    return theirs.eval()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    return SMALL


@pytest.fixture(scope="session")
def build() -> Callable[[ModelConfig, int], VLModel]:
    return _build


@pytest.fixture(scope="session")
def small_model() -> VLModel:
    return _build(SMALL, 0)


@pytest.fixture(scope="session")
def small_pair(small_model: VLModel) -> tuple[VLModel, Any]:
    pytest.importorskip("transformers")
    return small_model, _to_transformers(small_model)


@pytest.fixture(scope="session")
def new_name() -> Callable[[str], str]:
    return transformers_name


@pytest.fixture(scope="session")
def to_transformers() -> Callable[[VLModel], Any]:
    pytest.importorskip("transformers")
    return _to_transformers


@pytest.fixture(scope="session", params=[(16, 2, 3), (28, 4, 7)], ids=["3B", "7B"])
def large_pair(request: pytest.FixtureRequest) -> tuple[VLModel, Any]:
    pytest.importorskip("transformers")
    model = _build(_head_layout(*request.param), request.param[2])
    return model, _to_transformers(model)


@pytest.fixture(scope="session")
def pixels() -> Callable[..., Tensor]:
    def make(grids: Sequence[tuple[int, int, int]], seed: int = 0, dim: int = 1176) -> Tensor:
        rows = sum(t * h * w for t, h, w in grids)
        return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def prompt() -> Callable[..., list[int]]:
    """Token ids: text, then each image between its markers with text after it, or (`adjacent`) markers only."""

    def make(grids: Sequence[tuple[int, int, int]], text: int = 5, adjacent: bool = False) -> list[int]:
        ids = list(range(1, text + 1))
        for t, h, w in grids:
            ids += [SMALL.vision_start_token_id, *[SMALL.image_token_id] * (t * h * w // 4), SMALL.vision_end_token_id]
            ids += [] if adjacent else range(50, 50 + text)
        return [*ids, *range(100, 100 + text)]

    return make


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    return lambda ours, theirs: float((ours - theirs).abs().max() / theirs.abs().max())
