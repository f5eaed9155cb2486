"""Runs made by hand, and a real headless browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from vtengine.viewer import PageOptions, render_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def turn(text: str, size: tuple[int, int] | None, cached: int = 0, action: str | None = None) -> dict[str, Any]:
    images = [{"width": w, "height": h, "visual_tokens": w * h // 784, "encoded": True} for w, h in [size] if size]
    return {
        "text": text, "finish": "stop", "action": action, "prompt_tokens": cached + 40, "cached_tokens": cached,
        "prefill_tokens": 40, "completion_tokens": 12, "images": images, "latency_s": 0.1, "ttft_s": 0.05,
    }  # fmt: skip


def episode(name: str, image: str, *turns: dict[str, Any], **values: Any) -> dict[str, Any]:
    row = {
        "id": name, "sample": 0, "status": "answered", "error": None, "answer": "yes", "upscaled": len(turns) > 1,
        "turns": list(turns), "visual_tokens": 6, "visual_tokens_full": 24, "latency_s": 0.2, "logprob_sum": -1.5,
        "image": image, "question": f"What is {name}?",
    }  # fmt: skip
    return row | values


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A folder with one picture of 168x112 pixels: low view 84x56, high view 168x112."""
    picture = Image.new("RGB", (168, 112), "white")
    ImageDraw.Draw(picture).ellipse((20, 20, 150, 90), fill=(200, 40, 40))
    picture.save(tmp_path / "ball.png")
    return tmp_path


@pytest.fixture
def two_turn_rows() -> list[dict[str, Any]]:
    call = '<think>Too small.</think><tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
    answer = "<think>A red ball.</think><answer>yes</answer>"
    low, high = (84, 56), (168, 112)
    asking = turn(call, low, 0, "resize") | {"advantage": 0.5}
    fault = {"code": "image_not_found", "message": "no such file"}
    rejected = {"id": "gone", "status": "rejected", "error": fault, "expected": ["no"], "correct": False}
    return [
        episode("plain", "ball.png", turn(answer, low), correct=True, expected=["yes"]),
        episode(
            "closer", "ball.png", asking, turn(answer, high, 32), visual_tokens=30, correct=False,
            expected=["no"], reward=0.9, advantage=-0.25,
        ),
        episode("gone", "gone.png", turns=[], upscaled=False, answer=None, visual_tokens=0) | rejected,
    ]  # fmt: skip


@pytest.fixture
def make_page(run_folder: Path) -> Callable[..., Path]:
    def make(rows: list[Any], **options: Any) -> Path:
        source = run_folder / "out.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        render_page(source, run_folder / "out.html", PageOptions("out.jsonl", **options))
        return run_folder / "out.html"

    return make


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Opens a page in a headless browser; returns the DOM after its script ran. `screenshot`: also a PNG there."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no headless browser: none of {', '.join(BROWSERS)} is installed")

    def open_page(page: Path, fragment: str = "", screenshot: Path | None = None, size: str = "1320,1500") -> str:
        wanted = ["--dump-dom"] if screenshot is None else [f"--screenshot={screenshot}"]
        profile = f"--user-data-dir={tmp_path / 'browser'}"
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--hide-scrollbars",
            "--disable-gpu",
            profile,
            f"--window-size={size}",
        ]
        done = subprocess.run(
            [browser, *flags, *wanted, page.as_uri() + fragment],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout

    return open_page
