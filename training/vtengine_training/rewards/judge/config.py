"""Settings of the judge, in one frozen dataclass. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from vtengine_training.checks import at_least


@dataclass(frozen=True)
class JudgeConfig:
    """url: the endpoint's /v1. api_key_env: the environment variable that holds the key; unset = no key.

    concurrency, requests_per_minute (0 = no limit): over all requests. timeout_s: one attempt. deadline_s: one verdict
    with all its attempts and waits; then there is none. attempts: requests for one verdict, 429s included.
    breaker_failures: so many verdicts in a row that failed, and for breaker_pause_s no further one is asked for.
    cache: SQLite file of verdicts, "" = none. canaries: known pairs asked each step, 0 = none.
    price_*: per million tokens, for the cost counter. extra_body: added to every request.
    """

    url: str = "http://127.0.0.1:8000/v1"
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 32
    requests_per_minute: int = 0
    timeout_s: float = 30.0
    deadline_s: float = 120.0
    attempts: int = 4
    backoff_s: float = 0.5
    breaker_failures: int = 8
    breaker_pause_s: float = 15.0
    max_tokens: int = 64
    max_answer_chars: int = 1000
    cache: str = ""
    canaries: int = 2
    price_prompt: float = 0.0
    price_completion: float = 0.0
    extra_body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(self, 1, "concurrency", "attempts", "breaker_failures", "max_tokens", "max_answer_chars")
        at_least(self, 0, "requests_per_minute", "canaries")
        for name in ("timeout_s", "deadline_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} = {getattr(self, name)}: must be a number of seconds above 0")
        for name in ("backoff_s", "breaker_pause_s", "price_prompt", "price_completion"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} = {getattr(self, name)}: must be a number, 0 or more")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url = {self.url!r}: must start with http:// or https:// and end at /v1")
        taken = {"model", "messages", "temperature", "max_tokens", "n", "stream"} & self.extra_body.keys()
        if taken:
            raise ValueError(f"extra_body: {', '.join(sorted(taken))} cannot be changed here")

    def require_model(self) -> None:
        """Raises ValueError if no model is named."""
        if not self.model:
            raise ValueError('reward.judge.model = "": name the model that the endpoint serves')
