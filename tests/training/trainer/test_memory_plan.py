"""The plan's memory: its rows, their sum, what they leave for keys and values, and whether the GPU has it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vtengine_training.trainer import rollout_engine
from vtengine_training.trainer.cost import ModelCost
from vtengine_training.trainer.memory_plan import GIB, GPU_BYTES, LEAST_KV_BYTES, USABLE, MemoryPlan, too_few_keys
from vtengine_training.trainer.ranks import Ranks

from tests.tiny_model import byte_encoder
from tests.training.trainer.toy_model import tiny_config
from vtengine.engine.embedded.config import FREE_SHARE
from vtengine.model import load_model

COST = ModelCost.of(tiny_config(byte_encoder()))


@pytest.fixture
def plan(make_config, monkeypatch):
    """plan(ranks, gpu, kv_mib, **changes): (the config, its plan)."""

    def make(ranks: int, gpu: int | None = None, kv_mib: int | None = 16, **changes):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        config = make_config(**changes)
        config = replace(config, rollout=replace(config.rollout, kv_mib=kv_mib))
        return config, MemoryPlan.of(config, COST, gpu)

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
    assert "gradient" not in adapted.lines(config, COST)[0].partition("moments")[2]


@pytest.mark.parametrize(("spare_bytes", "words"), [(0, "GiB free: enough"), (-1, "TOO LITTLE: this GPU has")])
def test_it_is_compared_with_the_gpu(plan, spare_bytes, words) -> None:
    config, tiny = plan(1)
    last = tiny.lines(config, COST)[-1]
    assert "together" in last and f"{tiny.most / GIB:.1f} GiB" in last
    _, there = plan(1, tiny.most + GPU_BYTES + spare_bytes)
    assert words in there.lines(config, COST)[-1]


def test_keys_and_values_get_what_the_rest_leaves_of_a_gpu(plan) -> None:
    config, main_memory = plan(1, None, None)
    assert main_memory.keys == LEAST_KV_BYTES
    others = main_memory.most - main_memory.keys
    _, large = plan(1, 100 * GIB, None)
    assert large.keys == int(FREE_SHARE * 100 * GIB)
    _, small = plan(1, 8 * GIB, None)
    assert small.keys == int(USABLE * 8 * GIB) - GPU_BYTES - others > LEAST_KV_BYTES
    assert small.most + GPU_BYTES <= USABLE * 8 * GIB
    _, full = plan(1, GIB, None)
    assert full.keys == LEAST_KV_BYTES and "TOO LITTLE" in full.lines(config, COST)[-1]
    _, given = plan(1, 100 * GIB)
    assert given.keys == 16 << 20


def test_a_pool_that_holds_fewer_sequences_than_run_is_told_of(plan) -> None:
    """A token's keys and values: 2 of 2 layers, 2 heads of 8, float32."""
    config, _ = plan(1, rollout={"concurrency": 10, "max_new_tokens": 50, "max_turns": 2})
    text = COST.model.config.text
    token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4
    enough = token * 10 * 100
    assert too_few_keys(config, COST.model.config, enough) is None
    words = too_few_keys(config, COST.model.config, enough - 1)
    assert words is not None and "hold 9 sequences of 100 sampled tokens" in words and "rollout.kv_mib" in words
    for gpu, device, told in ((None, "auto", False), (None, "cpu", True), (8 * GIB, "auto", True)):
        long, told_of = plan(1, gpu, None, device=device, rollout={"max_new_tokens": 10**7})
        assert any(line.startswith("SLOW: ") for line in told_of.lines(long, COST)) == told
    for change, length in (({"max_context_tokens": 80}, 80), ({"resolution": "high"}, 50)):
        shorter, _ = plan(1, rollout={"concurrency": 10, "max_new_tokens": 50, **change})
        assert too_few_keys(shorter, COST.model.config, token * 10 * length) is None


def test_the_engine_gets_what_the_plan_says_and_warns(plan, tiny_folder, monkeypatch, caplog) -> None:
    made = []
    monkeypatch.setattr(rollout_engine, "EmbeddedEngine", lambda model, tokenizer, config: made.append(config))
    for length in (6, 10**6):
        config, wanted = plan(1, None, None, rollout={"max_new_tokens": length})
        rollout_engine.build_engine(config, tiny_folder, load_model(tiny_folder), None, Ranks())
        assert made[-1].kv_bytes == wanted.keys
    assert caplog.text.count("sequences of 2,000,000 sampled tokens") == caplog.text.count("keys and values") == 1
