"""`vtengine-train curate`: labels a set of questions with the model itself; run it again to go on."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vtengine.config import load_config, to_toml
from vtengine_training.curate.config import CurateConfig
from vtengine_training.missing import (
    absent_files,
    end_dry_run,
    of_backend,
    of_data,
    of_model,
    of_profile,
    of_reward,
    refused,
)


def run_curate(arguments: argparse.Namespace) -> int:
    """The command. Raises ValueError for what cannot be used, OSError where files cannot be written."""
    config = load_config(CurateConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(to_toml(config), end="")
        return end_dry_run(arguments.config, plan(config), list(_missing(config)))
    from vtengine.cli.errors import CliError
    from vtengine_training.files import only_run_in

    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        with only_run_in(Path(config.output)):
            found = asyncio.run(curate(config))
    except CliError as error:
        raise ValueError(str(error)) from None
    print("\n".join(f"{label}: {count}" for label, count in found["labels"].items()))
    for reason, count in Counter(found["reasons"]).most_common(MOST_REASONS):
        print(f"no label for {count}: {reason}", file=sys.stderr)
    print(f"{config.output}: the rows, their images and summary.json", file=sys.stderr)
    return 0


async def curate(config: CurateConfig) -> dict[str, Any]:
    """Labels what an earlier call has not labelled yet; returns the summary, which is also written."""
    from vtengine.cli.session import open_session
    from vtengine_training.curate.output import Output
    from vtengine_training.curate.run import Curation
    from vtengine_training.curate.summary import summary
    from vtengine_training.data.images import ImageStore
    from vtengine_training.data.load import load_examples
    from vtengine_training.progress import Progress
    from vtengine_training.rewards.rewarder import Rewarder

    output = Output(Path(config.output))
    place = Path(config.data.folder or output.folder / "data")
    dataset = load_examples(config.data, place, "train", config.data.seed)
    rows = output.begin({"examples": dataset.fingerprint, **config.what})
    began = time.perf_counter()
    if len(rows) < len(dataset):
        if rows:
            print(f"{output.folder}: going on after {len(rows)} questions", file=sys.stderr)
        _set_threads(config.threads)
        async with open_session(_session(config), config.concurrency) as setting:
            rewarder = Rewarder(config.reward)
            try:
                await rewarder.start()
                curation = Curation(config, setting, rewarder, ImageStore(output.folder / "images"))
                labels = Counter(row["label"] for row in rows)
                with Progress({"": len(dataset)}) as progress:
                    async for row in curation.rows(dataset.examples[len(rows) :]):
                        output.append(row)
                        rows.append({key: row[key] for key in KEPT if key in row})
                        labels[row["label"]] += 1
                        progress.update("", len(rows), _note(labels))
            finally:
                await rewarder.close()
    found = summary(rows, dataset.rejected) | {"seconds": round(time.perf_counter() - began, 1)}
    if config.format == "parquet":
        output.write_parquet()
    (output.folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    (output.folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


MOST_REASONS = 5
"""Said at the end; summary.json has all."""
KEPT = ("label", "reason", "low_correct", "high_correct", "rollouts", "needs_high")
"""What the summary needs of a row; the rest is on the disk."""


def plan(config: CurateConfig) -> list[str]:
    """What would be done."""
    return [
        "",
        "Plan",
        f"{config.rollouts} rollouts at the low view and {config.rollouts} at the high view of every question, "
        f"one turn each, temperature {config.temperature:g}, judged by {config.reward.accuracy}",
        f"low_is_enough: {config.rollouts} of {config.rollouts} right at both; needs_high: at least {config.margin} "
        "more right at the high view",
        f"rows, images and summary go to {config.output}",
    ]


def _missing(config: CurateConfig) -> Iterator[str]:
    yield from absent_files("data", config.data)
    yield from refused(
        *of_data("data", config.data),
        *of_model(config.model),
        *of_backend(config.backend),
        *of_reward(config.reward),
        *of_profile(config.profile),
    )


def _session(config: CurateConfig) -> argparse.Namespace:
    """The arguments of `vtengine generate` that this is like; what is not named here is as without the flag."""
    from vtengine.cli.arguments import build_parser
    from vtengine.cli.engine_args import engine_flags

    arguments = build_parser().parse_args(["generate", "-", "-o", "-"])
    vars(arguments).update(
        model=config.model,
        backend=config.backend,
        profile=config.profile or None,
        device=config.device,
        dtype=config.dtype,
        kv_gb=config.kv_gb,
        engine_arg=engine_flags(config.engine_args),
        deadline_s=config.deadline_s,
        resolution="high",
        max_turns=1,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
    )
    return arguments


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _note(labels: Mapping[str, int]) -> str:
    return "  ".join(f"{name} {labels[name]}" for name in ("low_is_enough", "needs_high"))
