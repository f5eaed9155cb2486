"""The judge against a local endpoint: faults, cache, limits, canaries, cost."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import asynccontextmanager

import pytest
from vtengine_training.rewards.judge.canaries import CANARIES
from vtengine_training.rewards.judge.check import check_judge
from vtengine_training.rewards.judge.config import JudgeConfig
from vtengine_training.rewards.judge.judge import Judge
from vtengine_training.rewards.judge.prompt import Query

from tests.training.rewards.judge_server import Action, cut, drop, honest, say, serving, slow, status

pytest.importorskip("openai")
QUICK = {"timeout_s": 5.0, "deadline_s": 20.0, "backoff_s": 0.01, "breaker_failures": 100, "canaries": 0}


def query(answer="4", question="How many?", references=("4",)):
    return Query.of(question, references, answer)


def config(server, **changes):
    return JudgeConfig(url=server.url, model="tiny", **(QUICK | changes))


@asynccontextmanager
async def judging(server, **changes):
    judge = Judge(config(server, **changes))
    try:
        yield judge
    finally:
        await judge.close()


def verdict_of(act, asked=None, **changes):
    """(verdict, server, figures) of one query against a server that acts so."""

    async def run(server):
        async with judging(server, **changes) as judge:
            return await judge.verdict(asked or query()), judge.figures()

    with serving(act) as server:
        verdict, figures = asyncio.run(run(server))
        return verdict, server, figures


@pytest.mark.parametrize(("answer", "expected"), [("4", True), ("5", False)])
def test_a_verdict(answer, expected):
    verdict, server, figures = verdict_of(honest, query(answer))
    assert verdict is expected
    assert figures["requests"] == 1 and figures["prompt_tokens"] == 100 and figures["completion_tokens"] == 5
    body = server.asked[0].body
    assert body["temperature"] == 0 and body["model"] == "tiny" and body["max_tokens"] == 64


FAULTS = {
    "500": (lambda asked: status(500), 4, "http_error"),
    "503": (lambda asked: status(503), 4, "http_error"),
    "429": (lambda asked: status(429), 4, "rate_limited"),
    "429 with a wait": (lambda asked: status(429, retry_after="0.02"), 4, "rate_limited"),
    "429 with nonsense": (lambda asked: status(429, retry_after="Wed, soon"), 4, "rate_limited"),
    "400": (lambda asked: status(400), 1, "http_error"),
    "401": (lambda asked: status(401), 1, "http_error"),
    "404": (lambda asked: status(404), 1, "http_error"),
    "slow": (lambda asked: slow(0.9, honest(asked)), 4, "timeout"),
    "garbage": (lambda asked: Action(b"<html>hello</html>"), 4, "bad_reply"),
    "empty": (lambda asked: Action(b""), 4, "bad_reply"),
    "not utf-8": (lambda asked: Action(b"\xff\xfe\x00"), 4, "bad_reply"),
    "wrong json": (lambda asked: Action(b'{"choices": []}'), 4, "bad_reply"),
    "no text": (lambda asked: say(None), 4, "bad_reply"),
    "cut by length": (lambda asked: say(f"{asked.key} CORRECT", finish="length"), 4, "bad_reply"),
    "drop": (lambda asked: drop(), 4, "connection"),
    "cut body": (lambda asked: cut(honest(asked)), 4, "connection"),
}


SLOW = {"timeout_s": 0.4}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_no_verdict_after_bounded_attempts_and_is_in_the_log(name, caplog):
    act, attempts, code = FAULTS[name]
    began = time.monotonic()
    verdict, server, figures = verdict_of(act, **(SLOW if name == "slow" else {}))
    assert verdict is None
    assert len(server.asked) == figures["requests"] == attempts
    assert figures[code] == attempts and figures[f"no_verdict/{code}"] == figures["no_verdict"] == 1
    assert caplog.text.count(f"no verdict ({code}; others are counted): {server.url}: ") == 1
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", [name for name, (_, attempts, _) in FAULTS.items() if attempts > 1])
def test_a_fault_that_passes_costs_a_retry(name):
    act = FAULTS[name][0]
    verdict, server, figures = verdict_of(
        lambda asked: act(asked) if asked.number == 0 else honest(asked), **(SLOW if name == "slow" else {})
    )
    assert verdict is True
    assert len(server.asked) >= 2 and "no_verdict/http_error" not in figures


def test_nothing_listens():
    with serving(honest) as server:
        pass
    judge = Judge(config(server))
    assert asyncio.run(judge.verdict(query())) is None
    assert judge.totals["connection"] == 4


def test_retry_after_holds_back_every_request():
    def act(asked):
        return status(429, retry_after="0.4") if asked.number == 0 else honest(asked)

    async def run(server):
        async with judging(server, concurrency=1) as judge:
            began = time.monotonic()
            found = await asyncio.gather(judge.verdict(query("4")), judge.verdict(query("5")))
            return found, time.monotonic() - began

    with serving(act) as server:
        found, seconds = asyncio.run(run(server))
    assert found == [True, False] and seconds >= 0.4


def test_a_wait_beyond_the_deadline_ends_at_the_deadline():
    began = time.monotonic()
    verdict, _, figures = verdict_of(lambda asked: status(429, retry_after="3600"), deadline_s=0.5)
    assert verdict is None and time.monotonic() - began < 5
    assert figures["no_verdict/deadline"] == 1


def test_unparsable_replies_are_asked_for_once_more_with_a_new_key():
    verdict, server, figures = verdict_of(lambda asked: say("Score: 1"))
    assert verdict is None and figures["unparsable"] == 2 and figures["no_verdict/unparsable"] == 1
    assert server.asked[0].key != server.asked[1].key and server.asked[0].fence != server.asked[1].fence


def test_after_many_failures_the_judge_is_left_alone_for_a_while():
    async def run(server):
        async with judging(server, attempts=1, breaker_failures=3, breaker_pause_s=2.0, concurrency=1) as judge:
            for number in range(10):
                assert await judge.verdict(query(str(number))) is None
            down, figures = len(server.asked), judge.figures()
            server.act = honest
            while (verdict := await judge.verdict(query("4"))) is None:
                await asyncio.sleep(0.05)
            assert verdict is True and await judge.verdict(query("5")) is False
            return down, figures

    with serving(lambda asked: status(500)) as server:
        down, figures = asyncio.run(run(server))
    assert down == 3 and figures["no_verdict/paused"] == 7


def test_concurrency_and_rate_are_kept():
    async def run(server, **limits):
        async with judging(server, **limits) as judge:
            began = time.monotonic()
            await asyncio.gather(*(judge.verdict(query(str(number))) for number in range(12)))
            return time.monotonic() - began

    with serving(lambda asked: slow(0.05, honest(asked))) as server:
        asyncio.run(run(server, concurrency=3))
        assert server.most_at_once == 3
    with serving(honest) as server:
        assert asyncio.run(run(server, requests_per_minute=1200)) >= 11 * 0.05 * 0.95


def test_a_long_queue_fails_nobody():
    async def run(server):
        async with judging(server, concurrency=1, deadline_s=1.5) as judge:
            return await asyncio.gather(*(judge.verdict(query(str(number))) for number in range(10)))

    with serving(lambda asked: slow(0.25, honest(asked))) as server:
        assert None not in asyncio.run(run(server))


def test_equal_queries_are_asked_once():
    async def run(server):
        async with judging(server) as judge:
            first = await asyncio.gather(*(judge.verdict(query("4")) for _ in range(16)))
            second = await judge.verdict(query("4"))
            return [*first, second], judge.figures()

    with serving(lambda asked: slow(0.05, honest(asked))) as server:
        found, figures = asyncio.run(run(server))
        assert found == [True] * 17 and len(server.asked) == 1
    assert figures["shared"] == 15 and figures["cache_hits"] == 1 and figures["asked"] == 17
    with serving(lambda asked: status(401)) as server:
        found, figures = asyncio.run(run(server))
    assert found == [None] * 17 and figures["no_verdict"] == figures["no_verdict/http_error"] == 17


def test_a_cancelled_waiter_takes_nobody_along():
    async def run(server):
        async with judging(server) as judge:
            first = asyncio.create_task(judge.verdict(query("4")))
            await asyncio.sleep(0.02)
            second = asyncio.create_task(judge.verdict(query("4")))
            await asyncio.sleep(0.02)
            first.cancel()
            return await second

    with serving(lambda asked: slow(0.1, honest(asked))) as server:
        assert asyncio.run(run(server)) is True
        assert len(server.asked) == 1


def test_the_cache_outlives_the_process_and_knows_what_a_verdict_depends_on(tmp_path):
    path = str(tmp_path / "deep" / "verdicts.sqlite")
    with serving(honest) as server:

        def ask(asked, **changes):
            async def run():
                async with judging(server, cache=path, **changes) as judge:
                    return await judge.verdict(asked)

            return asyncio.run(run())

        assert ask(query("4")) is True and len(server.asked) == 1
        assert ask(query("4")) is True and len(server.asked) == 1
        assert ask(query("5")) is False and len(server.asked) == 2
        assert ask(query("4", question="How few?")) is True and len(server.asked) == 3
        assert ask(query("4", references=("4", "four"))) is True and len(server.asked) == 4
        assert ask(query("4", references=("four", "4"))) is True and len(server.asked) == 4
        assert ask(query("4"), max_tokens=32) is True and len(server.asked) == 5
        assert ask(query("4"), extra_body={"seed": 1}) is True and len(server.asked) == 6


def test_no_verdict_is_never_cached(tmp_path):
    path = str(tmp_path / "verdicts.sqlite")
    for act, expected in ((lambda asked: status(500), None), (honest, True)):
        with serving(act) as server:

            async def run(server=server):
                async with judging(server, cache=path) as judge:
                    return await judge.verdict(query("4"))

            assert asyncio.run(run()) is expected


def test_a_file_that_is_no_cache_is_named(tmp_path):
    path = tmp_path / "verdicts.sqlite"
    path.write_bytes(b"no database, but long enough to be read as one" * 100)
    with pytest.raises(ValueError, match=r"reward\.judge\.cache"):
        Judge(JudgeConfig(model="tiny", cache=str(path)))


def test_a_full_disk_costs_the_cache_not_the_verdict(tmp_path):
    async def run(server):
        async with judging(server, cache=str(tmp_path / "verdicts.sqlite")) as judge:
            judge.cache._file.execute("PRAGMA query_only=ON")
            return [await judge.verdict(query("4")), await judge.verdict(query("4"))], judge.figures()

    with serving(honest) as server:
        found, figures = asyncio.run(run(server))
    assert found == [True, True] and figures["cache_errors"] == 1 and figures["cache_hits"] == 1


KILLED = """
import sys
from vtengine_training.rewards.judge.cache import VerdictCache
from vtengine_training.rewards.judge.prompt import Query
cache = VerdictCache(sys.argv[1])
for number in range(10**9):
    cache.put(f"k{number}", number % 2 == 0, Query("q", ("r",), str(number)), "m")
    if number == 50:
        print("going", flush=True)
