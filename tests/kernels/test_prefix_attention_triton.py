"""The Triton kernels without a GPU: interpreted in a process of their own, and compiled ahead of time."""

from __future__ import annotations

import pytest
import torch
from vtengine_kernels.prefix_attention import Crossover, Siblings, split
from vtengine_kernels.prefix_attention import triton as kernel

from tests.kernels.ahead_of_time import ARCHITECTURES, compiled
from tests.kernels.interpreting import run_interpreted
from tests.kernels.test_prefix_attention import SHAPES, forest

pytestmark = pytest.mark.skipif(kernel.missing() is not None, reason=str(kernel.missing()))

INTERPRETED = """
import json, torch
from vtengine_kernels.prefix_attention import prefix_attention, ref
from vtengine_kernels.prefix_attention.cases import CASES
errors = {}
for name, case in CASES.items():
    for dtype in (torch.float32, torch.float16):  # the interpreter multiplies bfloat16 wrongly
        q, keys, values, tables, lengths = case.tensors(dtype)
        out = prefix_attention(q, keys, values, tables, lengths, impl="triton")
        assert out.shape == q.shape and out.dtype == dtype
        plain = ref.prefix_attention(q, keys, values, tables, lengths, q.shape[2] ** -0.5)
        exact = ref.prefix_attention(q.double(), keys.double(), values.double(), tables, lengths, q.shape[2] ** -0.5)
        ours, torchs = ((x - exact).abs().max().item() if x.numel() else 0.0 for x in (out, plain))
        errors[f"{name} {dtype}"] = (ours, torchs)
print(json.dumps(errors))
"""


def test_interpreted_it_errs_no_more_than_torch():
    for name, (ours, torchs) in run_interpreted(INTERPRETED, timeout_s=120).items():
        assert ours <= torchs + (1e-2 if "float16" in name else 5e-6), name


SPLIT = """
import json, torch
from tests.kernels.test_prefix_attention import forest
from vtengine_kernels.prefix_attention import Crossover, Siblings, prefix_attention, ref, split
split.SPAN, split.ROWS = 16, 3
found = {}
for name, shape in {"grouped": (4, 2, 16, 8), "prime": (7, 1, 32, 5), "7b": (14, 2, 128, 16)}.items():
    for dtype in (torch.float32, torch.float16):
        for seed in (7, 13):
            (q, keys, values, tables, lengths), held = forest(seed, shape, most=60)
            q, keys, values = (x[:6].to(dtype) if x is q else x.to(dtype) for x in (q, keys, values))
            tables, lengths, held = tables[:6], lengths[:6], held[:6]
            siblings = Siblings.of(held, shape[3], Crossover()) or Siblings.strangers(len(q))
            work = siblings.with_work(lengths.numpy(), q.device).work
            idle = Siblings(siblings.order, siblings.shared, torch.cat([work, torch.full((3, 4), -1)]))
            out, alone, padded = (
                prefix_attention(q, keys, values, tables, lengths, s, impl="triton")
                for s in (siblings, Siblings.strangers(len(q)), idle)
            )
            assert out.dtype == dtype and torch.equal(out, padded)
            plain = ref.prefix_attention(q, keys, values, tables, lengths, q.shape[2] ** -0.5)
            exact = ref.prefix_attention(
                q.double(), keys.double(), values.double(), tables, lengths, q.shape[2] ** -0.5
            )
            errors = [(x - exact).abs().max().item() for x in (out, plain)]
            shares = int((work[:, 2] >= 0).sum())
            found[f"{name} {dtype} {seed}"] = (*errors, (out - alone).abs().max().item(), shares)
print(json.dumps(found))
"""


def test_split_interpreted_it_errs_no_more_than_torch():
    found = run_interpreted(SPLIT, timeout_s=200)
    for name, (ours, torchs, company, _) in found.items():
        assert ours <= torchs + (1e-2 if "float16" in name else 5e-6), name
        assert company <= (1e-3 if "float16" in name else 5e-6), name  # numpy's products look at the whole tile
    assert sum(shares for *_, shares in found.values()) > 5


