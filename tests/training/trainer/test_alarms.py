"""Alarms ring when they should, once; costs are those of the model."""

from __future__ import annotations

import pytest
import torch
from vtengine_kernels.shared_prefix_attention import PrefixTree
from vtengine_training.trainer.alarms import WINDOW, Alarms
from vtengine_training.trainer.cost import ModelCost

from vtengine.model import ModelConfig, PackedTree, load_model


def ring(rows):
    alarms = Alarms()
    return [alarms.check(row) for row in rows]


@pytest.mark.parametrize(("ratio", "word"), [(0.0, "near 0"), (1.0, "near 1")])
def test_collapse_rings_once_after_a_whole_window(ratio, word) -> None:
    said = ring([{"upscale/ratio": ratio}] * (WINDOW + 5))
    assert [index for index, texts in enumerate(said) if texts] == [WINDOW - 1]
    assert word in said[WINDOW - 1][0]


def test_healthy_runs_are_silent() -> None:
    row = {"upscale/ratio": 0.4, "groups/zero_spread_ratio": 0.5, "groups/used": 8.0, "mismatch/abs_diff": 0.02}
    assert not any(ring([row] * 30))


def test_it_rings_again_after_it_was_quiet() -> None:
    said = ring(
        [{"updates/skipped": 1.0}, {"updates/skipped": 1.0}, {"updates/skipped": 0.0}, {"updates/skipped": 1.0}]
    )
    assert [bool(texts) for texts in said] == [True, False, False, True]


def test_drift_of_the_mismatch() -> None:
    assert any(
        "drift" in text for texts in ring([{"mismatch/abs_diff": 0.01 * k} for k in range(20)]) for text in texts
    )
    assert not any(ring([{"mismatch/abs_diff": 1e-7 * k} for k in range(20)]))


def test_costs(tiny_folder) -> None:
    config = ModelConfig.from_json(tiny_folder / "config.json")
    cost = ModelCost.of(config)
    model = load_model(tiny_folder)
    assert cost.total == sum(p.numel() for p in model.parameters())
    assert cost.text + cost.vision + cost.head + config.text.hidden_size == cost.total
    assert cost.training_flops(10, 0, 0) == 60 * cost.text
    assert cost.training_flops(0, 0, 10, train_vision=False) == 20 * cost.vision
    assert cost.training_bytes(4, False) == 16 * cost.total
    assert cost.training_bytes(4, True) == 20 * cost.total
    assert cost.training_bytes(2, True, ranks=4) == 2 * cost.total + -(-18 * cost.total // 4)
    layers = [p for part in (model.layers, model.visual.blocks) for p in part.parameters()]
    assert cost.ends + sum(p.numel() for p in layers) == cost.total
    layer = sum(p.numel() for p in model.layers[0].parameters())
    assert cost.gathered_bytes(2, learns=True) == 8 * cost.ends + 10 * layer
    assert cost.gathered_bytes(2, learns=False) == 2 * cost.ends + 4 * layer


def test_the_estimate_of_activations_is_near_what_autograd_keeps(tiny_folder) -> None:
    model = load_model(tiny_folder)
    cost, kept = ModelCost.of(model.config), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and len(tensor):
            kept[storage.data_ptr()] = storage  # held, so that no other one gets its address
        return tensor

    tokens = 512
    embeds = torch.randn(tokens, model.config.text.hidden_size, requires_grad=True)
    tree = PackedTree(PrefixTree((tokens,), (-1,)))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.decode(embeds, torch.arange(tokens).expand(3, -1), tree)
    found = sum(storage.nbytes() for storage in kept.values())
    expected = cost.activation_bytes(tokens, 4, recompute=False)
    assert found == pytest.approx(expected, rel=0.3)
    text = model.config.text
    inputs = 4 * tokens * text.hidden_size * text.num_layers
    assert cost.activation_bytes(tokens, 4, recompute=True) == inputs + expected // text.num_layers
