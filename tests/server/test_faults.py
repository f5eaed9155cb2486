"""A request with a fault in any field is told field, value and remedy, in our words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from tests.server.running import MODEL
from vtengine.server.errors import ApiError
from vtengine.server.schema import ChatRequest, parse_chat

BODY: dict[str, Any] = {
    "model": MODEL, "n": 1, "stream": True, "stream_options": {"include_usage": True}, "temperature": 1.0, "top_p": 0.5,
    "seed": 1, "max_tokens": 3, "stop": ["a"], "vtengine": {"resolution": "low", "max_turns": 1, "scale": 0.7},
    "messages": [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}, {"type": "text", "text": "t"}]},
        {"role": "assistant", "content": "x", "tool_calls": []},
    ],
}  # fmt: skip
ODD = (None, True, -1, 0, 1.5, 99, 2.0**70, float("inf"), 2**80, "", "x" * 300, [], [1], ["a"] * 9, {}, {"a": 1})


def variants(value: Any, param: str = "") -> Iterator[tuple[str, Any]]:
    """(field, body) for every field with odd values, with one too many, and left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        name = f"{param}[{key}]" if isinstance(key, int) else f"{param}.{key}".lstrip(".")
        for odd in ODD:
            yield name, type(value)(value | {key: odd} if isinstance(value, dict) else [odd])
        if isinstance(value, dict):
            yield name, {other: value[other] for other in value if other != key}
            yield f"{name}x", value | {f"{key}x": 1}
        for found, changed in variants(inner, name):
            if isinstance(value, dict):
                yield found, value | {key: changed}
            else:
                yield found, [*value[:key], changed, *value[key + 1 :]]


def test_whatever_is_wrong_is_said_in_our_words() -> None:
    """Field, value and remedy, for every field; nothing that pydantic says of it."""
    parse_chat(json.dumps(BODY).encode())
    said = set()
    for name, body in variants(BODY):
        try:
            parse_chat(json.dumps(body).encode())
        except ApiError as error:
            said.add(error.message)
            assert error.code in ("missing_required_parameter", "invalid_type", "invalid_value", "unknown_parameter")
            assert error.param is not None and error.message.startswith(error.param), name
            field, remedy = error.message.removeprefix(error.param).split(": ", 1)
            assert not field or field.startswith(" = ")
            assert remedy.startswith(("must be", "must not", "missing; add it", "unknown ", "earlier ")), error.message
            assert len(error.message) < 250 and error.message.isascii()
    assert {
        "model: missing; add it",
        "model = null: must be text",
        "messages = []: must not be empty",
        "messages = null: must be a list",
        "messages[0].content = null: must be text or a list",
        "stop = 1.5: must be text or a list",
        'messages[0].role = "": must be one of user, system, developer, assistant',
        "messages[1].content[0].image_url.url = 1.5: must be text",
        "messages[1].content[1].typex: unknown field; leave it out",
        "stop = a list: must be at most 4 strings of 1 to 256 characters",
        "temperature = -1: must be >= 0",
        "seed = 1208925819614629174706176: must be < 9223372036854775808",
        "vtengine.scale = 99: must be <= 1",
        "vtengine.max_turnsx: unknown field; did you mean max_turns?",
        f'vtengine.resolution = "{"x" * 63}...: must be one of adaptive, low, high',
    } <= said


@pytest.mark.parametrize(
    "changed",
    [
        {"messages": [{"role": "us"}] * 9},
        {"messages": [{"role": "user", "content": [{"type": "x"}] * 9}]},
        {"messages": [{"role": "system", "content": [{"type": "x"}] * 9}]},
        {"stop": [1] * 9},
    ],
)
def test_reading_ends_at_the_first_fault_of_a_list(changed: dict[str, Any]) -> None:
    """To tell of a million of them takes seconds, in which nobody is served."""
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate_json(json.dumps(BODY | changed))
    assert len({error["loc"] for error in caught.value.errors()}) <= 2, "type and text of the one part"
