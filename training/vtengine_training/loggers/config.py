"""The `loggers` of a training configuration, and its [wandb] section. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LoggerName = Literal["console", "jsonl", "tensorboard", "wandb"]
DEFAULT_LOGGERS: tuple[LoggerName, ...] = ("console", "jsonl")


@dataclass(frozen=True)
class WandbConfig:
    """For "wandb" among the loggers. name: of the run; empty = wandb invents one. entity: empty = your own.

    mode: offline writes below the run's output, needs neither network nor account, and `wandb sync` sends it later.
    """

    project: str = "vtengine"
    entity: str = ""
    name: str = ""
    mode: Literal["online", "offline"] = "online"
