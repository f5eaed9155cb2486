"""What is available is found, said in words, and chosen; without the C++ library everything still works."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vtengine_kernels import dispatch, library
from vtengine_kernels.patchify import Target, patchify

IMAGE = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)


@pytest.fixture
def fresh_search():
    library._find.cache_clear()
    yield
    library._find.cache_clear()


def test_report_names_every_implementation():
    report = dispatch.report()
    assert {(entry.op, entry.impl) for entry in report} == {
        *(("patchify", impl) for impl in ("cpu", "ref", "triton")),
        *(("prefix_attention", impl) for impl in ("flash", "flashinfer", "cpu", "triton", "ref")),
        *(("paged_prefill", impl) for impl in ("flash", "flashinfer", "triton", "ref")),
        *(("kv_store", impl) for impl in ("triton", "torch", "ref")),
        *(("shared_prefix_attention", impl) for impl in ("flash", "tiles", "ref")),
        *(("few_rows", impl) for impl in ("cpu", "torch")),
        *(("layer_ops", impl) for impl in ("flashinfer", "triton", "cpu", "torch")),
        *(("visual_scatter", impl) for impl in ("triton", "ref")),
        *(("token_sample", impl) for impl in ("triton", "cpu", "torch", "ref")),
        *((op, impl) for op in ("token_logprob", "grpo_loss") for impl in ("triton", "cpu", "torch", "ref", "liger")),
    }
    assert all(entry.reason for entry in report)
    assert {entry.op for entry in report if entry.available} == {entry.op for entry in report}


def test_without_the_library(monkeypatch, fresh_search):
    expected = patchify(IMAGE, [Target(56, 56)])[0]
    library._find.cache_clear()
    monkeypatch.setattr(library, "NAME", "no_such_library.so")
    missing = dispatch.report()[0]
    assert not missing.available
    assert "was not built" in missing.reason and "pip install" in missing.reason
    assert "slower" in missing.cost
    assert library.isas() == ()
    assert torch.equal(patchify(IMAGE, [Target(56, 56)])[0], expected)
    with pytest.raises(RuntimeError, match="was not built"):
        patchify(IMAGE, [Target(56, 56)], impl="cpu")


def test_a_library_that_is_none(monkeypatch, fresh_search, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "NAME", str(tmp_path / "broken.so"))
    assert "does not load" in dispatch.report()[0].reason


def test_a_library_of_another_version(monkeypatch, fresh_search):
    if not library.isas():
        pytest.skip("the C++ library is not built")
    library._find.cache_clear()
    monkeypatch.setattr(library, "ABI_VERSION", 99)
    assert "ABI version" in dispatch.report()[0].reason


def test_patchify_names_what_it_knows():
    with pytest.raises(ValueError, match="must be one of auto, cpu, ref, triton"):
        patchify(IMAGE, [Target(28, 28)], impl="cuda")


def test_unknown_instruction_set(monkeypatch):
    from vtengine_kernels.patchify import native
    from vtengine_kernels.patchify.contract import checked_plan

    if not library.isas():
        pytest.skip("the C++ library is not built")
    monkeypatch.setitem(library.ISAS, "avx1024", 9)
    with pytest.raises(RuntimeError, match="no such instruction set"):
        native.run(checked_plan(IMAGE, [Target(28, 28)]), isa="avx1024")
