"""Engines in processes: what they answer, where requests go, and what happens when one ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from tests.engine.processes.engines import run as run_over
from tests.engine.processes.engines import several, tiny
from tests.engine.tiny import image, prompt, request, tiny_model
from vtengine.engine.base import BackendFailed
from vtengine.engine.processes import EngineLost
from vtengine.engine.processes import data_parallel as module
from vtengine.model import hf_tensors


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def on_two(loop):
    """Runs an async function over two engines that are started once."""
    backend = several("tiny")
    yield lambda function: loop.run(asyncio.wait_for(function(backend), 90))
    loop.run(backend.close())


run = partial(run_over, seconds=90)


def asks(count, **sampling):
    pictures = [image(k % 3) for k in range(count)]
    return [request(f"r{k}", prompt(k, 12, [pictures[k]]), [pictures[k]], **sampling) for k in range(count)]


async def until(condition, seconds=60):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        await asyncio.sleep(0.02)


def test_two_processes_answer_as_one_engine_here(on_two):
    async def all_of(backend):
        return await asyncio.gather(*map(backend.generate, asks(12, temperature=0.7, seed=3)))

    async def of_each(backend):
        found = await all_of(backend)
        return found, [engine.stats()["requests"] for engine in backend.engines]

    here = run(tiny(), all_of)
    there, shares = on_two(of_each)
    assert [c.token_ids for c in there] == [c.token_ids for c in here]
    for one, other in zip(there, here, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert sum(shares) == 12 and min(shares) >= 4


def test_turns_and_siblings_stay_with_one_engine(on_two):
    low, high = image(11), image(12, h=6, w=8)
    ids = prompt(1, 20, [low])

    async def ask(backend):
        others = [asyncio.create_task(backend.generate(request(f"other{k}", prompt(k, 9)))) for k in range(5)]
        first = await backend.generate(request("a", ids, [low]))
        more = (*ids, *first.token_ids, 253, *[250] * high.visual_tokens, 254)
        second = await backend.generate(request("b", more, [low, high]))
        await asyncio.gather(*others)
        return second

    second = on_two(ask)
    assert second.cached_tokens >= len(ids) and second.images_encoded == (False, True)


def test_new_weights_reach_every_engine():
    """By tensors: the answers become those of the other model. What does not fit is refused, and changes nothing."""

    async def update(backend):
        with pytest.raises(ValueError, match=r"model\.norm\.weight"):
            await backend.load_weights({"model.norm.weight": torch.zeros(3)}, version=1)
        await backend.load_weights(hf_tensors(tiny_model(seed=5)), version=3)
        return await asyncio.gather(*map(backend.generate, asks(6)))

    async def plain(backend):
        return await asyncio.gather(*map(backend.generate, asks(6)))

    updated = run(several("tiny"), update)
    assert [c.token_ids for c in updated] == [c.token_ids for c in run(tiny(seed=5), plain)]
    assert {c.weight_version for c in updated} == {3}


def test_an_engine_that_cannot_be_made_says_why():
    with pytest.raises(ValueError, match="holds no model; give another"):
        run(several("refusing"), lambda backend: backend.check())


def test_a_killed_process_is_done_without_and_comes_back():
    async def kill(backend):
        await backend.check()
        victim = backend.engines[0]._process
        calls = [asyncio.create_task(backend.generate(ask)) for ask in asks(8, max_new_tokens=100)]
        await asyncio.sleep(0)
        os.kill(victim.pid, signal.SIGKILL)
        found = await asyncio.gather(*calls, return_exceptions=True)
        lost = [k for k, one in enumerate(found) if isinstance(one, EngineLost)]
        assert lost and len(lost) < 8 and all(isinstance(found[k], BackendFailed) for k in lost)
        again = await asyncio.gather(*(backend.generate(asks(8)[k]) for k in lost))
        await until(lambda: backend.stats()["engines_down"] == 0)
        assert backend.engines[0]._process.pid != victim.pid
        counted = backend.stats()
        await backend.engines[0].generate(asks(1)[0])
        return again, counted, backend.stats()

    again, counted, stats = run(several("tiny"), kill)
    assert counted["requests"] >= len(again) and stats["requests"] == counted["requests"] + 1
    assert all(len(completion.token_ids) == 12 for completion in again)
    assert stats["engines"] == 2 and stats["engine_restarts"] == 1


def test_a_prompt_that_ends_every_process_ends_nothing_else(monkeypatch):
    monkeypatch.setattr(module, "RESTARTS", 1)

    async def poison(backend):
        await backend.check()
        with pytest.raises(EngineLost, match="status 9"):
            await backend.generate(request("bad", (66, 1)))
        assert not backend.is_closed
        good = await backend.generate(request("good", (65, 1)))  # waits for the new process
        with pytest.raises(EngineLost):
            await backend.generate(request("bad", (66, 1)))
        assert not backend.is_closed, "nobody has asked for another one yet"
        with pytest.raises(BackendFailed, match="none of 1 engines lives"):
            await backend.generate(request("good", (65, 1)))
        assert backend.is_closed
        return good

    assert run(several("fragile", 1), poison).token_ids == tuple(map(ord, "abcdefghijkl"))


def test_faults_far_apart_do_not_add_up(monkeypatch):
    """And what an engine counted stays counted when another takes its place."""
    monkeypatch.setattr(module, "RESTARTS", 1)
    monkeypatch.setattr(module, "RESTARTS_WITHIN_S", 0.0)

    async def poison(backend):
        counted = []
        for _ in range(3):
            counted.append((await backend.generate(request("good", (65, 1))), backend.stats())[1]["generated_tokens"])
            with pytest.raises(EngineLost):
                await backend.generate(request("bad", (66, 1)))
        return counted, backend.stats()

    counted, stats = run(several("fragile", 1), poison)
    assert counted == [12, 24, 36] and stats["engine_restarts"] == 2


def test_an_engine_that_closed_itself_is_started_again():
    async def lose(backend):
        await backend.check()
        with pytest.raises(BackendFailed):
            await backend.generate(request("gpu lost", (67, 1)))
        await until(lambda: backend.stats()["engines_down"] == 1)
        with pytest.raises(EngineLost):
            await backend.engines[0].generate(request("direct", (65, 1)))
        return await backend.generate(request("good", (65, 1)))

    assert run(several("fragile", 1), lose).finish == "length"


def test_a_caller_who_leaves_ends_the_request_there(on_two):
    async def leave(backend):
        await backend.check()
        before = backend.stats()["generated_tokens"]
        task = asyncio.create_task(backend.generate(request("long", prompt(1, 9), max_new_tokens=6000)))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.gather(*(backend.generate(request(f"short{k}", prompt(k, 9))) for k in range(4)))
        assert all(engine.num_running == 0 for engine in backend.engines)
        return backend.stats(), before

    stats, before = on_two(leave)
    assert stats["running"] + stats["waiting"] == 0
    assert stats["generated_tokens"] - before < 6000


def test_figures_are_those_of_now_though_nobody_asks_any_more(on_two):
    async def leave(backend):
        task = asyncio.create_task(backend.generate(request("long", prompt(1, 9), max_new_tokens=6000), lambda _: None))
        await until(lambda: backend.stats()["running"] == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: backend.stats()["running"] == 0, 20)
        return backend.stats()

    assert on_two(leave)["pages_in_use"] == 0


@pytest.mark.parametrize("is_ready", [True, False])
def test_an_owner_that_is_killed_leaves_no_process(is_ready):
    """Be the engine there, or still loading."""
    script = (
        "import asyncio, sys\n"
        "from tests.engine.processes.engines import process\n"
        f"engine = process('tiny') if {is_ready} else process('loading', seconds=120)\n"
        "async def main():\n"
        "    ready = asyncio.create_task(engine.check())\n"
        f"    await asyncio.sleep(3) if not {is_ready} else await ready\n"
        "    print(engine._process.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    path = os.pathsep.join(part or os.getcwd() for part in sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as owner:
        pid = int(owner.stdout.readline())
        owner.kill()
    ends = time.monotonic() + 30
    while _is_running(pid):
        assert time.monotonic() < ends
        time.sleep(0.05)


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
