"""A checkpoint folder without weights, scripted replies, pictures, and ways to run the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

from tests.tiny_model import QWEN3_VISION, TINY_VISION, byte_encoder, config_of, qwen3_text, tiny_text
from vtengine.cli import main
from vtengine.model import Qwen2_5_VL, Qwen3_VL, save_model

REPO = Path(__file__).resolve().parents[2]
CALL = '<think>too small</think><tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
SCRIPTS = [
    ["<think>easy</think><answer>red</answer>"],
    [CALL, "<think>now I see</think><answer>blue</answer>"],
    ["no tags at all"],
]
TIMES = ("latency_s", "ttft_s")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer, the glance profile and a config that names no weights."""
    folder = tmp_path_factory.mktemp("model")
    byte_encoder().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    (folder / "profile.toml").write_bytes((REPO / "vtengine/protocol/profiles/glance.toml").read_bytes())
    return folder


@pytest.fixture(scope="session")
def checkpoint(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a tiny random model in it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    shutil.copytree(model_folder, folder)
    config = config_of(tiny_text(272), TINY_VISION, Tokenizer.from_file(str(folder / "tokenizer.json")))
    save_model(Qwen2_5_VL.build(config, 0), folder)
    return folder


@pytest.fixture(scope="session")
def qwen3_checkpoint(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tiny random Qwen3-VL, and its processor's file as released."""
    folder = tmp_path_factory.mktemp("tiny") / "qwen3"
    shutil.copytree(model_folder, folder)
    config = config_of(qwen3_text(272), QWEN3_VISION, Tokenizer.from_file(str(folder / "tokenizer.json")))
    save_model(Qwen3_VL.build(config, 0), folder)
    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    sizes = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    size = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}}
    (folder / "preprocessor_config.json").write_text(json.dumps(size | sizes | half))
    return folder


@pytest.fixture
def scripted(model_folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Flags of a run on scripted replies, each taking `delay_s`."""

    def flags(delay_s: float = 0.0, scripts: list[list[str]] = SCRIPTS, text: str = "") -> list[str]:
        path = tmp_path / "replies.json"
        path.write_text(json.dumps({"delay_s": delay_s, "scripts": scripts, "text": text}))
        return ["--model", str(model_folder), "--backend", f"scripted:{path}"]

    return flags


@pytest.fixture
def questions(tmp_path: Path) -> Callable[..., Path]:
    """Writes IN.jsonl with `count` different pictures, then `extra` lines as they are."""

    def write(count: int = 6, *extra: bytes | dict[str, Any], name: str = "in.jsonl") -> Path:
        lines = []
        for number in range(count):
            make_picture(tmp_path / f"p{number}.png", number)
            row = {
                "id": f"q{number}",
                "image": f"p{number}.png",
                "question": f"{chr(48 + number)} is which?",  # no two begin alike, so the order does not matter
                "answer": "blue",
                "k": number,
            }
            lines.append(json.dumps(row).encode())
        lines += [line if isinstance(line, bytes) else json.dumps(line).encode() for line in extra]
        (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
        return tmp_path / name

    return write


def make_picture(path: Path, number: int) -> Path:
    image = Image.new("RGB", (112 + 28 * (number % 5), 84), "white")
    ImageDraw.Draw(image).text((10 + number % 30, 30), str(number), fill=(number * 37 % 256, 0, 90))
    image.save(path)
    return path


@pytest.fixture
def vtengine(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the command in this process."""

    def run(*arguments: str | Path) -> Done:
        capfd.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Done(status, out, err)

    return run


class Process:
    """The command in a process of its own."""

    def __init__(self, *arguments: str | Path, **options: Any) -> None:
        folders = [str(REPO), str(REPO / "kernels"), str(REPO / "training")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "vtengine.cli", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.popen = subprocess.Popen(line, env=environment, **(pipes | options))

    def wait_for_rows(self, path: Path, count: int) -> None:
        """Returns once `count` rows are in the file."""
        give_up_s = time.monotonic() + 150
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            assert self.popen.poll() is None, self.popen.communicate()
            assert time.monotonic() < give_up_s
            time.sleep(0.02)

    def finish(self) -> Done:
        out, err = self.popen.communicate(timeout=120)
        assert "Traceback" not in out + err, err
        return Done(self.popen.returncode, out, err)


@pytest.fixture
def process() -> Iterator[Callable[..., Process]]:
    """Starts the command; what still runs at the end of the test is killed."""
    started: list[Process] = []

    def start(*arguments: str | Path, **options: Any) -> Process:
        started.append(Process(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        if one.popen.poll() is None:
            one.popen.kill()
            one.popen.communicate()


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _strip(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _strip(item, names) for key, item in value.items() if key not in names}
    return [_strip(item, names) for item in value] if isinstance(value, list) else value


@pytest.fixture
def rows_of() -> Callable[[Path], list[dict[str, Any]]]:
    return _rows


@pytest.fixture
def without_times() -> Callable[[Path], list[str]]:
    """Lines of an output with the times taken out, and other fields too if named."""
    return lambda path, *more: [json.dumps(_strip(row, TIMES + more)) for row in _rows(path)]
