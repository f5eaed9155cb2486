"""TensorBoard's event files, in output/tensorboard."""

from __future__ import annotations

from pathlib import Path

from vtengine_training.loggers.base import Row, numbers

FOLDER = "tensorboard"


class TensorBoard:
    """done: the step that a resumed run goes on from; TensorBoard then hides what was written past it."""

    def __init__(self, output: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output / FOLDER), purge_step=done and done + 1)

    def log(self, row: Row) -> None:
        for name, value in numbers(row).items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))
        self._writer.flush()  # waits for the writing thread: a full disk is seen now, and a kill loses nothing

    def close(self) -> None:
        self._writer.close()
