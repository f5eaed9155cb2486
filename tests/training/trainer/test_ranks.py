"""Two ranks against one: same loss, same gradients, same run; nobody waits for ever; any number of ranks goes on."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from vtengine_training.trainer import models
from vtengine_training.trainer import ranks as ranks_module
from vtengine_training.trainer.checkpoint import check, files_below, find_latest
from vtengine_training.trainer.figures import StepFigures
from vtengine_training.trainer.loop import Run
from vtengine_training.trainer.models import build_models
from vtengine_training.trainer.ranks import Ranks

from tests.training.trainer import ranks_worker
from tests.training.trainer.probe import collect
from tests.training.trainer.toy import rewarder
from vtengine.config import to_toml
from vtengine.model import load_model, save_model

REPO = Path(__file__).resolve().parents[3]
ALONE = {"concurrency": 1}
TIMED = ("time/", "samples/", "mismatch/", "memory/", "patches/", "tokens/packed")
"""Not the same for every number of ranks: two of them may each have an image, or a prompt, that one has once."""


def timeless(rows):
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


def close_rows(found, expected, tolerance=1e-5):
    for row, wanted in zip(timeless(found), timeless(expected), strict=True):
        assert row.keys() == wanted.keys()
        assert row == pytest.approx(wanted, rel=tolerance, abs=1e-6)


@pytest.mark.parametrize(
    ("prompts", "changes"),
    [
        (3, {"loss": {"aggregation": "prompt-mean"}}),
        (1, {"loss": {"kl_coef": 0.1, "entropy_coef": 0.01}}),
        (2, {"loss": {"kl_coef": 0.1}, "lora": {"rank": 3, "vision": True}}),
    ],
)
def test_same_loss_and_gradients(make_config, ranks, prompts, changes) -> None:
    """Ranks with unequal shares, and, for one prompt, a rank without any; 1, some and many micro-batches."""
    config = make_config(rollout={"prompts": prompts, **ALONE}, **changes)
    expected = ranks_worker.gradients(Run(config, rewarder()), (1, 200, 10**6))
    found = ranks(config, "gradients")
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] - wanted).abs().max() <= 1e-6, name


def test_a_rank_whose_batch_shows_no_image_keeps_nobody_waiting(make_config, ranks) -> None:
    config = make_config(rollout={"prompts": 4, "max_refill": 6.0, **ALONE})
    expected = ranks_worker.gradients(Run(config, rewarder()), (1, 200, 10**6), "blind")
    found = ranks(config, "gradients-blind")
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] - wanted).abs().max() <= 1e-6, name
    assert any(wanted.abs().max() > 1e-4 for name, wanted in expected.items() if ".visual." in name)


def test_groups_move_to_ranks_that_have_less(make_config, ranks) -> None:
    """All that teach something were sampled by one rank: the other one gets its share, images and all."""
    config = make_config(rollout={"prompts": 8, "max_refill": 6.0, **ALONE})
    expected = ranks_worker.gradients(Run(config, rewarder()), (1, 200, 10**6), "uneven")
    found = ranks(config, "gradients-uneven")
    for bound in ("1", "200", "1000000"):
        one, shares = expected.pop(f"tokens.{bound}"), found.pop(f"tokens.{bound}")
        assert shares.max() < 0.7 * one.sum()
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] - wanted).abs().max() <= 1e-6, name


BF16_TOLERANCE = 0.02
"""Of the gradient's norm, against float32 on the same samples and weights: bfloat16 has 8 significant bits (0.4 %)."""


def test_sixteen_bits_in_pieces_stay_near_float32(make_config, ranks, tiny_folder, tmp_path) -> None:
    """FSDP2 computes in bfloat16 on float32 masters; gradients are summed in float32, whatever the cut."""
    folder = tmp_path / "sixteen"
    shutil.copytree(tiny_folder, folder)
    save_model(load_model(tiny_folder, dtype=torch.bfloat16), folder)
    settings = {"model": str(folder), "rollout": {"prompts": 3, **ALONE}}
    config = make_config(**settings, dtype="bfloat16", steps=2)
    found = ranks(config, "gradients")
    half, exact = (Run(make_config(**settings, dtype=dtype), rewarder()) for dtype in ("bfloat16", "float32"))
    groups = collect(half)
    learner = exact.parts.learner
    loss = learner.backward(learner.cutter.whole(groups), StepFigures())
    wanted = {name: p.grad for name, p in exact.parts.model.named_parameters()}
    for one in (half, exact):
        asyncio.run(one.close())
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for bound in ("1", "200", "1000000"):
        errors = [(found[f"{bound}.{name}"] - gradient).norm() for name, gradient in wanted.items()]
        assert 0 < torch.stack(errors).norm() <= BF16_TOLERANCE * whole
        assert float(found[f"loss.{bound}"]) == pytest.approx(loss, abs=BF16_TOLERANCE)
    rows = ranks(config, "curve-9")
    assert [row["updates/skipped"] for row in rows] == [0, 0] and all(row["mismatch/abs_diff"] < 0.05 for row in rows)


