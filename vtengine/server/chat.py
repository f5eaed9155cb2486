"""One chat completion, from the first byte of the body to the last of the reply. The episode loop does the work."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vtengine.engine.base import Backend
from vtengine.rollout.episode import Asked, Episode, Event, OnEvent, Replied, TextDelta, Turn, run_episode
from vtengine.server.account import (
    TURN_BREAK,
    Json,
    account,
    finish_reason,
    is_spent,
    plain_answer,
    shown_view,
    turn_account,
    usage,
    view_account,
    whole_reply,
)
from vtengine.server.cap import CappedBackend
from vtengine.server.connection import ClientGone, Reply, discard_body, read_body, while_connected
from vtengine.server.errors import BROKEN, ApiError, episode_error
from vtengine.server.house import House
from vtengine.server.prepare import Job, prepare
from vtengine.server.schema import ChatRequest, parse_chat
from vtengine.server.splitter import ReplySplitter, StopCutter

log = logging.getLogger(__name__)
GONE = 499
"""Status in log and metrics when the client left first."""


class ChatExchange(Response):
    """The response object of the route; everything happens when it is called, so that time limits cover all of it."""

    def __init__(self, house: House, request_id: str) -> None:
        super().__init__()
        self.house, self.request_id = house, request_id
        self.has_body = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            async with asyncio.timeout(self.house.limits.request_timeout_s):
                await self._serve(headers, receive, reply)
        except ApiError as error:
            await self._refuse(error, receive, reply)
        except TimeoutError:
            message = f"not finished within {self.house.limits.request_timeout_s:g} s"
            await self._refuse(ApiError(504, "deadline", message, kind=BROKEN), receive, reply)
        except ClientGone:
            if not reply.ended:
                scope["vtengine.status"] = GONE
                self.house.metrics.cancelled.inc()
        except asyncio.CancelledError:
            self.has_body = True  # nobody waits for the rest of it any more
            await self._refuse(ApiError(503, "shutting_down", "the server is stopping", kind=BROKEN), receive, reply)
        except Exception as error:
            log.error("request %s: unforeseen fault: %s", self.request_id, type(error).__name__, exc_info=error)
            await self._refuse(ApiError(500, "internal_error", "an internal error", kind=BROKEN), receive, reply)

    async def _refuse(self, error: ApiError, receive: Receive, reply: Reply) -> None:
        if reply.ended:
            return
        if reply.started:
            reply.add_event(error.body())
            await reply.send_events(is_last=True)
            return
        if not self.has_body:
            await discard_body(receive, 2 * self.house.limits.max_body_bytes)
        await reply.whole(error.status, error.body(), error.headers())

    async def _serve(self, headers: dict[str, str], receive: Receive, reply: Reply) -> None:
        house = self.house
        house.keys.check(headers.get("authorization"))
        with house.gate.enter() as hold:
            body = await read_body(receive, headers, house.limits.max_body_bytes, hold)
            self.has_body = True
            chat = await asyncio.to_thread(parse_chat, body)
            del body
            job = self._prepare(chat)
            del chat
            await while_connected(receive, self._run(job, reply))

    def _prepare(self, chat: ChatRequest) -> Job:
        if chat.model != self.house.model:
            message = f"model: the model {ascii(chat.model)[:100]} does not exist; there is {self.house.model!r}"
            raise ApiError(404, "model_not_found", message, param="model")
        return prepare(chat, self.house.setting, self.house.limits, self.request_id)

    async def _run(self, job: Job, reply: Reply) -> None:
        async with self.house.gate.running():
            if job.streams:
                await _Stream(self.house, job, reply, self.request_id).run()
                return
            episode = await run_job(job)
            note_episode(episode, job, self.house)
            await reply.whole(200, self._completion(episode, job))

    def _completion(self, episode: Episode, job: Job) -> Json:
        reasoning, content = whole_reply(episode)
        if job.stops:
            cutter = StopCutter(job.stops)
            content = cutter.push(content) + cutter.flush()
        message = {"role": "assistant", "content": content, "reasoning_content": reasoning or None, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason(episode), "logprobs": None}
        return {
            "id": f"chatcmpl-{self.request_id}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.house.model,
            "choices": [choice],
            "usage": usage(episode.turns),
            "vtengine": account(episode, job.setting.limits),
        }


async def run_job(job: Job, on_event: OnEvent | None = None) -> Episode:
    """The one loop, on the request's own limits."""
    setting = job.setting
    backend: Backend = setting.backend
    if job.max_tokens is not None:
        backend = CappedBackend(backend, job.max_tokens)
    parts = (setting.pipeline, setting.tokenizer, setting.profile, setting.limits, setting.sampling)
    return await run_episode(job.question, backend, *parts, on_event=on_event)


