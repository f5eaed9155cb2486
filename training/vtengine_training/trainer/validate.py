"""Held-out questions, asked greedily with the weights of the moment; training state is not touched."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from vtengine.rollout.episode import Episode
from vtengine.rollout.group import Setting, in_order, run_sample
from vtengine.rollout.question import Question
from vtengine_training.data.examples import Dataset, Example
from vtengine_training.grpo.metrics import rollout_metrics
from vtengine_training.rewards.base import RewardFn, Score
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.samples import sample_facts

KEPT = (
    *("reward/accuracy", "reward/format", "upscale/ratio", "upscale/precision", "upscale/recall", "upscale/needless"),
    *("upscale/accuracy_direct", "upscale/accuracy_upscaled", "visual_tokens/per_question", "visual_tokens/kept_ratio"),
    *("response_length/mean", "status/answered", "status/truncated"),
)
Answered = tuple[Example, Episode, Score | None, str]
"""The last one: why there is no score."""
log = logging.getLogger(__name__)


async def validate(
    setting: Setting, dataset: Dataset, function: RewardFn, concurrency: int, ranks: Ranks | None = None
) -> dict[str, float]:
    """`val/*`: the rollout metrics of one greedy episode per question, without penalty; each rank asks its share.

    `val/questions` counts those that could be scored; the others (unreadable image, no verdict) are left out, and said.
    """
    greedy = replace(setting, sampling=replace(setting.sampling, temperature=0.0))
    ranks = ranks or Ranks()
    own = [example for number, example in enumerate(dataset.examples) if ranks.owns(number)]
    jobs = (_job(greedy, example, function) for example in own)
    facts, left_out = [], []
    async for example, episode, score, fault in in_order(jobs, concurrency):
        if score is not None and score.is_usable and episode.turns and episode.status not in ("failed", "rejected"):
            reward = (score.accuracy or 0.0) + score.format
            facts.append([sample_facts(episode, score, reward, example)])
        else:
            why = fault or (episode.error.message if episode.error is not None else "no verdict")
            left_out.append(f"example {example.id}: {why}")
    if left_out:
        log.warning("validation leaves out %d of %d questions; %s", len(left_out), len(own), left_out[0])
    facts = [one for part in ranks.gather(facts) for one in part]
    found = rollout_metrics(facts)
    return {"val/questions": float(len(facts))} | {f"val/{name}": found[name] for name in KEPT if name in found}


def _job(setting: Setting, example: Example, function: RewardFn) -> Callable[[], Awaitable[Answered]]:
    async def run() -> Answered:
        question = Question(example.id, example.image, example.question, example.root, example.fields)
        episode = (await run_sample(setting, question, 0)).episode
        if not episode.turns:
            return example, episode, None, ""
        try:
            return example, episode, await function.score(episode, example), ""
        except Exception as error:
            return example, episode, None, f"{type(error).__name__}: {error}"

    return run
