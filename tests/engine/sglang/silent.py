"""A real SGLang server that is silent for longer than the limit: python -m tests.engine.sglang.silent

First because it generates, then because its scheduler is frozen. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from tests.engine.sglang import real
from tests.engine.tiny import STOP, request
from vtengine.engine.base import BackendFailed
from vtengine.engine.sglang import SglangHttpBackend

LIMIT_S = 3.0
TOKENS = 3000


async def ask(backend, tokens, report, name):
    bans = {"logit_bias": {STOP: -1e9}, "temperature": 0.0}
    began_s = time.monotonic()
    try:
        completion = await backend.generate(request(name, (1, 2, 3), max_new_tokens=tokens, **bans))
        report[name] = [completion.finish, len(completion.token_ids)]
    except BackendFailed as error:
        report[name] = str(error)
    report[f"{name}_s"] = time.monotonic() - began_s


async def main():
    report: dict[str, object] = {}
    with ExitStack() as stack:
        folder = real.write_checkpoint(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        ((url, process),) = stack.enter_context(real.servers(folder, 1))
        backend = SglangHttpBackend(url, folder, read_s=LIMIT_S, attempts=1)
        await backend.check()
        await ask(backend, TOKENS, report, "generates")
        for child in psutil.Process(process.pid).children(recursive=True):
            if "scheduler" in child.name():
                os.kill(child.pid, signal.SIGSTOP)
        await ask(backend, TOKENS, report, "frozen")
        await backend.close()
    print(json.dumps(report))


if __name__ == "__main__":
    asyncio.run(main())
