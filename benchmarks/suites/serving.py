"""What `vtengine serve` costs: the same questions through the server and straight through the episode loop.

The shipped model, greedy, fp32, 64 at a time; every other picture is made to be asked about twice. Direct: `run_batch`
in this process. Server: the real application in this process, asked by a process of its own over 64 kept connections,
which has its requests ready beforehand (load_client.py); the images travel as base64 in either case. Each run has a
fresh engine and empty caches; the sides take turns within each round. With the engine in this process, where it shares
Python's lock with the event loop (`--data-parallel 0`), in a process of its own (1, as `vtengine serve` has it), and
with two of those (2). `overhead` is the median over the rounds of a side's time over that of the direct side with as
many processes, less one. The client shares the machine, so its processor time is in it; the direct side has no client.
The server writes its log, as the command does.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from child import read
from two_turn_run import Asked, cpu_s, fresh_setting, held_out_questions, model_folder

from vtengine.cli.engine import EngineSetup, start_engines
from vtengine.cli.serve import LOG_FORMAT
from vtengine.engine.base import Backend
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.model import Qwen2_5_VL, load_model
from vtengine.rollout.group import Setting, run_batch
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.server.app import create_app, create_house
from vtengine.server.config import ServerLimits
from vtengine.server.run import Server, address, bind

TESTS = ["tests/server/test_completions.py", "tests/server/test_choices.py"]
QUESTIONS, CONCURRENCY, ROUNDS = 192, 64, 7
SIDES = ("direct", "server", "server, streamed")
ENGINES = (0, 1, 2)
"""Processes of engines; 0: one engine in this one."""
CLIENT = Path(__file__).parents[1] / "load_client.py"

TABLES = {
    "serving-overhead": {
        "columns": {
            "side": "Side",
            "engines": "Engine processes",
            "concurrency": "Concurrency",
            "questions_per_s": "Questions/s",
            "overhead": "Overhead",
            "cpu_ms": "CPU ms per question",
            "loop_cpu_ms": "Event loop, CPU ms per question",
            "client_cpu_ms": "Client, CPU ms per question",
            "first_byte_ms": "First byte, ms",
            "last_byte_ms": "Last byte, ms",
            "same_answers": "Same answers",
        },
        "where": {"part": "overhead"},
    }
}


@dataclass(frozen=True)
class Pass:
    """One side, once. cpu_s: of all threads of this process and of engines' processes; loop_s: of the event loop's.

    first_s, last_s: of each request, as the client saw them; empty where there is none.
    """

    wall_s: float
    cpu_s: float
    loop_s: float
    answers: tuple[str, ...]
    client_s: float = 0.0
    first_s: tuple[float, ...] = ()
    last_s: tuple[float, ...] = ()


def run(context: Any) -> list[dict[str, Any]]:
    folder = model_folder()
    logging.basicConfig(level=logging.INFO, filename=os.devnull, format=LOG_FORMAT)
    model = load_model(folder, dtype=torch.float32).requires_grad_(False)
    asked = held_out_questions(16 if context.quick else QUESTIONS)
    concurrency = 8 if context.quick else CONCURRENCY
    sides = [(side, engines) for engines in ENGINES if engines <= torch.get_num_threads() for side in SIDES]
    for side in SIDES:  # warm-up: allocator, threads, compiled op
        once(side, partial(embedded, model, concurrency), folder, asked[:16], concurrency)
    gc.collect()
    gc.freeze()  # as the command does; a full collection would fall to any side
    passes: dict[tuple[str, int], list[Pass]] = {side: [] for side in sides}
    for index in range(2 if context.quick else ROUNDS):
        shift = index % len(sides)
        for side, engines in sides[shift:] + sides[:shift]:
            make = partial(embedded, model) if engines == 0 else partial(side_by_side, folder, engines)
            passes[side, engines].append(once(side, partial(make, concurrency), folder, asked, concurrency))
    gc.unfreeze()
    return [_row(side, engines, passes, concurrency) for side, engines in sides]


def embedded(model: Qwen2_5_VL, concurrency: int, tokenizer: Tokenizer) -> Backend:
    config = EngineConfig(max_running=concurrency, max_chunks_per_s=ServerLimits().max_text_events_per_s)
    return EmbeddedEngine(model, tokenizer, config)


def side_by_side(folder: Path, engines: int, concurrency: int, tokenizer: Tokenizer) -> Backend:
    del tokenizer
    pace = ServerLimits().max_text_events_per_s
    return start_engines(engines, EngineSetup(str(folder), "cpu", "float32", concurrency, max_chunks_per_s=pace))


def once(
    side: str, make_backend: Callable[[Tokenizer], Backend], folder: Path, asked: Sequence[Asked], concurrency: int
) -> Pass:
    async def go() -> Pass:
        async with fresh_setting(folder, make_backend, ask_one_in=2) as setting:
            if side == "direct":
                return await _direct(setting, asked, concurrency)
            return await _served(setting, asked, concurrency, streams=side != "server")

    return asyncio.run(go())


async def _direct(setting: Setting, asked: Sequence[Asked], concurrency: int) -> Pass:
    questions = [one.question for one in asked]
    began, busy = time.perf_counter(), _busy_s(setting.backend)
    answers = [sample.episode.answer async for sample in run_batch(setting, questions, concurrency=concurrency)]
    return Pass(time.perf_counter() - began, *_since(busy, setting.backend), tuple(answer or "" for answer in answers))


def _busy_s(backend: Backend) -> tuple[float, float]:
    """CPU seconds of this process and the engines' processes, and of this thread."""
    return cpu_s(backend), time.thread_time()


