"""Which dtype the weights get where `--dtype` leaves it open."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch
from vtengine_kernels import few_rows

from vtengine.cli.session import LARGE_BYTES, _dtype


def folder_of(path, config, size):
    (path / "config.json").write_text(json.dumps(config))
    for name, part in (
        ("model-00001-of-00002.safetensors", size - size // 2),
        ("model-00002-of-00002.safetensors", size // 2),
    ):
        with (path / name).open("wb") as file:
            file.truncate(part)  # takes no space
    return path


@pytest.mark.parametrize(
    ("config", "size", "reason", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, LARGE_BYTES, None, torch.bfloat16),
        ({"dtype": "bfloat16"}, LARGE_BYTES, None, torch.bfloat16),
        ({"torch_dtype": "bfloat16"}, LARGE_BYTES - 1, None, torch.float32),
        ({"torch_dtype": "bfloat16"}, LARGE_BYTES, "the processor has no AVX-512 BF16", torch.float32),
        ({"torch_dtype": "float32"}, LARGE_BYTES, None, torch.float32),
        ({}, LARGE_BYTES, None, torch.float32),
    ],
)
def test_large_weights_stay_in_bfloat16_where_the_cpu_multiplies_it(
    config, size, reason, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(few_rows, "missing", lambda: reason)
    assert _dtype(Namespace(dtype="auto", device="cpu"), folder_of(tmp_path, config, size)) == expected


def test_what_was_asked_for_counts(tmp_path):
    folder = folder_of(tmp_path, {"torch_dtype": "bfloat16"}, 4)
    for name in ("float32", "bfloat16"):
        assert _dtype(Namespace(dtype=name, device="cpu"), folder) == getattr(torch, name)
