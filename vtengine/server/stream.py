"""Server-sent events of one request: what its episodes tell, as chunks of OpenAI's stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from vtengine.rollout.episode import Asked, Episode, Replied, TextDelta
from vtengine.server.account import (
    TURN_BREAK,
    Json,
    account,
    finish_reason,
    plain_answer,
    turn_account,
    usage,
    view_account,
)
from vtengine.server.admission import Visit
from vtengine.server.choices import run_choice, together
from vtengine.server.connection import Reply
from vtengine.server.house import House
from vtengine.server.mailbox import Mailbox, Told, Word
from vtengine.server.prepare import Job
from vtengine.server.splitter import ReplySplitter, StopCutter


class Stream:
    """The status line goes out with the first turn: what is refused before that, such as a bad image, gets its own
    status."""

    def __init__(self, house: House, job: Job, visit: Visit, reply: Reply, request_id: str) -> None:
        self.house, self.job, self.visit, self.reply = house, job, visit, reply
        self.frame = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": house.model,
        }
        self.choices = [_Choice(job) for _ in range(job.num_choices)]
        self.episodes: list[Episode] = []

    async def run(self) -> None:
        async with aclosing(self._told()) as batches:  # type: ignore[type-var]
            async for batch in batches:
                for index, event in batch:
                    self._read(index, event)
                if batch:
                    await self.reply.send_events(is_last=len(self.episodes) == len(self.choices))
                elif self.reply.started:
                    await self.reply.send_comment()

    def _read(self, index: int, event: Word) -> None:
        for delta, extension, finish in self.choices[index].read(event):
            choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}
            chunk = {**self.frame, "choices": [choice]}
            if self.job.with_usage:
                chunk["usage"] = None
            if extension is not None:
                chunk["vtengine"] = extension
            self.reply.add_event(chunk)
        if isinstance(event, Episode):
            self.episodes.append(event)
            if self.job.with_usage and len(self.episodes) == len(self.choices):
                self.reply.add_event({**self.frame, "choices": [], "usage": usage(self.episodes)})

    async def _told(self) -> AsyncIterator[list[Told]]:
        """What has happened since the last look, nothing for a silence of keep_alive_s. Closing it cancels the
        episodes. Raises ApiError when one of them gives no completion.
        """
        house = self.house
        limits = house.limits
        box = Mailbox(lambda: house.gate.running_now / limits.max_text_events_per_s, limits.keep_alive_s)

        async def run(index: int) -> None:
            told = run_choice(self.job, index, self.visit, house, lambda event: box.put((index, event)))
            box.put((index, await told))

        episodes = asyncio.ensure_future(together(run(index) for index in range(self.job.num_choices)))
        episodes.add_done_callback(lambda _: box.wake())
        try:
            while True:
                batch = await box.take()
                ended = episodes.done()
                if ended and not self.reply.started:
                    episodes.result()  # a fault becomes the status
                if batch or not ended:
                    yield batch
                if ended:
                    episodes.result()
                    return
        finally:
            box.close()
            episodes.cancel()
            await asyncio.gather(episodes, return_exceptions=True)


Chunk = tuple[Json, Json | None, str | None]
"""delta, extension, finish_reason"""


class _Choice:
    """One episode's events as chunks."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.splitter = ReplySplitter()
        self.cutter = StopCutter(job.stops)
        self.chunks: list[Chunk] = []
        self.has_content = self.has_reasoning = False
        self.breaks = False  # a turn has begun whose reasoning is to be set off from that before it

    def read(self, event: Word) -> list[Chunk]:
        self.chunks = []
        if isinstance(event, Asked):
            self._asked(event)
        elif isinstance(event, TextDelta):
            for channel, text in self.splitter.push(event.text):
                self._text(channel, text)
        elif isinstance(event, Replied):
            for channel, text in self.splitter.flush():
                self._text(channel, text)
            self._add({}, {"event": "turn_finished", **turn_account(event.record, event.turn)})
        else:
            self._end(event)
        return self.chunks

    def _asked(self, event: Asked) -> None:
        if event.turn == 0:
            self._add({"role": "assistant", "content": ""})
        self.splitter, self.breaks = ReplySplitter(), self.has_reasoning
        views = [
            view_account(view, image.width, image.height, image.visual_tokens)
            for view, image in zip(event.views, event.images, strict=True)
        ]
        started = {"event": "turn_started", "turn": event.turn + 1, "prompt_tokens": event.prompt_tokens}
        self._add({}, {**started, "views": views})

    def _text(self, channel: str, text: str) -> None:
        if channel == "content" and self.job.stops:
            text = self.cutter.push(text)
        if not text:
            return
        if channel == "content":
            self.has_content = True
        else:
            text, self.breaks, self.has_reasoning = TURN_BREAK * self.breaks + text, False, True
        self._add({channel: text})

    def _end(self, episode: Episode) -> None:
        if not self.has_content and not self.cutter.done and (plain := plain_answer(episode)):
            self._text("content", plain)
        if rest := self.cutter.flush():
            self._add({"content": rest})
        self._add({}, account(episode, self.job.setting.limits), finish_reason(episode))

    def _add(self, delta: Json, extension: Json | None = None, finish: str | None = None) -> None:
        self.chunks.append((delta, extension, finish))