def note_episode(episode: Episode, job: Job, house: House) -> None:
    """Counts it. Raises ApiError if it gives no completion."""
    house.metrics.count(episode)
    if episode.status in ("rejected", "failed") and not is_spent(episode):
        assert episode.error is not None
        raise episode_error(episode.status, episode.error, job.image_param, house.limits.retry_after_s)


async def job_events(job: Job, keep_alive_s: float) -> AsyncIterator[list[Event | Episode]]:
    """What has happened since the last look, nothing for a silence of keep_alive_s; the episode comes last.

    Closing it cancels the episode.
    """
    queue: asyncio.Queue[Event | None] = asyncio.Queue()
    episode = asyncio.ensure_future(run_job(job, queue.put_nowait))
    episode.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while True:
            try:
                async with asyncio.timeout(keep_alive_s):
                    event = await queue.get()
            except TimeoutError:
                yield []
                continue
            batch: list[Event | Episode] = []
            while event is not None:
                _append(batch, event)
                if queue.empty():
                    break
                event = queue.get_nowait()
            if event is None:
                yield [*batch, episode.result()]
                return
            yield batch
    finally:
        episode.cancel()
        await asyncio.gather(episode, return_exceptions=True)


def _append(batch: list[Event | Episode], event: Event) -> None:
    """Text joins the text before it, so that a server that falls behind has less to send."""
    if isinstance(event, TextDelta) and batch and isinstance(batch[-1], TextDelta):
        event = TextDelta(event.turn, batch.pop().text + event.text)  # type: ignore[union-attr]
    batch.append(event)


class _Stream:
    """Server-sent events of one episode. The status line goes out with the first turn: what is refused before that,
    such as a bad image, gets its own status."""

    def __init__(self, house: House, job: Job, reply: Reply, request_id: str) -> None:
        self.house, self.job, self.reply = house, job, reply
        self.frame = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": house.model,
        }
        self.splitter = ReplySplitter()
        self.cutter = StopCutter(job.stops)
        self.turns: list[Turn] = []
        self.has_content = self.has_reasoning = False
        self.breaks = False  # a turn has begun whose reasoning is to be set off from that before it

    async def run(self) -> None:
        async with aclosing(job_events(self.job, self.house.limits.keep_alive_s)) as batches:  # type: ignore[type-var]
            async for batch in batches:
                for event in batch:
                    self._read(event)
                if batch:
                    await self.reply.send_events(is_last=isinstance(batch[-1], Episode))
                elif self.reply.started:
                    await self.reply.send_comment()

    def _read(self, event: Event | Episode) -> None:
        """Adds what the event means to the chunks that are to be sent."""
        if isinstance(event, Asked):
            if event.turn == 0:
                self._delta({"role": "assistant", "content": ""})
            self.splitter, self.breaks = ReplySplitter(), self.has_reasoning
            self._asked(event)
        elif isinstance(event, TextDelta):
            for channel, text in self.splitter.push(event.text):
                self._text(channel, text)
        elif isinstance(event, Replied):
            self._replied(event)
        else:
            self._end(event)

    def _asked(self, event: Asked) -> None:
        view = shown_view(self.turns, event.turn, self.job.setting.limits)
        views = [view_account(view, image.width, image.height, image.visual_tokens) for image in event.images]
        started = {"event": "turn_started", "turn": event.turn + 1, "prompt_tokens": event.prompt_tokens}
        self._delta({}, {**started, "views": views})

    def _replied(self, event: Replied) -> None:
        self.turns.append(event.record)
        for channel, text in self.splitter.flush():
            self._text(channel, text)
        self._delta({}, {"event": "turn_finished", **turn_account(self.turns, event.turn, self.job.setting.limits)})

    def _text(self, channel: str, text: str) -> None:
        if channel == "content" and self.job.stops:
            text = self.cutter.push(text)
        if not text:
            return
        if channel == "content":
            self.has_content = True
        else:
            text, self.breaks, self.has_reasoning = TURN_BREAK * self.breaks + text, False, True
        self._delta({channel: text})

    def _end(self, episode: Episode) -> None:
        """Raises ApiError for an episode that gives no completion; where nothing was sent yet, that is the status."""
        note_episode(episode, self.job, self.house)
        if not self.has_content and not self.cutter.done and (plain := plain_answer(episode)):
            self._text("content", plain)
        if rest := self.cutter.flush():
            self._delta({"content": rest})
        self._delta({}, account(episode, self.job.setting.limits), finish_reason(episode))
        if self.job.with_usage:
            self.reply.add_event({**self.frame, "choices": [], "usage": usage(episode.turns)})

    def _delta(self, delta: Json, extension: Json | None = None, finish: str | None = None) -> None:
        chunk = {**self.frame, "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]}
        if self.job.with_usage:
            chunk["usage"] = None
        if extension is not None:
            chunk["vtengine"] = extension
        self.reply.add_event(chunk)
