"""A protocol profile: every string the model ever sees, and how its pixels are made, as a data file.

`load_profile` reads `profiles/<name>.toml`, a path to such a file, or a checkpoint folder holding `profile.toml`.
In a template `{word}` is a placeholder from a fixed list; other braces are plain text.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from vtengine.protocol.tools import ARGUMENTS, CROP, ToolCall
from vtengine.vision.plan import LOW_VIEWS, RESIZE_MODES, LowView, ResizeMode

T = TypeVar("T")
OnBadCall = Literal["end", "retry"]
PROFILE_FILE = "profile.toml"
SHIPPED = Path(__file__).parent / "profiles"
PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
ROLES = ("system", "user", "assistant")

_SIZE = ("width", "height")
_AFTER_CALL = ("or_call", "budget_left")


@dataclass(frozen=True)
class Field:
    """One string of the file: which placeholders it must and may hold, and what stands for it where it is left out:
    `default`, or the string named by `same_as`."""

    required: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    default: str | None = None
    same_as: str = ""


_SCHEMA: Mapping[str, Mapping[str, Field]] = {
    "turn": {
        "open": Field(("role",)),
        "close": Field(),
        "joiner": Field(default="\n"),
        "joiner_after_reply": Field(default="\n"),
        "image": Field(("pixels",)),
    },
    "adaptive": {
        "system": Field((), ("tools",)),
        "user": Field(("image", "question"), ("budget_note", *_SIZE)),
    },
    "direct": {"system": Field(), "user": Field(("image", "question"), _SIZE)},
    "text": {"system": Field(same_as="direct.system"), "user": Field(("question",), default="{question}")},
    "response": {
        "resize": Field(("image",), (*_SIZE, *_AFTER_CALL)),
        "crop": Field(("image",), (*_SIZE, *_AFTER_CALL)),
        "denied": Field((), ("reason", *_AFTER_CALL)),
        "bad_call": Field((), ("reason", *_AFTER_CALL)),
    },
    "reasons": {"budget": Field(), "already_shown": Field(), "box_outside": Field()},
    "budget": {"note": Field((), ("budget", "used"), default=""), "left": Field((), ("left",), default="")},
    "reply": {
        "answer": Field(("think", "answer")),
        "call": Field(("think", "call")),
        "or_call": Field(default=""),
    },
}

SEVERAL = "several"
"""The section for conversations about more than one image, and for images that come with a later question."""

_SEVERAL: Mapping[str, Field] = {
    "image": Field(("number", "image"), _SIZE),
    "user": Field(("images", "question"), ("budget_note",)),
    "direct": Field(("images", "question")),
    "later": Field(("images", "question")),
    "resize": Field(("images",), _AFTER_CALL),
}


@dataclass(frozen=True)
class OfferedTool:
    """A tool as a profile offers it. `line`: what {tools} shows of it (may be empty for compact prompts).

    several_arguments, several_line: the same for conversations about several images.
    """

    name: str
    arguments: tuple[str, ...]
    line: str = ""
    several_arguments: tuple[str, ...] = ()
    several_line: str = ""


@dataclass(frozen=True)
class Profile:
    """`strings` maps "section.key" to a template. `on_bad_call`: a call that cannot be obeyed ends the episode
    as malformed, or is answered with `response.bad_call` while turns are left. `resize_mode`,
    `low_view`: how the pixels were made that the weights were trained with, see vtengine.vision.plan."""

    name: str
    about: str
    on_bad_call: OnBadCall
    strings: Mapping[str, str]
    tools: tuple[OfferedTool, ...]
    resize_mode: ResizeMode = "pil13"
    low_view: LowView = "one_resize"

    def __getitem__(self, key: str) -> str:
        return self.strings[key]

    @property
    def offered(self) -> dict[str, tuple[str, ...]]:
        """Tool name -> arguments, as parse_reply wants it."""
        return {tool.name: tool.arguments for tool in self.tools}

    @property
    def offered_of_several(self) -> dict[str, tuple[str, ...]]:
        return {tool.name: tool.several_arguments for tool in self.tools}

    @property
    def knows_several(self) -> bool:
        """Whether it has words for more than one image."""
        return f"{SEVERAL}.user" in self.strings

    def tool_lines(self, several: bool = False) -> str:
        lines = (tool.several_line if several else tool.line for tool in self.tools)
        return "\n".join(line for line in lines if line)

    @property
    def close(self) -> str:
        """The text that ends a turn; the model ends its own with the same mark."""
        return self["turn.close"]

    def open(self, role: str) -> str:
        assert role in ROLES, role
        return self["turn.open"].replace("{role}", role)

    def reply_answer(self, think: str, answer: str) -> str:
        """The taught form of an answering reply, without the closing mark."""
        return fill(self["reply.answer"], {"think": think, "answer": answer})

    def reply_call(self, think: str, call: ToolCall) -> str:
        """The taught form of a calling reply, without the closing mark."""
        return fill(self["reply.call"], {"think": think, "call": call.to_json()})


def fill(template: str, values: Mapping[str, str]) -> str:
    """Every placeholder replaced once; inserted text is never read as a template."""
    return PLACEHOLDER.sub(lambda match: values[match[1]] if match[1] in values else match[0], template)


def pieces(template: str) -> Iterable[tuple[str, str]]:
    """(text, placeholder) pairs in order; the last placeholder is empty."""
    start = 0
    for match in PLACEHOLDER.finditer(template):
        yield template[start : match.start()], match[1]
        start = match.end()
    yield template[start:], ""


def shipped_profiles() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.toml")))


def own_profile(folder: Path, otherwise: str) -> Profile:
    """A checkpoint's own, or that of this name where it has none. Raises ValueError."""
    return load_profile(folder if (folder / PROFILE_FILE).is_file() else otherwise)


