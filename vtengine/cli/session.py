"""From arguments to everything that an episode needs: profile, tokenizer, image pipeline, engine. The only wiring."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtengine.cli.beginning import prefill_beginning, shortest_prompt
from vtengine.cli.engine import EngineSetup, start_engines
from vtengine.cli.engine_args import deciding, read_engine_args
from vtengine.cli.errors import CliError, UsageError, one_line
from vtengine.cli.models import bfloat16_bytes, context_tokens, find_model
from vtengine.protocol.conversation import Limits
from vtengine.protocol.profile import Profile, load_profile, own_profile

if TYPE_CHECKING:
    import torch

    from vtengine.engine.base import Backend
    from vtengine.rollout.group import Setting
    from vtengine.rollout.tokenizer import Tokenizer
    from vtengine.vision.decode import DecodeLimits

DEFAULT_PROFILE = "vtengine"
SETTINGS = (
    *("model", "backend", "profile", "resolution", "max_turns", "visual_token_budget", "scale", "max_new_tokens"),
    *("temperature", "top_p", "top_k", "seed", "n", "dtype", "image_root", "allow_http"),
    "allow_private_hosts",
)
SERVERS = ("http://", "https://")
CONCURRENCY, GPU_CONCURRENCY = 32, 128
"""Episodes at a time. A pass of a GPU reads the weights once for all of them; SGLang has a GPU as a rule."""
API_KEY = "VTENGINE_BACKEND_API_KEY"  # in the environment: the key of the server behind --backend URL
LARGE_BYTES = 1 << 30
"""Of weights in bfloat16: from here on a CPU with products for it keeps them so. In float32 they would take twice the
memory and, to decode, twice the time; small models are faster in float32."""
SCRIPTED = "scripted:"  # followed by a JSON file of replies: runs without a model, for tests


def sampling_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the contents of the rows, as JSON: compared when a run is resumed."""
    values = {name: getattr(arguments, name) for name in SETTINGS}
    values["engine_arg"] = deciding(read_engine_args(arguments.engine_arg)) or None
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in values.items()}


@asynccontextmanager
async def open_session(
    arguments: argparse.Namespace,
    concurrency: int,
    decode_limits: DecodeLimits | None = None,
    max_chunks_per_s: float | None = None,
) -> AsyncIterator[Setting]:
    """Loads the model and starts the engine; both are released at the end. Raises UsageError with the remedy.

    decode_limits: of one image, where the defaults are not wanted. max_chunks_per_s: of all streams together.
    """
    check_flags(arguments)
    try:
        with _interruptible():
            folder = find_model(arguments.model)
            setting = _build(arguments, folder, concurrency, decode_limits, max_chunks_per_s)
    except ValueError as error:  # a profile, tokenizer or checkpoint that cannot be used
        raise UsageError(f"--model {arguments.model}: {one_line(error)}") from None
    except OSError as error:
        raise UsageError(f"--model {arguments.model}: cannot be read: {one_line(error)}") from None
    try:
        await _check_server(setting.backend, arguments.backend)
        await prefill_beginning(setting)
        yield setting
    finally:
        await setting.backend.close()
        setting.pipeline.close()  # type: ignore[attr-defined]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends what is within at once; asyncio's own handler would wait until the event loop has its turn."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check_flags(arguments: argparse.Namespace) -> None:
    """Raises UsageError for a backend that is not there, and for flags that do not go together."""
    name = arguments.backend
    check_hosts(arguments)
    if arguments.engine_arg and name != "sglang":
        raise UsageError(f"--engine-arg {arguments.engine_arg[0]}: is for --backend sglang, the backend is {name}")
    read_engine_args(arguments.engine_arg)
    if arguments.deadline_s is not None and name != "sglang" and not name.startswith(SERVERS):
        raise UsageError(
            f"--deadline-s {arguments.deadline_s:g}: is for --backend sglang or URL, the backend is {name}"
        )
    if arguments.data_parallel > 1 and name != "embedded":
        raise UsageError(f"--data-parallel {arguments.data_parallel}: is for --backend embedded, the backend is {name}")
    if name == "embedded" or name.startswith(SCRIPTED):
        return
    if name == "sglang":
        from vtengine.engine.sglang.inprocess import installed_version

        try:
            installed_version()
        except ValueError as error:
            raise UsageError(about_backend(name, error)) from None
        return
    if not name.startswith(SERVERS):
        raise UsageError(f"--backend {name}: unknown; use embedded, sglang or the http://host:port of a server")
    from vtengine.engine.sglang.connect import addresses

    try:
        addresses(name)
    except ValueError as error:
        raise UsageError(f"--{one_line(error)}") from None


