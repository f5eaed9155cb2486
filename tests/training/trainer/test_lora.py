"""GRPO with adapters: they learn and nothing else does, the engine reads them, the reference is the model without."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vtengine_training.cli import main
from vtengine_training.trainer.batch import build_batch
from vtengine_training.trainer.checkpoint import CheckpointError, find_latest
from vtengine_training.trainer.command import train
from vtengine_training.trainer.loop import Run

from tests.engine.sglang.fake_server import FakeSglang
from tests.training.trainer.probe import collect, gradients, same
from tests.training.trainer.toy import rewarder
from vtengine.config import to_toml
from vtengine.model import ModelConfig, Qwen2_5_VL, hf_tensors, load_model, save_model

pytest.importorskip("peft")

LORA = {"rank": 4, "alpha": 16}


@pytest.fixture
def run(run):
    return partial(run, lora=LORA)


@pytest.fixture(scope="session")
def untied_folder(tiny_folder, tmp_path_factory) -> Path:
    """The tiny model with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    config = replace(ModelConfig.from_json(tiny_folder / "config.json"), tie_word_embeddings=False)
    save_model(Qwen2_5_VL.build(config, 5), folder)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (folder / name).write_bytes((tiny_folder / name).read_bytes())
    return folder


def stir(one) -> None:
    """Gives the adapters an effect."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in one.parts.learner.optimizer.live.values():
            parameter.add_(0.05 * torch.randn_like(parameter))


def test_a_run_trains_the_adapters_and_nothing_else(make_config, untied_folder) -> None:
    rows: list[dict] = []
    config = make_config(
        model=str(untied_folder),
        lora={"rank": 8, "targets": ["lm_head", "q_proj", "v_proj", "up_proj", "down_proj"]},
        steps=8,
        rollout={"prompts": 4, "n": 8},
        update={"learning_rate": 5e-2},
        loss={"kl_coef": 0.001},
        checkpoint={"every": 99},
    )
    one = Run(config, rewarder())
    asyncio.run(train(one, rows.append))
    base, now = hf_tensors(load_model(untied_folder)), hf_tensors(one.parts.model)
    assert base.keys() == now.keys()
    assert all(torch.equal(tensor, now[name]) for name, tensor in base.items())
    assert {name.split(".")[-3] for name in one.parts.learner.optimizer.live} == {"lora_A", "lora_B"}
    assert all(tensor.any() for tensor in one.parts.adapters.tensors().values())
    mismatches = [row["mismatch/max"] for row in rows if "mismatch/max" in row]
    assert len(mismatches) > 4 and max(mismatches) < 1e-4, "the engine does not read the adapters"
    assert rows[0]["kl"] < 1e-6 < max(row.get("kl", 0) for row in rows)
    rewards = [row["reward/mean"] for row in rows]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3, rewards


def test_the_reference_is_the_model_without_adapters(run) -> None:
    one, plain = run(loss={"kl_coef": 0.1}), run(lora={}, loss={"kl_coef": 0.1})
    groups = collect(one)
    stir(one)
    batch = build_batch(groups[0].trajectories, [1.0] * 4, torch.device("cpu"))
    learner = one.parts.learner
    assert learner.reference.model is learner.policy.model
    with torch.no_grad():
        without, expected = (r.logprobs(batch)[0] for r in (learner.reference, plain.parts.learner.reference))
        assert torch.equal(without, expected)
        assert (learner.policy.logprobs(batch)[0] - without).abs().max() > 1e-2


def test_an_adapter_on_the_head_goes_through_the_fused_loss(run, untied_folder) -> None:
    targets = ["lm_head", "o_proj"]
    one = run(model=str(untied_folder), lora={**LORA, "targets": targets}, loss={"kl_coef": 0.1, "entropy_coef": 0.01})
    groups = collect(one)
    stir(one)
    for chunk in (3, 10**6):
        fused, plain = (gradients(one, groups, logits=way, logits_chunk=chunk) for way in ("fused", "plain"))
        same(fused, plain)
        assert plain[1].keys() == set(one.parts.learner.optimizer.live)
        assert all(gradient.any() for gradient in plain[1].values())


def test_recomputed_layers_drop_the_same_inputs(run) -> None:
    lora = {**LORA, "dropout": 0.3, "vision": True}
    one, again = run(lora=lora), run(lora=lora, update={"recompute": True})
    groups = collect(one)
    found = []
    for each in (one, again):
        stir(each)
        torch.manual_seed(7)
        found.append(gradients(each, groups, max_tokens=10**6))
    same(*found)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)


def test_checkpoints_hold_adapters_and_refuse_others(make_config) -> None:
    config = make_config(lora=LORA, steps=1)
    asyncio.run(train(Run(config, rewarder()), lambda row: None))
    folder = find_latest(Path(config.output) / "checkpoints")
    assert folder is not None and not (folder / "model").exists()
    saved = load_file(next((folder / "optimizer").iterdir()))
    assert saved and all(".lora_A." in name or ".lora_B." in name for name in saved)
    for lora, words in (
        ({**LORA, "alpha": 8}, "made with lora.alpha = 16, not 8"),
        ({**LORA, "rank": 2}, "lora.rank = 4, not 2"),
        ({}, "lora.rank = 4, not 0"),
    ):
        other = Run(make_config(lora=lora), rewarder())
        try:
            with pytest.raises(CheckpointError, match=words):
                other.resume()
        finally:
            asyncio.run(other.close())


def test_a_server_gets_merged_weights_of_what_is_adapted(make_config, tiny_folder, monkeypatch) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    fake = FakeSglang(internal_states=[{"vtengine_hooks": ["flush"]}])
    fake.vocab, fake.image_token = config["vocab_size"], config["image_token_id"]
    sent: list[dict[str, torch.Tensor]] = []
    try:
        one = Run(make_config(lora=LORA, rollout={"backend": fake.url}), rewarder())
        publisher = one.parts.publisher
        weights = publisher.weights
        monkeypatch.setattr(publisher, "weights", lambda: iter(sent.append(dict(weights())) or sent[-1].items()))

        async def publish_twice() -> None:
            await publisher.publish(0)
            stir(one)
            await publisher.publish(1)
            await one.close()

        asyncio.run(publish_twice())
        assert [name for name, _ in fake.calls].count("update_weights_from_disk") == 2
    finally:
        fake.close()
    base, merged = hf_tensors(load_model(tiny_folder)), hf_tensors(one.parts.adapters.merged_model())
    assert sent[0].keys() == sent[1].keys() == {f"{target.name}.weight" for target in one.parts.adapters.targets}
    for name, tensor in sent[1].items():
        assert torch.equal(sent[0][name], base[name])
        assert torch.equal(tensor, merged[name]) and not torch.equal(tensor, base[name])


@pytest.fixture
def command(make_config, tmp_path, monkeypatch):
    """command(*overrides): the arguments of a run with adapters, whose reward is a function of the tests."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    reward = {"penalty": {"form": "off"}, "accuracy": "function", "function": "toy_reward:low_bytes"}
    path = tmp_path / "run.toml"
    path.write_text(to_toml(make_config(lora=LORA, steps=2, reward=reward, update={"learning_rate": 1e-2})))
    return lambda *overrides: ["grpo", str(path), *(word for one in overrides for word in ("--set", one))]


def test_the_command_ends_with_a_merged_model_and_its_adapter(command, make_config, tiny_folder) -> None:
    assert main(command()) == 0
    output = Path(make_config().output)
    merged, base = (hf_tensors(load_model(folder)) for folder in (output / "model", tiny_folder))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len(changed) == 14 and all("proj.weight" in name and "visual" not in name for name in changed)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        assert (output / "model" / name).is_file()
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    latest = find_latest(output / "checkpoints")
    assert latest is not None
    saved = load_file(latest / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == saved.keys() and all(torch.equal(adapter[name], saved[name]) for name in adapter)
    down, up = (
        adapter[f"base_model.model.model.language_model.layers.0.mlp.down_proj.{kind}.weight"]
        for kind in ("lora_A", "lora_B")
    )
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(merged[name], base[name] + 4 * up @ down)


def test_the_plan_counts_adapters(command, capsys) -> None:
    assert main([*command(), "--dry-run"]) == 0
    with_adapters = capsys.readouterr().out
    assert "3,712 in adapters learn in their place" in with_adapters and "rank = 4" in with_adapters
    assert main([*command("lora.targets=['q_porj']"), "--dry-run"]) == 2
    assert "did you mean q_proj" in capsys.readouterr().err
