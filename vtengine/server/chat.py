"""One chat completion, from the first byte of the body to the last of the reply. The episode loop does the work."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from starlette.types import Message, Receive, Scope, Send

from vtengine.rollout.episode import Episode
from vtengine.server.account import Json, account, account_of_choices, finish_reason, usage, whole_reply
from vtengine.server.admission import Visit
from vtengine.server.choices import run_choice, together
from vtengine.server.connection import ClientGone, Reply, discard_body, read_body, while_connected
from vtengine.server.errors import BROKEN, ApiError
from vtengine.server.house import House
from vtengine.server.logprobs import content_logprobs
from vtengine.server.prepare import Job, prepare
from vtengine.server.schema import ChatRequest, parse_chat
from vtengine.server.splitter import StopCutter
from vtengine.server.stream import Stream

log = logging.getLogger(__name__)
SMALL_BODY = 256 << 10
"""Bytes: reading fewer takes less time than handing them to a thread."""
GONE = 499
"""Status in log and metrics when the client left first."""


class ChatExchange:
    """Once `run` is called the request's time limit counts."""

    def __init__(self, house: House, scope: Scope, receive: Receive, send: Send) -> None:
        self.house, self.scope, self.reply = house, scope, Reply(send)
        self.request_id: str = scope["vtengine.request_id"]
        self.has_body = False
        self._receive = receive

    async def receive(self) -> Message:
        """Notes when the body has ended: one that is refused at its last piece is told at once, not awaited further."""
        message = await self._receive()
        self.has_body = self.has_body or not message.get("more_body", False)
        return message

    async def run(self) -> None:
        """Sends the reply, or why there is none. Faults do not leave it."""
        try:
            async with asyncio.timeout(self.house.limits.request_timeout_s):
                await self._serve()
        except ApiError as error:
            await self._refuse(error)
        except TimeoutError:
            message = f"not finished within {self.house.limits.request_timeout_s:g} s"
            await self._refuse(ApiError(504, "deadline", message, kind=BROKEN))
        except ClientGone:
            if not self.reply.ended:
                self.scope["vtengine.status"] = GONE
                self.house.metrics.cancelled.inc()
        except asyncio.CancelledError:
            self.has_body = True  # nobody waits for the rest of it any more
            await self._refuse(ApiError(503, "shutting_down", "the server is stopping", kind=BROKEN))
        except Exception as error:
            log.error("request %s: unforeseen fault: %s", self.request_id, type(error).__name__, exc_info=error)
            await self._refuse(ApiError(500, "internal_error", "an internal error", kind=BROKEN))

    async def _refuse(self, error: ApiError) -> None:
        reply = self.reply
        if reply.ended:
            return
        if reply.started:
            reply.add_event(error.body())
            await reply.send_events(is_last=True)
            return
        if not self.has_body:
            await discard_body(self.receive, 2 * self.house.limits.max_body_bytes)
        await reply.whole(error.status, error.body(), error.headers())

    async def _serve(self) -> None:
        house = self.house
        if self.scope["method"] != "POST":
            message = f"{self.scope['method']} is not possible on {self.scope['path']}"
            raise ApiError(405, "method_not_allowed", message)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.scope["headers"]}
        house.keys.check(headers.get("authorization"))
        with house.gate.enter() as visit:
            body = await read_body(self.receive, headers, house.limits.max_body_bytes, visit.hold)
            chat = parse_chat(body) if len(body) < SMALL_BODY else await asyncio.to_thread(parse_chat, body)
            del body
            job = self._prepare(chat)
            del chat
            visit.expect(job.num_choices - 1)
            await while_connected(self.receive, self._run(job, visit))

    def _prepare(self, chat: ChatRequest) -> Job:
        if chat.model != self.house.model:
            message = f"model: the model {ascii(chat.model)[:100]} does not exist; there is {self.house.model!r}"
            raise ApiError(404, "model_not_found", message, param="model")
        return prepare(chat, self.house.setting, self.house.limits, self.request_id)

    async def _run(self, job: Job, visit: Visit) -> None:
        if job.streams:
            await Stream(self.house, job, visit, self.reply, self.request_id).run()
            return
        choices = (run_choice(job, index, visit, self.house) for index in range(job.num_choices))
        await self.reply.whole(200, self._completion(await together(choices), job))

    def _completion(self, episodes: Sequence[Episode], job: Job) -> Json:
        return {
            "id": f"chatcmpl-{self.request_id}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.house.model,
            "choices": [self._choice(episode, index, job) for index, episode in enumerate(episodes)],
            "usage": usage(episodes),
            "vtengine": account_of_choices(episodes, job.limits),
        }

    def _choice(self, episode: Episode, index: int, job: Job) -> Json:
        reasoning, content = whole_reply(episode)
        if job.stops:
            cutter = StopCutter(job.stops)
            content = cutter.push(content) + cutter.flush()
        message = {"role": "assistant", "content": content, "reasoning_content": reasoning or None, "refusal": None}
        choice = {"index": index, "message": message, "finish_reason": finish_reason(episode), "logprobs": None}
        if job.with_logprobs:
            choice["logprobs"] = content_logprobs(episode, self.house.setting.tokenizer, len(content))
        return choice if job.num_choices == 1 else {**choice, "vtengine": account(episode, job.limits)}
