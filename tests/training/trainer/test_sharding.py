"""A checkpoint read in pieces by three ranks: the same weights to the bit, in a third of the memory, faults for all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vtengine_training.lora.adapters import Adapters
from vtengine_training.trainer.ranks import Ranks

from tests.tiny_model import byte_encoder
from tests.training.trainer.shard_worker import CASES, LORA, SEED
from tests.training.trainer.toy_model import tiny_config
from vtengine.model import Qwen2_5_VL, load_model, save_model

SIZE = 3
WORKER = str(Path(__file__).with_name("shard_worker.py"))
SLACK_BYTES = 12 << 20
"""What torch itself allocates on the way."""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, int, int]:
    """(a checkpoint of twelve layers, its bytes, those of its largest tensor)"""
    folder = tmp_path_factory.mktemp("large")
    config = tiny_config(byte_encoder())
    text = replace(config.text, num_layers=12, hidden_size=256, intermediate_size=2048, mrope_section=(8, 12, 12))
    vision = replace(config.vision, out_hidden_size=256)
    model = Qwen2_5_VL.build(replace(config, text=text, vision=vision), 0)
    save_model(model, folder)
    sizes = [parameter.numel() * 4 for parameter in model.parameters()]
    return folder, sum(sizes), max(sizes)


@pytest.fixture(scope="module")
def broken(tmp_path_factory, tiny_folder) -> Path:
    """NaN in the last row of a matrix: only the last rank reads it."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_ranks_read_their_own_rows(start_ranks, tiny_folder, large, broken, tmp_path) -> None:
    folder, all_bytes, largest = large
    out = tmp_path / "found.safetensors"
    processes = start_ranks(WORKER, str(tiny_folder), str(folder), str(broken), str(out), size=SIZE)
    statuses = [process.wait(timeout=240) for process in processes]
    assert statuses == [0] * SIZE, [(tmp_path / f"rank-{rank}.err").read_text() for rank in range(SIZE)]
    found = load_file(out)
    for name, (dtype, _) in CASES.items():
        model = load_model(tiny_folder, dtype=dtype)
        if name == "adapters":
            Adapters.put_into(model, LORA).begin(SEED)
        wanted = {f"{name}.{parameter}": value.float() for parameter, value in model.named_parameters()}
        assert {key for key in found if key.startswith(f"{name}.")} == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
    most, words = zip(*json.loads(out.with_suffix(".json").read_text()), strict=True)
    assert all(one < all_bytes / SIZE + largest / SIZE + SLACK_BYTES < 0.7 * all_bytes for one in most), most
    assert all("up_proj.weight has 1 of" in one and "NaN" in one for one in words)
    assert words[0].startswith("rank 2: ") and not words[2].startswith("rank")


def test_a_fault_of_one_is_raised_by_all(monkeypatch) -> None:
    ranks = Ranks(0, 2)
    said = []
    monkeypatch.setattr(Ranks, "gather", lambda self, value: said.append(value) or [value, "disk is gone"])
    with pytest.raises(ValueError, match="rank 1: disk is gone"):
        ranks.together(lambda: 3)

    def fail() -> None:
        raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        ranks.together(fail)
    assert said == [None, "mine"]
    assert Ranks().together(lambda: 3) == 3
