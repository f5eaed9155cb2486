"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} and a status."""

from __future__ import annotations

import json
from typing import Any

from vtengine.protocol.messages import ErrorInfo

INVALID, OVERLOADED, BROKEN = "invalid_request_error", "rate_limit_error", "server_error"
_FAILED_STATUS = {"backend_failed": 503}
_PARAMS = {
    "prompt_too_long": "messages",
    "text_not_unicode": "messages",
    "images_unsupported": "messages",
    "visual_budget_too_small": "vtengine.visual_token_budget",
}


class ApiError(Exception):
    """A request that gets no completion. param: the field at fault; code: stable; retry_after_s: sent as a header."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        kind: str = INVALID,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.kind = status, code, message, param, kind
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return headers | {401: {"www-authenticate": "Bearer"}, 405: {"allow": "POST"}}.get(self.status, {})


NOT_SHOWN: Any = object()
SHOWN_CHARS = 64


def invalid(param: str, message: str, code: str = "invalid_value", *, value: Any = NOT_SHOWN) -> ApiError:
    """Status 400; the message names the field, and its value where one is given."""
    field = param if value is NOT_SHOWN else f"{param} = {shown(value)}"
    return ApiError(400, code, f"{field}: {message}", param=param)


def shown(value: Any) -> str:
    """A value of a request as JSON in ASCII, cut where it is long; of lists and objects only what they are."""
    if isinstance(value, list | dict) and value:
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value[: SHOWN_CHARS + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def episode_error(status: str, error: ErrorInfo, image_param: str | None, retry_after_s: int) -> ApiError:
    """An episode without a reply: `rejected` is the request's fault, `failed` is ours where it is no image's."""
    if status == "rejected" or error.code.startswith("image_"):  # an address that cannot be reached is the client's
        param = image_param if error.code.startswith("image_") else _PARAMS.get(error.code, "messages")
        return ApiError(400, error.code, error.message, param=param)
    code = _FAILED_STATUS.get(error.code, 500)
    message = error.message if error.code != "internal_error" else "an internal error, logged under the request's id"
    return ApiError(code, error.code, message, kind=BROKEN, retry_after_s=retry_after_s if code == 503 else None)