"""


def test_a_killed_process_leaves_a_cache_that_works(tmp_path):
    path = tmp_path / "verdicts.sqlite"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, env=environment)
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = sqlite3.connect(path)
        assert found.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = dict(found.execute("SELECT key, verdict FROM verdicts"))
        found.close()
        assert len(rows) > 50 and all(verdict == (int(key[1:]) % 2 == 0) for key, verdict in rows.items())


def test_canaries_are_asked_in_turn_and_never_from_the_cache():
    async def run(server, steps):
        async with judging(server, canaries=2) as judge:
            for _ in range(steps):
                judge.start_canaries()
                await asyncio.gather(*judge._canary_tasks)
            return judge.figures()

    with serving(honest) as server:
        figures = asyncio.run(run(server, len(CANARIES)))
        assert figures["canary_right"] == len(server.asked) == 2 * len(CANARIES) and "canary_wrong" not in figures
    with serving(lambda asked: asked.verdict(True)) as server:
        figures = asyncio.run(run(server, len(CANARIES) // 2))
        assert figures["canary_wrong"] == sum(not canary.expected for canary in CANARIES)
    with serving(lambda asked: status(400)) as server:
        assert asyncio.run(run(server, 1))["canary_failed"] == 2


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda asked: status(500), "no verdict"),
        (lambda asked: say("yes"), "no verdict"),
        (lambda asked: asked.verdict(True), "known pairs"),
        (lambda asked: asked.verdict(False), "known pairs"),
    ],
)
def test_a_judge_that_is_down_or_wrong_is_found_at_the_start(act, says):
    async def run(server):
        async with judging(server) as judge:
            await check_judge(judge)

    with serving(act) as server, pytest.raises(ValueError, match=says):
        asyncio.run(run(server))


def test_cost_is_counted_and_survives_a_restart():
    async def run(server, *states):
        async with judging(server, price_prompt=2.0, price_completion=8.0) as judge:
            for state in states:  # of the processes that there were
                judge.restore(state)
            await judge.verdict(query("4"))
            return judge.cost, judge.state()

    with serving(honest) as server:
        cost, state = asyncio.run(run(server))
        assert cost == pytest.approx((100 * 2 + 5 * 8) / 1e6)
        assert asyncio.run(run(server, state))[0] == pytest.approx(2 * cost)
        assert asyncio.run(run(server, state, state))[0] == pytest.approx(3 * cost)


def test_a_new_event_loop_gets_new_connections():
    with serving(honest) as server:
        judge = Judge(config(server))
        for number in range(3):
            assert asyncio.run(judge.verdict(query(str(number)))) is False
        asyncio.run(judge.close())


def test_the_key_comes_from_the_environment_and_is_never_in_the_config(monkeypatch):
    monkeypatch.setenv("MY_JUDGE_KEY", "secret-1")
    verdict, server, _ = verdict_of(honest, api_key_env="MY_JUDGE_KEY")
    assert verdict is True and server.authorizations == ["Bearer secret-1"]


@pytest.mark.parametrize(
    "values",
    [
        *({"concurrency": 0}, {"attempts": 0}, {"timeout_s": 0.0}, {"deadline_s": float("inf")}, {"canaries": -1}),
        *({"url": "localhost:8000"}, {"price_prompt": -1.0}, {"extra_body": {"stream": True}}, {"max_tokens": 0}),
    ],
)
def test_a_bad_config_names_the_field(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        JudgeConfig(**values)


def test_a_model_must_be_named():
    with pytest.raises(ValueError, match=r"reward\.judge\.model"):
        Judge(JudgeConfig())


def test_chaos_ends_in_bounded_time_and_never_with_a_wrong_verdict():
    acts = itertools.cycle(act for act, _, _ in FAULTS.values())

    def act(asked):
        return honest(asked) if asked.number % 3 == 2 else next(acts)(asked)

    async def run(server):
        async with judging(server, breaker_failures=1000, concurrency=8) as judge:
            return await asyncio.gather(*(judge.verdict(query(str(number))) for number in range(40)))

    with serving(act) as server:
        began = time.monotonic()
        found = asyncio.run(run(server))
        assert time.monotonic() - began < 30
    assert all(verdict in (None, number == 4) for number, verdict in enumerate(found))
    assert sum(verdict is not None for verdict in found) > 10
