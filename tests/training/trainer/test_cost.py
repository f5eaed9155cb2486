"""Estimates are those of the model: parameters, operations, and what autograd keeps, in both families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from vtengine_kernels.shared_prefix_attention import PrefixTree
from vtengine_training.trainer.cost import ModelCost

from tests.model.test_config import DATA
from tests.tiny_model import QWEN3_VISION, TINY_VISION, config_of, qwen3_text, tiny_text
from vtengine.model import ModelConfig, PackedTree, VLModel
from vtengine.model.families import MODELS

CONFIGS = [config_of(tiny_text(), TINY_VISION), config_of(qwen3_text(), QWEN3_VISION)]
SIDE, TOKENS = 32, 512


@pytest.fixture(params=CONFIGS, ids=lambda config: config.model_type)
def model(request: pytest.FixtureRequest) -> VLModel:
    return MODELS[request.param.model_type].build(request.param, 0)


def numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def decode(model: VLModel) -> torch.Tensor:
    embeds = torch.randn(TOKENS, model.config.text.hidden_size, dtype=model.dtype).requires_grad_()
    if added := model.config.vision.feature_size - embeds.shape[1]:
        embeds = nn.functional.pad(embeds, (0, added))
    tree = PackedTree(PrefixTree((TOKENS,), (-1,)))
    return model.decode(embeds, torch.arange(TOKENS).expand(3, -1), tree)


def encode(model: VLModel) -> torch.Tensor:
    return model.visual(torch.randn(SIDE * SIDE, model.config.vision.compact_dim), [(1, SIDE, SIDE)])


def kept_bytes(model: VLModel, run: Callable[[VLModel], torch.Tensor]) -> int:
    """What a forward pass leaves for the backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and len(tensor):
            kept[storage.data_ptr()] = storage  # held, so that no other one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run(model)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("size", ["3b", "7b", "qwen3"])
def test_parameters_are_those_of_transformers(size: str) -> None:
    transformers = pytest.importorskip("transformers")
    if size == "qwen3":
        kind, theirs = transformers.Qwen3VLForConditionalGeneration, transformers.Qwen3VLConfig()
        theirs.vision_config.out_hidden_size = theirs.text_config.hidden_size
    else:
        path = DATA / "qwen2_5_vl_configs" / f"qwen2.5-vl-{size}.config.json"
        if not path.is_file():
            pytest.skip(f"no {path.name}: set VTENGINE_TEST_DATA to a folder with qwen2_5_vl_configs/")
        kind, theirs = (
            transformers.Qwen2_5_VLForConditionalGeneration,
            transformers.Qwen2_5_VLConfig.from_json_file(path),
        )
    with torch.device("meta"):
        real = kind(theirs)
    cost = ModelCost.of(ModelConfig.from_json(theirs.to_dict()))
    assert cost.total == sum(p.numel() for p in set(real.parameters()))
    assert cost.vision == numel(real.model.visual)
    assert cost.text == numel(real.model.language_model.layers)


def test_bytes_of_weights_and_moments(model: VLModel) -> None:
    config = model.config
    cost = ModelCost.of(config)
    assert cost.total == numel(model)
    assert cost.text + cost.vision + cost.head + config.text.hidden_size == cost.total
    assert cost.training_bytes(4, False) == 16 * cost.total
    assert cost.training_bytes(4, True) == 20 * cost.total
    assert cost.training_bytes(4, True, engine_copy=True) == 24 * cost.total
    assert cost.training_bytes(2, True, ranks=4) == -(-18 * cost.total // 4)
    assert cost.training_bytes(2, True, ranks=4, engine_copy=True) == 2 * cost.total + -(-18 * cost.total // 4)
    assert cost.adapter_bytes(4, 10, engine_copy=True) == cost.adapter_bytes(4, 10) + 4 * cost.total
    assert cost.ends + numel(model.layers) + numel(model.visual.blocks) == cost.total
    layer = numel(model.layers[0])
    assert cost.gathered_bytes(2, learns=True) == 4 * cost.ends + 12 * layer
    assert cost.gathered_bytes(2, learns=False) == 4 * cost.ends + 6 * layer
    assert cost.ends_gradient_bytes(2) == 6 * cost.ends
    assert (cost.head_gradient_bytes(2), cost.head_gradient_bytes(4)) == (6 * cost.head, 4 * cost.head)


def test_operations_are_those_that_torch_counts(model: VLModel) -> None:
    """Attention is left out; biases and norms, which torch does not count, are the difference."""
    cost, model = ModelCost.of(model.config), model.bfloat16()  # products that torch sees; oneDNN's it does not
    for run, expected in (
        (decode, cost.training_flops(TOKENS, 0, 0) / 3),
        (encode, cost.training_flops(0, 0, SIDE * SIDE, train_vision=False)),
    ):
        with FlopCounterMode(display=False) as counter:
            run(model)
        found = counter.get_flop_counts()["Global"]
        products = sum(count for op, count in found.items() if "attention" not in str(op) and "bmm" not in str(op))
        assert products == pytest.approx(expected, rel=0.03)
    assert cost.training_flops(10, 0, 0, frozen=True) == 40 * cost.text


def test_the_estimate_of_activations_is_what_autograd_keeps(model: VLModel) -> None:
    """Norms that are not fused, as on this machine's CPU, keep one copy more of what they norm."""
    cost, text = ModelCost.of(model.config), model.config.text
    expected = cost.activation_bytes(TOKENS, 4, recompute=False)
    heads = text.q_size + text.kv_size if model.head_norms else 0
    unfused = 4 * TOKENS * text.num_layers * (2 * text.hidden_size + heads)
    last_norm_and_tables = 4 * TOKENS * (2 * text.hidden_size + 2 * text.head_dim)
    assert kept_bytes(model, decode) == pytest.approx(expected + unfused + last_norm_and_tables, rel=0.02)
    tower = model.config.vision
    rms = 2 * tower.depth + 1 if model.config.model_type == "qwen2_5_vl" else 0
    unfused = 4 * SIDE * SIDE * rms * tower.hidden_size
    expected = cost.tower_bytes(SIDE * SIDE, 4, recompute=False)
    assert kept_bytes(model, encode) == pytest.approx(expected + unfused, rel=0.05)


def test_recomputed_layers_keep_their_inputs_and_one_whole(model: VLModel) -> None:
    deeper = replace(model.config, text=replace(model.config.text, num_layers=9))
    once = [ModelCost.of(config).activation_bytes(TOKENS, 4, recompute=True) for config in (model.config, deeper)]
    assert once[1] - once[0] == 4 * TOKENS * model.config.text.hidden_size * (9 - model.config.text.num_layers)
    tower = replace(model.config.vision, depth=9)
    deeper = replace(model.config, vision=tower)
    once = [ModelCost.of(config).tower_bytes(TOKENS, 4, recompute=True) for config in (model.config, deeper)]
    assert once[1] - once[0] == 4 * TOKENS * tower.hidden_size * (9 - model.config.vision.depth)
