"""kv_store and paged_prefill: against their references, interpreted, compiled ahead of time, and on a GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
from vtengine_kernels.kv_store import kv_store
from vtengine_kernels.kv_store import triton as store
from vtengine_kernels.paged_prefill import paged_prefill
from vtengine_kernels.paged_prefill import triton as prefill

from tests.kernels.ahead_of_time import ARCHITECTURES, compiled
from tests.kernels.interpreting import run_interpreted

needs_triton = pytest.mark.skipif(store.missing() is not None or store.interpreted(), reason="needs Triton, compiled")

STORED = """
def stored(tokens, heads, size, page_size, dtype, impl, device="cpu"):
    # The cache begins as NaN; k and v are strided views; what no slot names must stay as it was.
    import torch
    from vtengine_kernels.kv_store import kv_store
    generator = torch.Generator().manual_seed(tokens)
    whole = torch.randn(tokens, 3 * heads, size, generator=generator).to(dtype).to(device)
    k, v = whole[:, heads : 2 * heads], whole[:, 2 * heads :]
    pages = tokens // page_size + 2
    cache = torch.full((2, pages, page_size, heads, size), float("nan"), dtype=dtype, device=device)
    slots = torch.randperm(pages * page_size, generator=generator)[:tokens].to(device)
    kv_store(k, v, cache[0], cache[1], slots, impl=impl)
    expected = torch.full_like(cache, float("nan"))
    expected[0].flatten(0, 1)[slots], expected[1].flatten(0, 1)[slots] = k, v
    return torch.equal(cache.nan_to_num(7), expected.nan_to_num(7))

