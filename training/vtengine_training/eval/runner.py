"""Runs an evaluation and writes its results as JSON."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vtengine.cli.errors import UsageError
from vtengine.cli.models import SHIPPED_NAMES, find_model, is_hub_id, shipped_model
from vtengine.config import did_you_mean
from vtengine.engine.base import SamplingParams
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.model import load_model
from vtengine.protocol.conversation import Limits
from vtengine.protocol.profile import Profile, own_profile
from vtengine.rollout.group import Setting, in_order, run_sample
from vtengine.rollout.question import Question
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.stamp import stamp
from vtengine.vision.pipeline import ImagePipeline
from vtengine.vision.processor import image_processor
from vtengine_training.eval.config import EvalConfig
from vtengine_training.files import write_new
from vtengine_training.glance.export import write_questions

Row = dict[str, Any]
ALL_COLUMNS = {
    "resolution": "Resolution",
    "questions": "Questions",
    "right": "Right",
    "upscaled": "Looked again",
    "visual_ratio": "Visual tokens against always-high",
}


def model_folder(name: str, field: str = "model") -> Path:
    """The checkpoint folder that `field` of a config names; one that is on the Hugging Face hub is fetched into the
    hub's cache. Raises ValueError if it is none, or cannot be fetched."""
    if is_hub_id(name):
        try:
            return find_model(name)
        except UsageError as error:
            raise ValueError(str(error).replace("--model ", f"{field} = ", 1)) from None
    folder = shipped_model(name) if name in SHIPPED_NAMES else Path(name)
    if not (folder / "config.json").is_file():
        remedy = did_you_mean(name, SHIPPED_NAMES) or (
            "give the folder of a checkpoint, or its id on the Hugging Face hub (owner/name)"
        )
        raise ValueError(f"{field}: {folder} holds no config.json; {remedy}")
    return folder


def evaluate(config: EvalConfig, progress: Callable[[str, int], None]) -> Row:
    """Asks every question at every resolution. `progress(resolution, done)` is called as answers come in."""
    folder = model_folder(config.model)
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory() as place:
        rows = write_questions(Path(place), config.split, config.seed, config.count, balanced=False)
        results: dict[str, Row] = {}
        for resolution in config.resolutions:
            began = time.perf_counter()
            found = asyncio.run(_ask_all(config, folder, Path(place), rows, resolution, progress))
            results[resolution] = summary(found) | {"seconds": round(time.perf_counter() - began, 1)}
    return {
        "suite": Path(config.results).stem,
        "stamp": stamp(Path(__file__).parent),
        "quick": False,
        "rows": flat_rows(results),
        "tables": tables(Path(config.results).stem),
        "config": {
            key: getattr(config, key) for key in ("model", "split", "seed", "count", "max_new_tokens", "temperature")
        },
        "results": results,
    }


async def _ask_all(
    config: EvalConfig, folder: Path, root: Path, rows: list[Row], resolution: str, progress: Callable[[str, int], None]
) -> list[Row]:
    tokenizer = Tokenizer.load(folder)
    engine = EmbeddedEngine(load_model(folder).requires_grad_(False), tokenizer, EngineConfig(kv_bytes=1 << 28))
    sampling = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        stop_token_ids=tokenizer.stop_ids,
        logit_bias={token: float("-inf") for token in tokenizer.banned_ids},
    )
    profile = own_profile(folder, "glance")
    found: list[Row] = []
    try:
        with _pipeline(folder, profile) as pipeline:
            limits = Limits(resolution=resolution)  # type: ignore[arg-type]
            setting = Setting(engine, pipeline, tokenizer, profile, limits, sampling)
            questions = [Question(row["id"], row["image"], row["question"], root) for row in rows]
            jobs = (_job(setting, question) for question in questions)
            async for sample in in_order(jobs, config.concurrency):
                episode = sample.episode
                row = rows[len(found)]
                found.append(
                    {
                        **row,
                        "right": episode.answer == row["answer"],
                        "status": episode.status,
                        "upscaled": episode.is_upscaled,
                        "visual_tokens": episode.visual_tokens,
                        "visual_tokens_full": episode.visual_tokens_full,
                    }
                )
                progress(resolution, len(found))
    finally:
        await engine.close()
    return found


def _pipeline(folder: Path, profile: Profile) -> ImagePipeline:
    """As the checkpoint wants its images. Raises ValueError for what we would not make."""
    limits, mean, std = image_processor(folder)
    return ImagePipeline(limits, mean=mean, std=std, resize_mode=profile.resize_mode, low_view=profile.low_view)


def _job(setting: Setting, question: Question) -> Any:
    return lambda: run_sample(setting, question, 0)


def summary(rows: list[Row]) -> Row:
    """Shares, rounded to four digits: right answers overall, by kind and by whether the low view suffices."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        part = "needs_high" if row["needs_high"] else "low_is_enough"
        for name in ("all", part, f"kind/{row['kind']}", f"kind/{row['kind']}/{part}"):
            groups[name].append(row)
    return {
        "accuracy": {name: _share(group, "right") for name, group in sorted(groups.items())},
        "questions": {name: len(group) for name, group in sorted(groups.items())},
        "format_valid": round(sum(row["status"] == "answered" for row in rows) / len(rows), 4),
        "upscaled": {
            part: _share(groups[part], "upscaled") for part in ("all", "low_is_enough", "needs_high") if part in groups
        },
        "visual_tokens": sum(row["visual_tokens"] for row in rows),
        "visual_tokens_full": sum(row["visual_tokens_full"] for row in rows),
    }


def tables(name: str) -> Row:
    """Those of a result document: all questions, those that need the high view, the others."""
    few = {key: heading for key, heading in ALL_COLUMNS.items() if key != "visual_ratio"}
    groups = {"all": ALL_COLUMNS, "needs_high": few, "low_is_enough": few}
    return {f"{name}-{group}": {"columns": columns, "where": {"group": group}} for group, columns in groups.items()}


def flat_rows(results: dict[str, Row]) -> list[Row]:
    """One row per resolution and group of questions, for tables."""
    return [
        {
            "resolution": resolution,
            "group": group,
            "questions": found["questions"][group],
            "right": right,
            "upscaled": found["upscaled"].get(group),
            "visual_ratio": found["visual_tokens"] / found["visual_tokens_full"] if group == "all" else None,
        }
        for resolution, found in results.items()
        for group, right in found["accuracy"].items()
    ]


def _share(rows: list[Row], key: str) -> float:
    return round(sum(bool(row[key]) for row in rows) / len(rows), 4)


def write_results(results: Row, path: Path) -> Path | None:
    """As JSON; a reader never sees half a file. Returns where an older file is now, if there was one."""
    return write_new(path, json.dumps(results, indent=2) + "\n")
