"""One chat completion after the other from an OpenAI-compatible endpoint: bounded in number, rate and time."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from vtengine_training.rewards.judge.config import JudgeConfig
from vtengine_training.rewards.judge.prompt import Prompt

MAX_REPLY_CHARS = 200_000
_RETRIED = frozenset({408, 409, 425, 429})


class NoVerdict(Exception):
    """The judge gave none. Codes: deadline timeout rate_limited http_error connection bad_reply unparsable paused."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Reply:
    text: str
    prompt_tokens: int
    completion_tokens: int


class _Failed(Exception):
    """One attempt failed. retry_after_s: what the server asked for."""

    def __init__(self, code: str, message: str, is_final: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code, self.is_final, self.retry_after_s = code, is_final, retry_after_s


class Endpoint:
    """Use within one event loop. `counts`: attempts and failures by code since the start."""

    def __init__(self, config: JudgeConfig) -> None:
        config.require_model()
        try:
            import openai
        except ImportError:
            raise ValueError("reward.judge: needs the openai client; pip install 'vtengine[judge]'") from None
        self.config = config
        self.counts: Counter[str] = Counter()
        self._openai = openai
        key = os.environ.get(config.api_key_env) or "none"
        self._client = openai.AsyncOpenAI(base_url=config.url, api_key=key, timeout=config.timeout_s, max_retries=0)
        self._slots = asyncio.Semaphore(config.concurrency)
        # Both on the clock of time.monotonic: no request starts before; every request fails at once until.
        self._next_start_s = self._paused_until_s = 0.0
        self._failures_in_a_row = 0

    async def complete(self, prompt: Prompt) -> Reply:
        """The reply, or NoVerdict after `attempts` attempts or `deadline_s` seconds, whichever is first.

        The clock starts when it is this request's turn, so that a long queue fails nobody.
        """
        async with self._slots:
            if time.monotonic() < self._paused_until_s:
                raise NoVerdict("paused", f"{self.config.url}: the last {self._failures_in_a_row} requests failed")
            await self._wait_for_turn()
            try:
                async with asyncio.timeout(self.config.deadline_s):
                    reply = await self._attempts(prompt)
            except TimeoutError:
                self._note_failure()
                raise NoVerdict("deadline", f"no reply within {self.config.deadline_s} s") from None
            except NoVerdict:
                self._note_failure()
                raise
        self._failures_in_a_row = 0
        return reply

    async def close(self) -> None:
        await self._client.close()

    async def _attempts(self, prompt: Prompt) -> Reply:
        for attempt in range(1, self.config.attempts + 1):
            if attempt > 1:
                await self._wait_for_turn()
            self.counts["requests"] += 1
            try:
                return await self._attempt(prompt)
            except _Failed as failure:
                self.counts[failure.code] += 1
                if failure.is_final or attempt == self.config.attempts:
                    message = f"{self.config.url}: {failure} (attempt {attempt} of {self.config.attempts})"
                    raise NoVerdict(failure.code, message) from None
                if failure.retry_after_s is not None:
                    # The server speaks for every request: all of them wait.
                    pause_s = min(failure.retry_after_s, self.config.deadline_s)
                    self._next_start_s = max(self._next_start_s, time.monotonic() + pause_s)
                else:
                    await asyncio.sleep(self.config.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable")

    def _note_failure(self) -> None:
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self.config.breaker_failures:
            self._paused_until_s = time.monotonic() + self.config.breaker_pause_s

    async def _wait_for_turn(self) -> None:
        """Requests start `60 / requests_per_minute` apart, and not while the server asked for a pause."""
        while (wait_s := self._next_start_s - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)
        if self.config.requests_per_minute:
            self._next_start_s = max(self._next_start_s, time.monotonic()) + 60 / self.config.requests_per_minute

    async def _attempt(self, prompt: Prompt) -> Reply:
        api = self._openai
        try:
            async with asyncio.timeout(self.config.timeout_s):
                raw = await self._client.chat.completions.with_raw_response.create(
                    model=self.config.model,
                    messages=[{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}],
                    temperature=0.0,
                    max_tokens=self.config.max_tokens,
                    extra_body=dict(self.config.extra_body),
                )
                return read_reply(raw.http_response.content)
        except TimeoutError:
            raise _Failed("timeout", f"no reply within {self.config.timeout_s} s") from None
        except api.APITimeoutError:
            raise _Failed("timeout", f"no reply within {self.config.timeout_s} s") from None
        except api.APIStatusError as error:
            status = error.status_code
            code = "rate_limited" if status == 429 else "http_error"
            is_final = status < 500 and status not in _RETRIED
            raise _Failed(code, f"HTTP {status}", is_final, _retry_after_s(error.response.headers)) from None
        except api.APIConnectionError as error:
            raise _Failed("connection", f"cannot be reached: {error.__cause__ or error}") from None
        except (api.OpenAIError, OSError) as error:
            raise _Failed("connection", f"{type(error).__name__}: {error}") from None
        except ValueError as error:
            raise _Failed("bad_reply", f"no chat completion: {error}") from None


def read_reply(body: bytes) -> Reply:
    """Reads the body of a chat completion. Raises ValueError for anything else, and for a reply that was cut."""
    if len(body) > MAX_REPLY_CHARS:
        raise ValueError(f"{len(body)} bytes, at most {MAX_REPLY_CHARS} are read")
    try:
        data: Any = json.loads(body)
        choice = data["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("not of the documented shape") from None
    if not isinstance(text, str):
        raise ValueError("the message has no text")
    if finish not in ("stop", None):
        raise ValueError(f"finish_reason {finish!r}: raise max_tokens if the judge thinks before its verdict")
    usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
    return Reply(text, _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _retry_after_s(headers: Any) -> float | None:
    """Seconds; a date, or nonsense, is None (the usual backoff applies)."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
