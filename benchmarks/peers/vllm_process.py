"""vLLM in an environment of its own, behind a pipe: a JSON request per line in, a JSON reply per line out.

    .venv-vllm/bin/python benchmarks/peers/vllm_process.py CHECKPOINT [--no-prefix-cache]

Request: {"id", "token_ids" (one id per image, unexpanded), "images" (PNG as base64), "max_new_tokens",
"stop_token_ids", "banned"}, or {"id", "reset": true} to empty the caches. Reply, in any order: {"id", "token_ids",
"prompt_tokens", "cached_tokens", "ttft_s", "latency_s"} or {"id", "error"}. The first line out is {"ready": seconds}.
Imports nothing of this project.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import sys
import time
from typing import Any

STARTED_S = time.time()
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1"}
MAX_TOKENS, MAX_RUNNING, MAX_IMAGES = 2048, 64, 4


def start(folder: str, prefix_cache: bool) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=folder,
        dtype="float32",
        block_size=32,
        enforce_eager=True,
        max_model_len=MAX_TOKENS,
        max_num_seqs=MAX_RUNNING,
        limit_mm_per_prompt={"image": MAX_IMAGES},
        enable_prefix_caching=prefix_cache,
    )
    return AsyncLLM.from_engine_args(arguments)


async def answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    began, first_s, ids, last = time.perf_counter(), None, [], None
    images = [Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB") for image in request["images"]]
    prompt: dict[str, Any] = {"prompt_token_ids": request["token_ids"]}
    if images:
        prompt["multi_modal_data"] = {"image": images}
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=request["max_new_tokens"],
        stop_token_ids=request["stop_token_ids"],
        logit_bias={token: -100.0 for token in request["banned"]} or None,
        output_kind=RequestOutputKind.DELTA,
        detokenize=False,
    )
    async for last in engine.generate(prompt, sampling, request["id"]):
        first_s = first_s or time.perf_counter() - began
        ids += last.outputs[0].token_ids
    return {
        "id": request["id"],
        "token_ids": ids,
        "prompt_tokens": len(last.prompt_token_ids),
        "cached_tokens": last.num_cached_tokens or 0,
        "ttft_s": first_s,
        "latency_s": time.perf_counter() - began,
    }


async def serve(engine: Any, out: Any) -> None:
    async def handle(request: dict[str, Any]) -> None:
        try:
            if request.get("reset"):
                await engine.reset_mm_cache()
                reply = {"id": request["id"], "reset": bool(await engine.reset_prefix_cache())}
            else:
                reply = await answer(engine, request)
        except Exception as error:  # told to who asked; the process goes on
            reply = {"id": request["id"], "error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(reply) + "\n")
        out.flush()

    reader = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    out.write(json.dumps({"ready": time.time() - STARTED_S}) + "\n")
    out.flush()
    tasks: set[asyncio.Task[None]] = set()
    while line := await reader.readline():
        task = asyncio.create_task(handle(json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--no-prefix-cache", action="store_true")
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get among the replies

    async def run() -> None:
        engine = start(args.checkpoint, not args.no_prefix_cache)
        try:
            await serve(engine, out)
        finally:
            engine.shutdown()

    asyncio.run(run())


if __name__ == "__main__":
    main()
