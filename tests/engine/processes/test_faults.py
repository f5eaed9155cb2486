"""What goes wrong between an owner and its engines ends in an error for those whom it concerns, and in no wait."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch

from tests.engine.processes.engines import PAD, fragile, process, run, several
from tests.engine.tiny import image, prompt, request, tiny_model
from vtengine.engine.base import BackendFailed
from vtengine.engine.processes import DataParallel, EngineLost
from vtengine.engine.processes.host import Host
from vtengine.engine.processes.wire import Mirrored, pack_request
from vtengine.model import hf_tensors


def good(name="good"):
    return request(name, (65, 1))


def test_a_request_that_cannot_be_sent_concerns_its_caller_alone():
    """Neither the line nor what both sides know of images suffers."""
    first = image(1)
    second = dataclasses.replace(image(2), grid_thw=(1, np.int64(4), np.int64(6)))

    async def ask(engine):
        with pytest.raises(TypeError, match="int64"):
            await engine.generate(request("ids", [np.int64(65)]))
        with pytest.raises(TypeError, match="int64"):
            await engine.generate(request("grid", prompt(1, 9, [first, second]), [first, second]))
        return await engine.generate(request("good", prompt(1, 9, [first]), [first]))

    assert run(process("tiny"), ask).images_encoded == (True,)


def test_pixels_that_cannot_be_read_end_the_engine_and_nobody_waits():
    bad = dataclasses.replace(image(1), pixel_values=torch.empty(24, 588, device="meta"))

    async def ask(backend):
        await backend.check()
        with pytest.raises(EngineLost):
            await backend.generate(request("bad", prompt(1, 9, [bad]), [bad]))
        return await backend.generate(good())

    assert run(several("fragile", 1), ask).finish == "length"


@pytest.fixture
def host_and_line():
    """Makes a host in this event loop, and the owner's end of its line."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield lambda: Host(fragile(), theirs), ours


def asked(request, known=None):
    packed, _ = pack_request(request, known or Mirrored())
    return {"what": "generate", "call": 1, "request": packed, "streams": False, "sent_s": 0.0}


def test_a_host_that_is_out_of_step_ends(host_and_line, caplog):
    """It was told that it holds an image, which it does not."""
    make, _ = host_and_line
    known = Mirrored()
    ask = request("a", prompt(1, 9, [image(1)]), [image(1)])
    pack_request(ask, known)

    async def take():
        host = make()
        with caplog.at_level(logging.ERROR):
            host._take(asked(ask, known), [])
        await asyncio.wait_for(host.serve(), 10)
        return host.is_broken

    assert asyncio.run(take()) and "frame generate" in caplog.text


def test_a_request_cancelled_before_it_began_leaves_nothing(host_and_line, recwarn):
    make, _ = host_and_line

    async def take():
        host = make()
        host._take(asked(good()), [])
        host._take({"what": "cancel", "call": 1}, [])
        for _ in range(3):
            await asyncio.sleep(0)
        return host._calls

    assert asyncio.run(take()) == {}
    assert not [str(one.message) for one in recwarn if "never awaited" in str(one.message)]


def test_a_killed_engine_is_missed_though_a_process_of_its_own_lives_on():
    """Which would hold the line open, had it inherited it."""

    async def kill(engine):
        await engine.check()
        os.kill(engine._process.pid, signal.SIGKILL)
        with pytest.raises(EngineLost):
            await asyncio.wait_for(engine.generate(good()), 10)

    run(process("with_a_child", seconds=15), kill)


def test_closing_does_not_wait_for_a_model_to_load():
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        run(process("loading", seconds=60), lambda engine: asyncio.wait_for(engine.check(), 0.1))
    assert time.monotonic() - began < 40


def test_another_event_loop_is_refused():
    engine = process("fragile")
    with asyncio.Runner() as runner:
        runner.run(engine.check())
        with pytest.raises(RuntimeError, match="event loop that used it first"):
            asyncio.run(asyncio.wait_for(engine.generate(good()), 20))
        assert runner.run(engine.generate(good())).finish == "length"
        runner.run(engine.close())


def test_after_closing_nothing_is_started():
    async def ask(backend):
        await backend.check()
        call = asyncio.create_task(backend.generate(request("long", (65, 1)), lambda _: None))
        await asyncio.sleep(0.3)
        await backend.close()
        with pytest.raises(EngineLost):
            await call
        with pytest.raises(BackendFailed, match="none of 1 engines lives"):
            await backend.generate(good())
        return backend.stats()["engine_restarts"]

    assert run(several("fragile", 1, token_s=1.0), ask) == 0


def test_weights_reach_the_others_where_one_is_killed_meanwhile():
    async def update(backend):
        await backend.check()
        os.kill(backend.engines[0]._process.pid, signal.SIGKILL)
        await backend.load_weights(hf_tensors(tiny_model(seed=5)), version=3)
        completion = await backend.generate(good())
        return completion.weight_version, backend.stats()

    version, stats = run(several("tiny"), update)
    assert version == 3 and stats["weight_version"] == 3
    assert stats["engines_down"] == 1 and stats["engine_restarts"] == 0  # it would have the old weights


def test_an_engine_comes_back_after_its_caches_were_emptied():
    """By an update of nothing, whose weights are those that the engine begins with."""

    async def update(backend):
        await backend.load_weights({}, version=0)
        os.kill(backend.engines[0]._process.pid, signal.SIGKILL)
        with pytest.raises(EngineLost):
            await backend.generate(good())
        return await backend.generate(good())

    assert run(several("tiny", 1), update).finish == "length"


def test_an_engine_comes_back_after_an_update_that_was_refused_and_a_start_that_failed(monkeypatch):
    """The weights are the old ones, so the engine may come back with them."""
    starts = []

    def start(index):
        starts.append(index)
        if len(starts) == 2:
            raise OSError("no more processes")
        return process("tiny")

    async def update(backend):
        with pytest.raises(ValueError, match=r"model\.norm\.weight"):
            await backend.load_weights({"model.norm.weight": torch.zeros(3)}, version=1)
        os.kill(backend.engines[0]._process.pid, signal.SIGKILL)
        with pytest.raises(EngineLost):
            await backend.generate(good())
        return await backend.generate(good())

    assert run(DataParallel(start, 1, PAD), update).weight_version == 0
    assert len(starts) == 3


def test_modules_of_the_working_folder_are_not_imported(tmp_path, monkeypatch):
    """A folder of data may hold a file that is named like a module."""
    (tmp_path / "queue.py").write_text("open('imported', 'w')\nfrom _queue import *\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part])
    run(process("fragile"), lambda engine: engine.check())
    assert not (tmp_path / "imported").exists()


def test_an_image_too_large_to_be_kept_drives_out_no_other():
    cache = Mirrored(100)
    cache.put("small", True, 60)
    cache.put("large", True, 101)
    assert cache.get("small") and cache.get("large") is None
