"""A real SGLang with our hook `patchify`: python -m tests.engine.sglang.patchified

Prints one JSON object: the hooks at work, how often SGLang's own image processor ran, and what it answers to a JPEG
that it decodes itself, against our pixels of the same file.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from vtengine_kernels.patchify import Target, patchify

from tests.engine.sglang import probe, real
from tests.engine.tiny import PAD, cold_greedy, tiny_model
from vtengine.engine.base import ImageInput
from vtengine.engine.sglang import SglangHttpBackend

BEFORE, AFTER = (1, 2, 3, 253), (254, 4, 5)
COUNT = 4


def jpeg():
    """A file of 200 x 130 pixels, which the processor resizes to 196 x 140."""
    pixels = np.random.default_rng(0).integers(0, 256, (13, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((200, 130)).save(buffer, "JPEG")
    return buffer.getvalue()


def ask(url, file):
    sampling = {"max_new_tokens": COUNT, "temperature": 0, "logit_bias": {str(PAD): -1e9, str(PAD + 1): -1e9}}
    data = "data:image/jpeg;base64," + base64.b64encode(file).decode()
    body = {"input_ids": [*BEFORE, PAD, *AFTER], "image_data": [data], "sampling_params": sampling}
    answer = httpx.post(url + "/generate", json=body | {"return_logprob": True}, timeout=120).raise_for_status().json()
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]], answer["output_ids"]


async def hooks(url, folder):
    backend = SglangHttpBackend(url, folder)
    facts = await backend.check()
    await backend.close()
    return list(facts.hooks)


def main():
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environment = probe.install(scratch)
        os.environ.update(environment)
        (scratch / "model").mkdir()
        folder = real.write_checkpoint(scratch / "model")
        url = stack.enter_context(real.server(folder, VTENGINE_SGLANG_HOOKS="flush,patchify"))
        file = jpeg()
        logprobs, ids = ask(url, file)
        entries = probe.Log(environment[probe.LOG]).entries()
        report = {"hooks": asyncio.run(hooks(url, folder)), "processed": sum("processed" in one for one in entries)}
        pixels_HWC = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        (values,) = patchify(pixels_HWC, [Target(140, 196)], layout="compact")
        picture = ImageInput("jpeg", (1, 10, 14), values)
        prompt = [*BEFORE, *[PAD] * picture.visual_tokens, *AFTER]
        expected_ids, expected = cold_greedy(tiny_model(), prompt, [picture], COUNT)
        report |= {"ids": [ids, list(expected_ids)]}
        report["logprobs"] = max(abs(a - b) for a, b in zip(logprobs, expected, strict=True))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
