"""The micro level: what pytest-benchmark finds becomes one row per op and case."""

from __future__ import annotations

import pytest
import torch
from vtengine_kernels import dispatch

from benchmarks.suites import kernels


def test_quick_figures_of_one_op(tmp_path):
    pytest.importorskip("pytest_benchmark")
    found = kernels.measured(tmp_path / "found.json", [kernels.MICRO / "bench_visual_scatter.py"], quick=True)
    (row,) = kernels.compared(found)
    assert row["op"] == "visual_scatter" and row["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert 0 < row["min_ms"] <= row["ms"]
    assert row["reference_ratio"] == pytest.approx(row["reference_ms"] / row["ms"])


def test_a_benchmark_that_fails_is_no_result(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "bench_broken.py").write_text("def test_it(benchmark):\n    assert False, 'the op is broken'\n")
    with pytest.raises(RuntimeError, match="the op is broken"):
        kernels.measured(tmp_path / "found.json", [tmp_path / "bench_broken.py"], quick=True)


def test_every_op_is_measured():
    text = "".join(path.read_text(encoding="utf-8") for path in kernels.MICRO.glob("bench_*.py"))
    ops = {entry.op for entry in dispatch.report()}
    assert {
        op for op in ops if f"vtengine_kernels.{op} " not in text and f"vtengine_kernels import {op}" not in text
    } == set()
