"""The embedded engine that the flags ask for: in this process, or several, each in its own."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtengine.cli.errors import CliError, UsageError, one_line

if TYPE_CHECKING:
    from vtengine.engine.embedded import EmbeddedEngine
    from vtengine.engine.processes import DataParallel
    from vtengine.rollout.tokenizer import Tokenizer

MAX_RUNNING = 256  # sequences in one batch; more episodes wait for their turn
SWITCH_INTERVAL_S = 1e-4
"""For how long another thread keeps Python to itself while the engine's waits to launch a pass on a GPU. Beside an
event loop that is busy for half of a step, the 5 ms that are Python's own make the step 4 to 12 % longer."""


@dataclass(frozen=True)
class EngineSetup:
    """What an engine is made from, in words that can go to another process.

    folder: of the checkpoint. device, dtype: by torch's names ("cuda:1", "bfloat16"). kv_gb: GiB of keys and values;
    None: by the engine's rule. max_chunks_per_s, cuda_graphs, least_tokens: see EngineConfig.
    """

    folder: str
    device: str
    dtype: str
    concurrency: int
    kv_gb: float | None = None
    max_chunks_per_s: float | None = None
    cuda_graphs: bool = True
    least_tokens: int = 1

    def load(self, tokenizer: Tokenizer) -> EmbeddedEngine:
        """The engine, in this process. Raises UsageError where memory is short."""
        import torch

        from vtengine.engine.embedded import EmbeddedEngine, EngineConfig, PoolTooSmall
        from vtengine.model import load_model

        if torch.device(self.device).type == "cuda":
            sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            dtype: torch.dtype = getattr(torch, self.dtype)
            model = load_model(self.folder, device=torch.device(self.device), dtype=dtype).requires_grad_(False)
            config = EngineConfig(
                max_running=min(self.concurrency, MAX_RUNNING),
                kv_bytes=None if self.kv_gb is None else max(1, int(self.kv_gb * 2**30)),
                least_tokens=self.least_tokens,
                max_chunks_per_s=self.max_chunks_per_s,
                cuda_graphs=self.cuda_graphs,
            )
            return EmbeddedEngine(model, tokenizer, config)
        except PoolTooSmall as error:
            raise UsageError(self._too_small(error.needed_bytes)) from None
        except (RuntimeError, MemoryError) as error:  # torch's words for memory that is not there, and Python's
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            fix = "lower --kv-gb, or use --dtype bfloat16"
            raise UsageError(
                f"the model and its keys and values do not fit into memory; {fix}: {one_line(error)}"
            ) from None

    def _too_small(self, needed_bytes: int) -> str:
        given = "the default of --kv-gb" if self.kv_gb is None else f"--kv-gb {self.kv_gb:g}"
        least = math.ceil(needed_bytes / 2**30 * 1e5) / 1e5
        return (
            f"{given}: holds no question at all, the shortest takes {self.least_tokens} tokens with its reply; "
            f"give --kv-gb {least:g} or more, or lower --max-new-tokens"
        )


def start_engines(count: int, setup: EngineSetup) -> DataParallel:
    """On CUDA one for each GPU from the set-up's on; on a CPU each has its share of the cores. Raises UsageError."""
    import torch

    from vtengine.engine.processes import DataParallel, EngineProcess

    device = torch.device(setup.device)
    on_gpu, first = device.type == "cuda", device.index or 0
    there = torch.cuda.device_count() - first if on_gpu else torch.get_num_threads()
    if count > there:
        what = f"GPUs from {device} on" if on_gpu else "cores for torch (OMP_NUM_THREADS bounds them)"
        raise UsageError(f"--data-parallel {count}: is more than the {there} {what}")
    environment = {} if on_gpu else {"OMP_NUM_THREADS": str(there // count)}
    pace = setup.max_chunks_per_s and setup.max_chunks_per_s / count

    def start(index: int) -> EngineProcess:
        place = f"cuda:{first + index}" if on_gpu else setup.device
        own = replace(setup, device=place, max_chunks_per_s=pace)
        return EngineProcess(f"{__name__}:engine_of", asdict(own), f"{index} ({place})", environment)

    config = json.loads((Path(setup.folder) / "config.json").read_text("utf-8"))
    return DataParallel(start, count, config.get("image_token_id", -1))


def engine_of(**setup: Any) -> EmbeddedEngine:
    """What a process of `start_engines` begins with: the fields of an EngineSetup. Raises ValueError."""
    from vtengine.rollout.tokenizer import Tokenizer

    found = EngineSetup(**setup)
    try:
        return found.load(Tokenizer.load(found.folder))
    except (CliError, OSError) as error:
        raise ValueError(one_line(error)) from None
