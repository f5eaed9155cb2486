"""The plan's memory: its rows, their sum, and whether the GPU that is here has as much."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vtengine_training.trainer.cost import ModelCost
from vtengine_training.trainer.memory_plan import GIB, GPU_BYTES, MemoryPlan

from tests.tiny_model import byte_encoder
from tests.training.trainer.toy_model import tiny_config


@pytest.fixture
def plan(make_config, monkeypatch):
    """plan(ranks, **changes): (the config, its plan)."""

    def make(ranks: int, **changes):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        config = make_config(**changes)
        return config, MemoryPlan.of(config, ModelCost.of(tiny_config(byte_encoder())))

    return make


def test_what_is_there_at_the_same_time_is_added_up(plan) -> None:
    _, one = plan(1)
    assert one.gathered == one.ends == 0 and one.keys == 16 << 20
    assert one.most == one.states + one.keys + one.logits + one.head + one.activations + one.tower
    _, eight = plan(8, update={"max_tokens": 1, "logits_chunk": 1}, rollout={"backend": "http://a:1", "sync": "disk"})
    assert eight.keys == 0 and eight.ends > eight.logits + eight.head + eight.activations
    assert eight.most == eight.states + eight.gathered + eight.ends


def test_adapters_alone_get_gradients(plan) -> None:
    config, adapted = plan(8, lora={"rank": 2})
    assert adapted.head == adapted.ends == adapted.tower == 0 < adapted.gathered
    assert "gradient" not in adapted.lines(config)[0].partition("moments")[2]


@pytest.mark.parametrize(("spare_bytes", "words"), [(0, "GiB: enough"), (-1, "TOO LITTLE: this GPU has")])
def test_it_is_compared_with_the_gpu(plan, monkeypatch, spare_bytes, words) -> None:
    config, tiny = plan(1, device="auto")
    assert "together" in tiny.lines(config)[-1] and f"{tiny.most / GIB:.1f} GiB" in tiny.lines(config)[-1]
    there = SimpleNamespace(total_memory=tiny.most + GPU_BYTES + spare_bytes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: there)
    assert words in tiny.lines(config)[-1]
    assert "together" in tiny.lines(plan(1, device="cpu")[0])[-1]
