"""Threads beside an event loop: what they begin with, and that they may be left behind."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from vtengine_training.sync.daemon import in_daemon


def test_it_computes_with_its_callers_threads() -> None:
    """Torch would give it the number that any thread set last: an engine halves its own while its tower runs."""
    before = torch.get_num_threads()

    async def found() -> int:
        return await in_daemon(torch.get_num_threads)

    try:
        torch.set_num_threads(3)
        other = threading.Thread(target=torch.set_num_threads, args=(1,))
        other.start(), other.join()
        assert torch.get_num_threads() == 3 and asyncio.run(found()) == 3
    finally:
        torch.set_num_threads(before)


def test_an_error_keeps_nothing_alive_but_itself() -> None:
    """What a failed call held is freed with its error: sockets of a process group must not wait for a collection."""

    class Held:
        def fails(self) -> None:
            raise ValueError("at once")

    async def failed() -> weakref.ref[Held]:
        held = Held()
        with pytest.raises(ValueError, match="at once"):
            await in_daemon(held.fails)
        return weakref.ref(held)

    gc.disable()
    try:
        held, until = asyncio.run(failed()), time.monotonic() + 30
        while held() is not None:  # the thread says what it has found, and only then lets go of it
            assert time.monotonic() < until
            time.sleep(0.001)
    finally:
        gc.enable()


LEFT = """
import asyncio, time, torch
from vtengine_training import cli
from vtengine_training.sync.daemon import in_daemon

def learn():
    while {learns}:
        torch.ones(64, 64, requires_grad=True).exp().sum().backward()

async def sample():
    in_daemon(learn)
    await asyncio.sleep(0.3)

def main():
    asyncio.run(sample())
    print("said", end="")
    return 130

cli.main = main
cli.program()
"""


@pytest.mark.parametrize("learns", [True, False])
def test_a_thread_that_is_left_in_torch_does_not_abort_the_process(learns) -> None:
    done = subprocess.run([sys.executable, "-c", LEFT.format(learns=learns)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "said", "")
