"""Engines of other environments behind our Backend seam: vLLM over a pipe, SGLang as a server on loopback."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory import peak_mib

from vtengine.engine.base import BackendFailed, Completion, ImageInput, OnTokens, Request
from vtengine.engine.sglang.pixels import PngCache

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent
VLLM_PYTHON = HERE.parent / ".venv-vllm" / "bin" / "python"
SGLANG_PYTHON = HERE.parent / ".venv-sglang" / "bin" / "python"
START_S = 300.0
PNG_BYTES = 1 << 30
SGLANG_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"),
    *("--mem-fraction-static", "0.3", "--max-total-tokens", "65536", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--log-level", "error"),
    *("--disable-cuda-graph", "--enable-multimodal", "--skip-server-warmup"),
)
SGLANG_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"} | {
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}


class PeerMissing(RuntimeError):
    """A peer that cannot take part, and why."""

    def __init__(self, engine: str, message: str) -> None:
        super().__init__(message)
        self.engine = engine


@dataclass(frozen=True)
class Started:
    """startup_s: from the start of the process to its first word. pid: leads a process group of its own."""

    pid: int
    startup_s: float
    url: str = ""

    def peak_mib(self) -> float:
        """Peak resident memory of every process of the group, summed."""
        peaks = 0.0
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdecimal() and os.getpgid(int(folder.name)) == self.pid:
                    peaks += peak_mib(folder.name)
            except (OSError, StopIteration):
                continue  # gone meanwhile
        return peaks


class VllmBackend:
    """`vllm_process.py` under the interpreter of its own environment. Greedy only; `reset` empties its caches."""

    def __init__(self, folder: Path, image_pad_id: int, prefix_cache: bool, python: Path = VLLM_PYTHON) -> None:
        line = [str(python), str(HERE / "peers" / "vllm_process.py"), str(folder)]
        line += [] if prefix_cache else ["--no-prefix-cache"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=subprocess.PIPE, start_new_session=True)
        self._pad = image_pad_id
        self._numbers = itertools.count()
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._pngs = PngCache(PNG_BYTES)
        assert self._process.stdout is not None and self._process.stderr is not None
        try:
            ready = self._process.stdout.readline()
        except BaseException:  # interrupted while it starts
            self.stop()
            raise
        if not ready:
            raise PeerMissing("vLLM", self._process.stderr.read().decode(errors="replace")[-500:])
        self.started = Started(self._process.pid, float(json.loads(ready)["ready"]))

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        sampling = request.sampling
        reply = await self._send(
            token_ids=collapsed(request.token_ids, self._pad, request.images),
            images=[base64_png(self._pngs, image, request.request_id) for image in request.images],
            max_new_tokens=sampling.max_new_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            banned=[token for token, bias in sampling.logit_bias.items() if bias == float("-inf")],
        )
        ids = tuple(reply["token_ids"])
        if reply["prompt_tokens"] != len(request.token_ids):
            raise BackendFailed(
                f"vLLM counts {reply['prompt_tokens']} prompt tokens, ours are {len(request.token_ids)}"
            )
        if on_tokens is not None:
            on_tokens(ids)
        return Completion(
            request_id=request.request_id,
            token_ids=ids,
            logprobs=(0.0,) * len(ids),
            finish="stop" if ids and ids[-1] in sampling.stop_token_ids else "length",
            prompt_tokens=reply["prompt_tokens"],
            cached_tokens=reply["cached_tokens"],
            images_encoded=(True,) * len(request.images),  # it does not say
            weight_version=0,
            ttft_s=reply["ttft_s"],
            latency_s=reply["latency_s"],
        )

    async def load_weights(self, source: Path | Mapping[str, torch.Tensor], version: int) -> None:
        raise NotImplementedError("a peer keeps its weights")

    async def reset(self) -> None:
        await self._send(reset=True)

    def stats(self) -> dict[str, float]:
        return {}

    async def close(self) -> None:
        """Ends one run; the process goes on until `stop`."""
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None

    def stop(self) -> None:
        end_group(self._process)

    async def _send(self, **message: Any) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())
        name = f"r{next(self._numbers)}"
        self._waiting[name] = future = loop.create_future()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": name, **message}).encode() + b"\n")
        self._process.stdin.flush()
        reply = await future
        if "error" in reply:
            raise BackendFailed(f"vLLM: {reply['error']}")
        return reply

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await asyncio.to_thread(self._process.stdout.readline):
            reply = json.loads(line)
            self._waiting.pop(reply["id"]).set_result(reply)
            if not self._waiting:
                self._reader = None  # a thread must not sit in the pipe when the run ends
                return
        for future in self._waiting.values():
            future.set_exception(BackendFailed("vLLM's process has ended"))


def base64_png(pngs: PngCache, image: ImageInput, request_id: str) -> str:
    """The image as our own backend would send it, without the `data:` in front."""
    return pngs.data_url(image, request_id).partition(",")[2]


def collapsed(token_ids: tuple[int, ...], pad: int, images: tuple[ImageInput, ...]) -> list[int]:
    """One placeholder per image, as vLLM takes them; it puts the others back itself."""
    out: list[int] = []
    rest, skip = iter(images), 0
    for token in token_ids:
        if token == pad and skip:
            skip -= 1
            continue
        out.append(token)
        if token == pad:
            skip = next(rest).visual_tokens - 1
    return out


@contextmanager
def sglang_server(folder: Path, *flags: str, python: Path = SGLANG_PYTHON) -> Iterator[Started]:
    """An SGLang server over a checkpoint on a free port; gone afterwards, with all of its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [str(python), "-m", "sglang.launch_server", "--model-path", str(folder), "--host", "127.0.0.1"]
    environment = os.environ | SGLANG_ENVIRONMENT
    environment.pop("PYTHONPATH", None)
    began_s, quiet = time.perf_counter(), subprocess.DEVNULL
    process = subprocess.Popen(
        [*line, "--port", str(port), *flags], env=environment, stdout=quiet, stderr=quiet, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not _answers(url + "/model_info"):
            if process.poll() is not None or time.perf_counter() - began_s > START_S:
                raise PeerMissing("SGLang", f"the server did not start: {' '.join(line)}")
            time.sleep(0.2)
        yield Started(process.pid, time.perf_counter() - began_s, url)
    finally:
        end_group(process)


def flush_sglang(url: str) -> None:
    """Empties the radix cache; SGLang refuses while something is still in flight. Raises RuntimeError."""
    for _ in range(50):
        if _answers(url + "/flush_cache", method="POST"):
            return
        time.sleep(0.1)
    raise RuntimeError("SGLang does not empty its cache")


def end_group(process: subprocess.Popen[Any]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answers(url: str, method: str = "GET") -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
