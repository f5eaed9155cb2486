"""The small model and questions of the trainer's tests."""

from __future__ import annotations

from tests.training.trainer.conftest import tiny_data, tiny_folder

__all__ = ["tiny_data", "tiny_folder"]
