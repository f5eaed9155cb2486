"""The tools a model may call, and the strict reading of a call. Every failure has a code; nothing is repaired."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from vtengine.protocol.messages import HIGH, View

MAX_CALL_CHARS = 512
MAX_CALL_DEPTH = 4
SCALE_DENOMINATOR = 1000
"""A scale is read to three decimals."""

RESIZE = "resize_image"
CROP = "crop_image"

ARGUMENTS: Mapping[str, Mapping[str, bool]] = {
    RESIZE: {"action": True, "scale": False, "image": False},
    CROP: {"box": True, "image": False},
}
"""Tool -> argument -> whether it must be given. A profile may offer fewer (those that need not be given)."""

ACTIONS: Mapping[str, str] = {RESIZE: "resize", CROP: "crop"}
"""The word that records use for each tool."""


class CallError(ValueError):
    """A call that cannot be obeyed. `code` is stable; the message never quotes more than a name of the model's text."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class ToolCall:
    """`image`: the picture's number from 1 as the model wrote it, None where it named none."""

    name: str
    view: View
    image: int | None = None

    @property
    def action(self) -> str:
        return ACTIONS[self.name]

    def to_json(self) -> str:
        """The canonical text of the call, as the model is taught to write it."""
        arguments: dict[str, Any]
        if self.name == CROP:
            arguments = {"box": list(self.view.box or ())}
        else:
            arguments = {"action": "resize"}
            if self.view.scale is not None:
                arguments["scale"] = float(self.view.scale)
        if self.image is not None:
            arguments["image"] = self.image
        return json.dumps({"name": self.name, "arguments": arguments})


RESIZE_CALL = ToolCall(RESIZE, HIGH)


def parse_call(text: str, offered: Mapping[str, Collection[str]] | None = None) -> ToolCall:
    """Reads the text between the call tags.

    offered: tool name -> the argument names it is offered with; default: every tool with every argument.
    Raises CallError: call_too_long, call_too_deep, json_invalid, json_duplicate_key, json_not_finite,
    call_not_object, call_missing_key, call_unknown_key, tool_unknown, tool_not_offered, argument_missing,
    argument_unknown, argument_type, argument_value.
    """
    call = _load_json(text)
    if not isinstance(call, dict):
        raise CallError("call_not_object", "a call is a JSON object")
    _require_keys(call, {"name": True, "arguments": True}, "call_missing_key", "call_unknown_key")
    name, arguments = call["name"], call["arguments"]
    if not isinstance(name, str) or name not in ARGUMENTS:
        raise CallError("tool_unknown", f"no tool named {_short(name)}; there are {', '.join(ARGUMENTS)}")
    if offered is not None and name not in offered:
        raise CallError("tool_not_offered", f"{name} is not offered here")
    if not isinstance(arguments, dict):
        raise CallError("argument_type", "arguments is a JSON object")
    names = ARGUMENTS[name] if offered is None else {k: v for k, v in ARGUMENTS[name].items() if k in offered[name]}
    _require_keys(arguments, names, "argument_missing", "argument_unknown")
    view = _crop_view(arguments) if name == CROP else _resize_view(arguments)
    image = _image_number(arguments)
    return ToolCall(name, view if image is None else replace(view, image=image - 1), image)


def _resize_view(arguments: Mapping[str, Any]) -> View:
    if arguments["action"] != "resize":
        raise CallError("argument_value", 'action is "resize"')
    if "scale" not in arguments:
        return HIGH
    return whole_view(read_scale(arguments["scale"]))


def read_scale(value: Any) -> Fraction:
    """A share of the high view's sides. Raises CallError argument_type, argument_value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CallError("argument_type", "scale is a number")
    if not 0.5 < value <= 1:
        raise CallError("argument_value", "scale is above 0.5 (the low view) and at most 1 (the high view)")
    return Fraction(round(value * SCALE_DENOMINATOR), SCALE_DENOMINATOR)


def whole_view(scale: Fraction, image: int = 0) -> View:
    """The whole image at that share of the high view's sides."""
    return View("high", image=image) if scale == 1 else View("scale", scale=scale, image=image)


def _image_number(arguments: Mapping[str, Any]) -> int | None:
    if "image" not in arguments:
        return None
    number = arguments["image"]
    if isinstance(number, bool) or not isinstance(number, int):
        raise CallError("argument_type", "image is a whole number")
    if number < 1:
        raise CallError("argument_value", "image is 1 or more")
    return number


def _crop_view(arguments: Mapping[str, Any]) -> View:
    box = arguments["box"]
    whole = isinstance(box, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in box)
    if not whole or len(box) != 4:
        raise CallError("argument_type", "box is four whole numbers: [x1, y1, x2, y2]")
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 and 0 <= y1 < y2):
        raise CallError("argument_value", "box needs 0 <= x1 < x2 and 0 <= y1 < y2")
    return View("crop", box=(x1, y1, x2, y2))


def _load_json(text: str) -> Any:
    if len(text) > MAX_CALL_CHARS:
        raise CallError("call_too_long", f"a call has at most {MAX_CALL_CHARS} characters, this one {len(text)}")
    if _depth(text) > MAX_CALL_DEPTH:
        raise CallError("call_too_deep", f"a call nests at most {MAX_CALL_DEPTH} deep")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_finite)
    except CallError:
        raise
    except ValueError as error:  # JSONDecodeError, and integers of too many digits
        raise CallError("json_invalid", f"not JSON: {error}") from None
    _require_finite(value)
    return value


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings, without parsing."""
    depth = deepest = 0
    in_string = escaped = False
    for char in text:
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise CallError("json_duplicate_key", "a key is given twice")
    return result


def _not_finite(name: str) -> Any:
    raise CallError("json_not_finite", f"{name} is not a JSON number")


def _require_finite(value: Any) -> None:
    """A literal such as 1e999 is read as infinity by the JSON reader."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _require_finite(item)
    elif isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise CallError("json_not_finite", "a number is too large")


def _require_keys(found: Mapping[str, Any], names: Mapping[str, bool], missing: str, unknown: str) -> None:
    for name, required in names.items():
        if required and name not in found:
            raise CallError(missing, f"{name} is missing")
    for name in found:
        if name not in names:
            raise CallError(unknown, f"{_short(name)} is not known; there are {', '.join(names)}")


def _short(value: object) -> str:
    """A name from the model's text, safe to print."""
    return ascii(value)[:40]
