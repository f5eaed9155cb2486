"""Server-sent events of one request: what its episodes tell, as chunks of OpenAI's stream."""

from __future__ import annotations

import asyncio
import time
from functools import partial

from vtengine.rollout.episode import Asked, Episode, Event, Replied, TextDelta
from vtengine.rollout.tokenizer import Tokenizer
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
from vtengine.server.bell import Bell
from vtengine.server.choices import run_choice, together
from vtengine.server.connection import Reply
from vtengine.server.house import House
from vtengine.server.logprobs import content_logprobs
from vtengine.server.prepare import Job
from vtengine.server.splitter import ReplySplitter, StopCutter


class Stream:
    """The status line goes out with the first turn: what is refused before that, such as a bad image, gets its own
    status. Text goes out as the backend hands it over: that keeps the pace."""

    def __init__(self, house: House, job: Job, visit: Visit, reply: Reply, request_id: str) -> None:
        self.house, self.job, self.visit, self.reply = house, job, visit, reply
        self.frame = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": house.model,
        }
        self.choices = [_Choice(job, house.setting.tokenizer) for _ in range(job.num_choices)]
        self.episodes: list[Episode] = []
        self.bell = Bell(house.limits.keep_alive_s)

    async def run(self) -> None:
        """Its end, whichever it is, is that of the episodes. Raises ApiError when one of them gives no completion."""
        episodes = asyncio.ensure_future(together(self._run_choice(index) for index in range(self.job.num_choices)))
        episodes.add_done_callback(lambda _: self.bell.ring())
        try:
            while not self.reply.ended:
                await self.bell.wait()
                if episodes.done():
                    episodes.result()
                await self.reply.send_events(is_last=self._is_complete)
        finally:
            self.bell.close()
            episodes.cancel()
            await asyncio.gather(episodes, return_exceptions=True)

    @property
    def _is_complete(self) -> bool:
        return len(self.episodes) == len(self.choices)

    async def _run_choice(self, index: int) -> None:
        told = partial(self._tell, index)
        told(await run_choice(self.job, index, self.visit, self.house, told))

    def _tell(self, index: int, word: Event | Episode) -> None:
        """Keeps it for the writer."""
        chunks = self.choices[index].read(word)
        for delta, extension, finish, logprobs in chunks:
            choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
            chunk = {**self.frame, "choices": [choice]}
            if self.job.with_usage:
                chunk["usage"] = None
            if extension is not None:
                chunk["vtengine"] = extension
            self.reply.add_event(chunk)
        if isinstance(word, TextDelta):
            if chunks:
                self.bell.ring()
        elif isinstance(word, Episode):
            self.episodes.append(word)
            if self.job.with_usage and self._is_complete:
                self.reply.add_event({**self.frame, "choices": [], "usage": usage(self.episodes)})
            self.bell.ring()
        else:
            self.bell.ring_soon()


Chunk = tuple[Json, Json | None, str | None, Json | None]
"""delta, extension, finish_reason, logprobs"""


class _Choice:
    """One episode's events as chunks."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self.job, self.tokenizer = job, tokenizer
        self.splitter = ReplySplitter()
        self.cutter = StopCutter(job.stops)
        self.chunks: list[Chunk] = []
        self.num_chars = 0  # of content
        self.has_content = self.has_reasoning = False
        self.breaks = False  # a turn has begun whose reasoning is to be set off from that before it

    def read(self, event: Event | Episode) -> list[Chunk]:
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
        if self.job.with_logprobs:
            self._add({}, logprobs=content_logprobs(episode, self.tokenizer, self.num_chars))
        self._add({}, account(episode, self.job.limits), finish_reason(episode))

    def _add(
        self, delta: Json, extension: Json | None = None, finish: str | None = None, logprobs: Json | None = None
    ) -> None:
        self.num_chars += len(delta.get("content", ""))
        self.chunks.append((delta, extension, finish, logprobs))
