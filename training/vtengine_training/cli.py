"""`vtengine-train`: sft, grpo, judge-check, eval. Each reads a TOML file; `--set a.b=c` changes it, `--dry-run` checks.

Imports nothing heavy until a command runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = argparse.ArgumentParser(prog="vtengine-train", description="train and evaluate vtengine models")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, text in (
        ("sft", _sft, "supervised cold start: from nothing to a model that answers in the protocol's format"),
        ("grpo", _grpo, "reinforcement learning: teach a model when to ask for the high view"),
        ("judge-check", _judge_check, "ask the judge of a config known pairs and hostile answers: is it fit for use?"),
        ("eval", _eval, "ask generated questions at each resolution, and write what came out as JSON"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path, metavar="CONFIG.toml")
        command.add_argument(
            "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="change a value of the file"
        )
        command.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0 done, 1 stopped, 2 bad usage, 130 interrupted.

    `grpo` also: 4 diverged, 75 stopped by SIGTERM after saving.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ValueError as error:
        print(f"vtengine-train: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"vtengine-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vtengine-train: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _sft(arguments: argparse.Namespace) -> int:
    from vtengine.config import load_config, to_toml
    from vtengine_training.sft.config import SftConfig

    config = load_config(SftConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(to_toml(config), end="")
        return 0
    from vtengine_training.sft.curves import plot_curves
    from vtengine_training.sft.trainer import Run

    run = Run(config)
    if run.resume():
        print(f"{config.output}: going on from step {run.step}", file=sys.stderr)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    with progress_bar() as progress, (folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        task = progress.add_task("", total=config.total_steps, completed=run.step, note="")

        def report(figures: dict[str, Any]) -> None:
            metrics.write(json.dumps(figures) + "\n")
            metrics.flush()
            progress.update(task, completed=figures["step"], note=_note(figures))

        run.train(report)
    plot_curves(folder / "metrics.jsonl", folder / "curves.png")
    print(f"{folder / 'model'}: the model; {folder / 'curves.png'}: how it got there", file=sys.stderr)
    return 0


def _grpo(arguments: argparse.Namespace) -> int:
    from vtengine_training.trainer.command import run_grpo

    return run_grpo(arguments)


def _judge_check(arguments: argparse.Namespace) -> int:
    from vtengine_training.judge_check import run_judge_check

    return run_judge_check(arguments)


def _eval(arguments: argparse.Namespace) -> int:
    from vtengine.config import load_config, to_toml
    from vtengine_training.eval.config import EvalConfig

    config = load_config(EvalConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(to_toml(config), end="")
        return 0
    from vtengine_training.eval.runner import evaluate, write_results

    with progress_bar() as progress:
        tasks: dict[str, Any] = {
            name: progress.add_task(name, total=config.count, note="") for name in config.resolutions
        }
        results = evaluate(config, lambda name, done: progress.update(tasks[name], completed=done))
    write_results(results, Path(config.results))
    for name, found in results["results"].items():
        accuracy = found["accuracy"]
        parts = ", ".join(f"{part} {accuracy[part]:.3f}" for part in ("all", "low_is_enough", "needs_high"))
        print(f"{name}: {parts}; format {found['format_valid']:.3f}; upscaled {found['upscaled']['all']:.3f}")
    print(f"results: {config.results}", file=sys.stderr)
    return 0


def _note(figures: dict[str, Any]) -> str:
    shown = figures.get("validation") or figures
    names = ("high/all", "low/enough", "two/all", "char", "key", "language_loss", "dense_loss")
    return "  ".join(f"{name} {shown[name]:.3f}" for name in names if name in shown)


def progress_bar() -> Any:
    """A progress line on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))


if __name__ == "__main__":
    sys.exit(main())
