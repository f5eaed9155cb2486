"""Configurations: every mistake named, overrides, and the way back to TOML."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtengine.config import ConfigError, build, load_config, to_dict, to_toml


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: must be >= 1")


@dataclass(frozen=True)
class Stage:
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Nested:
    optim: Optim = field(default_factory=Optim)
    folders: dict[str, int] = field(default_factory=lambda: {"a": 1})


@dataclass(frozen=True)
class Config:
    out: Path
    optim: Optim = field(default_factory=Optim)
    nested: Nested = field(default_factory=lambda: Nested(Optim(lr=2e-6)))
    slow: Optim = field(default_factory=lambda: Optim(lr=1e-6, betas=(0.9, 0.999)))
    device: Literal["cpu", "cuda"] = "cpu"
    seed: int | None = None
    compile: bool = False
    names: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    size: int | str = 1
    level: Literal[1, 2] = 1


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_file_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, 'out = "runs"\n[optim]\nlr = 1\n[weights]\na = 2\n[[stages]]\nname = "one"\n')
    overrides = ["optim.steps=7", "seed = 3", "device=cuda", 'names=["a","b"]', "out=other/path", "weights.b=0.5"]
    config = load_config(Config, path, overrides)
    assert config == Config(
        out=Path("other/path"),
        optim=Optim(lr=1.0, steps=7),
        device="cuda",
        seed=3,
        names=("a", "b"),
        stages=(Stage("one"),),
        weights={"a": 2.0, "b": 0.5},
    )
    assert isinstance(config.optim.lr, float)


def test_a_section_given_in_part_keeps_the_rest_of_its_fields_default(tmp_path: Path) -> None:
    config = load_config(Config, write(tmp_path, 'out = "runs"\n[slow]\nsteps = 7\n'))
    assert config.slow == Optim(lr=1e-6, steps=7, betas=(0.9, 0.999))
    config = load_config(Config, write(tmp_path, 'out = "runs"\n[nested.optim]\nsteps = 7\n[nested.folders]\nb = 2\n'))
    assert config.nested == Nested(Optim(lr=2e-6, steps=7), {"b": 2})  # a table of free keys is one value


def test_a_machines_defaults_give_way_to_file_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, 'out = "runs"\nsize = 2\n')
    config = load_config(Config, path, ["level=2"], {"size": 7, "level": 1, "compile": True})
    assert (config.size, config.level, config.compile) == (2, 2, True)
    with pytest.raises(ConfigError, match="siz: unknown key"):
        load_config(Config, path, (), {"siz": 7})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optm.lr=1"], "optm: unknown key; did you mean optim?"),
        (["optim.lrate=1"], "optim.lrate: unknown key; did you mean lr?"),
        (["zzz=1"], "zzz: unknown key; known: out, optim"),
        (["optim.lr=fast"], "optim.lr = 'fast': must be a number"),
        (["optim.lr=true"], "optim.lr = True: must be a number"),
        (["optim.steps=1.5"], "optim.steps = 1.5: must be a whole number"),
        (["optim.steps=0"], "optim: steps = 0: must be >= 1"),
        (["optim=3"], "optim = 3: must be a section"),
        (["optim.betas=[1]"], "optim.betas: must have 2 items, has 1"),
        (['optim.betas=[1,"x"]'], "optim.betas[1] = 'x': must be a number"),
        (["device=cdua"], "device = 'cdua': must be one of cpu, cuda; did you mean cuda?"),
        (["level=true"], "level = True: must be one of 1, 2"),
        (["compile=1"], "compile = 1: must be true or false"),
        (["names=a"], "names = 'a': must be a list, such as [\"a\"]"),
        (["stages=[{weight=1}]"], "stages[0].name: missing; add it"),
        (["weights=1"], "weights = 1: must be a section"),
        (['weights.a="x"'], "weights.a = 'x': must be a number"),
        (["size=[1]"], "size = [1]: must be a whole number or text"),
        (["seed=x"], "seed = 'x': must be a whole number"),
        (["out=1"], "out = 1: must be a path"),
        (["optim.lr"], "--set optim.lr: must look like section.key=value"),
        (["=1"], "must look like section.key=value"),
        (["out.x=1"], "out is not a section"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(Config, write(tmp_path, 'out = "runs"\n'), overrides)
    assert str(caught.value).startswith(f"--set {overrides[0]}: ")


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("[optim]\nsteps = 0", ["out=runs", "optim.lr=1"], "FILE: optim: steps = 0: must be >= 1"),
        ("[optim]\nsteps = 0", ["out=runs", "optim.steps=-1"], "--set optim.steps=-1: optim: steps = -1: must be >= 1"),
        ("", ["out=runs", "optim.lr=1", "optim.steps=0"], "--set optim.steps=0: optim: steps = 0: must be >= 1"),
        ("", ["out=runs", "optim.steps=9", "optim.steps=0"], "--set optim.steps=0: optim: steps = 0: must be >= 1"),
        ("", ["out=runs", "seed=x", "optim.steps=0"], "--set optim.steps=0: optim: steps = 0: must be >= 1"),
        ("[optim]\nsteps = 0", ["out=runs", "optim.steps=1", "seed=x"], "--set seed=x: seed = 'x': must be a whole"),
        ("", ["seed=1"], "FILE: out: missing; add it"),
        ("odd = 1", ["out=runs", "seed=x"], "FILE: odd: unknown key"),
        ("", ["out=runs", "optm.lr=1", "optm.steps=2", "seed=1"], "--set optm.steps=2: optm: unknown key"),
    ],
)
def test_where_a_mistake_stands(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    """In the file, or in the `--set` that brought it."""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(Config, path, overrides)
    assert str(caught.value).startswith(message.replace("FILE", str(path)))


@pytest.mark.parametrize(("text", "message"), [("out =", "not TOML"), ("", "out: missing; add it")])
def test_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {message}")):
        load_config(Config, path)


def test_an_override_cannot_smuggle_keys(tmp_path: Path) -> None:
    config = load_config(Config, None, ["out=runs", "size=1\nseed = 4"])
    assert config.seed is None and config.size == "1\nseed = 4"


def test_unsupported_types_are_our_mistake() -> None:
    @dataclass(frozen=True)
    class Odd:
        x: complex = 0j

    with pytest.raises(TypeError, match="not supported"):
        build(Odd, {"x": 1})


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
NUMBER = st.floats(allow_nan=False)
CONFIGS: st.SearchStrategy[Any] = st.builds(
    Config,
    out=st.just(Path("a/b c")),
    optim=st.builds(Optim, lr=NUMBER, steps=st.integers(1, 9), betas=st.tuples(NUMBER, NUMBER)),
    seed=st.none() | st.integers(-(2**62), 2**62),
    names=st.lists(TEXT, max_size=3).map(tuple),
    stages=st.lists(st.builds(Stage, name=TEXT, weight=NUMBER), max_size=2).map(tuple),
    weights=st.dictionaries(TEXT, NUMBER, max_size=3),
    size=st.integers(0, 9) | TEXT,
)


@given(CONFIGS)
def test_toml_and_back(config: Config) -> None:
    import tomllib

    assert build(Config, to_dict(config)) == config
    assert build(Config, tomllib.loads(to_toml(config))) == config


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, vtengine.config, vtengine.protocol.conversation\n"
        "heavy = {'torch', 'numpy', 'PIL', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[1])
