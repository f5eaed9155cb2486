"""What a patchify call may be: targets, limits and the checks made before any implementation runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from vtengine_kernels import buffers
from vtengine_kernels.patchify.fixed_point import FILTERS, MODES, Box, Filter, Mode
from vtengine_kernels.patchify.normalise import CLIP_MEAN, CLIP_STD, Affine, affine, level_table

PATCHES = (14, 16)  # pixels per side of a patch: Qwen2-VL and Qwen2.5-VL, Qwen3-VL
MAX_STEPS = 2
MAX_SIDE = 1 << 24  # Pillow holds the size of the source as a float32
Layout = Literal["full", "compact"]
FLOAT32_MAX = float(np.finfo(np.float32).max)
FRAMES = {"full": 2, "compact": 1}
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Step:
    """A resize to height x width pixels (any size) that comes before a target's own; it rounds to 8 bits too."""

    height: int
    width: int
    filter: Filter = "lanczos"


@dataclass(frozen=True)
class Target:
    """One view: the part `box` of the source (left, top, right, bottom; None = all), resized to height x width pixels.

    Both sides are multiples of a merge window (2x2 patches). The box is cut out before resizing: no pixel outside it
    has influence. `before`: at most two resizes that come first.
    """

    height: int
    width: int
    box: Box | None = None
    before: tuple[Step, ...] = ()

    def rows(self, patch: int) -> int:
        """Patches of patch x patch pixels."""
        return self.height // patch * (self.width // patch)


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked call. image: uint8 [H, W, 3], C-contiguous, a tensor where it is on a GPU; device: where the outputs
    are; table: float32 [3, 256]; outputs: one per target."""

    image: np.ndarray | torch.Tensor
    device: torch.device
    targets: tuple[Target, ...]
    boxes: tuple[Box, ...]
    filter: Filter
    mode: Mode
    patch: int
    layout: Layout
    dtype: torch.dtype
    affine: Affine
    table: np.ndarray
    outputs: tuple[torch.Tensor, ...]
    num_threads: int


def checked_plan(
    image_HWC: np.ndarray | torch.Tensor,
    targets: Sequence[Target],
    *,
    filter: Filter = "bicubic",
    layout: Layout = "full",
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    num_threads: int = 1,
    mode: Mode = "pil13",
    patch: int = 14,
    device: torch.device | str | None = None,
    out: Sequence[torch.Tensor] | None = None,
) -> Plan:
    """The call as an implementation wants it, outputs allocated. ValueError: an argument outside its range."""
    check_options(filter, layout, dtype, mode, patch, num_threads)
    check_normalisation(mean, std)
    image = checked_image(image_HWC)
    place = checked_device(device, image)
    checked, boxes = checked_targets(targets, image.shape[0], image.shape[1], 2 * patch)
    return Plan(
        image=image,
        device=place,
        targets=checked,
        boxes=boxes,
        filter=filter,
        mode=mode,
        patch=patch,
        layout=layout,
        dtype=dtype,
        affine=affine(tuple(mean), tuple(std), mode),
        table=level_table(tuple(mean), tuple(std), mode),
        outputs=checked_outputs(out, checked, patch, layout, dtype, place),
        num_threads=num_threads,
    )


def checked_image(image: Any) -> np.ndarray | torch.Tensor:
    """The image, as a numpy view where it is on the CPU. ValueError: not uint8 [H, W, 3], not contiguous."""
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise ValueError(f"image = {type(image).__name__}: must be a numpy array or a torch tensor, uint8 [H, W, 3]")
    if isinstance(image, torch.Tensor) and image.device.type not in ("cpu", "cuda"):
        raise ValueError(f"image.device = {image.device}: must be cpu or cuda; move it with image.cpu()")
    if image.dtype != (torch.uint8 if isinstance(image, torch.Tensor) else np.uint8):
        raise ValueError(f"image.dtype = {image.dtype}: must be uint8, levels 0..255")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image.shape = {tuple(image.shape)}: must be [H, W, 3] (interleaved RGB)")
    if not 0 < image.shape[0] <= MAX_SIDE or not 0 < image.shape[1] <= MAX_SIDE:
        raise ValueError(f"image.shape = {tuple(image.shape)}: both sides must be 1 to {MAX_SIDE} pixels")
    if isinstance(image, torch.Tensor):
        if not image.is_contiguous():
            raise ValueError(f"image.stride = {image.stride()}: must be C-contiguous; pass image.contiguous()")
        return image.detach() if image.is_cuda else image.detach().numpy()
    if not image.flags.c_contiguous:
        raise ValueError(f"image.strides = {image.strides}: must be C-contiguous; pass np.ascontiguousarray(image)")
    return image


def checked_device(device: torch.device | str | None, image: np.ndarray | torch.Tensor) -> torch.device:
    """Where the outputs are to be: where the image is, unless it is to be brought up. ValueError: another way."""
    source = image.device if isinstance(image, torch.Tensor) else torch.device("cpu")
    try:
        wanted = source if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device = {device!r}: {str(error).splitlines()[0]}") from None
    if wanted.type == "cuda" and source.type != "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {device!r}: torch sees no CUDA device here; leave it out")
    if wanted.type == "cuda" and wanted.index is None:
        wanted = source if source.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    if wanted.type not in ("cpu", "cuda") or (source.type == "cuda" and wanted != source):
        raise ValueError(f"device = {device}: an image on {source} is prepared there, or one on the CPU on cpu or cuda")
    return wanted


def checked_targets(
    targets: Sequence[Target], height: int, width: int, window: int
) -> tuple[tuple[Target, ...], tuple[Box, ...]]:
    """(targets, their boxes with None resolved). ValueError: a size or a box that is out of range."""
    boxes = []
    for index, target in enumerate(targets):
        if not isinstance(target, Target):
            raise ValueError(f"targets[{index}] = {target!r}: must be a Target(height, width)")
        for name in ("height", "width"):
            side = getattr(target, name)
            if not _is_int(side) or side <= 0 or side % window or side > MAX_SIDE:
                raise ValueError(
                    f"targets[{index}].{name} = {side!r}: must be a positive multiple of {window} pixels; "
                    "vtengine.vision.plan gives such sizes"
                )
        box = (0, 0, width, height) if target.box is None else tuple(target.box)
        if len(box) != 4 or not all(_is_int(side) for side in box):
            raise ValueError(f"targets[{index}].box = {target.box!r}: must be four integers: left, top, right, bottom")
        left, top, right, bottom = box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"targets[{index}].box = {box}: must hold at least one pixel of the image of {width}x{height} pixels"
            )
        check_steps(f"targets[{index}].before", target.before)
        boxes.append((left, top, right, bottom))
    return tuple(targets), tuple(boxes)


def check_steps(name: str, steps: Any) -> None:
    """ValueError: not at most MAX_STEPS steps of a possible size."""
    if not isinstance(steps, tuple) or len(steps) > MAX_STEPS or not all(isinstance(step, Step) for step in steps):
        raise ValueError(f"{name} = {steps!r}: must be a tuple of at most {MAX_STEPS} Step(height, width)")
    for step in steps:
        for side in (step.height, step.width):
            if not _is_int(side) or not 0 < side <= MAX_SIDE:
                raise ValueError(f"{name}: {step}: both sides must be 1 to {MAX_SIDE} pixels")
        if step.filter not in FILTERS:
            raise ValueError(f"{name}: {step}: filter must be one of {', '.join(FILTERS)}")


def checked_outputs(
    out: Sequence[torch.Tensor] | None,
    targets: tuple[Target, ...],
    patch: int,
    layout: Layout,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, ...]:
    """New tensors on `device`, or the caller's after a check of shape, dtype, device and contiguity."""
    shapes = [(target.rows(patch), 3 * FRAMES[layout] * patch * patch) for target in targets]
    if out is None and device.type != "cpu":
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    if out is None:
        return tuple(buffers.outputs.empty(shape, dtype) for shape in shapes)
    if len(out) != len(targets):
        raise ValueError(f"out = {len(out)} tensors: must be one per target, here {len(targets)}")
    for index, (tensor, shape) in enumerate(zip(out, shapes, strict=True)):
        if not isinstance(tensor, torch.Tensor) or tensor.device != device or tensor.dtype is not dtype:
            raise ValueError(f"out[{index}]: must be a {dtype} tensor on {device}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"out[{index}].shape = {tuple(tensor.shape)}: must be {shape}")
        if not tensor.is_contiguous():
            raise ValueError(f"out[{index}].stride = {tensor.stride()}: must be contiguous")
        if tensor.requires_grad:
            raise ValueError(f"out[{index}].requires_grad = True: pixel values carry no gradient; pass out.detach()")
    return tuple(out)


def check_options(kind: str, layout: str, dtype: torch.dtype, mode: str, patch: int, num_threads: int) -> None:
    """ValueError: an option outside its set."""
    for name, value, allowed in (
        ("filter", kind, tuple(FILTERS)),
        ("layout", layout, tuple(FRAMES)),
        ("dtype", dtype, DTYPES),
        ("mode", mode, MODES),
        ("patch", patch, PATCHES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} = {value!r}: must be one of {', '.join(map(str, allowed))}")
    if not _is_int(num_threads) or not 1 <= num_threads <= 256:
        raise ValueError(f"num_threads = {num_threads!r}: must be an integer from 1 to 256")


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """ValueError: not three finite numbers each, or a std that is not positive."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or not all(abs(value) <= FLOAT32_MAX for value in values):
            raise ValueError(f"{name} = {tuple(values)!r}: must be three finite float32 numbers, one per channel")
    if min(np.float32(value) for value in std) <= 0:
        raise ValueError(f"std = {tuple(std)!r}: each must be above 0")


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
