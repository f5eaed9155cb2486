"""Ends this process soon after another one of the run has died, whatever it is in the middle of.

Meetings over gloo notice by themselves that a process is gone. NCCL inside of one machine does not: the GPU waits for a
collective that never comes, and its process with it, for as long as rank_timeout_s. So every process has a connection
to the first one, on which nothing is said but goodbye. Where it breaks without that, a process has died, and the first
one breaks those to all others.
"""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from vtengine.keepalive import KEEP_ALIVE

log = logging.getLogger(__name__)
GRACE_S = 60.0
"""How long a process has to find out for itself that another one is gone, and to end with its own words."""
OPENING_S = 60.0
BYE = b"."
STATUS = 1


class Meeting(Protocol):
    """What all processes call together (`trainer.ranks.Ranks`)."""

    @property
    def size(self) -> int: ...
    @property
    def is_first(self) -> bool: ...
    def first(self, value: Any = None) -> Any: ...
    def gather(self, value: Any) -> list[Any]: ...


class Watch:
    """One process's connections: the first one's to all others, another one's to the first."""

    def __init__(self, connections: Sequence[socket.socket]) -> None:
        self._connections = tuple(connections)
        self._left = threading.Event()
        threading.Thread(target=self._listen, name="vtengine-watch", daemon=True).start()

    def leave(self) -> None:
        """Says goodbye: that this process ends is no reason for the others to end."""
        self._left.set()
        for connection in self._connections:
            with suppress(OSError):
                connection.sendall(BYE)
        self.give_up()

    def give_up(self) -> None:
        """Without goodbye: all others are to end, and this process too, should something keep it from ending."""
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    if _said(key.fileobj) != BYE:
                        self._end()
                        return
                    selector.unregister(key.fileobj)

    def _end(self) -> None:
        self.give_up()
        if not self._left.wait(GRACE_S):
            words = f"vtengine-train: another rank is gone, and this one was kept waiting for {GRACE_S:.0f} s: ended\n"
            os.write(2, words.encode())
            os._exit(STATUS)


def open_watch(ranks: Meeting) -> Watch | None:
    """A meeting. None, with a warning, where the first process's address cannot be reached on a free port."""
    server = token = None
    if ranks.is_first:
        server, token = _server(), secrets.token_hex(16)
    address = ranks.first([None if server is None else server.getsockname()[1], token])
    connections: list[socket.socket] = []
    fault = ""
    try:
        if server is not None:
            with server:
                _accept(server, token or "", ranks.size - 1, connections)
        else:
            connections.append(_connect(*address))
    except OSError as error:
        fault = str(error) or type(error).__name__
    faults = [f"rank {rank}: {words}" for rank, words in enumerate(ranks.gather(fault)) if words]
    if not faults:
        return Watch(connections)
    for connection in connections:
        connection.close()
    if ranks.is_first:
        log.warning("a rank that dies may keep the others waiting for rank_timeout_s: no connections: %s", faults[0])
    return None


def _server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # IPv6 may be switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accept(server: socket.socket, token: str, count: int, connections: list[socket.socket]) -> None:
    """Adds `count` connections that begin with the token; others are closed. Raises TimeoutError."""
    until = time.monotonic() + OPENING_S
    while len(connections) < count:
        server.settimeout(max(until - time.monotonic(), 0.001))
        connection, _ = server.accept()
        connection.settimeout(5)
        with suppress(OSError):
            if secrets.compare_digest(connection.recv(len(token), socket.MSG_WAITALL), token.encode()):
                connections.append(_kept_alive(connection))
                continue
        connection.close()


def _connect(port: int, token: str) -> socket.socket:
    connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=OPENING_S)
    connection.sendall(token.encode())
    return _kept_alive(connection)


def _kept_alive(connection: socket.socket) -> socket.socket:
    """A machine that lost its power breaks no connection by itself."""
    connection.settimeout(None)
    for option in KEEP_ALIVE:
        connection.setsockopt(*option)
    return connection


def _said(connection: Any) -> bytes:
    try:
        return bytes(connection.recv(1))
    except OSError:
        return b""
