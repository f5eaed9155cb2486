"""Stands in for `vtengine-train COMMAND CONFIG`: writes metrics, notes that it ran, fails or waits when told to."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import tomllib
from pathlib import Path

config = tomllib.loads(Path(sys.argv[2]).read_text())
output = Path(config["output"])
with (output / "started.txt").open("a") as file:
    file.write("once\n")
(output / "gpu.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "any"))


def stop(number: int, frame: object) -> None:
    (output / "stopped.txt").write_text("saved")
    sys.exit(75)


signal.signal(signal.SIGTERM, stop)
theta = config["reward"]["penalty"]["theta"]
with (output / "metrics.jsonl").open("w") as file:
    file.write('{"step": 0, "val/reward/accuracy": 0.5}\n')  # as a run with a validation set begins
    for step in range(1, config["steps"] + 1):
        row = {"step": step, "upscale/ratio": theta * step, "reward/accuracy": 0.5, "time/step": 1.0}
        file.write(json.dumps(row) + "\n")
if theta == 0.3 and not (output / "mended").exists():
    sys.exit("the reward is not a number")
if theta == 0.5:
    time.sleep(60)
