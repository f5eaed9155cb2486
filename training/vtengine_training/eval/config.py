"""What an evaluation runs: a TOML file, read into a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vtengine_training.checks import at_least, not_empty


@dataclass(frozen=True)
class EvalConfig:
    """`count` generated questions of one split and seed, asked at each of `resolutions`; temperature 0 is greedy.

    model: a checkpoint folder, a Hugging Face id, or `glance`. results: a JSON file; an older one is kept beside it.
    """

    model: str = "glance"
    split: Literal["validation", "test"] = "test"
    seed: int = 0
    count: int = 1000
    resolutions: tuple[Literal["low", "high", "adaptive"], ...] = ("low", "high", "adaptive")
    concurrency: int = 32
    max_new_tokens: int = 64
    temperature: float = 0.0
    threads: int = 1
    results: str = "runs/eval.json"

    def __post_init__(self) -> None:
        not_empty(self, "model", "results")
        at_least(self, 1, "count", "concurrency", "max_new_tokens", "threads")
        if not self.temperature >= 0:
            raise ValueError(f"temperature = {self.temperature}: must be 0 (greedy) or more")
        if not self.resolutions:
            raise ValueError("resolutions = []: name at least one of low, high, adaptive")
