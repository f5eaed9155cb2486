"""`vtengine serve`: the OpenAI-compatible server over the engine that the flags name."""

from __future__ import annotations

import argparse
import asyncio
import gc
import ipaddress
import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vtengine.cli.errors import OK, CliError, UsageError, one_line, reason
from vtengine.cli.session import CONCURRENCY, check_flags, default_concurrency, open_session

if TYPE_CHECKING:
    from vtengine.server.config import ServerLimits
    from vtengine.server.keys import ApiKeys

log = logging.getLogger("vtengine.server")
MAX_PORT = 65535
WAITING_PER_RUNNING = 4
GPU_TEXT_EVENTS_PER_S = 2000
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal; status 0 after a clean stop."""
    check_flags(arguments)
    if arguments.port > MAX_PORT:
        raise UsageError(f"--port {arguments.port}: must be at most {MAX_PORT}")
    try:
        import prometheus_client  # noqa: F401
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"serve needs {error.name}: pip install 'vtengine[serve]'") from None
    limits, keys = _limits(arguments), _keys(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=LOG_FORMAT)
    listening = _bind(arguments)
    try:
        asyncio.run(_serve(arguments, limits, keys, listening))
    finally:
        listening.close()
    return OK


async def _serve(arguments: argparse.Namespace, limits: ServerLimits, keys: ApiKeys, listening: socket.socket) -> None:
    from vtengine.server.app import create_app, create_house
    from vtengine.server.run import Server, address
    from vtengine.vision.decode import DecodeLimits

    images = DecodeLimits(max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)
    async with open_session(arguments, limits.max_running, images, limits.max_text_events_per_s) as setting:
        name = arguments.served_name or Path(os.path.abspath(arguments.model)).name  # that of . too
        house = create_house(setting, name, limits, keys)
        server = Server(create_app(house), house)
        if not keys and not _is_loopback(arguments.host):
            log.warning("no API key: everybody who reaches %s may ask; see --api-key-file", address(listening))
        gc.collect()
        gc.freeze()  # what is there now stays; to look through it again would hold all up for a third of a second
        log.info("model %s on %s", name, address(listening))
        try:
            await server.serve(sockets=[listening])
        finally:
            gc.unfreeze()  # libraries that find their objects alive at the interpreter's end complain of leaks


def _limits(arguments: argparse.Namespace) -> ServerLimits:
    from vtengine.config import load_config
    from vtengine.server.config import ServerLimits

    try:
        return load_config(ServerLimits, arguments.config, arguments.set, _ample(default_concurrency(arguments)))
    except ValueError as error:
        raise UsageError(one_line(error)) from None
    except OSError as error:
        raise UsageError(f"--config {arguments.config}: cannot be read: {reason(error)}") from None


def _ample(concurrency: int) -> dict[str, int]:
    """Limits beside a GPU, whose passes take none of the processor's time."""
    if concurrency == CONCURRENCY:
        return {}
    events = {"max_text_events_per_s": GPU_TEXT_EVENTS_PER_S}
    return {"max_running": concurrency, "max_waiting": WAITING_PER_RUNNING * concurrency} | events


def _keys(arguments: argparse.Namespace) -> ApiKeys:
    from vtengine.server.keys import ApiKeys

    try:
        return ApiKeys.load(arguments.api_key_file, arguments.api_key_env)
    except ValueError as error:
        raise UsageError(f"--api-key-file, --api-key-env: {one_line(error)}") from None
    except OSError as error:
        raise UsageError(f"--api-key-file {arguments.api_key_file}: cannot be read: {reason(error)}") from None


def _bind(arguments: argparse.Namespace) -> socket.socket:
    from vtengine.server.run import bind

    try:
        return bind(arguments.host, arguments.port)
    except OSError as error:
        message = f"--host {arguments.host} --port {arguments.port}: cannot listen there: {one_line(error)}"
        raise CliError(message) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
