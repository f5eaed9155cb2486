"""OnceCache: one computation per key, whoever asks and however they leave."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator

import pytest

from vtengine.vision.once import OnceCache


@pytest.fixture
def cache() -> Iterator[OnceCache]:
    cache = OnceCache(4, 1000, "test")
    yield cache
    cache.close()


class Work:
    """A computation that counts its runs and can be held at a gate."""

    def __init__(self, value: object = "value", gate: threading.Event | None = None) -> None:
        self.runs = 0
        self.started = threading.Event()
        self.value, self.gate = value, gate

    def __call__(self) -> object:
        self.runs += 1
        self.started.set()
        if self.gate:
            assert self.gate.wait(10)
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10)


def test_a_kept_value_is_not_computed_again(cache: OnceCache) -> None:
    work = Work()

    async def main() -> None:
        assert [await cache.get("k", work, lambda _: 10) for _ in range(3)] == ["value"] * 3

    asyncio.run(main())
    assert (work.runs, cache.hits, cache.misses, cache.used_bytes) == (1, 2, 1, 10)


def test_a_value_of_no_size_is_shared_but_not_kept(cache: OnceCache) -> None:
    work = Work(gate=threading.Event())

    async def main() -> None:
        tasks = [asyncio.create_task(cache.get("k", work, lambda _: 0)) for _ in range(5)]
        await until(work.started)
        work.gate.set()
        await asyncio.gather(*tasks)
        await cache.get("k", work, lambda _: 0)

    asyncio.run(main())
    assert work.runs == 2 and cache.shared == 4 and cache.used_bytes == 0


def test_concurrent_requests_share_one_job(cache: OnceCache) -> None:
    work = Work(gate=threading.Event())

    async def main() -> list[object]:
        tasks = [asyncio.create_task(cache.get("k", work, lambda _: 1)) for _ in range(50)]
        await until(work.started)
        work.gate.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == ["value"] * 50
    assert work.runs == 1 and cache.shared == 49


def test_requests_from_several_event_loops_share_one_job(cache: OnceCache) -> None:
    work = Work(gate=threading.Event())
    results: list[object] = []
    threads = [
        threading.Thread(target=lambda: results.append(asyncio.run(cache.get("k", work, lambda _: 1))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    assert work.started.wait(10)
    work.gate.set()
    for thread in threads:
        thread.join(10)
    assert results == ["value"] * 8 and work.runs == 1


def test_a_failure_reaches_every_waiter_and_is_forgotten(cache: OnceCache) -> None:
    work = Work(ValueError("broken"), threading.Event())

    async def main() -> None:
        tasks = [asyncio.create_task(cache.get("k", work, lambda _: 1)) for _ in range(5)]
        await until(work.started)
        work.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(r) for r in results] == ["broken"] * 5
        work.value = "mended"
        assert await cache.get("k", work, lambda _: 1) == "mended"

    asyncio.run(main())
    assert work.runs == 2


def test_a_cancelled_waiter_leaves_the_others_alone(cache: OnceCache) -> None:
    work = Work(gate=threading.Event())

    async def main() -> None:
        first, second = (asyncio.create_task(cache.get("k", work, lambda _: 1)) for _ in range(2))
        await until(work.started)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        work.gate.set()
        assert await second == "value"

    asyncio.run(main())
    assert work.runs == 1


def test_work_that_all_have_left_is_not_started_and_can_be_asked_for_again() -> None:
    cache = OnceCache(1, 1000, "test")
    blocker, work = Work(gate=threading.Event()), Work()

    async def main() -> None:
        blocking = asyncio.create_task(cache.get("b", blocker, lambda _: 1))
        await until(blocker.started)
        left = [asyncio.create_task(cache.get("k", work, lambda _: 1)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        blocker.gate.set()
        await blocking
        await asyncio.to_thread(lambda: [time.sleep(0.01) for _ in range(10)])
        assert work.runs == 0
        assert await cache.get("k", work, lambda _: 1) == "value"

    asyncio.run(main())
    cache.close()
    assert work.runs == 1


def test_work_that_one_has_left_and_another_joined_is_done_once() -> None:
    cache = OnceCache(1, 1000, "test")
    blocker, work = Work(gate=threading.Event()), Work()

    async def main() -> None:
        blocking = asyncio.create_task(cache.get("b", blocker, lambda _: 1))
        await until(blocker.started)
        left = asyncio.create_task(cache.get("k", work, lambda _: 1))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        joined = asyncio.create_task(cache.get("k", work, lambda _: 1))
        await asyncio.sleep(0)
        blocker.gate.set()
        assert await joined == "value"
        await blocking

    asyncio.run(main())
    cache.close()
    assert work.runs == 1


def test_many_keys_are_computed_by_one_call_without_those_at_hand(cache: OnceCache) -> None:
    asked: list[tuple[str, ...]] = []

    def compute(keys: tuple[str, ...]) -> list[str]:
        asked.append(keys)
        return [key.upper() for key in keys]

    async def main() -> None:
        assert await cache.get_all(("a",), compute, len) == ["A"]
        assert await cache.get_all(("c", "a", "b", "c"), compute, len) == ["C", "A", "B", "C"]

    asyncio.run(main())
    assert asked == [("a",), ("c", "b")]


def test_a_computation_that_returns_too_few_values_fails_all_and_hangs_nobody(cache: OnceCache) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="zip"):
            await asyncio.wait_for(cache.get_all(("a", "b"), lambda _: ["A"], len), 10)

    asyncio.run(main())


def test_least_recently_used_goes_first_and_bytes_stay_bounded() -> None:
    cache = OnceCache(2, 100, "test")

    async def main() -> None:
        for key in "abc":
            await cache.get(key, Work(key), lambda _: 30)
        await cache.get("a", Work("again"), lambda _: 30)
        await cache.get("d", Work("d"), lambda _: 30)
        assert cache.kept(["a", "c", "d"]) == ["a", "c", "d"] and cache.kept(["b"]) is None
        assert await cache.get("huge", Work("huge"), lambda _: 101) == "huge"
        assert cache.kept(["huge"]) is None and cache.kept(["a", "c", "d"])
        await cache.get("full", Work("full"), lambda _: 100)
        assert cache.kept(["full"]) == ["full"] and cache.used_bytes == 100

    asyncio.run(main())
    assert cache.evictions == 4
    cache.close()
    assert cache.used_bytes == 0


def test_close_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    cache = OnceCache(1, 1000, "test")
    slow, queued = Work("slow", threading.Event()), Work("queued")

    async def main() -> None:
        tasks = [asyncio.create_task(cache.get(i, work, lambda _: 1)) for i, work in enumerate((slow, queued))]
        await until(slow.started)
        closing = asyncio.create_task(asyncio.to_thread(cache.close))
        await asyncio.sleep(0.02)
        slow.gate.set()
        assert await asyncio.gather(*tasks) == ["slow", "queued"]
        await closing
        with pytest.raises(RuntimeError, match="test is closed"):
            await cache.get("k", Work(), lambda _: 1)

    asyncio.run(main())
    cache.close()


@pytest.mark.filterwarnings("error")
def test_an_event_loop_that_ends_early_leaves_no_noise(caplog) -> None:
    cache = OnceCache(1, 1000, "test")
    for value in ("late", ValueError("late, too")):  # keys of their own: the first job may still be on its way
        work = Work(value, threading.Event())

        async def main(work: Work = work) -> None:
            asyncio.create_task(cache.get(str(work.value), work, lambda _: 0))  # noqa: RUF006
            await until(work.started)

        asyncio.run(main())
        work.gate.set()
    cache.close()
    gc.collect()
    assert not caplog.records


@pytest.mark.parametrize(("options", "named"), [((0, 1), "num_workers"), ((1, -1), "cache_bytes")])
def test_sizes_that_mean_nothing_are_refused(options: tuple[int, int], named: str) -> None:
    with pytest.raises(ValueError, match=f"test.{named}"):
        OnceCache(*options, "test")