def profile_file(source: str | Path) -> Path:
    """That of a shipped profile by name, a .toml file, or the one in a folder. Raises ValueError if there is none."""
    path = Path(source)
    if str(source) in shipped_profiles():
        path = SHIPPED / f"{source}.toml"
    elif path.is_dir():
        path = path / PROFILE_FILE
    if not path.is_file():
        raise ValueError(f"profile {str(source)!r}: not found; give a file, or one of {', '.join(shipped_profiles())}")
    return path


def load_profile(source: str | Path = "vtengine") -> Profile:
    """The profile in `profile_file`. Raises ValueError."""
    path = profile_file(source)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"profile {path}: not TOML in UTF-8: {error}") from None
    try:
        return parse_profile(data)
    except ValueError as error:
        raise ValueError(f"profile {path}: {error}") from None


def parse_profile(data: Mapping[str, Any]) -> Profile:
    """Checks a profile read from TOML. Raises ValueError naming the field."""
    keys = ("name", "about", "on_bad_call", "resize_mode", "low_view", "tools", *_SCHEMA, SEVERAL)
    reject_unknown("", data, keys)
    name = _string(data, "name", "")
    on_bad_call = data.get("on_bad_call", "end")
    if on_bad_call not in ("end", "retry"):
        raise ValueError(f'on_bad_call = {on_bad_call!r}: must be "end" or "retry"')
    resize_mode, low_view = _choice(data, "resize_mode", RESIZE_MODES), _choice(data, "low_view", LOW_VIEWS)
    strings: dict[str, str] = {}
    sections = dict(_SCHEMA) | ({SEVERAL: _SEVERAL} if SEVERAL in data else {})
    for section, fields in sections.items():
        table = _table(data, section)
        reject_unknown(f"{section}.", table, fields)
        for key, field in fields.items():
            default = strings.get(field.same_as, field.default)
            value = default if key not in table and default is not None else _string(table, key, section)
            _check_placeholders(f"{section}.{key}", value, field)
            strings[f"{section}.{key}"] = value
    tools = tuple(_parse_tool(tool, table) for tool, table in _table(data, "tools").items())
    if not tools:
        raise ValueError("tools: offer at least one of " + ", ".join(ARGUMENTS))
    for tool in tools:
        if SEVERAL in data and tool.name == CROP and "image" not in tool.several_arguments:
            raise ValueError(f"tools.{CROP}.several_arguments: image is required: a box lies in one of the images")
    return Profile(
        name, str(data.get("about", "")), on_bad_call, MappingProxyType(strings), tools, resize_mode, low_view
    )


def _choice(data: Mapping[str, Any], key: str, allowed: tuple[T, ...]) -> T:
    """One of `allowed`; the first where the key is missing."""
    value = data.get(key, allowed[0])
    if value not in allowed:
        raise ValueError(f"{key} = {value!r}: must be one of {', '.join(map(str, allowed))}")
    return allowed[allowed.index(value)]


def _parse_tool(name: str, table: Any) -> OfferedTool:
    reject_unknown("tools.", (name,), ARGUMENTS)
    if not isinstance(table, dict):
        raise ValueError(f"tools.{name}: must be a table")
    reject_unknown(f"tools.{name}.", table, ("arguments", "line", "several_arguments", "several_line"))
    arguments, line = _arguments(name, table, "arguments"), _line(name, table, "line")
    if "image" in arguments:
        raise ValueError(f"tools.{name}.arguments: image belongs into several_arguments")
    several = _arguments(name, table, "several_arguments") if "several_arguments" in table else arguments
    return OfferedTool(name, arguments, line, several, _line(name, table, "several_line") or line)


def _arguments(name: str, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    arguments = table.get(key)
    if not isinstance(arguments, list) or not all(isinstance(argument, str) for argument in arguments):
        raise ValueError(f"tools.{name}.{key}: must be a list of names")
    reject_unknown(f"tools.{name}.{key}: ", arguments, ARGUMENTS[name])
    missing = [argument for argument, needed in ARGUMENTS[name].items() if needed and argument not in arguments]
    if missing:
        raise ValueError(f"tools.{name}.{key}: {', '.join(missing)} is required")
    return tuple(arguments)


def _line(name: str, table: Mapping[str, Any], key: str) -> str:
    line = table.get(key, "")
    if not isinstance(line, str):
        raise ValueError(f"tools.{name}.{key}: must be text")
    if line:
        try:
            json.loads(line)
        except ValueError as error:
            raise ValueError(f"tools.{name}.{key}: not JSON: {error}") from None
    return line


def reject_unknown(where: str, found: Iterable[str], known: Collection[str]) -> None:
    """Raises ValueError for the first name that is not known, with the nearest one that is."""
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{where}{key}: unknown; {hint}")


def _table(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key}: must be a table")
    return value


def _string(table: Mapping[str, Any], key: str, section: str) -> str:
    name = f"{section}.{key}" if section else key
    if key not in table:
        raise ValueError(f"{name}: missing; add it")
    value = table[key]
    if not isinstance(value, str):
        raise ValueError(f"{name} = {value!r}: must be text")
    return value


def _check_placeholders(name: str, template: str, field: Field) -> None:
    found = PLACEHOLDER.findall(template)
    known = field.required + field.allowed
    for word in found:
        if word not in known:
            raise ValueError(f"{name}: placeholder {{{word}}} is not known here; known: {', '.join(known) or 'none'}")
    for word in field.required:
        if found.count(word) != 1:
            raise ValueError(f"{name}: needs {{{word}}} exactly once, has it {found.count(word)} times")
