"""`vtengine-train judge-check`: asks the judge of a config every known pair and every hostile answer."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtengine.config import ConfigError, build, load, to_toml
from vtengine_training.rewards.judge.check import Outcome, all_probes, try_probes
from vtengine_training.rewards.judge.config import JudgeConfig
from vtengine_training.rewards.judge.judge import Judge
from vtengine_training.rewards.rewarder import RewardConfig
from vtengine_training.trainer.config import GrpoConfig

EXIT_UNFIT = 1


def run_judge_check(arguments: argparse.Namespace) -> int:
    """The command. 0 = every probe got a verdict, and the right one; else 1."""
    config = judge_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(to_toml(config), end="")
        return 0
    logging.getLogger("httpx").setLevel(logging.WARNING)
    judge = Judge(config)
    outcomes = asyncio.run(_ask(judge))
    print("\n".join(report(outcomes)))
    figures = judge.figures()
    tokens = f"{figures.get('prompt_tokens', 0):.0f} + {figures.get('completion_tokens', 0):.0f} tokens"
    print(f"{figures.get('requests', 0):.0f} requests, {tokens}, cost {judge.cost:.4f}", file=sys.stderr)
    return 0 if all(outcome.is_right for outcome in outcomes) else EXIT_UNFIT


def judge_config(path: Path, overrides: Sequence[str]) -> JudgeConfig:
    """`[reward.judge]` of a file that holds only `[reward]`, or of a whole training config. Raises ValueError."""
    config = load(_make, path, overrides)
    config.require_model()
    return config


def _make(data: dict[str, Any]) -> JudgeConfig:
    section = data.get("reward")
    if not isinstance(section, dict) or not isinstance(section.get("judge"), dict):
        raise ConfigError("has no section [reward.judge]; see docs/rewards.md")
    if set(data) == {"reward"}:
        return build(RewardConfig, section, "reward.").judge
    return build(GrpoConfig, data).reward.judge


async def _ask(judge: Judge) -> list[Outcome]:
    try:
        return await try_probes(judge, all_probes())
    finally:
        await judge.close()


def report(outcomes: Sequence[Outcome]) -> list[str]:
    """What went wrong or got no verdict, one line each, then the counts."""
    lines = []
    right = wrong = missing = 0
    for outcome in outcomes:
        if outcome.is_right:
            right += 1
        elif outcome.verdict is None:
            missing += 1
            lines.append(f"NO VERDICT  {outcome.canary.name}: {outcome.problem}")
        else:
            wrong += 1
            lines.append(f"WRONG  {outcome.canary.name}: said {'correct' if outcome.verdict else 'incorrect'}")
    lines.append(f"of {len(outcomes)} probes {right} right, {wrong} wrong, {missing} without a verdict")
    return lines
