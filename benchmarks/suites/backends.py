"""Engines side by side on this machine: ours, SGLang, vLLM and `transformers`, on the same prompts and pixels.

The shipped model, greedy, fp32; every other picture is made to be asked about twice; the same episode loop drives all.
SGLang (a server on loopback) and vLLM (behind a pipe) run in environments of their own (`make sglang-venv
vllm-venv`); one that is not there is named in a row and left out. Prefix caches are emptied before each run. SGLang
without AMX is plain torch on a CPU, so its times say little; its counts and replies are exact.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from child import answer_of
from peer_backend import (
    SGLANG_FLAGS,
    SGLANG_PYTHON,
    VLLM_PYTHON,
    PeerMissing,
    Started,
    VllmBackend,
    flush_sglang,
    sglang_server,
)
from transformers_backend import TransformersBackend
from two_turn_run import Asked, Run, account, held_out_questions, model_folder, run_once, same_replies

from vtengine.engine.base import Backend
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.engine.sglang import SglangHttpBackend
from vtengine.model import load_model
from vtengine.rollout.tokenizer import Tokenizer

TESTS = ["tests/engine/conformance", "tests/benchmarks"]
QUESTIONS, CONCURRENCIES, ASK_ONE_IN = 128, (1, 8, 64), 2
PROBE = Path(__file__).parents[1] / "peers" / "probe.py"

TABLES = {
    "backends": {
        "columns": {
            "engine": "Engine",
            "resumption": "Resumption",
            "concurrency": "Concurrency",
            "questions_per_s": "Questions/s",
            "tokens_per_s": "Tokens/s",
            "ttft_turn2_ms": "First token of turn 2, ms",
            "prefill_tokens": "Tokens prefilled",
            "same_replies": "Same replies as transformers",
        },
        "where": {"part": "speed"},
    },
    "backends-process": {
        "columns": {"engine": "Engine", "startup_s": "Start-up, s", "peak_mib": "Peak memory, MiB", "note": "Note"},
        "where": {"part": "process"},
    },
}

MakeBackend = Callable[[Tokenizer], Backend]


@dataclass(frozen=True)
class Side:
    """An engine that is up. make: a backend for one run of that concurrency, with empty caches."""

    engine: str
    resumption: str
    make: Callable[[int], MakeBackend]
    concurrencies: tuple[int, ...]


def run(context: Any) -> list[dict[str, Any]]:
    folder = model_folder()
    asked = held_out_questions(8 if context.quick else QUESTIONS)
    concurrencies = (4,) if context.quick else CONCURRENCIES
    rows = [_probe(name, len(asked)) for name in ("embedded", "transformers")]
    runs: dict[tuple[str, str, int], Run] = {}
    for open_side in _sides(folder, concurrencies, context.quick):
        try:
            with open_side() as (side, started):
                for concurrency in side.concurrencies:
                    key = (side.engine, side.resumption, concurrency)
                    runs[key] = run_once(folder, side.make(concurrency), asked, concurrency, ask_one_in=ASK_ONE_IN)
                if started is not None and side.resumption == "on":
                    process = {"startup_s": started.startup_s, "peak_mib": started.peak_mib()}
                    rows.append({"part": "process", "engine": side.engine, **process, "note": ""})
        except PeerMissing as missing:
            rows.append({"part": "process", "engine": missing.engine, "note": f"not measured: {missing}"})
    truth = next(one for (engine, _, _), one in runs.items() if engine == "transformers")
    return [_row(*key, one, truth, asked) for key, one in runs.items()] + rows


def _row(engine: str, resumption: str, concurrency: int, one: Run, truth: Run, asked: list[Asked]) -> dict[str, Any]:
    row = {"part": "speed", "engine": engine, "resumption": resumption, "concurrency": concurrency}
    return {**row, **account([one], asked), "same_replies": same_replies(one, truth)}


def _sides(folder: Path, concurrencies: tuple[int, ...], quick: bool) -> Iterator[Callable[[], Any]]:
    """One engine is up at a time, so that none takes a core from another."""
    yield partial(_transformers, folder, concurrencies[:1])
    for resume in (True, False):
        yield partial(_embedded, folder, concurrencies, resume)
    for resume in (True,) if quick else (True, False):
        yield partial(_vllm, folder, concurrencies, resume)
        yield partial(_sglang, folder, concurrencies, resume)


@contextmanager
def _transformers(folder: Path, concurrencies: tuple[int, ...]) -> Iterator[tuple[Side, Started | None]]:
    """One request at a time: the truth that the replies of all are compared with."""
    yield Side("transformers", "none", lambda _: lambda _: TransformersBackend(folder, 1), concurrencies), None


@contextmanager
def _embedded(folder: Path, concurrencies: tuple[int, ...], resume: bool) -> Iterator[tuple[Side, Started | None]]:
    model = load_model(folder, dtype=torch.float32).requires_grad_(False)

    def make(concurrency: int) -> MakeBackend:
        config = EngineConfig(max_running=concurrency, resume=resume)
        return lambda tokenizer: EmbeddedEngine(model, tokenizer, config)

    yield Side("vtengine", _word(resume), make, concurrencies), None


@contextmanager
def _vllm(folder: Path, concurrencies: tuple[int, ...], resume: bool) -> Iterator[tuple[Side, Started | None]]:
    _require("vLLM", VLLM_PYTHON)
    backend = VllmBackend(folder, Tokenizer.load(folder).image_pad_id, resume)

    def make(concurrency: int) -> MakeBackend:
        asyncio.run(_emptied(backend))
        return lambda tokenizer: backend

    try:
        yield Side("vLLM", _word(resume), make, concurrencies), backend.started
    finally:
        backend.stop()


@contextmanager
def _sglang(folder: Path, concurrencies: tuple[int, ...], resume: bool) -> Iterator[tuple[Side, Started | None]]:
    _require("SGLang", SGLANG_PYTHON)
    flags = SGLANG_FLAGS if resume else (*SGLANG_FLAGS, "--disable-radix-cache")
    with sglang_server(folder, *flags) as started:

        def make(concurrency: int) -> MakeBackend:
            flush_sglang(started.url)
            return lambda tokenizer: SglangHttpBackend(started.url, folder)

        yield Side("SGLang", _word(resume), make, concurrencies), started


async def _emptied(backend: VllmBackend) -> None:
    await backend.reset()
    await backend.close()


def _probe(name: str, count: int) -> dict[str, Any]:
    found = answer_of(f"{PROBE.name} {name}", [sys.executable, str(PROBE), name, str(count)])
    engine = "vtengine" if name == "embedded" else name
    return {"part": "process", "engine": engine, **found, "note": ""}


def _require(engine: str, python: Path) -> None:
    if not python.is_file():
        raise PeerMissing(engine, "its environment is not there")


def _word(resume: bool) -> str:
    return "on" if resume else "off"