SIZES = ((1, 1, 16, 1), (13, 3, 80, 5), (40, 4, 128, 16), (0, 2, 64, 16))
"""
ATTENDED = """
def attended(rows, heads, kv_heads, size, page_size, dtype, device="cpu"):
    # rows: (queries, length) each; slots that nobody sees are NaN. Errors of Triton and of torch against float64.
    import torch
    from vtengine_kernels.paged_prefill import paged_prefill
    generator = torch.Generator().manual_seed(len(rows))
    counts, lengths = [c for c, _ in rows], [n for _, n in rows]
    width = max(-(-n // page_size) for n in lengths)
    cache = torch.full((2, len(rows) * width + 1, page_size, kv_heads, size), float("nan"))
    tables = torch.randperm(len(rows) * width, generator=generator).view(len(rows), width)
    for row, length in enumerate(lengths):
        t = torch.arange(length)
        for one in cache:
            one[tables[row, t // page_size], t % page_size] = torch.randn(length, kv_heads, size, generator=generator)
    whole = 2 * torch.randn(sum(counts), heads + 1, size, generator=generator)
    cache, q = cache.to(dtype).to(device), whole.to(dtype).to(device)[:, :heads]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    rest = (tables.to(device), torch.tensor(lengths, device=device), offsets.to(device), max(counts))
    out = paged_prefill(q, *cache, *rest, impl="triton")
    plain = paged_prefill(q, *cache, *rest, impl="ref")
    exact = paged_prefill(q.double(), *cache.double(), *rest, impl="ref")
    return float((out - exact).abs().max()), float((plain - exact).abs().max())

CASES = {
    "usual": (((37, 100), (5, 64), (1, 1), (64, 64)), 4, 2, 64, 16),
    "prime": (((7, 11), (3, 13)), 7, 1, 32, 5),
    "7b": (((20, 41),), 28, 4, 128, 16),
    "long": (((3, 150), (40, 200)), 2, 2, 16, 16),  # whole blocks that all queries see, and a masked rest
    "one": (((1, 1),), 1, 1, 16, 1),
    "size 80": (((9, 30), (2, 3)), 2, 2, 80, 8),
}
"""
LIMITS = {torch.float32: 5e-6, torch.float16: 1e-2, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("impl", ["torch", "ref", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_where_the_slots_say(impl, dtype):
    scope = {}
    exec(STORED, scope)
    assert all(scope["stored"](*sizes, dtype, impl) for sizes in scope["SIZES"])


@needs_triton
def test_interpreted_they_err_no_more_than_torch():
    code = STORED + ATTENDED + "import json, torch\nDTYPES = {'fp32': torch.float32, 'fp16': torch.float16}\n"
    code += "same = all(stored(*s, d, 'triton') for s in SIZES for d in DTYPES.values())\n"
    code += "errors = {f'{n} {t}': attended(*c, d) for n, c in CASES.items() for t, d in DTYPES.items()}\n"
    same, errors = run_interpreted(code + "print(json.dumps([same, errors]))")
    assert same
    for name, (ours, torchs) in errors.items():
        assert ours <= torchs + LIMITS[torch.float16 if "fp16" in name else torch.float32], name


def test_the_reference_is_causal_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(12, 2, 16, generator=generator) for _ in range(3))
    cache = [x.view(3, 4, 2, 16) for x in (k, v)]
    table, length, offsets = torch.tensor([[0, 1, 2]]), torch.tensor([12]), torch.tensor([0, 7])
    out = paged_prefill(q[5:], *cache, table, length, offsets, 7, impl="ref")
    x = (t.transpose(0, 1) for t in (q, k, v))
    whole = torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True).transpose(0, 1)
    torch.testing.assert_close(out, whole[5:])


def test_what_does_not_fit_is_refused():
    k, keys, slots = torch.ones(3, 2, 16), torch.zeros(2, 4, 2, 16), torch.arange(3)
    for change, message in (
        ({"k": k[:, :1]}, r"k \[3, 1, 16\]"),
        ({"slots": slots.int()}, r"slots \[3\] torch.int32"),
        ({"slots": slots[:2]}, r"must be int64 \[3\]"),
        ({"k": k.double()}, "must be equal"),
        ({"keys": torch.zeros(2, 4, 2, 32)[..., ::2]}, "contiguous"),
        ({"impl": "cuda"}, "must be one of auto, triton, torch, ref"),
    ):
        with pytest.raises(ValueError, match=message):
            kv_store(**{"k": k, "v": k, "keys": keys, "values": keys, "slots": slots} | change)
    good = {"q": k, "keys": keys, "values": keys, "tables": torch.zeros(1, 2, dtype=torch.int64)}
    good |= {"lengths": torch.tensor([5]), "offsets": torch.tensor([0, 3]), "longest": 3}
    for change, message in (
        ({"q": torch.ones(3, 3, 16)}, "Hq a multiple of Hkv"),
        ({"keys": keys[:, :, :0], "values": keys[:, :, :0]}, "Hq a multiple of Hkv"),
        ({"q": k.double()}, "must be equal"),
        ({"offsets": torch.tensor([0])}, r"\[N \+ 1\]"),
        ({"lengths": torch.tensor([5.0])}, "must be int64"),
        ({"impl": "cuda"}, "must be one of auto, flash, triton, ref, flashinfer"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_prefill(**good | change)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "width", "arch"), [*(("bf16", 512, arch) for arch in ARCHITECTURES), ("fp32", 128, 90)]
)
def test_kv_store_compiles_without_spills(tmp_path, record_property, dtype, width, arch):
    types = dict.fromkeys(("k_ptr", "v_ptr", "keys_ptr", "values_ptr"), f"*{dtype}") | {"slots_ptr": "*i64"}
    needs = compiled(store._kv_store_kernel, types, {"WIDTH": width, "BLOCK_W": store.block(width)}, arch, tmp_path)
    record_property("needs", str(needs))
    assert needs.spill_bytes == 0 and needs.registers <= 64


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "group", "size", "arch"),
    [
        *(("bf16", 7, 128, arch) for arch in ARCHITECTURES),
        ("fp16", 2, 64, 90),
        *(("bf16", 8, 80, arch) for arch in ARCHITECTURES),
        ("fp32", 2, 64, 90),
        ("fp32", 7, 128, 90),
    ],
)
def test_paged_prefill_compiles_without_spills(tmp_path, record_property, dtype, group, size, arch):
    itemsize = 4 if dtype == "fp32" else 2
    types = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr", "out_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("tables_ptr", "lengths_ptr", "offsets_ptr"), "*i64") | {"scale_log2": "fp32"}
    blocks = prefill.blocks(group, size, itemsize, arch // 10)
    constants, warps = {"GROUP": group, "SIZE": size, "PAGE": 16, **blocks}, prefill.warps(blocks["BLOCK_M"])
    strides = ("q_stride", "out_stride", "page_stride", "token_stride")
    needs = compiled(prefill._paged_prefill_kernel, types, constants, arch, tmp_path, warps, strides)
    record_property("needs", str(needs))
    most_shared_bytes = (99 if arch < 90 else 227) * 1024  # what a program may have on the smallest of its generation
    assert needs.spill_bytes == 0 and needs.shared_bytes <= most_shared_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(LIMITS))
def test_on_the_gpu_they_err_no_more_than_torch(dtype):
    importlib.import_module("triton")
    scope = {}
    exec(STORED + ATTENDED, scope)
    assert all(scope["stored"](*sizes, dtype, "triton", "cuda") for sizes in scope["SIZES"])
    for name, case in scope["CASES"].items():
        ours, torchs = scope["attended"](*case, dtype, "cuda")
        assert ours <= torchs + LIMITS[dtype], name