@pytest.mark.parametrize("seed", range(8))
def test_every_span_of_every_row_is_somebodys_work_once(monkeypatch, seed):
    monkeypatch.setattr(split, "SPAN", 16)
    (*_, lengths), tables = forest(seed, SHAPES[0])
    siblings = Siblings.of(tables, 16, Crossover()) or Siblings.strangers(len(tables))
    done, together = [], 0
    for span, *rows in split.items(siblings, lengths.numpy()).tolist():
        rows = [row for row in rows if row >= 0]
        assert 1 <= len(rows) <= split.ROWS
        assert len({tables[row][span] for row in rows}) == 1  # the page of the span
        assert len(rows) == 1 or all(lengths[row] >= 16 * (span + 1) for row in rows)
        done += [(row, span) for row in rows]
        together += len(rows) - 1
    assert sorted(done) == [(row, span) for row, n in enumerate(lengths.tolist()) for span in range(-(-n // 16))]
    everything = split.items(Siblings.strangers(len(tables)), lengths.numpy())
    assert len(everything) == len(done) and (everything[:, 2:] == -1).all()
    assert len(split.items(Siblings.strangers(0), lengths[:0].numpy())) == 0


@pytest.mark.skipif(kernel.interpreted(), reason="TRITON_INTERPRET is set")
@pytest.mark.parametrize(
    ("rows", "dtype", "group", "size", "arch"),
    [
        *((rows, "bf16", 7, 128, arch) for rows in (1, split.ROWS) for arch in ARCHITECTURES),
        *(
            (rows, *case, 90)
            for rows in (1, split.ROWS)
            for case in (("bf16", 8, 128), ("fp16", 2, 64), ("fp32", 2, 64), ("bf16", 8, 80))
        ),
        (split.ROWS, "bf16", 8, 128, 100),
        (split.ROWS, "bf16", 16, 128, 90),
        (1, "fp16", 4, 64, 90),
        (1, "bf16", 8, 256, 90),
    ],
)
def test_it_compiles_without_spills(tmp_path, record_property, rows, dtype, group, size, arch):
    blocks = split.blocks(rows, group, size, 4 if dtype == "fp32" else 2, arch // 10)
    constants = {"GROUP": group, "SIZE": size, "PAGE": 16, "SPAN": split.SPAN, "ROWS": rows, **blocks}
    types = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("tables_ptr", "lengths_ptr", "items_ptr"), "*i64")
    types |= dict.fromkeys(("parts_ptr", "lse_ptr"), "*fp32") | {"scale_log2": "fp32"}
    if rows == 1:
        constants["items_ptr"] = types.pop("items_ptr") and None
    strides = ("q_stride", "page_stride", "token_stride")
    needs = compiled(split._span_kernel, types, constants, arch, tmp_path, sixteens=strides)
    record_property("needs", str(needs))
    # outside of the loops, where the assembler gives three registers for another program (28 bytes: Triton 3.8)
    assert needs.spill_bytes <= 28
    assert needs.shared_bytes <= (75 if rows == 1 else 99 if arch < 90 else 113) * 1024  # two on a Hopper's processor
    merge = {"SIZE": size, "SPAN": split.SPAN, **split.merge_blocks(size)}
    types = {"parts_ptr": "*fp32", "lse_ptr": "*fp32", "lengths_ptr": "*i64", "out_ptr": f"*{dtype}"}
    assert compiled(split._merge_spans_kernel, types, merge, arch, tmp_path, 1).spill_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu_company_changes_no_bit(dtype):
    from vtengine_kernels.prefix_attention import prefix_attention, ref

    shared = 0
    for seed, shape in ((seed, shape) for seed in (0, 3, 5, 7) for shape in SHAPES[:3]):
        tensors, tables = forest(seed, shape, most=2000)
        q, keys, values = (x.cuda().to(dtype) for x in tensors[:3])
        rest = [x.cuda() for x in tensors[3:]]
        siblings = Siblings.of(tables, shape[3], Crossover()) or Siblings.strangers(len(q))
        shared += int((split.items(siblings, tensors[4].numpy())[:, 2] >= 0).sum())
        out, alone = (
            prefix_attention(q, keys, values, *rest, s, impl="triton") for s in (siblings, Siblings.strangers(len(q)))
        )
        assert torch.equal(out, alone)
        scale = q.shape[2] ** -0.5
        exact = ref.prefix_attention(q.double(), keys.double(), values.double(), *rest, scale)
        plain = ref.prefix_attention(q, keys, values, *rest, scale)
        assert (out - exact).abs().max() <= (plain - exact).abs().max() + (1e-5 if dtype == torch.float32 else 1e-2)
    assert shared > 10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu_it_errs_no_more_than_torch(dtype):
    from vtengine_kernels.prefix_attention import prefix_attention, ref
    from vtengine_kernels.prefix_attention.cases import CASES

    for case in CASES.values():
        q, keys, values, tables, lengths = (x.cuda() for x in case.tensors(dtype))
        out = prefix_attention(q, keys, values, tables, lengths, impl="triton")
        if len(q):
            scale = q.shape[2] ** -0.5
            exact = ref.prefix_attention(q.double(), keys.double(), values.double(), tables, lengths, scale)
            plain = ref.prefix_attention(q, keys, values, tables, lengths, scale)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            assert (out - exact).abs().max() <= (plain - exact).abs().max() + tolerance
