"""Frozen dataclasses from TOML: an unknown key, a wrong type or a bad value is an error that names the field.

    config = load_config(TrainConfig, "grpo.toml", overrides=["optim.lr=1e-6"])

Supported field types: bool, int, float, str, Path, Literal, X | None, tuple[X, ...], dict[str, X], nested dataclasses.
Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names field, value and remedy."""


def load_config(
    cls: type[T],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> T:
    """Reads a TOML file (or nothing: defaults), applies overrides "a.b=c" in order, and builds `cls`.

    An override's value is read as TOML, and as plain text where it is not TOML. defaults: of this machine, in place of
    the class's. Raises ConfigError, which names the file, or the override that is to blame; OSError when the file
    cannot be read.
    """
    return load(lambda data: build(cls, {**defaults, **data}), path, overrides)


def load(make: Callable[[dict[str, Any]], T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """`load_config` for what `make` builds from plain data and raises ConfigError for."""
    data = read_data(path, overrides)
    try:
        return make(data)
    except ConfigError as error:
        place = _place(make, path, overrides, str(error))
        raise ConfigError(f"{place}: {error}" if place else str(error)) from None


def _place(
    make: Callable[[dict[str, Any]], object], path: str | Path | None, overrides: Sequence[str], message: str
) -> str:
    """Where the value stands that an error is about: in an override without which there would be another error or none,
    and which the message has a word of; else in the file."""
    words = set(re.findall(r"\w+", message))
    for depth in (None, 1):  # several overrides of a section that there is not: each alone makes no difference
        for override in reversed(overrides):  # of two values of a key the last one counts
            key = _key_of(override).split(".")
            others = [other for other in overrides if _key_of(other).split(".")[:depth] != key[:depth]]
            try:
                make(read_data(path, others))
            except ConfigError as error:
                if str(error) == message:
                    continue
            if words.intersection(key):
                return f"--set {override}"
    return "" if path is None else str(path)


def read_data(path: str | Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The TOML file with the overrides applied, nothing checked: for commands that use one section of a file."""
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML in UTF-8: {error}") from None
    for override in overrides:
        _apply(data, override)
    return data


def build(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """A dataclass from plain data. Raises ConfigError."""
    known = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}{key}: unknown key; {_nearest(key, list(known))}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in data:
            default = None if field.default_factory is dataclasses.MISSING else field.default_factory()
            values[name] = _convert(_completed(data[name], default), hints[name], where + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name}: missing; add it")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where.rstrip('.')}: {error}" if where else str(error)) from None


def _completed(value: Any, default: Any) -> Any:
    """A section with what it leaves out as its field has it by default, which its class may have otherwise."""
    if not isinstance(value, Mapping) or not dataclasses.is_dataclass(default):
        return value
    return to_dict(default) | {key: _completed(item, getattr(default, key, None)) for key, item in value.items()}


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data that `build` turns into an equal config; keys that are None are left out, as TOML has no null."""
    return {
        field.name: _plain(value)
        for field in dataclasses.fields(config)
        if field.init and (value := getattr(config, field.name)) is not None
    }


def to_toml(config: Any) -> str:
    """The resolved configuration as TOML."""
    return "\n".join(_toml_lines(to_dict(config), "")).strip() + "\n"


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _key_of(override: str) -> str:
    return ".".join(key.strip() for key in override.partition("=")[0].split("."))


def _apply(data: dict[str, Any], override: str) -> None:
    _, sign, text = override.partition("=")
    keys = _key_of(override).split(".")
    if not sign or not all(keys):
        raise ConfigError(f"--set {override}: must look like section.key=value")
    table = data
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {key} is not a section")
        table = inner
    table[keys[-1]] = _read_value(text.strip())


def _read_value(text: str) -> Any:
    try:
        data = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return data["value"] if set(data) == {"value"} else text


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value` as a field of type `kind`. Numbers are not made from text, nor whole numbers from fractions."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(value, kind, where)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
            names = [str(choice) for choice in get_args(kind)]
            raise ConfigError(hinted(f"{where} = {value!r}: must be one of {', '.join(names)}", str(value), names))
        return value
    if origin is tuple:
        return _convert_tuple(value, kind, where)
    if origin is dict or kind is dict:
        return _convert_dict(value, kind, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} = {value!r}: must be a section with keys of its own")
        return build(typing.cast("type[Any]", kind), value, where + ".")
    return _convert_scalar(value, kind, where)


def _convert_union(value: Any, kind: Any, where: str) -> Any:
    choices = [choice for choice in get_args(kind) if choice is not type(None)]
    if len(choices) == 1:
        return _convert(value, choices[0], where)
    for choice in choices:
        try:
            return _convert(value, choice, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where} = {value!r}: must be {' or '.join(map(_name, choices))}")


def _convert_tuple(value: Any, kind: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} = {value!r}: must be a list, such as {json.dumps([value], default=str)}")
    kinds = get_args(kind)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_convert(item, kinds[0], f"{where}[{index}]") for index, item in enumerate(value))
    if len(value) != len(kinds):
        raise ConfigError(f"{where}: must have {len(kinds)} items, has {len(value)}")
    return tuple(_convert(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))


def _convert_dict(value: Any, kind: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} = {value!r}: must be a section")
    inner = get_args(kind)[1] if get_args(kind) else Any
    return {str(key): _convert(item, inner, f"{where}.{key}") for key, item in value.items()}


def _convert_scalar(value: Any, kind: Any, where: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is Any or (kind is bool and isinstance(value, bool)):
        return value
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and isinstance(value, int):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind not in (bool, int, float, str, Path):
        raise TypeError(f"{where}: fields of type {_name(kind)} are not supported in configurations")
    raise ConfigError(f"{where} = {value!r}: must be {_name(kind)}")


def did_you_mean(word: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """The known word that is nearest to this one, as a question; empty where none is near. likeness: 0 to 1."""
    near = difflib.get_close_matches(word, list(known), 1, likeness)
    return f"did you mean {near[0]}?" if near else ""


def hinted(message: str, word: str, known: Iterable[str]) -> str:
    """The message with `did_you_mean` behind it."""
    return "; ".join(filter(None, (message, did_you_mean(word, known))))


def _nearest(word: str, known: list[str]) -> str:
    return did_you_mean(word, known, 0.55) or f"known: {', '.join(known) or 'none'}"


def _name(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return names.get(kind, str(kind))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _toml_lines(data: Mapping[str, Any], prefix: str) -> list[str]:
    lines = [f"{_key(key)} = {toml_value(value)}" for key, value in data.items() if not isinstance(value, Mapping)]
    for key, value in data.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{prefix}{_key(key)}]", *_toml_lines(value, f"{prefix}{_key(key)}.")]
    return lines


def toml_value(value: Any) -> str:
    """Plain data as what stands behind `key =`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    return _quoted(value) if isinstance(value, str) else repr(value)


def _key(key: str) -> str:
    return key if key and all(char.isascii() and (char.isalnum() or char in "-_") for char in key) else _quoted(key)


def _quoted(text: str) -> str:
    """A basic string: JSON's escapes are TOML's, except that TOML also wants DEL escaped and has no surrogates."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
