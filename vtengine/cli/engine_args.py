"""`--engine-arg NAME=VALUE`: arguments of SGLang's engine, and which of them decide what a run writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vtengine.cli.errors import UsageError
from vtengine.config import read_data, toml_value

SIZES = frozenset({
    *("mem_fraction_static", "max_total_tokens", "max_running_requests", "max_prefill_tokens", "chunked_prefill_size"),
    *("tp_size", "dp_size", "pp_size"),
})  # fmt: skip
"""How much memory, on how many devices: a run may go on with others. All that is not here counts as deciding."""


def read_engine_args(flags: Sequence[str]) -> dict[str, Any]:
    """{name: value}, values as TOML, and as text where they are not TOML. Raises UsageError."""
    for flag in flags:
        name, sign, _ = flag.partition("=")
        if not sign or not name.strip() or "." in name:
            raise UsageError(f"--engine-arg {flag}: must look like NAME=VALUE, as tp_size=2")
    return read_data(overrides=flags)


def engine_flags(arguments: Mapping[str, Any]) -> list[str]:
    """The way back."""
    return [f"{name}={toml_value(value)}" for name, value in arguments.items()]


def deciding(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those that decide what an answer is, as far as we know, by SGLang's names."""
    named = {name.replace("-", "_"): value for name, value in arguments.items()}
    return {name: value for name, value in named.items() if name not in SIZES}