def test_sixteen_bits_with_adapters_in_float32(make_config, ranks) -> None:
    """Frozen weights in bfloat16 and adapters in float32 lie in the same pieces; the engines read them merged."""
    config = make_config(dtype="bfloat16", steps=2, lora={"rank": 3}, update={"learning_rate": 1e-2}, rollout=ALONE)
    rows = ranks(config, "curve-9")
    assert [row["updates/skipped"] for row in rows] == [0, 0] and all(row["grad_norm"] > 0 for row in rows)
    assert all(row["mismatch/abs_diff"] < 0.05 for row in rows)
    folder = find_latest(Path(config.output) / "checkpoints")
    assert folder is not None
    assert {x.dtype for x in load_file(folder / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("lora", [{}, {"rank": 3, "vision": True}], ids=["whole", "adapters"])
def test_two_copies_in_two_pieces_each(make_config, four_ranks, tmp_path, lora) -> None:
    """Four ranks as two nodes of two: the same loss and gradients, and a run that one process or four go on with."""
    update = {"learning_rate": 1e-3, "max_tokens": 200}
    settings = {"lora": lora, "loss": {"kl_coef": 0.1}, "rollout": {"prompts": 3, **ALONE}, "update": update}
    several = {**settings, "update": {**update, "shard_ranks": 2}, "output": str(tmp_path / "several")}
    alone = make_config(**settings, output=str(tmp_path / "one"))
    expected = ranks_worker.gradients(Run(alone, rewarder()), (1, 200, 10**6))
    found = four_ranks(make_config(**several), "gradients")
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] - wanted).abs().max() <= 1e-6, name
    rows = ranks_worker.curve(Run(alone, rewarder()), 99)
    close_rows(four_ranks(make_config(**several), "curve-1"), rows[:1], 1e-3)
    one_goes_on = make_config(**settings, output=several["output"])
    close_rows(ranks_worker.curve(Run(one_goes_on, rewarder()), 2), rows[1:2], 1e-3)
    close_rows(four_ranks(make_config(**several), "curve-99"), rows[2:], 1e-3)


def test_copies_are_summed_once_for_each_update(make_config, four_ranks) -> None:
    """Each FSDP group's gradients go between nodes with the last micro-batch, however many there are."""
    found = four_ranks(make_config(update={"shard_ranks": 2}, rollout={"prompts": 3, **ALONE}), "sums-over-copies")
    (many, sums), (one, expected) = found
    assert many > one and sums == expected > 0


def test_copies_must_come_out_even() -> None:
    with pytest.raises(ValueError, match=r"shard_ranks = 2: must divide the number of ranks \(3\)"):
        Ranks(0, 3).mesh(torch.device("cpu"), 2)
    with pytest.raises(ValueError, match=r"shard_ranks = 4: must divide the number of ranks \(2\)"):
        Ranks(0, 2).mesh(torch.device("cpu"), 4)


@pytest.mark.parametrize("lora", [{}, {"rank": 3}], ids=["whole", "adapters"])
def test_same_run_and_goes_on_with_any_number_of_ranks(make_config, ranks, tmp_path, lora) -> None:
    settings = {
        "lora": lora,
        "rollout": {"prompts": 3, "oversample": 1.5, "max_refill": 4.0, "dump_every": 2, **ALONE},
        "update": {"minibatch_prompts": 2, "learning_rate": 1e-3, "max_tokens": 200},
        "validation": {"every": 2, "files": make_config().data.files},
        "steps": 5,
    }
    config = make_config(**settings, output=str(tmp_path / "one"))
    expected = ranks_worker.curve(Run(config, rewarder()), 99)
    several = make_config(**settings, output=str(tmp_path / "several"))
    found = ranks(several, "curve-2")
    files = list((tmp_path / "several" / "checkpoints").glob("step-*2/optimizer/*.safetensors"))
    assert len(files) > 2 or lora  # adapters are small
    found += ranks_worker.curve(Run(several, rewarder()), 3)
    found += ranks(several, "curve-99")
    close_rows(found, expected, 1e-3)
    ends = [find_latest(tmp_path / name / "checkpoints") for name in ("one", "several")]
    file = "adapter/adapter_model.safetensors" if lora else "model/model.safetensors"
    first, second = (load_file(folder / file) for folder in ends if folder is not None)
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() < 1e-4, name
    dumps = [
        (tmp_path / name / "rollouts" / "step-000002.jsonl").read_text().splitlines() for name in ("one", "several")
    ]
    assert [json.loads(row)["answer"] for row in dumps[0]] == [json.loads(row)["answer"] for row in dumps[1]]


