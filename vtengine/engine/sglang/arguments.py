"""Arguments of SGLang's engine (`ServerArgs`) that are given by name: a memory share, a tensor parallel size."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vtengine.config import did_you_mean

OURS = {
    "model_path": "the model",
    "enable_multimodal": "the model",
    "device": "the device",
    "base_gpu_id": "the device, as in cuda:1",
    "dtype": "the dtype",
}


def checked(arguments: Mapping[str, Any], known: Collection[str], version: str) -> dict[str, Any]:
    """The same with names as SGLang `version` has them in `known`; - may stand for _, as on its command line.

    Raises ValueError for names that it does not have (with the nearest), that follow from others or are given twice.
    """
    found: dict[str, Any] = {}
    for given, value in arguments.items():
        name = given.replace("-", "_")
        if name in OURS:
            raise ValueError(f"engine argument {given}: leave it out, it follows from {OURS[name]}")
        if name not in known:
            hint = did_you_mean(name, known, 0.5) or "its names are those of `python -m sglang.launch_server --help`"
            raise ValueError(f"engine argument {given}: SGLang {version} has none of this name; {hint}")
        if name in found:
            raise ValueError(f"engine argument {given}: is given twice")
        found[name] = value
    return found
