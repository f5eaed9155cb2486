"""Asking for some tokens' hidden states gives those of the full pass."""

from __future__ import annotations

import torch

from tests.engine.tiny import tiny_model
from vtengine.model import PackedCausal


def test_wanted_rows_equal_the_full_pass():
    model = tiny_model()
    embeds = torch.randn(23, 64, generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(9), torch.arange(14)]).expand(3, 23)
    rows = torch.tensor([0, 8, 22])
    with torch.inference_mode():
        full = model.decode(embeds, positions, PackedCausal([0, 9, 23]))
        some = model.decode(embeds, positions, PackedCausal([0, 9, 23]), rows)
        none = model.decode(embeds, positions, PackedCausal([0, 9, 23]), rows[:0])
    assert torch.allclose(some, full[rows], atol=1e-6)
    assert none.shape == (0, 64)
