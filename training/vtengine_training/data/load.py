"""From a configuration to its examples: generated or read, mixed, and what was left out said once."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

from vtengine_training.data.config import GlanceData, SourceConfig
from vtengine_training.data.examples import Dataset, read_dataset
from vtengine_training.data.mix import mixed
from vtengine_training.glance.export import write_questions

log = logging.getLogger(__name__)


def load_examples(source: SourceConfig, folder: Path, split: str = "train", seed: int = 0) -> Dataset:
    """The examples of `source`. folder: for generated questions and unpacked images. split: of generated questions.

    Raises ValueError with field and remedy, OSError as files do.
    """
    files = [Path(name) for name in source.files]
    if source.glance is not None:
        files = [glance_questions(source.glance, folder, split)]
    section = "data" if split == "train" else split
    dataset = read_dataset(files, source, folder / "images", section)
    if dataset.rejected:
        counts = ", ".join(f"{code} {count}" for code, count in sorted(dataset.rejected.items()))
        log.warning("%s: %d rows cannot be used: %s", section, sum(dataset.rejected.values()), counts)
    if not source.mix:
        return dataset
    kept = tuple(mixed(dataset.examples, source.label, source.mix, seed, section))
    log.info("%s: %d of %d examples make the mix", section, len(kept), len(dataset))
    return replace(dataset, examples=kept)


def glance_questions(glance: GlanceData, folder: Path, split: str) -> Path:
    """The JSONL of generated questions; written first, where it is not there yet."""
    # All of it is in the name, so that another config gets other questions.
    made = folder / f"questions-{split}-{glance.seed}-{glance.count}{'-crops' if glance.crops else ''}"
    if not (made / "questions.jsonl").is_file():
        making = made.with_name(f".{made.name}.{os.getpid()}")
        shutil.rmtree(making, ignore_errors=True)
        write_questions(making, split, glance.seed, glance.count, balanced=False, crops=glance.crops)
        try:
            making.replace(made)
        except OSError:  # another process was faster: its questions are the same
            shutil.rmtree(making)
            if not (made / "questions.jsonl").is_file():
                raise
    return made / "questions.jsonl"
