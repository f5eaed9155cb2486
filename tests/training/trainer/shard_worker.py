"""One of several ranks, started by test_sharding: `python shard_worker.py SMALL LARGE BROKEN OUT`."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from vtengine_training.lora.config import LoraConfig
from vtengine_training.sync.gathered import gathered
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.sharding import shard

from vtengine.model import Checkpoint

CPU = torch.device("cpu")
LORA, SEED = LoraConfig(rank=3, vision=True), 7
CASES = {
    "learning": (torch.float32, {}),
    "rounded": (torch.bfloat16, {"train_vision": False}),
    "frozen": (torch.bfloat16, {"frozen": True}),
    "adapters": (torch.float32, {"lora": LORA, "seed": SEED}),
}


def resident_bytes() -> int:
    """Memory of this process that is no file's."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def most_memory(function) -> int:
    """Bytes by which the process was at most larger than before, and still is if function returned something."""
    before, most, over = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, resident_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = function()
    over.set()
    watcher.join()
    del kept
    return most - before


def main(small: Path, large: Path, broken: Path, out: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join(CPU, 60)
    tensors = {}
    for name, (dtype, options) in CASES.items():
        pieces = shard(Checkpoint.open(small), dtype, CPU, ranks, **options)
        for parameter, value in pieces.model.named_parameters():
            tensors[f"{name}.{parameter}"] = gathered(value, torch.float32).contiguous()
    words = ""
    try:
        shard(Checkpoint.open(broken), torch.float32, CPU, ranks)
    except ValueError as error:
        words = str(error)
    found = ranks.gather(
        [most_memory(lambda: shard(Checkpoint.open(large), torch.float32, CPU, ranks, frozen=True)), words]
    )
    if ranks.is_first:
        save_file(tensors, out)
        out.with_suffix(".json").write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
