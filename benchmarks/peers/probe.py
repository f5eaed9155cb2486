"""Start-up and memory of an engine that runs in its caller's process: one JSON line, {"startup_s", "peak_mib"}.

    python benchmarks/peers/probe.py embedded|transformers QUESTIONS

From the start of the process to an engine that can take a request; then so many questions, 8 at a time, and the peak.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

BEGAN_S = time.time()
sys.path[:0] = [str(Path(__file__).parents[1])]


def main() -> None:
    name, count = sys.argv[1], int(sys.argv[2])
    import torch
    from memory import peak_mib
    from transformers_backend import TransformersBackend
    from two_turn_run import held_out_questions, model_folder, run_once

    from vtengine.engine.base import Backend
    from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
    from vtengine.model import load_model
    from vtengine.rollout.tokenizer import Tokenizer

    folder, ready = model_folder(), 0.0

    def make(tokenizer: Tokenizer) -> Backend:
        nonlocal ready
        backend: Backend
        if name == "embedded":
            model = load_model(folder, dtype=torch.float32).requires_grad_(False)
            backend = EmbeddedEngine(model, tokenizer, EngineConfig(max_running=8))
        else:
            backend = TransformersBackend(folder, 8)
        ready = time.time() - BEGAN_S
        return backend

    run_once(folder, make, held_out_questions(count), 8, ask_one_in=2)
    print(json.dumps({"startup_s": ready, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main()
