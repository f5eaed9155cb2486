"""What a curation runs: a TOML file, read into frozen dataclasses. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from vtengine.cli.engine_args import deciding
from vtengine.config import to_dict
from vtengine_training.checks import at_least, not_empty, positive_or_none
from vtengine_training.data.config import DataConfig
from vtengine_training.rewards.rewarder import RewardConfig

WHERE = frozenset({"output", "concurrency", "device", "threads", "kv_gb", "deadline_s", "format"})
"""Settings that decide where and how fast, not what is written."""


@dataclass(frozen=True)
class CurateConfig:
    """Every question is answered `rollouts` times at each of two views, low and high, in one turn.

    model: a checkpoint folder, a Hugging Face id, or a shipped name. backend: embedded, sglang, or the URL of a server.
    output: a folder. format: of the finished file; parquet holds the images. margin: right answers that the high view
    must have more, for a question to need it. reward: how answers are judged (the penalty has no part in it).
    kv_gb: memory for keys and values; None = by the machine. engine_args: of SGLang's engine by name, with backend =
    "sglang". deadline_s: longest time of a rollout at SGLang, 0 = no bound, None = 600.
    """

    model: str
    output: str
    data: DataConfig
    rollouts: int = 8
    margin: int = 6
    format: Literal["jsonl", "parquet"] = "jsonl"
    backend: str = "embedded"
    profile: str = ""
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    threads: int | None = None
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 512
    concurrency: int = 64
    kv_gb: float | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)
    deadline_s: float | None = None
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        not_empty(self, "model", "output")
        at_least(self, 1, "rollouts", "max_new_tokens", "concurrency")
        positive_or_none(self, "threads", "kv_gb")
        if self.engine_args and self.backend != "sglang":
            raise ValueError(f'engine_args: is for backend = "sglang", the backend is {self.backend!r}; leave it out')
        if self.deadline_s is not None:
            if not 0 <= self.deadline_s < math.inf:
                raise ValueError(f"deadline_s = {self.deadline_s}: must be 0 (no bound) or more seconds")
            if self.backend == "embedded":
                raise ValueError(
                    f"deadline_s = {self.deadline_s:g}: is for SGLang, the backend is embedded; leave it out"
                )
        if not 1 <= self.margin <= self.rollouts:
            raise ValueError(f"margin = {self.margin}: must be from 1 to rollouts (= {self.rollouts})")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature = {self.temperature}: must be 0 or more")
        if self.temperature == 0 and self.rollouts > 1:
            raise ValueError(f"temperature = 0: {self.rollouts} greedy rollouts would be equal; use rollouts = 1")

    @property
    def what(self) -> dict[str, Any]:
        """The settings that decide what is written: an interrupted curation goes on only with the same."""
        engine = deciding(self.engine_args)
        others = {name: value for name, value in to_dict(self).items() if name not in {"engine_args", *WHERE}}
        return others | ({"engine_args": engine} if engine else {})
