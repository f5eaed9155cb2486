"""A run in small: a random model of two layers over bytes, a few pictures, a question each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from vtengine_training.trainer.config import GrpoConfig

from tests.tiny_model import byte_encoder
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
def start_ranks(tmp_path):
    """start_ranks(*arguments of Python, size=2): the processes, as torchrun would start them; killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, size: int = 2) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        paths = (REPO, REPO / "kernels", REPO / "training", Path(__file__).parent)
        common = {"PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
        common |= {"PYTHONFAULTHANDLER": "1"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = []
        for rank in range(size):
            with (tmp_path / f"rank-{rank}.err").open("w") as log:
                environment = os.environ | common | {"RANK": str(rank)}
                ranks.append(subprocess.Popen([sys.executable, *arguments], env=environment, stderr=log, text=True))
        started.extend(ranks)
        return ranks

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def ranks(start_ranks, tmp_path):
    """ranks(config, what, size=2): what the first of `size` ranks found."""

    def run(config, what: str, size: int = 2):
        path, out = tmp_path / "ranks.toml", tmp_path / f"{what}.out"
        path.write_text(to_toml(config))
        processes = start_ranks(str(Path(__file__).with_name("ranks_worker.py")), str(path), str(out), what, size=size)
        statuses = [process.wait(timeout=240) for process in processes]
        assert statuses == [0] * size, [(tmp_path / f"rank-{rank}.err").read_text() for rank in range(size)]
        return load_file(out) if what.startswith("gradients") else json.loads(out.read_text())

    return run
