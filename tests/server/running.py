"""A real server on a loopback port over scripted replies, pictures as data URLs, and OpenAI's client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import openai
from PIL import Image, ImageDraw

from tests.tiny_model import TINY_VISION, byte_encoder, config_of, tiny_text
from vtengine.engine.base import Backend, Completion, OnTokens, Request, SamplingParams
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.engine.scripted import Reply, ScriptedBackend
from vtengine.model import Qwen2_5_VL
from vtengine.protocol.conversation import Limits
from vtengine.protocol.profile import load_profile
from vtengine.rollout.group import Setting
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.server.app import create_app, create_house
from vtengine.server.config import ServerLimits
from vtengine.server.house import House
from vtengine.server.keys import ApiKeys
from vtengine.server.run import Server, address, bind
from vtengine.vision.decode import DecodeLimits
from vtengine.vision.pipeline import ImagePipeline
from vtengine.vision.source import SourceLimits

CALL = '<think>too small</think><tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
CROP = '<think>there</think><tool_call>{"name": "crop_image", "arguments": {"box": [0, 0, 28, 28]}}</tool_call>'
ANSWER = "<think>now I see</think><answer> a red ball </answer>"
MODEL = "tiny"
Replies = Sequence[Reply] | Callable[[Request], Reply]


def byte_tokenizer() -> Tokenizer:
    """Tags come letter by letter."""
    return Tokenizer(byte_encoder(tags=()))


def two_turns(request: Request) -> str:
    """Asks for the closer view, then answers."""
    return CALL if len(request.images) == 1 else ANSWER


class WatchedScript(ScriptedBackend):
    """Knows how many requests are in it, and how many of them were left before their end.

    released: none is answered before it is set; the test's thread may set it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.active = 0
        self.abandoned = 0
        self.released = threading.Event()
        self.released.set()

    async def generate(self, request: Request, on_tokens: OnTokens | None = None) -> Completion:
        self.active += 1
        try:
            while not self.released.is_set():
                await asyncio.sleep(0.005)
            return await super().generate(request, on_tokens)
        except asyncio.CancelledError:
            self.abandoned += 1
            raise
        finally:
            self.active -= 1


@dataclass
class Running:
    """A server in a thread of its own."""

    url: str
    house: House
    backend: Backend
    server: Server
    thread: threading.Thread

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 30} | options
        )

    def metrics(self) -> dict[str, float]:
        lines = self.house.metrics.render().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line[0] != "#")
        return defaultdict(float, {name: float(value) for name, value in pairs})

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()


def make_setting(
    backend: Backend, tokenizer: Tokenizer, profile: str = "glance", http: bool = False, **limits: Any
) -> Setting:
    sources = SourceLimits(1 << 20, allow_http=http, allow_private_hosts=http)
    pixels = DecodeLimits(max_pixels=500_000)
    pipeline = ImagePipeline(layout="compact", num_workers=1, decode_limits=pixels, source_limits=sources)
    sampling = SamplingParams(max_new_tokens=512)
    return Setting(backend, pipeline, tokenizer, load_profile(profile), Limits(**limits), sampling)


def embedded_backend(tokenizer: Tokenizer) -> EmbeddedEngine:
    """The real engine under a tiny model of random weights. Close it."""
    config = config_of(tiny_text(tokenizer.vocab_size), TINY_VISION, byte_encoder(tags=()))
    return EmbeddedEngine(Qwen2_5_VL.build(config, 0).eval(), tokenizer, EngineConfig(kv_bytes=1 << 22))


@contextlib.contextmanager
def running(setting: Setting, limits: ServerLimits | None = None, keys: ApiKeys | None = None) -> Iterator[Running]:
    """Stops the server and closes the pipeline at the end; the backend stays the caller's."""
    listening = bind("127.0.0.1", 0)
    ready = threading.Event()
    made: list[tuple[Server, House]] = []

    def run() -> None:
        async def main() -> None:
            house = create_house(setting, MODEL, limits, keys)
            server = Server(create_app(house), house)
            made.append((server, house))
            ready.set()
            await server.serve(sockets=[listening])

        asyncio.run(main())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60)
    server, house = made[0]
    one = Running(address(listening), house, setting.backend, server, thread)
    try:
        yield one
    finally:
        if thread.is_alive():
            one.stop()
        setting.pipeline.close()  # type: ignore[attr-defined]
        listening.close()


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def picture(number: int = 0, size: tuple[int, int] = (168, 112), form: str = "PNG") -> bytes:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((10 + number, 10, 90, 90), fill=(200, 40, 40))
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def data_url(data: bytes | None = None, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(picture() if data is None else data).decode()}"


def image_part(url: str | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url or data_url(), **more}}


def ask(question: str = "What is it?", url: str | None = None, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [image_part(url, **more), {"type": "text", "text": question}]}]
