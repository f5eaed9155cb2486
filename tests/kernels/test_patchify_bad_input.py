"""Wrong calls: a ValueError that names the field, before anything is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vtengine_kernels.patchify import Step, Target, patchify

GOOD = np.zeros((40, 50, 3), dtype=np.uint8)

IMAGES = {
    "not an array": ([[[0, 0, 0]]], "image = list"),
    "None": (None, "image = NoneType"),
    "float": (GOOD.astype(np.float32), r"image\.dtype = float32"),
    "int16 tensor": (torch.zeros(40, 50, 3, dtype=torch.int16), r"image\.dtype = torch\.int16"),
    "grey": (GOOD[:, :, 0], r"image\.shape = \(40, 50\)"),
    "planes first": (np.zeros((3, 40, 50), dtype=np.uint8), r"image\.shape = \(3, 40, 50\)"),
    "alpha": (np.zeros((40, 50, 4), dtype=np.uint8), r"image\.shape"),
    "batch": (np.zeros((1, 40, 50, 3), dtype=np.uint8), r"image\.shape"),
    "no rows": (np.zeros((0, 50, 3), dtype=np.uint8), "1 to"),
    "no columns": (np.zeros((40, 0, 3), dtype=np.uint8), "1 to"),
    "every second column": (GOOD[:, ::2], "C-contiguous"),
    "upside down": (GOOD[::-1], "C-contiguous"),
    "transposed": (GOOD.transpose(1, 0, 2), "C-contiguous"),
    "strided tensor": (torch.from_numpy(GOOD)[:, ::2], "C-contiguous"),
    "meta tensor": (torch.zeros(40, 50, 3, dtype=torch.uint8, device="meta"), r"image\.device = meta"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_image(case):
    image, message = IMAGES[case]
    with pytest.raises(ValueError, match=message):
        patchify(image, [Target(28, 28)])


@pytest.mark.parametrize("side", [0, -28, 1, 27, 29, 56.0, "28", None, True, 1 << 30])
def test_target_sides(side):
    with pytest.raises(ValueError, match=r"targets\[1\]\.height"):
        patchify(GOOD, [Target(28, 28), Target(side, 28)])
    with pytest.raises(ValueError, match=r"targets\[0\]\.width"):
        patchify(GOOD, [Target(28, side)])


@pytest.mark.parametrize(
    "box",
    [(0, 0, 0, 40), (0, 0, 51, 40), (0, 0, 50, 41), (-1, 0, 50, 40), (30, 0, 20, 40), (0, 0, 50), (0, 0, 5.5, 4)],
    ids=str,
)
def test_boxes(box):
    with pytest.raises(ValueError, match=r"targets\[0\]\.box"):
        patchify(GOOD, [Target(28, 28, box=box)])


@pytest.mark.parametrize(
    "before",
    [[Step(20, 20)], (Step(9, 9),) * 3, ((20, 20),), (Step(0, 20),), (Step(20, 2.5),), (Step(20, 20, "box"),), None],
    ids=str,
)
def test_steps(before):
    with pytest.raises(ValueError, match=r"targets\[0\]\.before"):
        patchify(GOOD, [Target(28, 28, before=before)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": "nearest"}, "filter = 'nearest'"),
        ({"layout": "rows"}, "layout = 'rows'"),
        ({"dtype": torch.float16}, r"dtype = torch\.float16"),
        ({"mode": "pil14"}, "mode = 'pil14'"),
        ({"patch": 15}, "patch = 15: must be one of 14, 16"),
        ({"patch": 16}, r"targets\[0\]\.height = 28: must be a positive multiple of 32 pixels"),
        ({"num_threads": 0}, "num_threads = 0"),
        ({"num_threads": 2.0}, "num_threads = 2.0"),
        ({"num_threads": 10**6}, "num_threads"),
        ({"mean": (0.5, 0.5)}, "mean = "),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean = "),
        ({"mean": (0.5, 0.5, 1e39)}, "mean = "),
        ({"std": (0.5, 0.0, 0.5)}, "std = "),
        ({"std": (0.5, 1e-60, 0.5)}, "std = "),
        ({"std": (0.5, -1.0, 0.5)}, "std = "),
        ({"impl": "gpu"}, "impl = 'gpu'"),
        ({"device": "meta"}, "device = meta: an image on cpu"),
        ({"device": "gpu"}, "device = 'gpu'"),
    ],
    ids=str,
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        patchify(GOOD, [Target(28, 28)], **options)


OUTPUTS = {
    "too few": ([], "out = 0 tensors"),
    "shape": ([torch.full((4, 588), 7.0)], r"out\[0\]\.shape"),
    "type": ([torch.full((4, 1176), 7.0, dtype=torch.float64)], r"out\[0\]: must be a torch\.float32"),
    "array": ([np.zeros((4, 1176), dtype=np.float32)], r"out\[0\]: must be"),
    "strided": ([torch.full((1176, 4), 7.0).t()], r"out\[0\]\.stride"),
    "elsewhere": ([torch.zeros(4, 1176, device="meta")], r"out\[0\]: must be a torch\.float32 tensor on cpu"),
    "gradient": ([torch.full((4, 1176), 7.0, requires_grad=True)], "requires_grad"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs(case):
    out, message = OUTPUTS[case]
    with pytest.raises(ValueError, match=message):
        patchify(GOOD, [Target(28, 28)], out=out)
    assert all(
        (torch.as_tensor(one) == 7).all() or (torch.as_tensor(one) == 0).all() for one in out if not is_meta(one)
    )


def is_meta(tensor):
    return isinstance(tensor, torch.Tensor) and tensor.is_meta


def test_targets_must_be_targets():
    with pytest.raises(ValueError, match=r"targets\[0\] = \(28, 28\)"):
        patchify(GOOD, [(28, 28)])


def test_nothing_is_written_when_a_later_target_is_wrong():
    out = [torch.full((4, 1176), 7.0), torch.full((4, 1176), 7.0)]
    with pytest.raises(ValueError, match=r"targets\[1\]"):
        patchify(GOOD, [Target(28, 28), Target(30, 28)], out=out)
    assert all((one == 7).all() for one in out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="device = 'cuda'"):
        patchify(GOOD, [Target(28, 28)], device="cuda")
    with pytest.raises(RuntimeError, match="impl = 'triton' is not available"):
        patchify(GOOD, [Target(28, 28)], impl="triton")
