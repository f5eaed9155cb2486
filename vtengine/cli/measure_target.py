"""What `vtengine measure` asks: an engine behind our own episode loop, or a chat server as its clients see it."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from vtengine.cli.arguments import build_parser
from vtengine.cli.asking import answer_row, place_image, score
from vtengine.cli.beginning import prefill_beginning
from vtengine.cli.errors import CliError, UsageError, one_line
from vtengine.cli.inputs import InputRow
from vtengine.cli.session import API_KEY, about_backend, check_hosts, open_session
from vtengine.protocol.messages import Resolution

if TYPE_CHECKING:
    from vtengine.measure.chat import ChatServer
    from vtengine.measure.load import Row
    from vtengine.rollout.group import Setting

OF_ENGINES = (
    *("backend", "profile", "max_turns", "visual_token_budget", "scale", "top_k", "device", "data_parallel"),
    *("image_device", "dtype", "kv_gb", "no_cuda_graphs", "engine_arg"),
)
"""Flags that say how an engine of ours runs: a server behind --chat does not hear them."""


DEADLINE_S = 600.0
"""Of a chat server's reply, by default."""
MAX_FILES = 1 << 16


class Target(Protocol):
    """repeats: whether the same questions may be asked again and find no trace of the first time. model: by the name
    that it has there."""

    repeats: bool
    model: str

    async def ask(self, row: InputRow, resolution: Resolution) -> Row: ...

    async def empty_caches(self) -> None:
        """As far as that can be done from here; what every prompt begins with stays."""
        ...


class EngineTarget:
    repeats = True

    def __init__(self, arguments: argparse.Namespace, setting: Setting, resolutions: Sequence[Resolution]) -> None:
        self._arguments, self.model = arguments, arguments.model
        self._settings = {
            view: replace(setting, limits=replace(setting.limits, resolution=view)) for view in resolutions
        }

    async def ask(self, row: InputRow, resolution: Resolution) -> Row:
        record, _ = await answer_row(self._arguments, self._settings[resolution], row, 0)
        return record

    async def empty_caches(self) -> None:
        from vtengine.engine.base import BackendFailed

        settings = list(self._settings.values())
        backend, pipeline = settings[0].backend, settings[0].pipeline
        version = int(backend.stats().get("weight_version", 0))
        try:
            await backend.load_weights({}, version)  # no weight is new, but all that was made with the old ones goes
        except BackendFailed as error:
            raise CliError(about_backend(self._arguments.backend, error)) from None
        pipeline.forget()  # type: ignore[attr-defined]
        for setting in settings:
            await prefill_beginning(setting)


class ChatTarget:
    """Its caches are its own: it is asked other questions every time, as far as there are any."""

    repeats = False

    def __init__(self, arguments: argparse.Namespace, server: ChatServer) -> None:
        from vtengine.vision.source import SourceLimits

        self._arguments, self._server, self.model = arguments, server, server.model or ""
        self._limits = SourceLimits(allow_http=arguments.allow_http, allow_private_hosts=arguments.allow_private_hosts)

    async def ask(self, row: InputRow, resolution: Resolution) -> Row:
        from vtengine.measure.chat import failed
        from vtengine.vision.errors import ImageError

        try:
            record = await self._server.answer(row.id, await asyncio.to_thread(self._body, row, resolution))
        except ImageError as error:
            return failed(row.id, error.code, str(error))
        score(record, row)
        return record

    def _body(self, row: InputRow, resolution: Resolution) -> bytes:
        from vtengine.vision.source import read_image_source

        image = None
        if row.image is not None:
            image = read_image_source(*place_image(row.image, self._arguments), self._limits)
        return self._server.body(row.question, image, resolution)

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
    deadline_s = DEADLINE_S if arguments.deadline_s is None else arguments.deadline_s or None
    try:
        server = ChatServer(arguments.chat, model, os.environ.get(API_KEY), options, deadline_s)
    except ValueError as error:
        raise UsageError(f"--chat {arguments.chat}: {one_line(error)}") from None
    _allow_connections()
    try:
        await server.find_model()
        yield ChatTarget(arguments, server)
    except ChatFailed as error:
        raise CliError(f"--chat {arguments.chat}: {error}") from None
    finally:
        server.close()


def _allow_connections() -> None:
    """One for each question at a time; a shell's limit is 1024 files as a rule, and may be raised."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if most == resource.RLIM_INFINITY else min(most, MAX_FILES)
    if now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def check_chat_flags(arguments: argparse.Namespace) -> None:
    """Raises UsageError for a flag that a chat server does not hear."""
    check_hosts(arguments)
    defaults = vars(_defaults())
    for name in OF_ENGINES:
        if (value := getattr(arguments, name)) != defaults[name]:
            flag = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise UsageError(
                f"{flag}: says how an engine of ours runs; behind --chat {arguments.chat} the server decides"
            )


def _defaults() -> argparse.Namespace:
    return build_parser().parse_args(["measure", "-"])
