"""Which memory is asked to be in huge pages: all of large tensors on the CPU and nothing else."""

from __future__ import annotations

import mmap

import pytest
import torch

from vtengine.model import huge_pages as module
from vtengine.model import load_model, save_model
from vtengine.model.huge_pages import LEAST_BYTES, prefer_huge_pages


@pytest.fixture
def asked(monkeypatch):
    """The (address, bytes, advice) of every call."""
    calls = []
    monkeypatch.setattr(module, "_madvise", lambda: lambda *arguments: calls.append(arguments) or 0)
    return calls


def test_whole_pages_inside_of_large_tensors(asked):
    large = torch.empty(LEAST_BYTES + 100, dtype=torch.uint8)
    view = large[3 : LEAST_BYTES + 50]
    prefer_huge_pages([view, torch.empty(10), torch.empty(LEAST_BYTES, device="meta")])
    [(begin, size, advice)] = asked
    assert advice == mmap.MADV_HUGEPAGE and begin % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
    assert view.data_ptr() <= begin < view.data_ptr() + mmap.PAGESIZE
    assert 0 <= view.data_ptr() + view.numel() - begin - size < mmap.PAGESIZE


def test_the_system_accepts_what_it_is_asked():
    if (advise := module._madvise()) is None:
        pytest.skip("no madvise here")
    tensor = torch.empty(LEAST_BYTES, dtype=torch.uint8)
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    assert advise(begin, mmap.PAGESIZE, mmap.MADV_NORMAL) == 0
    prefer_huge_pages([tensor])
    tensor.fill_(7)
    assert (tensor == 7).all()


def test_without_it_nothing_happens(monkeypatch):
    monkeypatch.setattr(module, "_madvise", lambda: None)
    prefer_huge_pages([torch.empty(LEAST_BYTES, dtype=torch.uint8)])


def test_a_checkpoint_is_loaded_into_such_memory(small_model, tmp_path, asked, monkeypatch):
    monkeypatch.setattr(module, "LEAST_BYTES", mmap.PAGESIZE)
    save_model(small_model, tmp_path)
    assert not asked
    load_model(tmp_path)
    assert asked
