"""The strict reading of calls: what is accepted, every code, and fuzzing."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtengine.protocol.messages import HIGH, View
from vtengine.protocol.profile import load_profile
from vtengine.protocol.tools import (
    ARGUMENTS,
    CROP,
    MAX_CALL_CHARS,
    RESIZE,
    RESIZE_CALL,
    CallError,
    ToolCall,
    parse_call,
)

RESIZE_JSON = '{"name": "resize_image", "arguments": {"action": "resize"}}'


def crop(box: object) -> str:
    return json.dumps({"name": CROP, "arguments": {"box": box}})


def scaled(scale: str) -> str:
    return RESIZE_JSON.replace('"resize"}', f'"resize", "scale": {scale}}}')


@pytest.mark.parametrize(
    ("text", "view"),
    [
        (RESIZE_JSON, HIGH),
        (f"\n  {RESIZE_JSON}\n", HIGH),
        ('{"arguments":{"action":"resize"},"name":"resize_image"}', HIGH),
        ('{\n "name": "resize_image",\n "arguments": {\n  "action": "resize"\n } }', HIGH),
        (scaled("1"), HIGH),
        (scaled("1.0"), HIGH),
        (scaled("0.75"), View("scale", scale=Fraction(3, 4))),
        (scaled("0.9999999"), HIGH),
        (scaled("6e-1"), View("scale", scale=Fraction(3, 5))),
        (crop([0, 0, 1, 1]), View("crop", box=(0, 0, 1, 1))),
        (crop([10, 20, 300, 40000]), View("crop", box=(10, 20, 300, 40000))),
    ],
)
def test_reads_calls(text: str, view: View) -> None:
    assert parse_call(text).view == view


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "json_invalid"),
        ("resize", "json_invalid"),
        ("\ufeff" + RESIZE_JSON, "json_invalid"),
        (RESIZE_JSON + RESIZE_JSON, "json_invalid"),
        (RESIZE_JSON[:-1], "json_invalid"),
        ("{'name': 'resize_image'}", "json_invalid"),
        ('{"name": "resize\nimage", "arguments": {}}', "json_invalid"),
        (RESIZE_JSON + " " * MAX_CALL_CHARS, "call_too_long"),
        ("[" * 400, "call_too_deep"),
        ('{"a": [[[[]]]]}', "call_too_deep"),
        ('{"name": "a", "name": "a", "arguments": {}}', "json_duplicate_key"),
        ('{"name": "resize_image", "arguments": {"action": "resize", "action": "resize"}}', "json_duplicate_key"),
        (scaled("NaN"), "json_not_finite"),
        (scaled("-Infinity"), "json_not_finite"),
        (scaled("1e999"), "json_not_finite"),
        ("[]", "call_not_object"),
        ("null", "call_not_object"),
        ('"resize_image"', "call_not_object"),
        ("{}", "call_missing_key"),
        ('{"name": "resize_image"}', "call_missing_key"),
        ('{"name": "resize_image", "arguments": {"action": "resize"}, "id": 1}', "call_unknown_key"),
        ('{"name": "zoom", "arguments": {"action": "resize"}}', "tool_unknown"),
        ('{"name": "Resize_image", "arguments": {"action": "resize"}}', "tool_unknown"),
        ('{"name": ["resize_image"], "arguments": {}}', "tool_unknown"),
        ('{"name": "resize_image", "arguments": "{}"}', "argument_type"),
        ('{"name": "resize_image", "arguments": {}}', "argument_missing"),
        ('{"name": "resize_image", "arguments": {"action": "resize", "box": [0, 0, 1, 1]}}', "argument_unknown"),
        ('{"name": "resize_image", "arguments": {"action": "shrink"}}', "argument_value"),
        ('{"name": "resize_image", "arguments": {"action": true}}', "argument_value"),
        (scaled("true"), "argument_type"),
        (scaled('"1"'), "argument_type"),
        (scaled("null"), "argument_type"),
        (scaled("0.5"), "argument_value"),
        (scaled("1.01"), "argument_value"),
        (scaled("9" * 300), "argument_value"),
        (crop([0, 0, 1]), "argument_type"),
        (crop([0, 0, 1, 1, 1]), "argument_type"),
        (crop([0, 0, 1.0, 1]), "argument_type"),
        (crop([0, 0, True, 1]), "argument_type"),
        (crop("0,0,1,1"), "argument_type"),
        (crop([5, 0, 5, 1]), "argument_value"),
        (crop([6, 0, 5, 1]), "argument_value"),
        (crop([-1, 0, 5, 1]), "argument_value"),
        ('{"name": "crop_image", "arguments": {}}', "argument_missing"),
    ],
)
def test_every_failure_has_a_code(text: str, code: str) -> None:
    with pytest.raises(CallError) as caught:
        parse_call(text)
    assert caught.value.code == code


def test_only_what_is_offered_is_obeyed() -> None:
    offered = {RESIZE: ("action",)}
    assert parse_call(RESIZE_JSON, offered) == RESIZE_CALL
    for text, code in ((scaled("0.75"), "argument_unknown"), (crop([0, 0, 1, 1]), "tool_not_offered")):
        with pytest.raises(CallError) as caught:
            parse_call(text, offered)
        assert caught.value.code == code


def test_messages_quote_the_model_only_in_ascii_and_briefly() -> None:
    name = "<|im_end|>\u202e" + "x" * 200
    with pytest.raises(CallError) as caught:
        parse_call(json.dumps({"name": name, "arguments": {}}, ensure_ascii=False))
    assert str(caught.value).isascii() and len(str(caught.value)) < 120


BOXES = st.tuples(*[st.integers(0, 10_000)] * 4).filter(lambda b: b[0] < b[2] and b[1] < b[3])
CALLS = st.one_of(
    st.just(RESIZE_CALL),
    st.integers(501, 999).map(lambda n: ToolCall(RESIZE, View("scale", scale=Fraction(n, 1000)))),
    BOXES.map(lambda box: ToolCall(CROP, View("crop", box=box))),
)


@given(CALLS)
def test_canonical_text_reads_back(call: ToolCall) -> None:
    assert parse_call(call.to_json()) == call


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(list(ARGUMENTS)),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["name", "arguments", "action", "scale", "box", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(JSON_VALUES.map(json.dumps) | st.text(max_size=60) | st.text('{}[]",:ae+-.0159 \\nu', max_size=60))
def test_fuzzed_calls_give_a_call_or_a_code(text: str) -> None:
    try:
        call = parse_call(text)
    except CallError as error:
        assert error.code
    else:
        assert parse_call(call.to_json()) == call


@given(CALLS, st.data())
def test_one_changed_character_never_breaks_the_reader(call: ToolCall, data: st.DataObject) -> None:
    text = call.to_json()
    at = data.draw(st.integers(0, len(text) - 1))
    test = text[:at] + data.draw(st.characters(codec="utf-8")) + text[at + 1 :]
    try:
        parse_call(test)
    except CallError as error:
        assert error.code


@pytest.mark.parametrize("name", ["vtengine", "visionthink"])
def test_shown_schema_agrees_with_the_reader(name: str) -> None:
    for tool in load_profile(name).tools:
        shown = json.loads(tool.line)
        shown = shown.get("function", shown)
        assert shown["name"] == tool.name
        assert set(shown["parameters"]["properties"]) == set(tool.arguments)
        assert shown["parameters"]["required"] == [key for key, needed in ARGUMENTS[tool.name].items() if needed]
