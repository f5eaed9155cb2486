"""Waiting for a server that says nothing: what is left behind when the wait ends otherwise."""

from __future__ import annotations

import asyncio
import gc
import socket
import time

import httpx
import pytest

from tests.engine.sglang.fake_server import FakeSglang
from vtengine.engine.sglang.http import HttpTransport
from vtengine.engine.sglang.silence import Patience

PROBE = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1}, "stream": True}


def over_fake(act):
    """Runs an async function of a transport to a server without a model."""
    fake = FakeSglang()

    async def main():
        transport = HttpTransport(fake.url, None, 10.0, 10.0)
        try:
            return await act(transport)
        finally:
            await transport.close()

    try:
        return asyncio.run(main())
    finally:
        fake.close()


def test_a_reply_that_comes_as_its_reader_leaves_is_closed(monkeypatch):
    closed = []
    aclose = httpx.Response.aclose

    async def noted(response):
        closed.append(response.status_code)
        await aclose(response)

    async def leave(answer):
        await answer
        raise asyncio.CancelledError

    async def act(transport):
        monkeypatch.setattr(transport._patience, "wait_for", leave)
        monkeypatch.setattr(httpx.Response, "aclose", noted)
        with pytest.raises(asyncio.CancelledError):
            await anext(transport.send(PROBE))
        return closed

    assert over_fake(act) == [200]


def test_the_system_asks_after_a_connection_that_is_silent():
    async def act(transport):
        response = await transport._client.get("/health")
        return (
            response.extensions["network_stream"]
            .get_extra_info("socket")
            .getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        )

    assert over_fake(act)


def test_a_process_that_stood_still_asks_before_it_gives_up():
    async def main():
        async def is_alive():
            return True

        async def answer():
            await asyncio.sleep(0.2)
            return "there"

        patience = Patience(is_alive, limit_s=0.1)
        waiting = asyncio.create_task(patience.wait_for(answer()))
        await asyncio.sleep(0.01)
        time.sleep(0.15)
        return await waiting

    assert asyncio.run(main()) == "there"


def test_no_question_outlives_its_close():
    async def main():
        asked = asyncio.Event()

        async def is_alive():
            asked.set()
            await asyncio.Event().wait()

        patience = Patience(is_alive, limit_s=0.03)
        with pytest.raises(TimeoutError):
            await asyncio.gather(patience.wait_for(asyncio.Event().wait()), asked.wait())
        await patience.close()
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(main()) == set()


def test_a_fault_that_comes_as_its_reader_leaves_is_not_logged():
    async def main():
        noted, faulty = [], asyncio.Event()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: noted.append(context["message"]))

        async def answer():
            await faulty.wait()
            raise OSError

        waiter = asyncio.create_task(Patience(lambda: None, 60).wait_for(answer()))
        await asyncio.sleep(0.01)
        faulty.set()
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        del waiter
        gc.collect()
        return noted

    assert asyncio.run(main()) == []