def _since(before: tuple[float, float], backend: Backend) -> tuple[float, float]:
    process_s, thread_s = _busy_s(backend)
    return process_s - before[0], thread_s - before[1]


async def _served(setting: Setting, asked: Sequence[Asked], concurrency: int, streams: bool) -> Pass:
    listening = bind("127.0.0.1", 0)
    limits = ServerLimits(max_running=concurrency, max_waiting=4 * concurrency)
    house = create_house(setting, "glance", limits)
    server = Server(create_app(house), house)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    with tempfile.NamedTemporaryFile("wb", suffix=".jsonl") as file:
        for one in asked:
            file.write(json.dumps(_body(one, streams)).encode() + b"\n")
        file.flush()
        line = [sys.executable, str(CLIENT), address(listening), file.name, "--concurrency", str(concurrency)]
        pipe = subprocess.PIPE
        client = await asyncio.create_subprocess_exec(*line, stdin=pipe, stdout=pipe, limit=1 << 26)
        assert client.stdin is not None and client.stdout is not None
        await client.stdout.readline()
        before = _busy_s(setting.backend)
        client.stdin.write(b"\n")
        said = await client.stdout.readline()
        busy = _since(before, setting.backend)
        report = read(CLIENT.name, await client.wait(), said)
    server.stop()
    await serving
    listening.close()
    if report["failed"]:
        raise RuntimeError(f"{len(report['failed'])} requests failed: {report['failed'][0]}")
    times = (tuple(report["first_s"]), tuple(report["last_s"]))
    return Pass(report["wall_s"], *busy, tuple(report["contents"]), report["client_cpu_s"], *times)


def _body(one: Asked, streams: bool) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": one.question.image}}
    content = [image, {"type": "text", "text": one.question.text}]
    return {"model": "glance", "stream": streams, "messages": [{"role": "user", "content": content}]}


def _row(side: str, engines: int, passes: dict[tuple[str, int], list[Pass]], concurrency: int) -> dict[str, Any]:
    mine, direct = passes[side, engines], passes["direct", engines]
    count = len(mine[0].answers)
    wall_s = statistics.median(one.wall_s for one in mine)
    ratios = [one.wall_s / other.wall_s for one, other in zip(mine, direct, strict=True)]
    pairs = list(zip(mine[-1].answers, direct[-1].answers, strict=True))
    firsts, lasts = [s for one in mine for s in one.first_s], [s for one in mine for s in one.last_s]
    return {
        "part": "overhead",
        "side": side,
        "engines": engines,
        "concurrency": concurrency,
        "questions": count,
        "rounds": len(mine),
        "questions_per_s": count / wall_s,
        "overhead": statistics.median(ratios) - 1,
        "overheads": [ratio - 1 for ratio in ratios],
        "cpu_ms": 1e3 * statistics.median(one.cpu_s for one in mine) / count,
        "loop_cpu_ms": 1e3 * statistics.median(one.loop_s for one in mine) / count,
        "client_cpu_ms": 1e3 * statistics.median(one.client_s for one in mine) / count if firsts else None,
        "first_byte_ms": 1e3 * statistics.median(firsts) if firsts else None,
        "last_byte_ms": 1e3 * statistics.median(lasts) if lasts else None,
        "same_answers": sum(a == b for a, b in pairs) / len(pairs),
    }
