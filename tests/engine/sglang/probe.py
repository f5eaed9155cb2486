"""A plugin for SGLang that looks on: what its vision tower encoded, and checksums of its weights. For tests only.

Registered by an entry point that `install` writes to a folder on PYTHONPATH, through SGLang's public hook registry.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

LOG, WEIGHTS = "VTENGINE_PROBE_LOG", "probe_weights"
TOWER = "sglang.srt.models.qwen2_5_vl.Qwen2_5_VLForConditionalGeneration.get_image_feature"
PROCESSOR = "transformers.models.qwen2_vl.image_processing_qwen2_vl.Qwen2VLImageProcessor._preprocess"


def install(folder):
    """Environment with which SGLang's processes load the probe; the log is `folder`/probe.jsonl."""
    info = Path(folder) / "vtengine_probe-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vtengine-probe\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nprobe = tests.engine.sglang.probe:register\n")
    paths = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), LOG: str(Path(folder) / "probe.jsonl")}


def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TOWER, tower, HookType.AROUND)
    HookRegistry.register(PROCESSOR, processor, HookType.AROUND)
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.get_internal_state", weights, HookType.AFTER)


def tower(original, model, items):
    write({"encoded": [int(item.feature.shape[0]) for item in items]})
    return original(model, items)


def processor(original, *arguments, **options):
    write({"processed": 1})
    return original(*arguments, **options)


def weights(result, scheduler, *_):
    model = scheduler.tp_worker.model_runner.model
    result.internal_state[WEIGHTS] = {name: checksum(tensor) for name, tensor in model.named_parameters()}


def checksum(tensor):
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def write(entry):
    with open(os.environ[LOG], "a") as file:
        file.write(json.dumps(entry) + "\n")


class Log:
    """Reads what came since it was last asked."""

    def __init__(self, path):
        self.path, self.read = Path(path), 0

    def encoded(self):
        """Patches of every image that the vision tower ran on."""
        return [patches for entry in self.entries() for patches in entry.get("encoded", [])]

    def entries(self):
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        new, self.read = lines[self.read :], len(lines)
        return [json.loads(line) for line in new]
