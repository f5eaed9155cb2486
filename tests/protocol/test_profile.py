"""Profiles: golden prompts byte for byte, and every mistake in a profile file named."""

from __future__ import annotations

import copy
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import pytest

from vtengine.protocol.conversation import Conversation, Limits
from vtengine.protocol.messages import Geometry, View
from vtengine.protocol.profile import SHIPPED, fill, load_profile, parse_profile, shipped_profiles
from vtengine.protocol.tools import CROP, RESIZE_CALL, ToolCall

DATA = Path(os.environ.get("VTENGINE_TEST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
GOLDEN = Path(__file__).parent / "golden"
QUESTION = "What does the {sign} say? <|im_end|>"
CROP_CALL = ToolCall(CROP, View("crop", box=(0, 0, 100, 50)))


def play(name: str, limits: Limits, geometry: Geometry, *replies: str) -> str:
    """The whole context as text: asks, and replies with the closing mark that the model samples."""
    profile = load_profile(name)
    conversation = Conversation.start(QUESTION, profile, limits, geometry)
    text = ""
    for reply in (*replies, None):
        ask = conversation.ask()
        if ask is None:
            break
        text += ask.text()
        if reply is not None:
            text += reply + profile.close
            conversation = conversation.after(reply)
    return text


def cases(name: str) -> dict[str, tuple[Limits, tuple[str, ...]]]:
    profile = load_profile(name)
    resize = profile.reply_call("small", RESIZE_CALL)
    answer = profile.reply_answer("clear", "STOP")
    budget = Limits(visual_token_budget=300, max_turns=3)
    return {
        "direct_low": (Limits("low"), (answer,)),
        "direct_high": (Limits("high"), (answer,)),
        "resized": (Limits(), (resize, answer)),
        "denied_budget": (budget, (resize, answer)),
        "denied_twice": (Limits(max_turns=3), (resize, resize, answer)),
        "cropped": (Limits(max_turns=3), (profile.reply_call("there", CROP_CALL), answer)),
        "bad_call": (Limits(), ("<think>a</think><tool_call>{}</tool_call>", answer)),
    }


ALL = [(name, case) for name in shipped_profiles() for case in cases(name)]


@pytest.mark.parametrize(("name", "case"), ALL)
def test_prompts_are_golden(name: str, case: str, geometry: Geometry) -> None:
    limits, replies = cases(name)[case]
    golden = (GOLDEN / f"{name}.{case}.txt").read_bytes().decode("utf-8")
    assert play(name, limits, geometry, *replies) == golden


@pytest.mark.parametrize(("name", "joiner"), [("vtengine", "\n"), ("glance", "\n"), ("visionthink", "")])
def test_joiner_after_a_reply(name: str, joiner: str, geometry: Geometry) -> None:
    profile = load_profile(name)
    reply = profile.reply_call("a", RESIZE_CALL)
    text = play(name, Limits(), geometry, reply)
    first, second = text.split(reply)
    assert second.startswith(f"<|im_end|>{joiner}<|im_start|>user\n<tool_response>\n")
    assert second.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert first.startswith("<|im_start|>system\n") and "<|im_end|>\n<|im_start|>user\n" in first


def test_facts_of_the_released_weights(geometry: Geometry) -> None:
    text = play("visionthink", Limits(), geometry, load_profile("visionthink").reply_call("a", RESIZE_CALL))
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n\n")
    assert f"Here is the image and question:\n<|vision_start|><|image_pad|><|vision_end|>{QUESTION}<|im_end|>" in text
    assert (
        "</tool_call><|im_end|><|im_start|>user\n<tool_response>\nThe resized image is shown below:\n"
        "<|vision_start|><|image_pad|><|vision_end|>\n</tool_response>\n"
    ) in text
    (tool,) = load_profile("visionthink").tools
    shown = json.loads(tool.line)["function"]
    assert shown["name"] == shown["name_for_human"] == "resize_image"
    assert shown["description"] == "Resize the image resolution."
    assert shown["args_format"] == "Format the arguments as a JSON object."
    assert shown["parameters"]["properties"]["action"]["enum"] == ["resize"]


@pytest.mark.parametrize("name", shipped_profiles())
def test_qwen_chat_template_gives_the_same_first_turn(name: str, geometry: Geometry) -> None:
    """The first turn is what the models' own template makes of the same messages."""
    path = DATA / "qwen2_5_vl_configs" / "chat_template.json"
    if not path.is_file():
        pytest.skip(f"no Qwen2.5-VL chat template at {path}")
    ours = play(name, Limits(), geometry)
    pattern = (
        r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n"
    )
    match = re.fullmatch(pattern, ours, re.DOTALL)
    assert match is not None
    before, after = match[2].split("<|vision_start|><|image_pad|><|vision_end|>")
    content = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
    messages = [{"role": "system", "content": match[1]}, {"role": "user", "content": content}]
    template = jinja2.Template(json.loads(path.read_text(encoding="utf-8"))["chat_template"])
    assert template.render(messages=messages, add_generation_prompt=True) == ours


def test_glance_is_compact(geometry: Geometry) -> None:
    text = play("glance", Limits(), geometry, load_profile("glance").reply_call("", RESIZE_CALL))
    assert len(text.replace(QUESTION, "")) < 450


def shipped(name: str = "glance") -> dict[str, Any]:
    return tomllib.loads((SHIPPED / f"{name}.toml").read_text(encoding="utf-8"))


def changed(path: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(shipped())
    *sections, key = path.split(".")
    table = data
    for section in sections:
        table = table[section]
    if value is None:
        del table[key]
    else:
        table[key] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("nmae", "x", "nmae: unknown; did you mean name"),
        ("name", None, "name: missing"),
        ("name", 3, "name = 3: must be text"),
        ("on_bad_call", "ignore", 'must be "end" or "retry"'),
        ("low_view", "quarter", "low_view = 'quarter': must be one of one_resize, half_first"),
        ("resize_mode", "pil14", "resize_mode = 'pil14': must be one of pil13, pil12, tv"),
        ("turn", "x", "turn: must be a table"),
        ("turn.joinr", "x", "turn.joinr: unknown; did you mean joiner"),
        ("turn.close", None, "turn.close: missing"),
        ("turn.open", "<|im_start|>", r"turn.open: needs {role} exactly once, has it 0 times"),
        ("adaptive.user", "{image}{image}{question}", r"adaptive.user: needs {image} exactly once, has it 2"),
        ("adaptive.user", "{image}{question}{answer}", r"placeholder {answer} is not known here"),
        ("direct.system", "{tools}", r"placeholder {tools} is not known here; known: none"),
        ("tools", {}, "offer at least one"),
        ("tools.zoom", {"arguments": []}, "tools.zoom: unknown"),
        ("tools.crop_image", 1, "must be a table"),
        ("tools.resize_image.arguments", "action", "must be a list of names"),
        ("tools.resize_image.arguments", ["scale"], "action is required"),
        ("tools.resize_image.arguments", ["action", "scael"], "did you mean scale"),
        ("tools.resize_image.line", "{", "not JSON"),
        ("tools.resize_image.line", 1, "must be text"),
    ],
)
def test_mistakes_are_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_profile(changed(path, value))


def test_from_a_folder_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "profile.toml").write_bytes((SHIPPED / "glance.toml").read_bytes())
    assert load_profile(tmp_path) == load_profile(tmp_path / "profile.toml") == load_profile("glance")


@pytest.mark.parametrize(("content", "message"), [(b"= 1", "not TOML"), (b"\xff", "not TOML"), (b"", "name: missing")])
def test_unreadable_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "profile.toml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_profile(tmp_path)


def test_unknown_name() -> None:
    with pytest.raises(
        ValueError, match="profile 'nope': not found; give a file, or one of glance, glance-crop, visionthink"
    ):
        load_profile("nope")


def test_fill_reads_inserted_text_never_again() -> None:
    assert fill("{a} {b} {c}", {"a": "{b}", "b": "2"}) == "{b} 2 {c}"


def test_how_pixels_are_made_is_part_of_a_profile() -> None:
    ours, theirs = load_profile("vtengine"), load_profile("visionthink")
    assert (ours.resize_mode, ours.low_view) == ("pil13", "one_resize")
    assert (theirs.resize_mode, theirs.low_view) == ("pil12", "half_first")
