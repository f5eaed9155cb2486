"""Weights & Biases. The run's id stands in output/wandb-id, so that a resumed run is the same one there."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtengine_training.files import write_whole
from vtengine_training.loggers.base import Row, numbers
from vtengine_training.loggers.config import WandbConfig

ID_FILE = "wandb-id"
CLOSING_SECONDS = 60
"""How long the end of a run waits for what has not been sent. It stays on the disk, for `wandb sync`."""


class Wandb:
    """settings: the run's configuration, shown beside its curves. Raises ValueError where no run can be opened."""

    def __init__(self, output: Path, config: WandbConfig, settings: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity or None,
                name=config.name or None,
                mode=config.mode,
                id=run_id(output),
                resume="allow",
                dir=str(output),
                config=dict(settings),
            )
        except Exception as error:
            raise ValueError(
                f'loggers: wandb cannot open a run: {error}; log in (`wandb login`), or set wandb.mode = "offline"'
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # its own counter cannot go back, a resumed run can

    def log(self, row: Row) -> None:
        self._run.log(numbers(row))

    def close(self) -> None:
        """Raises TimeoutError after CLOSING_SECONDS."""
        closing = threading.Thread(target=self._run.finish, daemon=True)
        closing.start()
        closing.join(CLOSING_SECONDS)
        if closing.is_alive():
            raise TimeoutError(f"not all was sent within {CLOSING_SECONDS} s; `wandb sync` sends the rest")


def run_id(output: Path) -> str:
    """The id of the run in this folder, made when it is first asked for."""
    path = output / ID_FILE
    if not path.is_file():
        write_whole(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()
