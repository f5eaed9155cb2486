"""Accuracy by rules, by judge, or by rules first and the judge where they do not decide; each as a RewardFn."""

from __future__ import annotations

from typing import Literal

from vtengine.rollout.episode import Episode
from vtengine_training.data.examples import Example
from vtengine_training.rewards.base import Score
from vtengine_training.rewards.format import broken_conditions, format_reward
from vtengine_training.rewards.judge.judge import Judge
from vtengine_training.rewards.judge.prompt import Query
from vtengine_training.rewards.rules import MAX_ANSWER, Task, decide

Mode = Literal["rules", "judge", "rules+judge"]


class Accuracy:
    """1 where the answer is right, 0 where it is not, None where the judge gave no verdict.

    An episode that ended without an answer is wrong. One that the engine broke or rejected says nothing about the
    model: no verdict. rules: what they do not decide is wrong.
    """

    def __init__(self, mode: Mode, judge: Judge | None = None, tolerance: float = 0.0) -> None:
        if (judge is None) != (mode == "rules"):
            raise ValueError(f"reward.accuracy = {mode!r}: {'needs a' if judge is None else 'has no use for a'} judge")
        self.mode, self.judge, self.tolerance = mode, judge, tolerance

    async def score(self, episode: Episode, example: Example) -> Score:
        """Raises ValueError for a row whose answer_type, options or tolerance cannot be used."""
        form = format_reward(episode)
        detail = {f"format/{name}": 1.0 for name in broken_conditions(episode)}
        if episode.status in ("rejected", "failed"):
            return Score(None, form, detail | {f"status/{episode.status}": 1.0})
        if episode.status != "answered":
            return Score(0.0, form, detail)
        task = Task.of(example.question, example.answers, example.fields, self.tolerance)
        by_rules = decide(episode.answer, task)
        detail["rules/decided"] = float(by_rules is not None)
        if self.judge is None or (self.mode == "rules+judge" and by_rules is not None):
            return Score(float(by_rules is True), form, detail)
        by_judge = await self._ask(self.judge, episode.answer or "", example)
        if by_judge is not None and by_rules is not None:
            detail["judge/agrees_with_rules"] = float(by_judge == by_rules)
        return Score(None if by_judge is None else float(by_judge), form, detail)

    async def _ask(self, judge: Judge, answer: str, example: Example) -> bool | None:
        """Too long an answer is wrong without asking: that is cheaper, and what is cut off cannot hide anything."""
        longest = max(map(len, example.answers), default=0)
        limit = max(judge.config.max_answer_chars, 4 * longest if longest > MAX_ANSWER // 4 else 0)
        if len(answer) > limit:
            judge.totals["too_long"] += 1
            return False
        return await judge.verdict(Query.of(example.question, example.answers, answer))
