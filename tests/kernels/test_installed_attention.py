"""flash-attn 3 and FlashInfer behind prefix_attention and paged_prefill.

Without them the adapters talk to stand-ins that compute in torch what the packages document, and insist on the shapes,
dtypes and order of calls that these ask for. The tests marked gpu run the packages themselves, where they are there.
"""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from vtengine_kernels import flash_attn3, flashinfer_paged
from vtengine_kernels.paged_prefill import flash as prefill_flash
from vtengine_kernels.paged_prefill import flashinfer as prefill_flashinfer
from vtengine_kernels.paged_prefill import paged_prefill
from vtengine_kernels.prefix_attention import capturable, prefix_attention
from vtengine_kernels.prefix_attention import flash as decode_flash
from vtengine_kernels.prefix_attention import flashinfer as decode_flashinfer

DTYPES = (torch.bfloat16, torch.float16)


def attention(q, pages, cache, length, scale):
    """q [c, Hq, D]: the last c tokens of a sequence whose keys and values lie in these pages, in float32."""
    k, v = (x[pages].flatten(0, 1)[:length].float().repeat_interleave(q.shape[1] // x.shape[2], 1) for x in cache)
    scores = torch.einsum("chd,lhd->hcl", q.float(), k) * scale
    seen = torch.arange(length) <= torch.arange(length - len(q), length)[:, None]
    return torch.einsum("hcl,lhd->chd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).to(q.dtype)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, *, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q, softmax_scale, causal
):
    """As hopper/flash_attn_interface.py says, with a page table and packed queries."""
    assert q.ndim == 3 and k_cache.ndim == 4 and k_cache.shape == v_cache.shape and q.stride(-1) == 1 and causal
    assert q.dtype == k_cache.dtype in DTYPES
    assert {cache_seqlens.dtype, page_table.dtype, cu_seqlens_q.dtype} == {torch.int32}
    assert len(page_table) == len(cache_seqlens) == len(cu_seqlens_q) - 1
    out = torch.empty(q.shape, dtype=q.dtype)
    for row, (begin, end) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
        assert 1 <= end - begin <= max_seqlen_q
        length = int(cache_seqlens[row])
        pages = page_table[row, : -(-length // k_cache.shape[1])].long()
        out[begin:end] = attention(q[begin:end], pages, (k_cache, v_cache), length, softmax_scale)
    return out


class Wrapper:
    """The paged wrappers of FlashInfer, layout NHD: `plan` before `run`, indices on the host or the device."""

    def __init__(self, workspace, layout, use_tensor_cores=False):
        assert workspace.dtype == torch.uint8 and workspace.numel() >= 128 << 20 and layout == "NHD"
        assert not workspace.any()
        self.plans, self.planned = 0, None

    def _keep(
        self, queries, begins, indices, last, heads, kv_heads, size, page_size, q_data_type, kv_data_type, sm_scale
    ):
        assert {x.dtype for x in (queries, begins, indices, last)} == {torch.int32}
        assert len(begins) == len(last) + 1 == len(queries) and len(indices) == int(begins[-1])
        assert ((last >= 1) & (last <= page_size)).all() and q_data_type == kv_data_type
        self.planned = (queries.tolist(), begins.tolist(), indices.long(), last.tolist())
        self.shapes, self.dtype, self.scale = ((heads, size), (page_size, kv_heads, size)), q_data_type, sm_scale
        self.plans += 1

    def run(self, q, cache):
        assert self.planned is not None, "run before plan"
        queries, begins, indices, last = self.planned
        assert q.is_contiguous() and q.dtype == self.dtype and len(q) == queries[-1]
        assert (q.shape[1:], cache[0].shape[1:]) == self.shapes and cache[0].shape == cache[1].shape
        out = torch.empty(q.shape, dtype=q.dtype)
        for row, (begin, end) in enumerate(itertools.pairwise(queries)):
            pages = indices[begins[row] : begins[row + 1]]
            length = (len(pages) - 1) * self.shapes[1][0] + last[row]
            out[begin:end] = attention(q[begin:end], pages, cache, length, self.scale)
        return out


class Decode(Wrapper):
    def plan(self, indptr, indices, last_page_len, heads, kv_heads, size, page_size, **kinds):
        one_each = torch.arange(len(indptr), dtype=torch.int32)
        self._keep(one_each, indptr, indices, last_page_len, heads, kv_heads, size, page_size, **kinds)


class Prefill(Wrapper):
    def plan(self, qo_indptr, indptr, indices, last, heads, kv_heads, size, page_size, *, causal, **kinds):
        assert causal
        self._keep(qo_indptr, indptr, indices, last, heads, kv_heads, size, page_size, **kinds)


@pytest.fixture
def installed(monkeypatch):
    """Both packages, as stand-ins."""
    flash = SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    wrappers = {"BatchDecodeWithPagedKVCacheWrapper": Decode, "BatchPrefillWithPagedKVCacheWrapper": Prefill}
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(**wrappers))
    for cached in (flash_attn3._function, flashinfer_paged.planned):
        cached.cache_clear()
    yield
    for cached in (flash_attn3._function, flashinfer_paged.planned):
        cached.cache_clear()


def problem(counts, lengths, dtype, heads=4, kv_heads=2, size=64, page_size=16, device="cpu"):
    """(q, keys, values, tables, lengths, offsets); what no row sees is NaN, q is a view of a larger tensor."""
    generator = torch.Generator().manual_seed(sum(lengths))
    width = max(-(-n // page_size) for n in lengths) + 1
    cache = torch.full((2, len(lengths) * width, page_size, kv_heads, size), float("nan"))
    tables = torch.randperm(len(lengths) * width, generator=generator).view(len(lengths), width)
    for row, length in enumerate(lengths):
        t = torch.arange(length)
        for one in cache:
            one[tables[row, t // page_size], t % page_size] = torch.randn(length, kv_heads, size, generator=generator)
    q = torch.randn(sum(counts), heads + 2, size, generator=generator)[:, :heads]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    tensors = (q.to(dtype), *cache.to(dtype), tables, torch.tensor(lengths), offsets)
    return [x.to(device) for x in tensors]


@pytest.mark.parametrize("module", [decode_flash, decode_flashinfer])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_through_the_adapters(installed, module, dtype):
    for lengths, shape in (((1, 16, 17, 100), {}), ((33,), {"heads": 7, "kv_heads": 1, "size": 128, "page_size": 5})):
        q, keys, values, tables, seen, _ = problem([1] * len(lengths), lengths, dtype, **shape)
        out = module.prefix_attention(q, keys, values, tables, seen, q.shape[2] ** -0.5)
        exact = prefix_attention(q.double(), keys.double(), values.double(), tables, seen, impl="ref")
        assert out.dtype == dtype and (out - exact).abs().max() < 2e-2


@pytest.mark.parametrize("module", [prefill_flash, prefill_flashinfer])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_through_the_adapters(installed, module, dtype):
    q, keys, values, tables, seen, offsets = problem((5, 1, 40), (64, 1, 40), dtype)
    out = module.paged_prefill(q, keys, values, tables, seen, offsets, 40)
    exact = paged_prefill(q.double(), keys.double(), values.double(), tables, seen, offsets, 40, impl="ref")
    assert out.dtype == dtype and (out - exact).abs().max() < 2e-2


def test_flashinfer_plans_once_for_the_layers_of_a_pass(installed):
    wrapper = flashinfer_paged.planned("Decode", torch.device("cpu"))._wrapper
    q, keys, values, tables, seen, _ = problem((1, 1), (20, 33), torch.bfloat16)
    first = [decode_flashinfer.prefix_attention(q, k, values, tables, seen, 0.125) for k in (keys, keys.flip(0))]
    assert wrapper.plans == 1 and not torch.equal(*first)
    longer = seen + 1  # the next pass: other tensors, though of the same shape
    keys[tables[[0, 1], longer // 16], longer % 16] = values[tables[[0, 1], longer // 16], longer % 16] = 1
    decode_flashinfer.prefix_attention(q, keys, values, tables, longer, 0.125)
    decode_flashinfer.prefix_attention(q, keys, values, tables.clone(), longer, 0.125)
    assert wrapper.plans == 3


def test_they_are_not_taken_where_they_cannot_run(installed):
    keys = torch.zeros(2, 16, 2, 64)
    assert capturable(keys) is None
    assert not any(module.takes(keys) for module in (flash_attn3, flashinfer_paged))
    if not torch.cuda.is_available():
        assert flash_attn3.missing() == flashinfer_paged.missing() == "no CUDA device here"
        with pytest.raises(RuntimeError, match="impl = 'flash' is not available: no CUDA device"):
            prefix_attention(*problem((1,), (3,), torch.bfloat16)[:5], impl="flash")


def test_auto_takes_no_flashinfer(installed, monkeypatch):
    """It may have to be compiled at its first call, in the middle of a step."""
    monkeypatch.setattr(flash_attn3, "missing", lambda: "not here")
    for module in (decode_flashinfer, prefill_flashinfer):
        monkeypatch.setattr(module, "missing", lambda: None)
        monkeypatch.setattr(module, "takes", lambda keys: True)
    q, keys, values, tables, seen, offsets = problem((1, 1), (20, 33), torch.bfloat16)
    prefix_attention(q, keys, values, tables, seen)
    paged_prefill(q, keys, values, tables, seen, offsets, 1)
    assert not flashinfer_paged.planned.cache_info().currsize
    prefix_attention(q, keys, values, tables, seen, impl="flashinfer")
    assert flashinfer_paged.planned.cache_info().currsize == 1


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(flash_attn3, "_function", lambda: None)
    assert "flash-attn 3 is not installed" in flash_attn3.missing.__wrapped__()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "no Hopper" in flash_attn3.missing.__wrapped__()
    monkeypatch.setattr(flashinfer_paged.importlib.util, "find_spec", lambda name: object())
    assert "older than" in flashinfer_paged.missing.__wrapped__()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", [flash_attn3, flashinfer_paged])
def test_on_the_gpu_they_err_no_more_than_torch(adapter, dtype):
    if adapter.missing() is not None:
        pytest.skip(adapter.missing())
    impl = "flash" if adapter is flash_attn3 else "flashinfer"
    for counts, lengths in (((1, 1, 1), (1, 100, 513)), ((40, 1, 300), (40, 77, 900))):
        tensors = problem(counts, lengths, dtype, heads=28, kv_heads=4, size=128, device="cuda")
        q, keys, values, *rest = tensors
        double = (q.double(), keys.double(), values.double())
        out = paged_prefill(q, keys, values, *rest, max(counts), impl=impl)
        exact = paged_prefill(*double, *rest, max(counts), impl="ref")
        plain = paged_prefill(q, keys, values, *rest, max(counts), impl="ref")
        assert (out - exact).abs().max() <= (plain - exact).abs().max() + 1e-2
        if max(counts) == 1:
            out = prefix_attention(q, keys, values, *rest[:2], impl=impl)
            assert (out - exact).abs().max() <= (plain - exact).abs().max() + 1e-2
