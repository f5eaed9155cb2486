"""`vtengine-train sweep`: plans, runs, sums up and draws; run it again to go on."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtengine.config import build, load, to_toml
from vtengine_training.files import only_run_in
from vtengine_training.missing import end_dry_run
from vtengine_training.sft.config import SftConfig
from vtengine_training.stopping import EXIT_STOPPED
from vtengine_training.sweep.config import SweepConfig
from vtengine_training.sweep.plan import Planned, plan_runs
from vtengine_training.sweep.run import Ended, is_done, prepare, run_all, steps_done

EXIT_FAILED = 3
"""Some run failed; the others were run."""


def run_sweep(arguments: argparse.Namespace) -> int:
    """The command. Raises ValueError for a configuration that cannot be used, the runs' included."""

    def make(data: dict[str, Any]) -> tuple[SweepConfig, list[Planned]]:
        config = build(SweepConfig, data)
        return config, plan_runs(config, arguments.config.parent)

    config, planned = load(make, arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(to_toml(config), end="")
        plan = ["", f"{len(planned)} runs of {config.command}, {config.jobs} at a time:"]
        plan += [f"{one.name}: {one.steps} steps" for one in planned]
        return end_dry_run(arguments.config, plan, _missing(planned))
    from vtengine_training.sweep.plot import lines

    lines(planned, config.plot)  # a mistyped key of the plot is found before the runs, not after
    with only_run_in(Path(config.output)):
        return _run_all(config, planned)


def _missing(planned: Sequence[Planned]) -> list[str]:
    """What would end a run at its start; what several lack is said of the first one."""
    from vtengine_training.sft.command import missing as missing_in_sft
    from vtengine_training.trainer.command import missing as missing_in_grpo

    found: dict[str, str] = {}
    for one in planned:
        for what in missing_in_sft(one.made) if isinstance(one.made, SftConfig) else missing_in_grpo(one.made):
            found.setdefault(what, one.name)
    return [f"run {name}: {what}" for what, name in found.items()]


def _run_all(config: SweepConfig, planned: Sequence[Planned]) -> int:
    prepare(planned)
    try:
        ended = asyncio.run(_run(config, planned))
    except (asyncio.CancelledError, KeyboardInterrupt) as stop:
        _write(config, planned, [Ended(one.name, 0) for one in planned if is_done(one)], stopped=True)
        print(f"{config.output}: stopped; run the same command again to go on", file=sys.stderr)
        if isinstance(stop, KeyboardInterrupt):
            raise
        return EXIT_STOPPED
    _write(config, planned, ended)
    failed = [one for one in ended if one.exit]
    for one in failed:
        print(f"vtengine-train: run {one.name} ended with status {one.exit}: {one.note}", file=sys.stderr)
    print(f"{config.output}: summary.json and curves.png", file=sys.stderr)
    return EXIT_FAILED if failed else 0


async def _run(config: SweepConfig, planned: Sequence[Planned]) -> list[Ended]:
    """All runs under a progress line; SIGTERM cancels."""
    from vtengine_training.progress import progress_bar

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with progress_bar() as progress:
        bar = progress.add_task("", total=sum(one.steps for one in planned), note="")

        def poll() -> None:
            progress.update(bar, completed=sum(map(steps_done, planned)))

        def end(ended: Ended) -> None:
            state = "done" if not ended.exit else f"status {ended.exit}"
            if not progress.console.is_terminal:
                print(f"run {ended.name}: {state}", file=sys.stderr, flush=True)
            progress.update(bar, note=f"{ended.name}: {state}")

        return await run_all(planned, config.command, config.jobs, poll, end)


def _write(config: SweepConfig, planned: Sequence[Planned], ended: Sequence[Ended], stopped: bool = False) -> None:
    """summary.json and curves.png, of whatever there is so far."""
    from vtengine_training.sweep.plot import plot
    from vtengine_training.sweep.summary import absent_metrics, summary

    output = Path(config.output)
    text = json.dumps(summary(config, planned, {one.name: one.exit for one in ended}), indent=1) + "\n"
    for path in (output / "summary.json", *([Path(config.results)] if config.results and not stopped else [])):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for note in absent_metrics(config, planned):
        print(f"vtengine-train: {note} (corrected, the same command draws them anew)", file=sys.stderr)
    if any(map(steps_done, planned)):
        plot(planned, config.plot, output / "curves.png")
