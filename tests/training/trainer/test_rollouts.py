"""What a step's rollouts cost and leave: shared work, rewards that do not wait, refills in the clock, dumps."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from vtengine_training.rewards.base import Score
from vtengine_training.trainer.command import train
from vtengine_training.trainer.loop import Run

from tests.training.trainer.toy import LowBytes, rewarder
from vtengine.cli import main as vtengine


class Watching(LowBytes):
    """Remembers every episode in the order in which they were scored."""

    def __init__(self) -> None:
        super().__init__()
        self.episodes = []

    async def score(self, episode, example):
        self.episodes.append(episode)
        return await super().score(episode, example)


def test_siblings_share_prompt_and_view(run) -> None:
    """Of a group, the image is decoded, patchified, encoded once; the prompt prefilled once but for its last page."""
    seen = Watching()
    one = run(seen, rollout={"prompts": 2, "n": 4, "resolution": "low", "max_turns": 1, "max_refill": 1.0})
    asyncio.run(one.parts.collector.collect(1))
    pictures = {episode.image.content_hash for episode in seen.episodes}
    stats = one.parts.pipeline.stats()
    assert stats["images_decoded"] == stats["views_patchified"] == len(pictures)
    turns = [episode.turns[0].completion for episode in seen.episodes]
    assert sum(sum(turn.images_encoded) for turn in turns) == len(pictures)
    prompts = {episode.question.id: episode.turns[0].completion.prompt_tokens for episode in seen.episodes}
    pages = (len(turns) - len(prompts)) * one.parts.engine.pool.page_size
    assert sum(turn.prefill_tokens for turn in turns) <= sum(prompts.values()) + pages


def test_what_is_kept_is_what_the_engine_sampled(run) -> None:
    seen = Watching()
    one = run(seen, rollout={"max_refill": 1.0})
    found = asyncio.run(one.parts.collector.collect(1))
    by_ids = {tuple(episode.transcript.token_ids): episode for episode in seen.episodes}
    for group in found.groups:
        for kept in group.trajectories:
            episode = by_ids[tuple(kept.token_ids.tolist())]
            sampled = [token for turn in episode.turns for token in turn.completion.token_ids]
            logprobs = [value for turn in episode.turns for value in turn.completion.logprobs]
            assert kept.token_ids[kept.trainable].tolist() == sampled
            assert kept.logprobs[kept.trainable].tolist() == pytest.approx(logprobs)
            assert kept.version == min(turn.completion.weight_version for turn in episode.turns)


def test_rewards_are_asked_while_others_generate(run) -> None:
    """The first reward is asked for before the last episode has begun."""
    begun, at_first_reward = [], []

    class Early(LowBytes):
        async def score(self, episode, example):
            at_first_reward.append(len(begun))
            return await super().score(episode, example)

    one = run(Early(), rollout={"prompts": 2, "n": 4, "concurrency": 2, "max_refill": 1.0})
    engine = one.parts.engine
    generate = engine.generate

    async def counted(request, on_tokens=None):
        begun.append(request.request_id)
        return await generate(request, on_tokens)

    engine.generate = counted
    asyncio.run(one.parts.collector.collect(1))
    assert at_first_reward[0] < len(begun)


def test_refills_are_in_the_logged_time(run) -> None:
    class Slow:
        async def score(self, episode, example):
            time.sleep(0.02)
            return Score(1.0, 0.5)  # no spread: two groups of two, then four

    one = run(Slow(), rollout={"prompts": 2, "n": 2, "max_refill": 3.0})
    figures = asyncio.run(one.advance())
    assert figures["groups/waves"] == 2 and figures["groups/drawn"] == 6
    assert 12 * 0.02 < figures["time/rollout"] <= figures["time/step"]


def test_dumped_rollouts_are_a_page_with_rewards_and_advantages(make_config, tmp_path) -> None:
    config = make_config(steps=2, rollout={"dump_every": 2})
    asyncio.run(train(Run(config, rewarder()), lambda _: None))
    folder = tmp_path / "run" / "rollouts"
    assert [path.name for path in folder.iterdir()] == ["step-000002.jsonl"]
    rows = [json.loads(line) for line in (folder / "step-000002.jsonl").read_text().splitlines()]
    assert all(isinstance(row["reward"], float) and isinstance(row["advantage"], float) for row in rows)
    page = tmp_path / "page.html"
    assert vtengine(["view", str(folder / "step-000002.jsonl"), "-o", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert '"advantage":' in text.replace(" ", "") and "data:image/" in text  # the pictures were found too