def test_older_weights_count_alike_for_any_number_of_ranks(make_config, ranks, tmp_path) -> None:
    """A rank without groups of older weights takes part in the pass that those of others need."""
    settings = {
        "loss": {"old_logprobs": "recompute"},
        "rollout": {"prompts": 3, "oversample": 1.5, "max_refill": 4.0, **ALONE},
        "update": {"learning_rate": 1e-3, "max_tokens": 200},
    }
    expected = ranks_worker.curve(Run(make_config(**settings, output=str(tmp_path / "one")), rewarder()), 3)
    assert any(row["groups/reused"] % 2 and row["staleness/mean"] and abs(row["approx_kl"]) > 1e-6 for row in expected)
    close_rows(ranks(make_config(**settings, output=str(tmp_path / "several")), "curve-3"), expected, 1e-3)


def test_a_broken_reward_on_one_rank_skips_the_update_on_all(make_config, ranks) -> None:
    found = ranks(make_config(rollout={"prompts": 4, **ALONE}), "skipped")
    assert found == [[1.0, 0.0], [1.0, 0.0]]


def test_each_rank_seals_what_it_wrote_and_its_counts_go_on_once(make_config, ranks, tmp_path, monkeypatch) -> None:
    config = make_config()
    first, second = ranks(config, "sealed")
    folder = find_latest(tmp_path / "run" / "checkpoints")
    assert folder is not None and check(folder) is None
    assert sorted([*first, *second, "manifest.json"]) == files_below(folder)
    own = [name for name in second if not name.startswith("optimizer/shard-00002-")]
    assert own == ["ranks/1/rollouts.safetensors", "ranks/1/state.json"] and len(own) < len(second)
    for rank, size, wanted in ((0, 1, [True, True]), (0, 4, [True, False]), (3, 4, [False, False])):
        one, counted = Run(config, rewarder()), []
        one.parts.rewarder.restore = lambda state, counts, counted=counted: counted.append(counts)
        monkeypatch.setattr(Ranks, "owns", Ranks(rank, size).owns)
        assert one.resume() and counted == wanted
        asyncio.run(one.close())
        monkeypatch.undo()


