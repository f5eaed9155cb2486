"""A run in small: a random model of two layers over bytes, a few pictures, a question each."""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import SystemRandom
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from vtengine_training.trainer.config import GrpoConfig
from vtengine_training.trainer.loop import Run

from tests.tiny_model import byte_encoder
from tests.training.trainer.toy import rewarder
from tests.training.trainer.toy_model import tiny_config
from vtengine.config import build, to_toml
from vtengine.model import Qwen2_5_VL, save_model

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder."""
    folder = tmp_path_factory.mktemp("tiny")
    encoder = byte_encoder()
    encoder.save(str(folder / "tokenizer.json"))
    model = Qwen2_5_VL.build(tiny_config(encoder), 3)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(0.5)  # flatter distributions: more to choose from
    save_model(model, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 12544}))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of five questions about three pictures."""
    folder = tmp_path_factory.mktemp("questions")
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 256, (56 + 28 * number, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [
        {"id": f"q{k}", "image": f"{k % 3}.png", "question": f"{k}?", "answer": str(k), "needs_high": bool(k % 2)}
        for k in range(5)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_config(tiny_folder: Path, tiny_data: Path, tmp_path: Path):
    """make_config(section={...}, key=value): a config of a run below tmp_path."""

    def make(**changes) -> GrpoConfig:
        data = {
            "model": str(tiny_folder),
            "output": str(tmp_path / "run"),
            "profile": "glance",
            "device": "cpu",
            "threads": 1,
            "steps": 3,
            "data": {"files": [str(tiny_data)]},
            "rollout": {"prompts": 2, "n": 4, "max_new_tokens": 6, "kv_mib": 16, "image_cache_mib": 16},
            "update": {"learning_rate": 1e-3, "max_tokens": 200},
            "checkpoint": {"every": 1, "keep": 2},
        }
        for key, value in changes.items():
            data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
        return build(GrpoConfig, data)

    return make


@pytest.fixture
def run(make_config):
    """run(reward function, **changes of the config): a run that has not begun; closed at the end."""
    made = []

    def make(function=None, **changes) -> Run:
        made.append(Run(make_config(**changes), rewarder(function)))
        return made[-1]

    yield make
    for one in made:
        asyncio.run(one.close())


def unasked_port() -> int:
    """A free one that the system gives to nobody who asks for any: the first rank takes it seconds later."""
    while True:
        port = SystemRandom().randrange(15_000, 32_000)  # below those of Linux; `random` has one seed in all tests
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def launch(folder: Path, *arguments: str, size: int = 2, **pipes: int) -> list[subprocess.Popen[str]]:
    """Python with these arguments in `size` processes, as torchrun would start them; what they say: rank-N.err."""
    port = unasked_port()
    paths = (REPO, REPO / "kernels", REPO / "training", Path(__file__).parent)
    common = {"PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    common |= {"PYTHONFAULTHANDLER": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(size):
        with (folder / f"rank-{rank}.err").open("w") as log:
            environment = os.environ | common | {"RANK": str(rank)}
            ranks.append(
                subprocess.Popen([sys.executable, *arguments], env=environment, stderr=log, text=True, **pipes)
            )
    return ranks


def kill(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def start_ranks(tmp_path):
    """start_ranks(*arguments of Python): two processes, or `size`; killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, size: int = 2) -> list[subprocess.Popen[str]]:
        ranks = launch(tmp_path, *arguments, size=size)
        started.extend(ranks)
        return ranks

    yield start
    kill(started)


class Meeting:
    """Ranks that have met, and do one case after the other: to start them takes longer than most cases."""

    def __init__(self, folder: Path, size: int = 2) -> None:
        self.folder, self.size = folder, size
        self.processes: list[subprocess.Popen[str]] = []

    def do(self, *case: str) -> None:
        """Returns when all have done it. After a fault they end, and the next case gets others."""
        if not self.processes:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            worker = str(Path(__file__).with_name("ranks_worker.py"))
            self.processes = launch(self.folder, worker, size=self.size, **pipes)
        for process in self.processes:
            with suppress(BrokenPipeError):  # it has no answer either
                print(json.dumps(case), file=process.stdin, flush=True)
        until = time.monotonic() + 240
        said = [self._answer(process, until) for process in self.processes]
        if said != ["done\n"] * self.size:
            kill(self.processes)
            self.processes = []
            logs = [(self.folder / f"rank-{rank}.err").read_text() for rank in range(self.size)]
            raise AssertionError("\n".join(logs))

    def _answer(self, process: subprocess.Popen[str], until: float) -> str:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
        return process.stdout.readline() if ready else "nothing in time"

    def leave(self) -> None:
        """They part, and end well."""
        for process in self.processes:
            process.stdin.close()
        assert [process.wait(timeout=60) for process in self.processes] == [0] * len(self.processes)


@contextmanager
def meeting(folder: Path, size: int) -> Iterator[Meeting]:
    met = Meeting(folder, size)
    yield met
    try:
        met.leave()
    finally:
        kill(met.processes)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Meeting]:
    with meeting(tmp_path_factory.mktemp("pair"), 2) as two:
        yield two


@pytest.fixture(scope="module")
def quartet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Meeting]:
    with meeting(tmp_path_factory.mktemp("quartet"), 4) as four:
        yield four


def asked(met: Meeting, folder: Path) -> Callable[[GrpoConfig, str], Any]:
    """run(config, what): what the first rank found."""

    def run(config: GrpoConfig, what: str) -> Any:
        path, out = folder / "ranks.toml", folder / f"{what}.out"
        path.write_text(to_toml(config))
        met.do(str(path), str(out), what)
        return load_file(out) if what.startswith("gradients") else json.loads(out.read_text())

    return run


@pytest.fixture
def ranks(pair, tmp_path):
    """ranks(config, what): what the first of two ranks found."""
    return asked(pair, tmp_path)


@pytest.fixture
def four_ranks(quartet, tmp_path):
    """four_ranks(config, what): what the first of four ranks found."""
    return asked(quartet, tmp_path)
