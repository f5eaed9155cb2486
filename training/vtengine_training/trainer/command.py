"""`vtengine-train grpo`: reads the config, prints the plan or trains, ends with a status that says why it ended."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtengine.config import load_config, to_toml
from vtengine_training.errors import first_line
from vtengine_training.files import only_run_in
from vtengine_training.loggers.open import check_loggers, open_loggers
from vtengine_training.missing import (
    absent_files,
    end_dry_run,
    of_backend,
    of_data,
    of_lora,
    of_model,
    of_profile,
    of_reward,
    refused,
)
from vtengine_training.rewards.penalty import PenaltyConfig
from vtengine_training.stopping import EXIT_STOPPED, stop_at_signal
from vtengine_training.trainer.config import GrpoConfig

if TYPE_CHECKING:
    from vtengine_training.trainer.loop import Run
    from vtengine_training.trainer.ranks import Ranks

EXIT_DIVERGED = 4
LESS_MEMORY = (
    "update.recompute = true, a lower update.max_tokens or rollout.kv_mib, and more processes take less of it; "
    "--dry-run adds it up"
)
NOTE = (
    *("reward/mean", "reward/accuracy", "upscale/ratio", "loss", "kl", "entropy", "grad_norm"),
    *("val/reward/accuracy", "val/upscale/ratio"),
)


def run_grpo(arguments: argparse.Namespace) -> int:
    """The command. Raises ValueError for a config that cannot be used, OSError where files cannot be written."""
    config = load_config(GrpoConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(to_toml(config), end="")
        return end_dry_run(arguments.config, plan(config), list(missing(config)))
    check_loggers(config.loggers)
    from torch import OutOfMemoryError

    from vtengine.engine.base import BackendFailed
    from vtengine_training.trainer.parts import pick_device
    from vtengine_training.trainer.ranks import Ranks, RanksLost
    from vtengine_training.trainer.rollout_engine import set_up_nccl
    from vtengine_training.trainer.step import TrainingDiverged

    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    output = Path(config.output)
    set_up_nccl(config)
    ranks = Ranks.join(pick_device(config.device), config.rank_timeout_s)
    say = partial(print, file=sys.stderr) if ranks.is_first else _nothing
    in_order = False
    try:
        run = _run(config, ranks, say)
        in_order = True
    except TrainingDiverged as error:
        in_order = True  # all ranks count alike
        say(f"vtengine-train: {error}")
        return EXIT_DIVERGED
    except (BackendFailed, RanksLost, OutOfMemoryError) as error:
        place = "" if ranks.is_alone else f" (rank {ranks.rank})"
        words = f"{first_line(error)} {LESS_MEMORY}" if isinstance(error, OutOfMemoryError) else str(error)
        print(f"vtengine-train{place}: stopped; run it again to go on from what was saved: {words}", file=sys.stderr)
        return 1
    finally:
        ranks.leave(in_order)
    if run.step < config.steps:
        say(f"{output}: stopped and saved at step {run.step} of {config.steps}")
        return EXIT_STOPPED
    say(f"{output / 'model'}: the model; {output / 'metrics.jsonl'}: how it got there")
    return 0


def _run(config: GrpoConfig, ranks: Ranks, say: Callable[[str], None]) -> Run:
    """Trains to the end, or to a signal; exports at the end."""
    from vtengine_training.trainer.export import export_whole
    from vtengine_training.trainer.loop import Run
    from vtengine_training.trainer.step import TrainingDiverged

    output = Path(config.output)
    with ExitStack() as stack:
        ranks.from_first(lambda: stack.enter_context(only_run_in(output)))
        run = Run(config, ranks=ranks)
        if run.resume():
            otherwise = f"; changed since: {', '.join(run.changes)}" if run.changes else ""
            say(f"{output}: going on from step {run.step}{otherwise}")
        if ranks.is_first:
            (output / "config.toml").write_text(to_toml(config), encoding="utf-8")
        reporting = open_loggers(config, config.steps, run.step, note) if ranks.is_first else nullcontext(_nothing)
        with reporting as report, stop_at_signal(run):
            try:
                asyncio.run(train(run, report))
            except TrainingDiverged as error:
                raise TrainingDiverged(f"stopped at step {run.step}: {error}") from None
        if run.step == config.steps:
            export_whole(run.parts, output, ranks)
    return run


def _nothing(*_: Any) -> None:
    """What all ranks but the first report."""


async def train(run: Run, report: Callable[[dict[str, float]], None]) -> None:
    """Trains, and closes the run whatever happens."""
    try:
        await run.train(report)
    finally:
        await run.close()


def note(figures: Mapping[str, Any]) -> str:
    """What the console says of a step."""
    found = "  ".join(f"{name} {figures[name]:.4g}" for name in NOTE if name in figures)
    return found or f"nothing scored: {figures.get('groups/drawn', 0):.0f} groups drawn"


def plan(config: GrpoConfig) -> list[str]:
    """What the run would do, and what it would take.

    Reads only the model's config.json, where it is there, and the reward function's module.
    """
    rollout, loss, objective = config.rollout, config.loss, config.loss.objective
    step = f"each of {config.steps} steps: {rollout.prompts} prompts"
    updates = f"{config.updates_per_step} update{'s' if config.updates_per_step > 1 else ''}"
    kept = f"checkpoints every {config.checkpoint.every} steps, {config.checkpoint.keep} kept, in {config.output}"
    if loss.is_supervised:
        replies = f"{step}, their replies written from their rows; {updates}"
        return ["", "Plan", replies, f"loss: sft; KL {loss.kl_coef:g} ({loss.kl})", kept, *_estimate(config)]
    lines = [
        "",
        "Plan",
        f"{step} x {rollout.n} samples, at most "
        f"{math.ceil(rollout.prompts * rollout.max_refill)} prompts drawn; {updates}",
        f"loss: {loss.algorithm}: advantage {objective.advantage}, policy {objective.policy}, clip "
        f"[{1 - objective.clip_low:g}, {1 + objective.clip_high:g}], {objective.aggregation}; "
        f"KL {loss.kl_coef:g} ({loss.kl}), entropy {loss.entropy_coef:g}",
        f"old log-probabilities: {loss.old_logprobs}; importance cap: {loss.importance_cap or 'off'}",
        f"penalty: {_penalty(config.reward.penalty)}",
        kept,
    ]
    return lines + _estimate(config)


def missing(config: GrpoConfig) -> Iterator[str]:
    """What would end the run at its start, of what is seen without loading anything."""
    sources = {"data": config.data} | ({"validation": config.validation} if config.validation.every else {})
    for section, source in sources.items():
        yield from absent_files(section, source)
        yield from refused(*of_data(section, source))
    yield from refused(
        *of_model(config.model),
        *of_lora(config.lora),
        *of_backend(config.rollout.backend),
        partial(check_loggers, config.loggers),
        *of_reward(config.reward),
        *of_profile(config.profile),
    )


def _penalty(config: PenaltyConfig) -> str:
    if config.form == "off":
        return "off"
    if config.form == "budget":
        return f"budget: target ratio {config.budget.target:g}, price from {config.budget.start:g}"
    return f"{config.form}: theta {config.theta:g}, size {config.size:g}"


def _estimate(config: GrpoConfig) -> list[str]:
    import torch

    from vtengine.cli.models import cached_config, is_hub_id
    from vtengine.model import ModelConfig
    from vtengine_training.eval.runner import model_folder
    from vtengine_training.trainer.cost import ModelCost
    from vtengine_training.trainer.memory import gpu_bytes
    from vtengine_training.trainer.memory_plan import MemoryPlan, num_adapted

    if is_hub_id(name := config.model):
        found = cached_config(name)
        if found is None:
            return [f"no estimate: no folder {name} here; as an id of the Hugging Face hub: hf download {name}"]
    else:
        try:
            found = model_folder(name) / "config.json"
        except ValueError:
            return ["no estimate without the model"]
    cost = ModelCost.of(ModelConfig.from_json(found))
    gpu = gpu_bytes(torch.device("cuda")) if config.device != "cpu" and torch.cuda.is_available() else None
    frozen = bool(config.lora.rank)
    token = cost.training_flops(1, 0, 0, frozen=frozen) / 1e9
    patch = cost.training_flops(0, 0, 1, config.trains_vision, frozen) / 1e9
    return [
        f"model: {cost.total / 1e6:.1f} M parameters, {cost.vision / 1e6:.1f} M of them vision"
        + (f"; {num_adapted(config, cost):,} in adapters learn in their place" if frozen else ""),
        *MemoryPlan.of(config, cost, gpu).lines(config, cost),
        f"compute: {token:.3g} GFLOP per packed token, {patch:.3g} GFLOP per image patch, forward and backward",
    ]
