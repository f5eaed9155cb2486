"""A real SGLang for tests: a tiny checkpoint, a server of our own, one engine per process.

SGLang takes its caller down when its scheduler dies, so whatever uses this module runs in a process of its own.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.engine.tiny import PAD, tiny_model
from tests.tiny_model import byte_encoder
from tests.training.trainer.toy_model import tiny_config as toy_config
from vtengine.engine.sglang import ServedModel, SglangBackend
from vtengine.model import Qwen2_5_VL, save_model

SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>")
START_S = 600  # a busy machine takes minutes
ON_CPU = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--dtype": "float32",
    "--mem-fraction-static": "0.3",
    "--max-total-tokens": "8192",
    "--sampling-backend": "pytorch",
    "--grammar-backend": "none",
    "--log-level": "error",
}
SWITCHES = ("--disable-cuda-graph", "--enable-multimodal", "--skip-server-warmup")
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "VTENGINE_SGLANG_HOOKS": "flush",  # weights are updated in these tests
    "TORCH_COMPILE_DISABLE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
ENGINE_ARGUMENTS = {"max_total_tokens": 8192}


def write_checkpoint(folder, seed=0):
    """The tiny model with a tokenizer of single bytes: what SGLang needs to load it."""
    save_model(tiny_model(seed), folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:PAD]
    tokenizer = Tokenizer(models.BPE({letter: k for k, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    assert tokenizer.token_to_id("<|image_pad|>") == PAD
    tokenizer.save(str(folder / "tokenizer.json"))
    write_processor(folder, min_pixels=784, max_pixels=62720)
    return folder


def write_processor(folder, **pixels):
    """What SGLang and transformers read beside the weights."""
    files = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
        | {"pad_token": "<|im_end|>", "chat_template": "{{ messages }}", "model_max_length": 4096},
        "preprocessor_config.json": pixels
        | {"patch_size": 14, "merge_size": 2}
        | {"temporal_patch_size": 2, "image_processor_type": "Qwen2VLImageProcessor"}
        | {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
        | {"processor_class": "Qwen2_5_VLProcessor"},
    }
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data))


def write_toy_checkpoint(folder, seed=3):
    """The trainer's toy model (bytes and marks as tokens, two layers) as SGLang loads it."""
    encoder = byte_encoder()
    encoder.save(str(folder / "tokenizer.json"))
    model = Qwen2_5_VL.build(toy_config(encoder), seed)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(0.5)
    save_model(model, folder)
    write_processor(folder, min_pixels=3136, max_pixels=12544)


@contextmanager
def server(folder, log=None, **environment):
    """The address of an SGLang server over a checkpoint folder; gone afterwards, with all of its processes."""
    with servers(folder, 1, log, **environment) as ((url, _),):
        yield url


@contextmanager
def servers(folder, count, log=None, **environment):
    """(address, process) of several that start at the same time; the process leads a group of its own."""
    options = [part for pair in ON_CPU.items() for part in pair]
    started = []
    try:
        for _ in range(count):
            port = free_port()
            command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), "--port", str(port)]
            with open(log or os.devnull, "ab") as out:
                process = subprocess.Popen(
                    [*command, "--host", "127.0.0.1", *options, *SWITCHES],
                    env=os.environ | ENVIRONMENT | environment, stdout=out, stderr=out, start_new_session=True,
                )  # fmt: skip
            started.append((f"http://127.0.0.1:{port}", process))
        for url, process in started:
            wait(process, url)
        yield started
    finally:
        for _, process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def has(module):
    return find_spec(module) is not None


def wait(process, url, path="/model_info"):
    """Until it answers. Raises RuntimeError where it does not."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(url + path, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the server did not start")


class KeptTransport:
    """A transport for one test after another: closing it only empties the cache."""

    def __init__(self, transport):
        self._transport = transport

    def __getattr__(self, name):
        return getattr(self._transport, name)

    async def close(self):
        for _ in range(40):
            if await self._transport.flush():
                return


_shared = {}


def shared_backend(kind):
    """A fresh backend over the process's only SGLang (kind: sglang_http or sglang_engine)."""
    if kind not in _shared:
        os.environ.update(ENVIRONMENT)
        folder = write_checkpoint(Path(tempfile.mkdtemp(prefix="tiny-")))
        model = ServedModel.from_folder(folder)
        if kind == "sglang_http":
            from vtengine.engine.sglang.http import HttpTransport

            running = server(folder)
            transport = HttpTransport(running.__enter__(), None, 10, 300)
            atexit.register(running.__exit__, None, None, None)
        else:
            from vtengine.engine.sglang.inprocess import EngineTransport

            transport = EngineTransport(folder, "cpu", "float32", True, ENGINE_ARGUMENTS)
            atexit.register(transport._engine.shutdown)
        _shared[kind] = (KeptTransport(transport), model)
    return SglangBackend(*_shared[kind])
