"""The Triton implementation: the image goes up as bytes, two kernels at most per resize, values come out as patches.

A resize is one pass per direction that changes. All passes but the last write 8-bit levels; the last one of the last
resize turns them into values and writes patches. Weights, sums and values are those of the reference, so the result is
too. Runs on the CPU as well, under TRITON_INTERPRET=1 (set before triton is imported).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtengine_kernels import triton_runtime
from vtengine_kernels.patchify.contract import FRAMES, Layout, Plan, Step, Target
from vtengine_kernels.patchify.fixed_point import PRECISION_BITS, Filter, Mode, vertical_first, weights
from vtengine_kernels.patchify.normalise import Affine, table_of
from vtengine_kernels.triton_runtime import interpreted, launch

if triton_runtime.missing() is None:
    from vtengine_kernels.patchify.triton_kernels import _across_kernel, _down_kernel, _down_patches_kernel

# What one program makes, and its warps.
ACROSS: dict[str, Any] = {"WORDS": True, "COLUMNS": 128, "num_warps": 4}
DOWN = {"COLUMNS": 1024, "num_warps": 4}  # columns are bytes
DOWN_PATCHES = {"LINES": 2, "UNITS": 16, "num_warps": 1}
ROWS_ACROSS, ROWS_DOWN = 4, 2  # of a program, few: more programs have loads under way
TAPS = (1, 4, 5, 9, 13)  # of one round of summation, few: kernels are compiled for each
ROOM = 16  # bytes: rows of levels begin at multiples of it
GROUP, UNIT = 8, 16  # patches whose units lie together, bytes of a unit
ONE_HALF = 1 << (PRECISION_BITS - 1)  # of the weights
BITS_OF = {torch.bfloat16: torch.int16, torch.float32: torch.int32}  # the kernels store bits


@dataclass(frozen=True)
class Form:
    """Whose arithmetic, and how values are written."""

    mode: Mode
    patch: int
    layout: Layout
    dtype: torch.dtype
    affine: Affine
    device: torch.device


@dataclass(frozen=True, eq=False)
class Pass:
    """kernel[grid](source, out, *arguments, **constants). scratch: bytes of `out`; None: it is the call's output."""

    kernel: Any
    grid: tuple[int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    scratch: int | None = None


@dataclass(frozen=True)
class Pixels:
    """uint8 [height, width, 3] whose rows begin `row` bytes after one another; `readable` of them may be read."""

    height: int
    width: int
    row: int
    readable: int


def missing() -> str | None:
    """Why the kernels do not run here, or None."""
    reason = triton_runtime.missing()
    if reason is None and not (interpreted() or torch.cuda.is_initialized() or torch.cuda.is_available()):
        return "no CUDA device here"  # asked of the driver, which takes a while, as long as nothing has been there
    return reason


def run(plan: Plan) -> list[Tensor]:
    """Writes every target of the plan into its output tensor and returns these."""
    image = upload(plan.image, plan.device)
    form = Form(plan.mode, plan.patch, plan.layout, plan.dtype, plan.affine, plan.device)
    for target, (left, top, right, bottom), out in zip(plan.targets, plan.boxes, plan.outputs, strict=True):
        source = image[top:bottom, left:right]
        for each in passes(bottom - top, right - left, 3 * image.shape[1], target, plan.filter, form):
            to = out.view(BITS_OF[plan.dtype]) if each.scratch is None else image.new_empty(each.scratch)
            launch(each.kernel, each.grid, source, to, *each.arguments, **each.constants)
            source = to
    return list(plan.outputs)


def upload(image: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """uint8 [H, W, 3] on the device, by way of pinned memory, which torch keeps and uses again."""
    if isinstance(image, Tensor):
        return image
    staged = torch.empty(image.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.copyto(staged.numpy(), image)
    return staged.to(device, non_blocking=True)


@functools.lru_cache(maxsize=256)
def passes(height: int, width: int, row: int, target: Target, kind: Filter, form: Form) -> tuple[Pass, ...]:
    """From uint8 [height, width, 3], whose rows begin `row` bytes after one another, to the patches of the target."""
    made = []
    source = Pixels(height, width, row, 3 * width)
    steps = (*target.before, Step(target.height, target.width, kind))
    for step in steps:
        axes = [0, 1] if vertical_first(source.height, source.width, step.height, step.width, form.mode) else [1, 0]
        changed = [axis for axis in axes if (source.height, source.width)[axis] != (step.height, step.width)[axis]]
        if step is steps[-1]:  # the last pass goes across, be it by one tap, unless it is a pass down after another
            made += _last(source, step, changed, form)
            break
        for axis in changed:
            made.append((_down, _across)[axis](source, step, form))
            source = _scratch(step.height, source.width) if axis == 0 else _scratch(source.height, step.width)
    return tuple(made)


def _last(source: Pixels, step: Step, changed: list[int], form: Form) -> list[Pass]:
    """One pass or two, the second of which writes patches."""
    if changed == [1, 0]:
        return [_across(source, step, form, "units"), _down_patches(source.height, step, form)]
    if 0 in changed:
        return [_down(source, step, form), _across(_scratch(step.height, source.width), step, form, "patches")]
    return [_across(source, step, form, "patches")]


def _across(source: Pixels, step: Step, form: Form, to: str = "pixels") -> Pass:
    axis = _axis(source.width, step.width, step.filter, form.mode, form.device)
    values = _values(form)
    blocks = -(-step.width // ACROSS["COLUMNS"])
    if to == "units":
        out_row = _units(step.width, form) * UNIT
        scratch: int | None = source.height * out_row + DOWN_PATCHES["UNITS"] * UNIT  # a block is read whole
    else:
        out_row = _scratch(source.height, step.width).row
        scratch = None if to == "patches" else source.height * out_row
    apart = (source.row, out_row)
    return Pass(
        _across_kernel,
        (-(-source.height // ROWS_ACROSS) * blocks,),
        (
            axis.first,
            axis.across,
            values.tensor,
            source.height,
            step.width,
            axis.rounds,
            ONE_HALF,
            blocks,
            ROWS_ACROSS,
            *apart,
        ),
        {"TO": to, "TAPS": axis.taps, "ONE_ROUND": axis.rounds == 1, "BITS": PRECISION_BITS, **ACROSS}
        | {"WORDS": ACROSS["WORDS"] and axis.rounds == 1 and source.row % 4 == 0, "COMPUTED": values.computed}
        | {"FRAMES": FRAMES[form.layout] if to == "patches" else 1, "PATCH": form.patch},
        scratch,
    )


def _down(source: Pixels, step: Step, form: Form) -> Pass:
    axis = _axis(source.height, step.height, step.filter, form.mode, form.device)
    out = _scratch(step.height, source.width)
    columns = out.row if source.readable == out.row else 3 * source.width  # to the end of a row, for wide accesses
    blocks = -(-columns // DOWN["COLUMNS"])
    apart = (source.row, out.row)
    return Pass(
        _down_kernel,
        (-(-step.height // ROWS_DOWN) * blocks,),
        (axis.first, axis.weight, step.height, columns, axis.rounds, ONE_HALF, blocks, ROWS_DOWN, *apart),
        {"TAPS": axis.taps, "ONE_ROUND": axis.rounds == 1, "BITS": PRECISION_BITS, **DOWN},
        out.height * out.row,
    )


def _down_patches(height_in: int, step: Step, form: Form) -> Pass:
    """From the units that _across writes."""
    axis = _axis(height_in, step.height, step.filter, form.mode, form.device)
    values = _values(form)
    units = _units(step.width, form)
    blocks = -(-units // DOWN_PATCHES["UNITS"])
    rows = DOWN_PATCHES["LINES"]
    return Pass(
        _down_patches_kernel,
        (step.height // rows * blocks,),
        (axis.first, axis.weight, values.tensor, step.width // form.patch, axis.rounds, ONE_HALF, blocks, rows),
        {"TAPS": axis.taps, "ONE_ROUND": axis.rounds == 1, "BITS": PRECISION_BITS, **DOWN_PATCHES}
        | {"PATCH": form.patch, "COMPUTED": values.computed, "FRAMES": FRAMES[form.layout]},
    )


def _units(width: int, form: Form) -> int:
    """Of a row, in whole groups."""
    return -(-width // form.patch // GROUP) * GROUP * 3


def _scratch(height: int, width: int) -> Pixels:
    room = -(-3 * width // ROOM) * ROOM
    return Pixels(height, width, room, room)


@dataclass(frozen=True, eq=False)
class Axis:
    """first: int32 [size_out]; weight: int32 [size_out, rounds * taps] and, `across`, its transpose. No tap lies past
    the input."""

    first: Tensor
    weight: Tensor
    across: Tensor
    rounds: int
    taps: int


@functools.lru_cache(maxsize=256)
def _axis(size_in: int, size_out: int, kind: Filter, mode: Mode, device: torch.device) -> Axis:
    if size_in == size_out:
        first, weight = np.arange(size_out), np.full((size_out, 1), 1 << PRECISION_BITS)
    else:
        first, weight = weights(size_in, size_out, kind, mode)
    rounds, taps = rounds_of(weight.shape[1], size_in)
    first, weight = inside(first, np.pad(weight, ((0, 0), (0, rounds * taps - weight.shape[1]))), size_in)
    tensors = [torch.from_numpy(array.astype(np.int32)).to(device) for array in (first, weight, weight.T.copy())]
    return Axis(tensors[0], tensors[1], tensors[2], rounds, taps)


def rounds_of(taps: int, size_in: int) -> tuple[int, int]:
    """(rounds, taps of each), together at least `taps` and at most size_in: few different ones, with few zeros."""
    each = next((count for count in TAPS if count >= taps), TAPS[-1])
    rounds = -(-taps // each)
    return (rounds, each) if rounds * each <= size_in else (taps, 1)


def inside(first: np.ndarray, weight: np.ndarray, size_in: int) -> tuple[np.ndarray, np.ndarray]:
    """The same sums, with first + taps <= size_in: windows that stick out are moved back."""
    back = np.maximum(first + weight.shape[1] - size_in, 0)
    moved = np.arange(weight.shape[1])[None, :] - back[:, None]
    return first - back, np.where(moved >= 0, np.take_along_axis(weight, np.maximum(moved, 0), axis=1), 0)


@dataclass(frozen=True, eq=False)
class Values:
    """computed: float32 [3, 2], slope and offset of each channel; else the bits of the values of levels, [3 * 256]."""

    tensor: Tensor
    computed: bool


@functools.lru_cache(maxsize=16)
def _values(form: Form) -> Values:
    table = torch.from_numpy(table_of(form.affine).copy()).to(form.dtype)
    lines = lines_of(form.affine) if form.dtype is torch.bfloat16 and not interpreted() else None
    if lines is not None:
        return Values(torch.from_numpy(lines).to(form.device), True)
    return Values(table.view(BITS_OF[form.dtype]).flatten().to(form.device), False)


@functools.lru_cache(maxsize=16)
def lines_of(affine: Affine) -> np.ndarray | None:
    """float32 [3, 2], slope and offset with which the kernels compute the very bfloat16 values of the table, if any.

    Rounding in float32 can take a value to the other side of a tie: lines some units in the last place away are tried.
    """
    table = torch.from_numpy(table_of(affine).copy()).to(torch.bfloat16)
    mean, std = (np.asarray(values, np.float32).astype(np.float64) for values in (affine.mean, affine.std))
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = np.stack([255 * affine.unit / std, -mean / std], axis=1).astype(np.float32)
    found = nearest.copy()
    for channel, (line, values) in enumerate(zip(nearest, table, strict=True)):
        nudges = sorted(itertools.product(range(-4, 5), repeat=2), key=lambda nudge: abs(nudge[0]) + abs(nudge[1]))
        lines = [(line.view(np.int32) + np.array(nudge, np.int32)).view(np.float32) for nudge in nudges]
        fitting = next((each for each in lines if torch.equal(on_line(each), values)), None)
        if fitting is None:
            return None
        found[channel] = fitting
    return found


def on_line(line: np.ndarray) -> Tensor:
    """bfloat16 [256]: what the kernels make of levels 0 to 255, rounded where they round."""
    unit = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = line[0].astype(np.float64) * unit + line[1]  # as a fused multiplication and addition: rounded once
        return torch.from_numpy(exact.astype(np.float32)).to(torch.bfloat16)
