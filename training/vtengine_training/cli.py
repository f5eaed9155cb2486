"""`vtengine-train`: sft, grpo, eval, curate, judge-check, sweep.

Each reads a TOML file; `--set a.b=c` changes it, `--dry-run` checks it. Imports nothing heavy until a command runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from vtengine.cli.arguments import Parser
from vtengine.cli.errors import UsageError, one_line


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = Parser(
        prog="vtengine-train",
        description="Train and evaluate models that ask for the high view only when they need it.",
        epilog=_examples("vtengine-train COMMAND --help", "vtengine-train grpo configs/glance_grpo.toml --dry-run"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (run, text, examples) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_examples(*(f"vtengine-train {name} {rest}" for rest in examples)),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("config", type=Path, metavar="CONFIG.toml", help="the run; examples are in configs/")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="a.b=c",
            dest="overrides",
            help="change a value of the file; may be given several times",
        )
        command.add_argument(
            "--dry-run",
            action="store_true",
            help=DRY_RUN.get(name, "print the resolved configuration and what is missing, then stop"),
        )
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0 done, 1 stopped, 2 bad usage, 130 interrupted.

    `sft` and `grpo` also: 75 stopped by SIGTERM or Ctrl-C, and saved. `grpo` also: 4 diverged. `sweep` also: 3 some run
    failed, 75 stopped.
    """
    arguments = build_parser().parse_args(argv)
    try:
        arguments.config.open("rb").close()
    except OSError as error:
        print(f"vtengine-train: CONFIG {arguments.config}: cannot be read: {error.strerror}", file=sys.stderr)
        return 2
    try:
        return int(arguments.run(arguments))
    except (ValueError, UsageError) as error:
        print(f"vtengine-train: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"vtengine-train: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vtengine-train: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def program() -> None:
    """`main` as a process. The interpreter is not ended where a failed run has left its process group standing, or an
    interrupted one its learner at work: their threads would need it, and abort the process, whatever its status."""
    # No two packed batches have one shape: what is kept of oneDNN's products is only memory (vtengine_kernels.onednn).
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    distributed, daemon = (sys.modules.get(name) for name in ("torch.distributed", "vtengine_training.sync.daemon"))
    if (distributed is not None and distributed.is_initialized()) or (daemon is not None and daemon.is_running()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _sft(arguments: argparse.Namespace) -> int:
    from vtengine_training.sft.command import run_sft

    return run_sft(arguments)


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
    from vtengine_training.eval.runner import evaluate, write_results

    if arguments.dry_run:
        from vtengine_training.missing import end_dry_run, of_model, refused

        print(to_toml(config), end="")
        return end_dry_run(arguments.config, [], list(refused(*of_model(config.model))))
    from vtengine_training.files import check_place
    from vtengine_training.progress import Progress

    check_place(Path(config.results))
    with Progress({name: config.count for name in config.resolutions}) as progress:
        results = evaluate(config, progress.update)
    previous = write_results(results, Path(config.results))
    if previous is not None:
        print(f"{config.results}: the older file is now {previous}", file=sys.stderr)
    for name, found in results["results"].items():
        accuracy = found["accuracy"]
        parts = ", ".join(f"{part} {accuracy[part]:.3f}" for part in ("all", "low_is_enough", "needs_high"))
        print(f"{name}: {parts}; format {found['format_valid']:.3f}; upscaled {found['upscaled']['all']:.3f}")
    print(f"results: {config.results}", file=sys.stderr)
    return 0


def _curate(arguments: argparse.Namespace) -> int:
    from vtengine_training.curate.command import run_curate

    return run_curate(arguments)


def _sweep(arguments: argparse.Namespace) -> int:
    from vtengine_training.sweep.command import run_sweep

    return run_sweep(arguments)


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str, tuple[str, ...]]] = {
    "sft": (
        _sft,
        "supervised cold start on generated pictures, from random weights; on your own: grpo, loss.algorithm = sft",
        ("configs/glance_sft.toml", "configs/glance_sft.toml --set output=runs/mine --dry-run"),
    ),
    "grpo": (
        _grpo,
        "reinforcement learning: teach a model when to ask for the high view",
        (
            "configs/glance_grpo.toml --dry-run      # the resolved file, the plan, memory and cost",
            "configs/glance_grpo.toml                # again: continues where it stopped",
            "my.toml --set rollout.n=16 --set loss.algorithm=dapo --set data.files='[\"train.parquet\"]'",
            "my.toml --set loss.algorithm=sft --set output=runs/cold      # a cold start from the rows' own answers",
            'my.toml --set lora.rank=16 --set \'loggers=["console", "tensorboard"]\'',
        ),
    ),
    "eval": (
        _eval,
        "ask generated questions at each resolution and write the results as JSON",
        (
            "configs/glance_eval.toml",
            "configs/glance_eval.toml --set model=runs/glance-grpo/model --set results=runs/eval.json",
        ),
    ),
    "curate": (
        _curate,
        "label questions by what the model answers at each view: low_is_enough, needs_high or neither",
        (
            "configs/glance_curate.toml              # again: continues where it stopped",
            "my.toml --set backend=http://127.0.0.1:30000 --set concurrency=256",
        ),
    ),
    "judge-check": (
        _judge_check,
        "test a configuration's judge with known pairs and hostile answers: is it fit for use?",
        ("configs/example_judge-check.toml",),
    ),
    "sweep": (
        _sweep,
        "run one training configuration with some of its keys varied; summarise and plot the results",
        (
            "configs/glance_penalty_sweep.toml --dry-run      # the runs, their steps, what is missing",
            "configs/glance_penalty_sweep.toml --set jobs=2   # again: runs what is missing",
        ),
    ),
}


DRY_RUN = {
    "grpo": "print the resolved configuration, the plan, memory and cost, and what is missing; then stop",
    "curate": "print the resolved configuration, the plan and what is missing, then stop",
    "judge-check": "print the resolved configuration, then stop",
    "sweep": "print the runs, their steps and what is missing, then stop",
}


def _examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


if __name__ == "__main__":
    program()
