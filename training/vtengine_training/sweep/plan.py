"""From a sweep to its runs: names, settings, and each one's whole configuration, checked before the first starts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtengine.config import ConfigError, build, flat, read_data, to_toml
from vtengine_training.sft.config import SftConfig
from vtengine_training.sweep.config import SweepConfig
from vtengine_training.trainer.config import GrpoConfig

Settings = dict[str, Any]
KINDS = {"grpo": GrpoConfig, "sft": SftConfig}


@dataclass(frozen=True)
class Planned:
    """One run. settings: what is varied, by dotted key."""

    name: str
    settings: Settings
    folder: Path
    made: GrpoConfig | SftConfig

    @property
    def config(self) -> str:
        """Its file's text."""
        return to_toml(self.made)

    @property
    def steps(self) -> int:
        """How many it will take."""
        return self.made.steps if isinstance(self.made, GrpoConfig) else self.made.total_steps

    @property
    def path(self) -> Path:
        """Its configuration file, beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.toml")


def plan_runs(config: SweepConfig, near: Path) -> list[Planned]:
    """Every run in order: the grid, the last key varying fastest, then the single ones. near: base is relative to it.

    Raises ValueError, naming the run, for one whose configuration cannot be used.
    """
    if not (near / config.base).is_file():
        raise ConfigError(
            f"base = {config.base!r}: {near / config.base} is no file; give its path from this file's folder"
        )
    varied = [*grid(config.sweep), *(flat(run) for run in config.runs)]
    keys = list(dict.fromkeys(key for settings in varied for key in settings if key != "name"))
    planned = [_plan(config, near, settings, keys) for settings in varied]
    for a, b in itertools.combinations(planned, 2):
        if a.name == b.name:
            raise ConfigError(f"sweep: two runs are called {a.name}; give one of them another name")
    return planned


def grid(sweep: Mapping[str, Any]) -> list[Settings]:
    """All combinations; nothing for an empty grid."""
    axes = flat(sweep)
    for key, values in axes.items():
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"sweep.{key} = {values!r}: must be a list of values")
    if not axes:
        return []
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested tables. Raises ValueError where a part of it is no table."""
    *parents, last = key.split(".")
    table = data
    for name in parents:
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {name} is not a section")
        table = inner
    table[last] = value


def _plan(config: SweepConfig, near: Path, settings: Settings, keys: Sequence[str]) -> Planned:
    given = settings.get("name")
    settings = {key: value for key, value in settings.items() if key != "name"}
    name = safe(str(given)) if given is not None else name_of(settings, keys)
    folder = Path(config.output) / name
    try:
        made = _build(config, near, {**flat(config.set), **settings, "output": str(folder)})
    except ConfigError as error:
        raise ConfigError(f"run {name}: {_place(config, near, str(error))}{error}") from None
    return Planned(name, settings, folder, made)


def _build(config: SweepConfig, near: Path, settings: Settings) -> GrpoConfig | SftConfig:
    """The base with these keys changed."""
    data = read_data(near / config.base)
    for key, value in settings.items():
        put(data, key, value)
    if config.command == "grpo" and isinstance(data.get("data"), dict):
        data["data"].setdefault("folder", str(Path(config.output) / "data"))
    kind: Any = KINDS[config.command]
    made: GrpoConfig | SftConfig = build(kind, data)
    return made


def _place(config: SweepConfig, near: Path, message: str) -> str:
    """Where an error stands that the base has also when nothing in it is changed."""
    try:
        _build(config, near, {"output": config.output})
    except ConfigError as error:
        return f"base {near / config.base}: " if str(error) == message else ""
    return ""


def name_of(settings: Settings, keys: Sequence[str]) -> str:
    """Such as form-paper_theta-0.1: the last parts of the keys, longer where two would be the same."""
    return "_".join(safe(f"{short(key, keys)}-{value}") for key, value in settings.items())


def short(key: str, keys: Sequence[str]) -> str:
    """The shortest end of the key that no other key has."""
    parts = key.split(".")
    for start in range(len(parts) - 1, 0, -1):
        tail = ".".join(parts[start:])
        if not any(other != key and (other == tail or other.endswith(f".{tail}")) for other in keys):
            return tail
    return key


def safe(text: str) -> str:
    """As the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "run"
