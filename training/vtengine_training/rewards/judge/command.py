"""`vtengine-train judge-check`: asks the judge of a config every known pair and every hostile answer."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence

from vtengine.config import build, read_data, to_toml
from vtengine_training.rewards.judge.check import Outcome, all_probes, try_probes
from vtengine_training.rewards.judge.config import JudgeConfig
from vtengine_training.rewards.judge.judge import Judge

EXIT_UNFIT = 1


def run_judge_check(arguments: argparse.Namespace) -> int:
    """The command. Reads `[reward.judge]` of any training config. 0 = every verdict was right, else 1."""
    data = read_data(arguments.config, arguments.overrides)
    section = data.get("reward", {})
    section = section.get("judge") if isinstance(section, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{arguments.config}: has no section [reward.judge]; see docs/rewards.md")
    config = build(JudgeConfig, section, "reward.judge.")
    config.require_model()
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


async def _ask(judge: Judge) -> list[Outcome]:
    try:
        return await try_probes(judge, all_probes())
    finally:
        await judge.close()


def report(outcomes: Sequence[Outcome]) -> list[str]:
    """What went wrong, one line each, then the count."""
    lines = []
    for outcome in outcomes:
        if outcome.is_right:
            continue
        said = {True: "said correct", False: "said incorrect", None: f"no verdict: {outcome.problem}"}[outcome.verdict]
        lines.append(f"WRONG  {outcome.canary.name}: {said}")
    right = sum(outcome.is_right for outcome in outcomes)
    failed = sum(outcome.verdict is None for outcome in outcomes)
    lines.append(f"{right} of {len(outcomes)} verdicts right, {failed} missing")
    return lines
