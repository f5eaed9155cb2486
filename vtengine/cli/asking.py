"""A row of the input answered: the record of its episode, scored where it has an answer."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtengine.cli.errors import UsageError
from vtengine.cli.inputs import InputRow
from vtengine.cli.scoring import is_correct
from vtengine.viewer.totals import UNFINISHED
from vtengine.vision.source import is_url

if TYPE_CHECKING:
    from vtengine.rollout.group import Setting

Row = dict[str, Any]
LOGPROB_DIGITS = 3  # batches of other sizes differ in later ones


def check_image_root(arguments: argparse.Namespace) -> None:
    """Raises UsageError where it is no folder."""
    if arguments.image_root is not None and not arguments.image_root.is_dir():
        raise UsageError(f"--image-root {arguments.image_root}: is not a folder")


async def answer_row(arguments: argparse.Namespace, setting: Setting, row: InputRow, sample: int) -> tuple[Row, bool]:
    """The record, and whether an image could be opened. Relative paths start at the input's folder."""
    from vtengine.rollout.group import run_sample
    from vtengine.rollout.question import Question
    from vtengine.rollout.records import episode_row

    image, root = place_image(row.image, arguments) if row.image is not None else (None, arguments.input.parent)
    done = await run_sample(setting, Question(row.id, image, row.question, root, row.carried), sample)
    record = episode_row(done.episode, sample)
    if record["logprob_sum"] is not None:  # it is where it has no finite value
        record["logprob_sum"] = round(record["logprob_sum"], LOGPROB_DIGITS)
    score(record, row)
    return record, done.episode.image is not None


def score(record: Row, row: InputRow) -> None:
    """Adds the accepted answers to the record, where the row has any, and whether it has one of them."""
    if row.answers:
        record["expected"] = list(row.answers)
        if record["status"] not in UNFINISHED:
            record["correct"] = is_correct(record["answer"], row.answers)


def place_image(image: str, arguments: argparse.Namespace) -> tuple[str, Path]:
    """(source, root) as the pipeline wants them: relative paths start at the input's folder, not at the root."""
    folder = arguments.input.parent
    if arguments.image_root is None or is_url(image):
        return image, folder
    return os.path.abspath(folder / image), arguments.image_root
