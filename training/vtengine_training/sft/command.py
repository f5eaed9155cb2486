"""`vtengine-train sft`: reads the config, trains, ends with a status that says why it ended."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vtengine.config import load_config, to_toml
from vtengine_training.loggers.open import check_loggers, open_loggers
from vtengine_training.missing import end_dry_run, of_model, of_profile, refused
from vtengine_training.sft.config import SftConfig
from vtengine_training.stopping import EXIT_STOPPED, stop_at_signal

NOTE = ("high/all", "low/enough", "two/all", "char", "key", "language_loss", "dense_loss")


def run_sft(arguments: argparse.Namespace) -> int:
    """The command. Raises ValueError for a config that cannot be used, OSError where files cannot be written."""
    config = load_config(SftConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(to_toml(config), end="")
        return end_dry_run(arguments.config, [], list(missing(config)))
    check_loggers(config.loggers)
    from vtengine_training.files import only_run_in

    with only_run_in(Path(config.output)):
        return _train(config)


def missing(config: SftConfig) -> Iterator[str]:
    """What would end the run at its start, of what is seen without loading anything."""
    init = of_model(config.init, "init") if config.init else ()
    yield from refused(*init, partial(check_loggers, config.loggers), *of_profile(config.profile))


def _train(config: SftConfig) -> int:
    from vtengine_training.sft.curves import plot_curves
    from vtengine_training.sft.trainer import Run

    run = Run(config)
    if run.resume():
        print(f"{config.output}: going on from step {run.step}", file=sys.stderr)
    folder = Path(config.output)
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    with open_loggers(config, config.total_steps, run.step, _note) as report, stop_at_signal(run):
        run.train(report)
    if run.step < config.total_steps:
        print(f"{folder}: stopped and saved at step {run.step} of {config.total_steps}", file=sys.stderr)
        return EXIT_STOPPED
    plot_curves(folder / "metrics.jsonl", folder / "curves.png")
    print(f"{folder / 'model'}: the model; {folder / 'curves.png'}: how it got there", file=sys.stderr)
    return 0


def _note(figures: Mapping[str, Any]) -> str:
    shown = figures.get("validation") or figures
    return "  ".join(f"{name} {shown[name]:.3f}" for name in NOTE if name in shown)
