"""What pydantic finds wrong with a body, in our words: field, value, remedy; codes as OpenAI's are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vtengine.config import did_you_mean, hinted
from vtengine.server.errors import SHOWN_CHARS, ApiError, invalid

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

MISSING, TYPE, VALUE, UNKNOWN = "missing_required_parameter", "invalid_type", "invalid_value", "unknown_parameter"
_TYPES = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "model_attributes_type": "must be an object",
}
_OR_TEXT = ("content", "stop")
"""Lists of one text may be that text."""
_BOUNDS = {
    "greater_than_equal": "must be >= {ge}",
    "greater_than": "must be > {gt}",
    "less_than_equal": "must be <= {le}",
    "less_than": "must be < {lt}",
    "finite_number": "must be finite",
    "too_short": "must not be empty",
    "value_error": "{error}",
}


def refusal(error: ValidationError, fields: Mapping[str, Iterable[str]]) -> ApiError:
    """Of the first fault. fields: the known ones of a section, to name the nearest of."""
    first = error.errors(include_url=False)[0]
    kind, value = first["type"], first["input"]
    context = {
        name: f"{found:g}" if isinstance(found, float) else found for name, found in first.get("ctx", {}).items()
    }
    if kind == "json_invalid":
        return ApiError(400, "invalid_json", f"the body is not JSON: {context['error']}")
    param = field_name(first["loc"]) or "body"
    if kind == "missing":
        return invalid(param, "missing; add it", MISSING)
    if kind == "extra_forbidden":
        return unknown("field", param, str(first["loc"][-1]), fields.get(str(first["loc"][0]), ()))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _no_such_kind(param, first)
    if kind == "literal_error":
        return invalid(param, _one_of(value, str(context["expected"])), value=value)
    if kind in _TYPES:
        or_text = "must be text or a list" if kind == "list_type" and first["loc"][-1] in _OR_TEXT else None
        return invalid(param, or_text or _TYPES[kind], TYPE, value=value)
    return invalid(param, _BOUNDS.get(kind, "cannot be used").format(**context), value=value)


def _no_such_kind(param: str, fault: ErrorDetails) -> ApiError:
    """A message without a role that we know, or a part without such a type."""
    context, value = fault["ctx"], fault["input"]
    name = str(context["discriminator"]).strip("'")
    if name not in value:
        return invalid(f"{param}.{name}", "missing; add it", MISSING)
    return invalid(f"{param}.{name}", _one_of(value[name], str(context["expected_tags"])), value=value[name])


def _one_of(value: Any, expected: str) -> str:
    """expected: in pydantic's words, such as 'low' or 'high'."""
    names = [word.strip("' ") for word in expected.replace(" or ", ", ").split(",")]
    return hinted(f"must be one of {', '.join(names)}", str(value)[:SHOWN_CHARS], names)


def unknown(what: str, param: str, name: str, known: Iterable[str]) -> ApiError:
    """param: the whole name; name: its last part, which the nearest of `known` is told for."""
    short = ascii(param)[1:-1][:SHOWN_CHARS]
    remedy = did_you_mean(name[:SHOWN_CHARS], known) or "leave it out"
    return invalid(short, f"unknown {what}; {remedy}", UNKNOWN)


_UNION_TAGS = frozenset(("user", "system", "developer", "assistant", "text", "image_url"))


def field_name(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "user", "content", 1, "text", "text") -> "messages[0].content[1].text", as OpenAI names it."""
    parts: list[str] = []
    is_tag_next = False
    for item in loc:
        if isinstance(item, int):
            parts.append(f"[{item}]")
        elif not (is_tag_next and item in _UNION_TAGS):
            parts.append(f".{item}" if parts else item)
        is_tag_next = isinstance(item, int)
    return "".join(parts)
