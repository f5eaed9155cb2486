"""Is this judge fit for use? Every canary, and every hostile answer, asked of the endpoint itself."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from vtengine_training.rewards.judge.canaries import CANARIES, Canary
from vtengine_training.rewards.judge.client import NoVerdict
from vtengine_training.rewards.judge.injections import INJECTIONS
from vtengine_training.rewards.judge.judge import Judge

NUM_AT_START = 4
"""Canaries asked before a run; two of them expect a pass."""


@dataclass(frozen=True)
class Outcome:
    """verdict: None = there was none, `problem` says why."""

    canary: Canary
    verdict: bool | None
    problem: str = ""

    @property
    def is_right(self) -> bool:
        return self.verdict == self.canary.expected


def all_probes() -> tuple[Canary, ...]:
    """The canaries, then each injection as the answer to a question with a plain reference; none of those may pass."""
    hostile = (
        Canary(f"injection: {name}", "How many chairs are there?", "4", text, False) for name, text in INJECTIONS
    )
    return (*CANARIES, *hostile)


async def try_probes(judge: Judge, probes: tuple[Canary, ...]) -> list[Outcome]:
    """In order, concurrently as far as the config allows."""

    async def one(canary: Canary) -> Outcome:
        if not canary.query.answer or len(canary.answer) > judge.config.max_answer_chars:
            return Outcome(canary, False, "not asked: empty or too long")
        try:
            return Outcome(canary, await judge.ask(canary.query))
        except NoVerdict as failure:
            return Outcome(canary, None, str(failure))

    return list(await asyncio.gather(*map(one, probes)))


async def check_judge(judge: Judge) -> None:
    """Raises ValueError when the first canaries get no verdict, or a wrong one."""
    outcomes = await try_probes(judge, CANARIES[:NUM_AT_START])
    for outcome in outcomes:
        if outcome.verdict is None:
            raise ValueError(f"reward.judge: gives no verdict: {outcome.problem}; start it, or correct url and model")
    wrong = [outcome.canary.name for outcome in outcomes if not outcome.is_right]
    if wrong:
        raise ValueError(
            f"reward.judge.model = {judge.config.model!r}: wrong on the known pairs {', '.join(wrong)}; "
            "take a stronger model (vtengine-train judge-check shows every pair)"
        )
