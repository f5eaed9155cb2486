"""The C++ implementation (csrc/cpu): one fused pass, AVX-512, AVX2 or plain C++ as the machine has it."""

from __future__ import annotations

import ctypes
from typing import Literal

import numpy as np
import torch

from vtengine_kernels import library
from vtengine_kernels.patchify.contract import MAX_STEPS, Plan, Target
from vtengine_kernels.patchify.fixed_point import FILTERS, MODES, Box

Isa = Literal["auto", "scalar", "avx2", "avx512"]

_FILTERS = tuple(FILTERS)
_FAILURES = {
    1: "invalid call",
    2: "out of memory",
    3: "this machine has no such instruction set",
    4: "unexpected failure",
}


class _Image(ctypes.Structure):
    _fields_ = (
        ("pixels", ctypes.c_void_p),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    _fields_ = (("height", ctypes.c_int64), ("width", ctypes.c_int64), ("filter", ctypes.c_int32))


class _Target(ctypes.Structure):
    _fields_ = (
        ("left", ctypes.c_int64),
        ("top", ctypes.c_int64),
        ("right", ctypes.c_int64),
        ("bottom", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("steps", ctypes.c_int32),
        ("step", _Step * MAX_STEPS),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("filter", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("stream", ctypes.c_int32),
        ("patch", ctypes.c_int32),
        ("mean", ctypes.c_float * 3),
        ("std", ctypes.c_float * 3),
        ("unit", ctypes.c_double),
        ("table", ctypes.c_void_p),
    )


def missing() -> str | None:
    """Why the library is not here, or None."""
    return library.missing("vt_patchify")


def run(plan: Plan, *, isa: Isa = "auto", stream: bool | None = None) -> list[torch.Tensor]:
    """Writes every target of the plan into its output tensor and returns these.

    isa, stream (stores that bypass the caches; None: by size) are for tests. LibraryMissing: not built.
    RuntimeError: this machine lacks `isa`. MemoryError.
    """
    vt_patchify = library.load().vt_patchify
    pixels = np.asarray(plan.image)
    height, width, _ = pixels.shape
    image = _Image(pixels.ctypes.data, height, width, 3 * width)
    targets = (_Target * len(plan.targets))(
        *(_target(target, box, out) for target, box, out in zip(plan.targets, plan.boxes, plan.outputs, strict=True))
    )
    options = _Options(
        filter=_FILTERS.index(plan.filter),
        mode=MODES.index(plan.mode),
        layout=("full", "compact").index(plan.layout),
        dtype=(torch.float32, torch.bfloat16).index(plan.dtype),
        isa=library.ISAS[isa],
        num_threads=plan.num_threads,
        stream=-1 if stream is None else int(stream),
        patch=plan.patch,
        mean=(ctypes.c_float * 3)(*plan.affine.mean),
        std=(ctypes.c_float * 3)(*plan.affine.std),
        unit=plan.affine.unit,
        table=plan.table.ctypes.data,
    )
    status = vt_patchify(ctypes.byref(image), targets, ctypes.c_int64(len(targets)), ctypes.byref(options))
    if status:
        failure = MemoryError if status == 2 else RuntimeError
        raise failure(f"patchify on the CPU, isa = {isa!r}: {_FAILURES.get(status, status)}")
    return list(plan.outputs)


def _target(target: Target, box: Box, out: torch.Tensor) -> _Target:
    steps = (_Step(step.height, step.width, _FILTERS.index(step.filter)) for step in target.before)
    return _Target(*box, target.height, target.width, out.data_ptr(), len(target.before), (_Step * MAX_STEPS)(*steps))
