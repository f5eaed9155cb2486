"""Masters and moments in files of a bounded size, which come back equal."""

from __future__ import annotations

import torch
from torch import nn
from vtengine_training.sft.config import OptimizerConfig
from vtengine_training.sft.optim import MasterAdamW
from vtengine_training.trainer import optimizer_state
from vtengine_training.trainer.optimizer_state import load_optimizer, save_optimizer
from vtengine_training.trainer.ranks import Ranks

from tests.training.trainer.shard_worker import most_memory

MIB = 1 << 20
LAYERS = 16


def optimizer(value: float, rows: int) -> MasterAdamW:
    """Of LAYERS parameters of `rows` KiB each, with moments."""
    named = [(f"layer.{k}", nn.Parameter(torch.full((rows, 256), value + k))) for k in range(LAYERS)]
    made = MasterAdamW(named, OptimizerConfig(), own_masters=False)
    for _, parameter in named:
        parameter.grad = torch.full_like(parameter, value)
    made.step(1e-3)
    return made


def test_files_come_back_equal(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(optimizer_state, "FILE_BYTES", 10_000)
    saved, other = optimizer(1.0, 4), optimizer(2.0, 4)
    save_optimizer(saved, tmp_path, Ranks())
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) > LAYERS and max(sizes) < 12_000
    load_optimizer(other, tmp_path, Ranks())
    wanted = saved.tensors()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in other.tensors().items())


def test_a_save_holds_one_file_in_memory(tmp_path, monkeypatch) -> None:
    large, most = optimizer(1.0, 4096), []  # 192 MiB
    for file_bytes in (8 * MIB, 2048 * MIB):
        monkeypatch.setattr(optimizer_state, "FILE_BYTES", file_bytes)
        most.append(most_memory(lambda folder=tmp_path / str(file_bytes): save_optimizer(large, folder, Ranks())))
    assert most[0] < 48 * MIB and most[1] > 150 * MIB, most
