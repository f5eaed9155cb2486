"""All that the trainer asks of rewards, in one object: score episodes, total a group, keep state between steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vtengine.rollout.episode import Episode
from vtengine_training.data.examples import Example
from vtengine_training.rewards import penalty
from vtengine_training.rewards.accuracy import Accuracy
from vtengine_training.rewards.base import RewardFn, Score
from vtengine_training.rewards.judge.check import check_judge
from vtengine_training.rewards.judge.config import JudgeConfig
from vtengine_training.rewards.judge.judge import Judge
from vtengine_training.rewards.penalty import BudgetController, PenaltyConfig
from vtengine_training.rewards.user import UserReward


@dataclass(frozen=True)
class RewardConfig:
    """The `[reward]` section of a training run.

    accuracy: rules, judge, rules+judge, or function = the user's own at `function` (package.module:name).
    timeout_s: of one call of that function, with all its own waiting; then there is no verdict.
    tolerance: how far a number may be off, as a share of the reference; a row's own `tolerance` wins.
    """

    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    accuracy: Literal["rules", "judge", "rules+judge", "function"] = "rules"
    function: str = ""
    timeout_s: float = 600.0
    tolerance: float = 0.0
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        if (self.accuracy == "function") != bool(self.function):
            remedy = "leave it out" if self.function else "name yours as package.module:name"
            raise ValueError(f"accuracy = {self.accuracy!r}, function = {self.function!r}: {remedy}")
        if not (self.timeout_s > 0 and math.isfinite(self.timeout_s)):
            raise ValueError(f"timeout_s = {self.timeout_s}: must be a number of seconds above 0")
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance = {self.tolerance}: must be from 0 to 1")
        if self.uses_judge:
            self.judge.require_model()

    @property
    def uses_judge(self) -> bool:
        return self.accuracy in ("judge", "rules+judge")


class Rewarder:
    """Built once per run from its config. `state` goes into checkpoints."""

    def __init__(self, config: RewardConfig, function: RewardFn | None = None) -> None:
        self.config = config
        self.judge = Judge(config.judge) if config.uses_judge and function is None else None
        self.function = function or _build(config, self.judge)
        self.budget = BudgetController(config.penalty.budget)
        self._canaries_due = True
        self._step: defaultdict[str, float] = defaultdict(float)
        self._judge_before: dict[str, float] = {} if self.judge is None else self.judge.figures()

    async def start(self) -> None:
        """Call before the first step. Raises ValueError when the judge cannot be reached or fails known pairs."""
        if self.judge is not None:
            await check_judge(self.judge)

    async def score(self, episode: Episode, example: Example) -> Score:
        """One episode, before the penalty. May raise: the caller drops the group and counts it."""
        if self.judge is not None and self._canaries_due:
            self._canaries_due = False
            self.judge.start_canaries()
        score = await self.function.score(episode, example)
        self._step["scored"] += 1
        self._step["upscaled"] += episode.is_upscaled
        for name, value in score.detail.items():
            self._step[f"detail:{name}"] += value
            self._step[f"count:{name}"] += 1
        return score

    def totals(self, scores: Sequence[Score], episodes: Sequence[Episode]) -> list[float]:
        """The reward of each sibling of a group."""
        upscaled = [episode.is_upscaled for episode in episodes]
        extra = [extra_views(episode) for episode in episodes]
        return penalty.apply(scores, upscaled, self.config.penalty, extra, self.budget.price)

    def end_step(
        self, figures: Mapping[str, float], total: Callable[[Mapping[str, float]], dict[str, float]] = dict
    ) -> dict[str, float]:
        """Called once per training step with its rollout metrics; returns more metrics (`judge/*`, `penalty/*`).

        total: adds up this rewarder's counters with those of the other processes of the run.
        The budget follows figures["upscale/ratio"], or, without it, the episodes that were scored.
        """
        found: dict[str, float] = {}
        step = defaultdict(float, total(self._step))
        scored = step["scored"]
        if self.config.penalty.form == "budget":
            own = step["upscaled"] / scored if scored else None
            ratio = figures.get("upscale/ratio", own)
            if ratio is not None:
                self.budget.update(ratio)
            found |= {"penalty/price": self.budget.price, "penalty/dual": self.budget.dual}
        found |= _detail_metrics(step, scored)
        found |= self._judge_metrics(total)
        self._step.clear()
        self._canaries_due = True
        return found

    def state(self) -> dict[str, Any]:
        """Plain JSON data; `restore` takes it back."""
        judge = {} if self.judge is None else {"judge": self.judge.state()}
        return {"budget": self.budget.state_dict(), **judge}

    def restore(self, state: Mapping[str, Any], counts: bool = True) -> None:
        """Goes on from `state()` of an earlier process; of one after another, where there were several.

        counts: whether its counts are added to this one's, as just one of those that go on has to.
        """
        if "budget" in state:
            self.budget.load_state_dict(state["budget"])
        if self.judge is not None and counts and "judge" in state:
            self.judge.restore(state["judge"])
            self._judge_before = self.judge.figures()

    async def close(self) -> None:
        """Ends connections and writes caches."""
        if self.judge is not None:
            await self.judge.close()

    def _judge_metrics(self, total: Callable[[Mapping[str, float]], dict[str, float]]) -> dict[str, float]:
        """What the judge did in this step; `judge/cost` is that of the whole run."""
        if self.judge is None:
            return {}
        own = self.judge.figures()
        step = total({name: value - self._judge_before.get(name, 0.0) for name, value in own.items()})
        self._judge_before = own
        now = total(own)
        found = {f"judge/{name}": value for name, value in step.items() if name != "latency_s"}
        found["judge/cost"] = now["cost"]
        if step.get("requests"):
            found["judge/latency_s"] = step["latency_s"] / step["requests"]
        return found


def extra_views(episode: Episode) -> float:
    """Visual tokens beyond the first view, as a share of those of the high view; 1 for a plain second look."""
    if len(episode.images) < 2 or not episode.visual_tokens_full:
        return 0.0
    return sum(image.visual_tokens for image in episode.images[1:]) / episode.visual_tokens_full


def _build(config: RewardConfig, judge: Judge | None) -> RewardFn:
    if config.accuracy == "function":
        return UserReward(config.function, config.timeout_s)
    return Accuracy(config.accuracy, judge, config.tolerance)


def _detail_metrics(step: Mapping[str, float], scored: float) -> dict[str, float]:
    """Details become shares: flaws of all episodes scored, the others of those that have the figure."""
    found = {}
    for key, total in step.items():
        if not key.startswith("detail:"):
            continue
        name = key.removeprefix("detail:")
        of_all = name.startswith(("format/", "status/"))
        found[f"reward/{name}" if of_all else name] = total / (scored if of_all else step[f"count:{name}"])
    return found
