"""The optimiser's state on disk: torch's distributed checkpoints in their safetensors form, each rank in its own files.

Each file says in its header (JSON) which part of which tensor it holds, so any number of ranks can read it back.
See docs/decisions/0004-checkpoints.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from vtengine_training.sft.optim import MasterAdamW
from vtengine_training.trainer.checkpoint import CheckpointError
from vtengine_training.trainer.ranks import Ranks

FILE_BYTES = 2 << 30
"""Of a file, about: while torch writes one, a rank holds its content twice in the CPU's memory."""


def save_optimizer(optimizer: MasterAdamW, folder: Path, ranks: Ranks) -> None:
    """Every rank writes its pieces. Raises OSError."""
    tensors = optimizer.tensors()
    files = _files(tensors, FILE_BYTES * ranks.size)
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    try:
        with _quiet():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=ranks.is_alone)
    except CheckpointException as error:  # not an Exception: it carries those of all ranks
        raise OSError(_reasons(error)) from error


def load_optimizer(optimizer: MasterAdamW, folder: Path, ranks: Ranks) -> None:
    """Restores what `save_optimizer` wrote, on any number of ranks. Raises CheckpointError where it does not fit."""
    try:
        saved: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        for name in optimizer.master:
            if f"exp_avg.{name}" in saved:
                optimizer.make_moments(name)
        tensors = optimizer.tensors()
        for name, tensor in tensors.items():
            found = None if name not in saved else tuple(saved[name].size)
            if found != tuple(tensor.shape):
                raise CheckpointError(
                    f"{folder}: {name} is {found and list(found)}, not {list(tensor.shape)}: what is trained has "
                    "changed; give the old configuration back, or use another output"
                )
        with _quiet():
            dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=ranks.is_alone)
    except (CheckpointException, OSError) as error:
        raise CheckpointError(f"{folder}: cannot be read: {_reasons(error)}") from error
    optimizer.write_back()


def _files(tensors: Mapping[str, Tensor], most: int) -> dict[str, int]:
    """Number of each tensor's file, from 1, on all ranks alike: `most` bytes over all of them, or one larger tensor."""
    found, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > most:
            number, filled = number + 1, 0
        found[name] = number
        filled += size
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """One process without a group is what we mean; torch warns of it each time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _reasons(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if not failures:
        return str(error)
    return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in failures.items())
