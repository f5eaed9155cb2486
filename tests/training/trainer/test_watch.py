"""A rank that dies ends the others, also those that wait for it where Python cannot look: in a collective of NCCL."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from vtengine_training.trainer import watch

WORKER = str(Path(__file__).with_name("watch_worker.py"))


@pytest.mark.parametrize(
    ("doing", "statuses"),
    [
        (["waits", "dies", "waits"], [1, -9, 1]),
        (["dies", "waits", "waits"], [-9, 1, 1]),
        (["waits", "waits", "fails"], [1, 1, 3]),
        (["leaves", "leaves late", "leaves"], [0, 0, 0]),
        (["leaves late", "leaves", "leaves late"], [0, 0, 0]),
    ],
    ids=["killed", "first one killed", "failed", "first one ends first", "first one ends last"],
)
def test_how_ranks_end(start_ranks, tmp_path, doing, statuses) -> None:
    ranks = start_ranks(WORKER, str(tmp_path), *doing, size=3)
    assert [process.wait(timeout=120) for process in ranks] == statuses
    said = [(tmp_path / f"rank-{rank}.err").read_text() for rank in range(3)]
    for status, words in zip(statuses, said, strict=True):
        assert ("another rank is gone" in words) == (status == 1), words


def test_strangers_are_sent_away() -> None:
    server, token = watch._server(), "0123456789abcdef"
    port = server.getsockname()[1]
    found: list[socket.socket] = []
    taking = threading.Thread(target=watch._accept, args=(server, token, 1, found))
    taking.start()
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.settimeout(10)
        with suppress(ConnectionResetError):  # closed with something unread
            assert stranger.recv(1) == b""
    with socket.create_connection(("127.0.0.1", port)) as ours:
        ours.sendall(token.encode())
        taking.join(timeout=10)
    assert len(found) == 1
    for one in (*found, server):
        one.close()


def test_without_connections_the_run_goes_on(monkeypatch, caplog) -> None:
    """As where the first process's address stands for one port only."""

    class Alone:
        size, is_first = 2, True

        def first(self, value=None):
            return value

        def gather(self, value):
            return [value, "Connection refused"]

    monkeypatch.setattr(watch, "_accept", lambda *_: None)
    assert watch.open_watch(Alone()) is None
    assert "no connections: rank 1: Connection refused" in caplog.text