def check_hosts(arguments: argparse.Namespace) -> None:
    """Raises UsageError where the flags about addresses in the input do not go together."""
    if arguments.allow_private_hosts and not arguments.allow_http:
        raise UsageError("--allow-private-hosts: lets no image in without --allow-http; give both, or leave it out")


def default_concurrency(arguments: argparse.Namespace) -> int:
    """Episodes at a time that keep the engines busy which the flags name."""
    name = arguments.backend
    if name.startswith(SERVERS):
        return GPU_CONCURRENCY * len(name.split(","))
    if name == "sglang" or (name == "embedded" and find_device(arguments.device).type == "cuda"):
        return int(GPU_CONCURRENCY * max(1, arguments.data_parallel))
    return CONCURRENCY


def _build(
    arguments: argparse.Namespace,
    folder: Path,
    concurrency: int,
    decode_limits: DecodeLimits | None,
    max_chunks_per_s: float | None,
) -> Setting:
    import torch

    from vtengine.engine.base import SamplingParams
    from vtengine.rollout.group import Setting
    from vtengine.rollout.tokenizer import Tokenizer
    from vtengine.vision.decode import DecodeLimits
    from vtengine.vision.pipeline import ImagePipeline
    from vtengine.vision.processor import image_processor
    from vtengine.vision.source import SourceLimits

    profile = _profile(arguments.profile, folder)
    tokenizer = Tokenizer.load(folder)
    device, dtype = find_device(arguments.device), _dtype(arguments, folder)
    over_http = arguments.backend.startswith(SERVERS)  # bytes are told from float32 pixels, not from bfloat16
    pixels_dtype = dtype if dtype == torch.bfloat16 and not over_http else torch.float32
    processor, images = image_processor(folder), decode_limits or DecodeLimits()
    sources = SourceLimits(images.max_bytes, arguments.allow_http, arguments.allow_private_hosts)
    pipeline = ImagePipeline(
        processor.limits,
        "compact",
        pixels_dtype,
        mean=processor.mean,
        std=processor.std,
        resize_mode=profile.resize_mode,
        low_view=profile.low_view,
        device=_image_device(arguments, device),
        decode_limits=images,
        source_limits=sources,
    )
    limits = Limits(
        arguments.resolution,
        arguments.max_turns,
        arguments.visual_token_budget,
        context_tokens(folder),
        arguments.scale,
    )
    sampling = SamplingParams(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    longest = limits.max_context_tokens or sys.maxsize  # where a reply ends, whatever it was allowed
    least_tokens = max(1, min(shortest_prompt(tokenizer, profile, limits) + sampling.max_new_tokens, longest) - 1)
    # the last thing that can fail: nobody would close it
    backend = _backend(arguments, folder, tokenizer, device, dtype, concurrency, max_chunks_per_s, least_tokens)
    return Setting(backend, pipeline, tokenizer, profile, limits, sampling)


def _backend(
    arguments: argparse.Namespace,
    folder: Path,
    tokenizer: Tokenizer,
    device: torch.device,
    dtype: torch.dtype,
    concurrency: int,
    max_chunks_per_s: float | None,
    least_tokens: int,
) -> Backend:
    if arguments.backend.startswith(SCRIPTED):
        return _scripted(Path(arguments.backend.removeprefix(SCRIPTED)), tokenizer)
    if arguments.backend != "embedded":
        return _sglang(arguments, folder, device, dtype, max_chunks_per_s)
    kind, graphs = str(dtype).removeprefix("torch."), not arguments.no_cuda_graphs
    setup = EngineSetup(
        str(folder), str(device), kind, concurrency, arguments.kv_gb, max_chunks_per_s, graphs, least_tokens
    )
    if arguments.data_parallel:
        return start_engines(arguments.data_parallel, setup)
    return setup.load(tokenizer)


def _sglang(
    arguments: argparse.Namespace,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    max_chunks_per_s: float | None,
) -> Backend:
    from vtengine.engine.sglang import SglangEngineBackend, connect_servers

    name, key = arguments.backend, os.environ.get(API_KEY)
    options: dict[str, Any] = {"max_chunks_per_s": max_chunks_per_s}
    if arguments.deadline_s is not None:
        options["deadline_s"] = arguments.deadline_s or None
    try:
        if name != "sglang":
            return connect_servers(name, folder, api_key=key, **options)
        kind, extra = str(dtype).removeprefix("torch."), read_engine_args(arguments.engine_arg)
        return SglangEngineBackend(folder, device=str(device), dtype=kind, arguments=extra, **options)
    except ValueError as error:
        raise UsageError(about_backend(name, error)) from None


def about_backend(name: str, error: Exception) -> str:
    """What is wrong with `--backend NAME`; the error may name it too."""
    words = one_line(error).removeprefix("backend ").removeprefix(f"{name}: ")
    return f"--backend {name}: {words}"


async def _check_server(backend: Backend, name: str) -> None:
    """Is the server or the engine's process there, and does it serve this model? Others have nothing to be asked."""
    from vtengine.engine.base import BackendFailed

    check = getattr(backend, "check", None)
    if check is None:
        return
    try:
        await check()
    except BackendFailed as error:
        raise CliError(about_backend(name, error)) from None
    except ValueError as error:
        raise UsageError(about_backend(name, error)) from None


def _scripted(path: Path, tokenizer: Tokenizer) -> Backend:
    """Replies from a JSON file: {"delay_s": 0, "scripts": [[reply of turn 1, reply of turn 2, ...], ...], "text": ""}.

    text: the reply to a question without an image. Which script an image gets depends on its pixels alone, so that a
    run can be repeated.
    """
    from vtengine.engine.base import Request
    from vtengine.engine.scripted import ScriptedBackend

    script = json.loads(path.read_text(encoding="utf-8"))

    def reply(request: Request) -> str:
        if not request.images:
            return str(script.get("text", ""))
        replies = script["scripts"][int(request.images[0].content_hash[:8], 16) % len(script["scripts"])]
        text: str = replies[min(len(request.images), len(replies)) - 1]
        return text

    return ScriptedBackend(tokenizer, reply, delay_s=script.get("delay_s", 0.0))


def _profile(name: str | None, folder: Path) -> Profile:
    """The profile asked for, else the checkpoint's own, else the default."""
    if name is not None:
        try:
            return load_profile(name)
        except (ValueError, OSError) as error:
            raise UsageError(f"--profile {name}: {one_line(error)}") from None
    return own_profile(folder, DEFAULT_PROFILE)


def find_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: is not supported; use cpu or cuda")
    return device


def _image_device(arguments: argparse.Namespace, device: torch.device) -> torch.device:
    """Where pixel values are made: beside an embedded model on CUDA, if Triton is there; else on the CPU."""
    import torch
    from vtengine_kernels import dispatch

    in_process = arguments.backend == "embedded" and not arguments.data_parallel
    on_gpu = device.type == "cuda" and in_process and arguments.image_device == "auto"
    if on_gpu and any(
        (found.op, found.impl, found.available) == ("patchify", "triton", True) for found in dispatch.report()
    ):
        return device
    return torch.device("cpu")


def _dtype(arguments: argparse.Namespace, folder: Path) -> torch.dtype:
    import torch
    from vtengine_kernels import few_rows

    if arguments.dtype == "auto":
        on_gpu = find_device(arguments.device).type == "cuda"
        fast = on_gpu or (few_rows.missing() is None and bfloat16_bytes(folder) >= LARGE_BYTES)
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
