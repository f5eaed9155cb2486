"""The embedded engine that the flags ask for: in this process, or several, each in its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtengine.cli.errors import CliError, UsageError, one_line

if TYPE_CHECKING:
    import torch

    from vtengine.engine.embedded import EmbeddedEngine
    from vtengine.engine.processes import DataParallel
    from vtengine.rollout.tokenizer import Tokenizer

MAX_RUNNING = 256  # sequences in one batch; more episodes wait for their turn


def load_engine(
    folder: Path,
    tokenizer: Tokenizer,
    device: torch.device,
    dtype: torch.dtype,
    concurrency: int,
    kv_gb: float | None = None,
    max_chunks_per_s: float | None = None,
    cuda_graphs: bool = True,
) -> EmbeddedEngine:
    """kv_gb: GiB of keys and values; None: by the engine's rule. Raises UsageError where memory is short."""
    from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
    from vtengine.model import load_model

    running = min(concurrency, MAX_RUNNING)
    try:
        model = load_model(folder, device=device, dtype=dtype).requires_grad_(False)
        kv_bytes = None if kv_gb is None else max(1, int(kv_gb * 2**30))
        config = EngineConfig(
            max_running=running, kv_bytes=kv_bytes, max_chunks_per_s=max_chunks_per_s, cuda_graphs=cuda_graphs
        )
        return EmbeddedEngine(model, tokenizer, config)
    except (RuntimeError, MemoryError) as error:  # torch's words for memory that is not there, and Python's
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        fix = "lower --kv-gb, or use --dtype bfloat16"
        raise UsageError(
            f"the model and its keys and values do not fit into memory; {fix}: {one_line(error)}"
        ) from None


def start_engines(
    count: int,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    concurrency: int,
    kv_gb: float | None = None,
    max_chunks_per_s: float | None = None,
    cuda_graphs: bool = True,
) -> DataParallel:
    """On CUDA one for each GPU from `device` on; on a CPU each has its share of the cores. Raises UsageError."""
    import torch

    from vtengine.engine.processes import DataParallel, EngineProcess

    on_gpu = device.type == "cuda"
    first = device.index or 0
    there = torch.cuda.device_count() - first if on_gpu else torch.get_num_threads()
    if count > there:
        what = f"GPUs from {device} on" if on_gpu else "cores for torch (OMP_NUM_THREADS bounds them)"
        raise UsageError(f"--data-parallel {count}: is more than the {there} {what}")
    options: dict[str, Any] = {
        "folder": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "concurrency": concurrency,
        "kv_gb": kv_gb,
        "max_chunks_per_s": max_chunks_per_s and max_chunks_per_s / count,
        "cuda_graphs": cuda_graphs,
    }
    environment = {} if on_gpu else {"OMP_NUM_THREADS": str(there // count)}

    def start(index: int) -> EngineProcess:
        place = f"cuda:{first + index}" if on_gpu else str(device)
        own = options | {"device": place}
        return EngineProcess(f"{__name__}:engine_of", own, f"{index} ({place})", environment)

    config = json.loads((folder / "config.json").read_text("utf-8"))
    return DataParallel(start, count, config.get("image_token_id", -1))


def engine_of(
    folder: str, device: str, dtype: str, concurrency: int, kv_gb: float | None, max_chunks_per_s: float | None,
    cuda_graphs: bool,
) -> EmbeddedEngine:  # fmt: skip
    """What a process of `start_engines` begins with. Raises ValueError."""
    import torch

    from vtengine.rollout.tokenizer import Tokenizer

    path = Path(folder)
    place, kind = torch.device(device), getattr(torch, dtype)
    try:
        return load_engine(path, Tokenizer.load(path), place, kind, concurrency, kv_gb, max_chunks_per_s, cuda_graphs)
    except (CliError, OSError) as error:
        raise ValueError(one_line(error)) from None
