"""GRPO on Qwen3-VL: savings change nothing, the engine agrees with the trainer, transformers reads the result."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from vtengine_training.lora.config import LoraConfig
from vtengine_training.lora.targets import find_targets
from vtengine_training.trainer.batch import build_batch
from vtengine_training.trainer.command import train
from vtengine_training.trainer.export import export_whole
from vtengine_training.trainer.loop import Run

from tests.tiny_model import QWEN3_VISION, byte_encoder, config_of, qwen3_text
from tests.training.trainer.probe import collect, gradients, nearly_equal, plain, same
from tests.training.trainer.toy import rewarder
from vtengine.model import Qwen3_VL, hf_tensors, load_model, save_model

CONFIG = config_of(qwen3_text(272), QWEN3_VISION, byte_encoder())
LIMITS = {"min_pixels": 4096, "max_pixels": 16384}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("qwen3")
    byte_encoder().save(str(made / "tokenizer.json"))
    model = Qwen3_VL.build(CONFIG, 3)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(0.5)
    save_model(model, made)
    (made / "preprocessor_config.json").write_text(json.dumps(LIMITS | HALF | {"patch_size": 16}))
    return made


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("share_images", [True, False])
def test_savings_change_nothing(run, folder, share_images, share_prefix) -> None:
    one = run(model=str(folder), loss={"entropy_coef": 0.01}, rollout={"prompts": 3, "n": 4})
    groups = collect(one)
    saved = gradients(one, groups, share_images=share_images, share_prefix=share_prefix, max_tokens=10**6)
    nearly_equal(saved, plain(one, groups))
    deepest = saved[1]["visual.deepstack.1.fc2.weight"]
    assert deepest.abs().max() > 0


def test_recomputed_layers_change_nothing(run, folder) -> None:
    one, again = run(model=str(folder)), run(model=str(folder), update={"recompute": True})
    groups = collect(one)
    same(gradients(again, groups), gradients(one, groups))


def test_trainer_and_engine_agree_on_log_probabilities(run, folder) -> None:
    one = run(model=str(folder))
    batch = build_batch(collect(one)[0].trajectories, [1.0] * 4)
    logprobs, _ = one.parts.learner.policy.logprobs(batch)
    torch.testing.assert_close(logprobs.detach(), batch.rollout, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [{}, {"rank": 2, "vision": True, "merger": True}])
def test_a_run_ends_with_a_checkpoint_that_transformers_loads(make_config, folder, tmp_path, lora) -> None:
    transformers = pytest.importorskip("transformers")
    one = Run(make_config(model=str(folder), steps=2, lora=lora), rewarder(None))
    asyncio.run(train(one, lambda figures: None))
    export_whole(one.parts, tmp_path / "run", one.ranks)
    written = tmp_path / "run" / "model"
    before, after = hf_tensors(load_model(folder)), hf_tensors(load_model(written))
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("visual.deepstack_merger_list") for name in moved)
    assert any(name.startswith("model.layers.0.self_attn.q_proj") for name in moved)
    theirs, report = transformers.Qwen3VLForConditionalGeneration.from_pretrained(written, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(theirs.model.visual.pos_embed.weight, after["visual.pos_embed.weight"])


def test_adapters_leave_the_mergers_of_all_depths_alone() -> None:
    names = [target.name for target in find_targets(CONFIG, LoraConfig(rank=2, vision=True))]
    assert "visual.blocks.0.mlp.linear_fc1" in names
    assert not any("merger" in name for name in names)
    names = [target.name for target in find_targets(CONFIG, LoraConfig(rank=2, merger=True))]
    assert {"visual.merger.linear_fc2", "visual.deepstack_merger_list.1.linear_fc1"} <= set(names)
