"""What `vtengine measure` asks: an engine behind our own episode loop, or a chat server as its clients see it."""

from __future__ import annotations

import argparse
import asyncio
import mimetypes
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from vtengine.cli.arguments import build_parser
from vtengine.cli.asking import answer_row, place_image, score
from vtengine.cli.beginning import prefill_beginning
from vtengine.cli.errors import CliError, UsageError, one_line
from vtengine.cli.inputs import InputRow
from vtengine.cli.session import API_KEY, open_session
from vtengine.protocol.messages import Resolution

if TYPE_CHECKING:
    from vtengine.measure.chat import ChatServer
    from vtengine.measure.load import Row
    from vtengine.rollout.group import Setting

OF_ENGINES = (
    *("backend", "profile", "max_turns", "visual_token_budget", "scale", "top_k", "device", "data_parallel"),
    *("image_device", "dtype", "kv_gb", "no_cuda_graphs", "engine_arg", "deadline_s"),
)
"""Flags that say how an engine of ours runs: a server behind --chat does not hear them."""


class Target(Protocol):
    """repeats: whether the same questions may be asked again and find no trace of the first time."""

    repeats: bool

    async def ask(self, row: InputRow, resolution: Resolution) -> Row: ...

    async def empty_caches(self) -> None:
        """As far as that can be done from here; what every prompt begins with stays."""
        ...


class EngineTarget:
    repeats = True

    def __init__(self, arguments: argparse.Namespace, setting: Setting, resolutions: Sequence[Resolution]) -> None:
        self._arguments = arguments
        self._settings = {
            view: replace(setting, limits=replace(setting.limits, resolution=view)) for view in resolutions
        }

    async def ask(self, row: InputRow, resolution: Resolution) -> Row:
        record, _ = await answer_row(self._arguments, self._settings[resolution], row, 0)
        return record

    async def empty_caches(self) -> None:
        settings = list(self._settings.values())
        backend, pipeline = settings[0].backend, settings[0].pipeline
        version = int(backend.stats().get("weight_version", 0))
        await backend.load_weights({}, version)  # no weight is new, but all that was made with the old ones goes
        pipeline.forget()  # type: ignore[attr-defined]
        for setting in settings:
            await prefill_beginning(setting)


class ChatTarget:
    """Its caches are its own: it is asked other questions every time, as far as there are any."""

    repeats = False

    def __init__(self, arguments: argparse.Namespace, server: ChatServer) -> None:
        from vtengine.vision.source import SourceLimits

        self._arguments, self._server = arguments, server
        self._limits = SourceLimits(allow_http=arguments.allow_http, allow_private_hosts=arguments.allow_private_hosts)

    async def ask(self, row: InputRow, resolution: Resolution) -> Row:
        from vtengine.measure.chat import Ask, failed
        from vtengine.vision.errors import ImageError
        from vtengine.vision.source import read_image_source

        image, media_type = None, ""
        if row.image is not None:
            place = place_image(row.image, self._arguments)
            try:
                image = await asyncio.to_thread(read_image_source, *place, self._limits)
            except ImageError as error:
                return failed(row.id, error.code, str(error))
            media_type = mimetypes.guess_type(row.image[:4096])[0] or "image/png"
        record = await self._server.answer(Ask(row.id, row.question, image, media_type, resolution))
        score(record, row)
        return record

    async def empty_caches(self) -> None:
        pass


@asynccontextmanager
async def open_target(
    arguments: argparse.Namespace, concurrency: int, resolutions: Sequence[Resolution]
) -> AsyncIterator[Target]:
    """Raises CliError where it is not there."""
    if arguments.chat is None:
        async with open_session(arguments, concurrency) as setting:
            yield EngineTarget(arguments, setting, resolutions)
        return
    from vtengine.measure.chat import ChatFailed, ChatServer

    options: dict[str, Any] = {"max_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    options |= {"top_p": arguments.top_p, "seed": arguments.seed}
    model = None if arguments.model == _defaults().model else arguments.model
    try:
        server = ChatServer(arguments.chat, model, os.environ.get(API_KEY), options)
    except ValueError as error:
        raise UsageError(f"--chat {arguments.chat}: {one_line(error)}") from None
    async with server:
        try:
            await server.find_model()
        except ChatFailed as error:
            raise CliError(f"--chat {arguments.chat}: {error}") from None
        yield ChatTarget(arguments, server)


def check_chat_flags(arguments: argparse.Namespace) -> None:
    """Raises UsageError for a flag that a chat server does not hear."""
    defaults = vars(_defaults())
    for name in OF_ENGINES:
        if (value := getattr(arguments, name)) != defaults[name]:
            flag = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise UsageError(
                f"{flag}: says how an engine of ours runs; behind --chat {arguments.chat} the server decides"
            )


def _defaults() -> argparse.Namespace:
    return build_parser().parse_args(["measure", "-"])
