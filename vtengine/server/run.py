"""Runs the application until a signal, then lets running requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from vtengine.server.house import House
from vtengine.server.transport import HttpProtocol

log = logging.getLogger(__name__)
IDLE_S = 75
"""How long a connection stays open without a request. Clients and proxies keep theirs for up to 60 s; one closed
here first fails the request that is sent into it just then."""


class Server(uvicorn.Server):
    """uvicorn with our shutdown: the first signal drains, a second one ends at once; the caller's exit status stays."""

    def __init__(self, app: ASGIApp, house: House) -> None:
        options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "lifespan": "off"}
        options["proxy_headers"] = False  # nothing here depends on a client's address
        options |= {"timeout_graceful_shutdown": math.ceil(house.limits.drain_s), "timeout_keep_alive": IDLE_S}
        super().__init__(uvicorn.Config(app, http=HttpProtocol, **options))
        self.house = house

    def stop(self) -> None:
        """New requests get 503; those inside may finish within drain_s."""
        if self.should_exit:
            self.force_exit = True
            for connection in list(self.server_state.connections):  # from Python 3.12 on asyncio waits for them
                connection.transport.abort()
        self.house.gate.draining = True
        self.should_exit = True
        log.info("stopping: %d requests are inside", self.house.gate.inside)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup wants it to be
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