def test_torchrun_writes_once_what_exists_once(make_config, tmp_path) -> None:
    config = make_config(
        steps=2, reward={"penalty": {"form": "off"}, "accuracy": "function", "function": "toy_reward:low_bytes"}
    )
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config))
    paths = (REPO, REPO / "kernels", REPO / "training", Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vtengine_training.cli", "grpo", str(path)]
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    output = Path(config.output)
    assert done.stderr.count("step 2/2") == 1
    assert [json.loads(row)["step"] for row in (output / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert (output / "model" / "model.safetensors").is_file()
    folder = find_latest(output / "checkpoints")
    assert folder is not None
    assert sorted(p.name for p in (folder / "ranks").iterdir()) == ["0", "1"]
    assert len(list((folder / "optimizer").glob("*.safetensors"))) == 2


GRPO = ("-m", "vtengine_training.cli", "grpo")


def rows_in(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def steps_of(folder: Path) -> list[dict]:
    return timeless([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])


ABORTING = "import atexit, os, runpy; atexit.register(os.abort); runpy.run_module('{}', run_name='__main__')"


def test_failing_ranks_end_with_their_status_and_words(make_config, tmp_path, start_ranks) -> None:
    """Though the interpreter's own end would abort them, as threads of a process group do now and then."""
    config = make_config(data={"files": [str(tmp_path / "absent.jsonl")]})
    (tmp_path / "run.toml").write_text(to_toml(config))
    pair = start_ranks("-c", ABORTING.format(GRPO[1]), GRPO[2], str(tmp_path / "run.toml"))
    assert [process.wait(timeout=120) for process in pair] == [1, 2]  # its own OSError, another's words
    for rank in range(2):
        assert "absent.jsonl" in (tmp_path / f"rank-{rank}.err").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_killed_pairs_end_as_an_uninterrupted_one(make_config, tmp_path, start_ranks, ahead) -> None:
    """kill -9 of one rank, at random moments of a step and of its save: `latest` can be loaded, the other rank ends."""
    reward = {"penalty": {"form": "off"}, "accuracy": "function", "function": "toy_reward:low_bytes"}
    configs = {
        name: make_config(steps=6, rollout={**ALONE, "ahead": ahead}, reward=reward, output=str(tmp_path / name))
        for name in ("whole", "parts")
    }
    for name, config in configs.items():
        (tmp_path / f"{name}.toml").write_text(to_toml(config))
    assert [process.wait(timeout=240) for process in start_ranks(*GRPO, str(tmp_path / "whole.toml"))] == [0, 0]
    rng, output = random.Random(3), tmp_path / "parts"
    for victim, step in enumerate((1, 3, 5)):  # the row of a step is written before its checkpoint
        pair = start_ranks(*GRPO, str(tmp_path / "parts.toml"))
        try:
            deadline = time.monotonic() + 120
            while rows_in(output) < step and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.15))
            pair[victim % 2].send_signal(signal.SIGKILL)
            assert pair[1 - victim % 2].wait(timeout=120) != 0
        finally:
            for process in pair:
                process.kill()
                process.wait()
        folder = find_latest(output / "checkpoints")
        assert folder is None or check(folder) is None
        assert (0 if folder is None else int(folder.name[5:])) >= step - 1
    assert [process.wait(timeout=240) for process in start_ranks(*GRPO, str(tmp_path / "parts.toml"))] == [0, 0]
    assert steps_of(output) == steps_of(tmp_path / "whole")
    ends = [find_latest(tmp_path / name / "checkpoints") for name in ("whole", "parts")]
    first, second = (
        {path.name: load_file(path) for part in ("optimizer", "model") for path in folder.glob(f"{part}/*.safetensors")}
        for folder in ends
        if folder is not None
    )
    assert len(first) == 3 and first.keys() == second.keys()
    for file, tensors in first.items():
        assert tensors.keys() == second[file].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second[file][name]), (file, name)


def test_several_ranks_refuse_an_engine_in_each(make_config, tiny_folder) -> None:
    config = make_config(rollout={"backend": "sglang"})
    with pytest.raises(ValueError, match=r'rollout.backend = "sglang".*start servers.*addresses'):
        build_models(config, tiny_folder, torch.device("cpu"), (), Ranks(0, 2))


def test_learner_and_reference_lie_on_one_mesh(make_config, tiny_folder, monkeypatch) -> None:
    """NCCL's buffers are per group."""
    meshes, model = [], load_model(tiny_folder)

    def shard(*_, mesh, **__):
        meshes.append(mesh)
        return SimpleNamespace(model=model, adapters=None)

    monkeypatch.setattr(models, "shard", shard)
    several = SimpleNamespace(is_alone=False, size=2, together=lambda make: make(), mesh=lambda *_: object())
    config = make_config(loss={"kl_coef": 0.1}, rollout={"backend": "http://a:1", "sync": "disk"})
    build_models(config, tiny_folder, torch.device("cpu"), (), several)
    learner, reference = meshes
    assert learner is reference


def test_processes_that_do_not_meet_say_what_to_set(start_ranks, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    pair = start_ranks(str(Path(__file__).with_name("watch_worker.py")), "leaves", "leaves")
    assert [process.wait(timeout=60) for process in pair] == [1, 1]
    words = (tmp_path / "rank-1.err").read_text()
    assert "ValueError: the 2 processes did not meet at MASTER_ADDR = 127.0.0.1" in words
    assert "nowhere0" in words and "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in words


@pytest.mark.parametrize(("local", "count", "taken"), [("3", 8, 3), ("3", 1, 0)], ids=["node", "one is shown"])
def test_each_process_takes_a_gpu(monkeypatch, local, count, taken) -> None:
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert ranks_module._own_gpu() == taken
    ranks_module._check_gpus(["GPU-a", "GPU-b"])


def test_too_few_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="local rank 4: there are 4 GPUs; use a smaller --nproc-per-node"):
        ranks_module._own_gpu()
    with pytest.raises(ValueError, match="ranks 0 and 2 have the same GPU, GPU-a; use a smaller"):
        ranks_module._check_gpus(["GPU-a", "GPU-b", "GPU-a"])


def test_one_process_needs_no_group() -> None:
    alone = Ranks()
    assert alone.gather({"a": 1}) == [{"a": 1}] and alone.first(2) == 2 and alone.sum(0.1) == 0.1
    assert alone.is_first and alone.owns(7) and not alone.any(False)
    assert alone.one_before_others(lambda: 3) == 3
