"""Several views from one call, boxes, and the memory that is written."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from vtengine_kernels.patchify import Target, patchify

GUARD = 64  # values before and after an output that must stay as they were
POISON = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def guarded(shape: tuple[int, int], dtype: torch.dtype, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(an output full of NaN at an odd address, the memory around it)."""
    size = shape[0] * shape[1]
    memory = torch.full((size + 2 * GUARD + shift,), float("nan"), dtype=dtype)
    return memory[GUARD + shift : GUARD + shift + size].view(shape), memory


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_views_of_one_call_equal_single_calls(run, picture, threads):
    image = picture(240, 330)
    targets = [Target(112, 168), Target(224, 336), Target(28, 28), Target(140, 56, box=(10, 20, 300, 77))]
    together = run(image, targets, num_threads=threads)
    for target, rows in zip(targets, together, strict=True):
        assert torch.equal(rows, run(image, [target])[0])


def test_no_targets(run, picture):
    assert run(picture(30, 30), []) == []


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (5, 7, 61, 63), (49, 0, 50, 40), (0, 39, 50, 40), (3, 3, 47, 37)])
def test_a_box_is_a_crop(run, picture, box):
    image = picture(64, 64) if box[2] > 50 else picture(40, 50)
    left, top, right, bottom = box
    cut = np.ascontiguousarray(image[top:bottom, left:right])
    for kind in ("bicubic", "lanczos"):
        boxed = run(image, [Target(56, 84, box=box)], filter=kind)[0]
        assert torch.equal(boxed, run(cut, [Target(56, 84)], filter=kind)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["full", "compact"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("patch", [14, 16])
def test_writes_its_rows_and_nothing_else(compiled, picture, dtype, layout, stream, patch):
    image, target = picture(90, 100), Target(6 * patch, 8 * patch)
    columns = (6 if layout == "full" else 3) * patch**2
    options = {"layout": layout, "dtype": dtype, "patch": patch}
    expected = compiled(image, [target], **options)[0]
    for shift in (0, 1, 2, 5, 16, 31):
        for threads in (1, 3):
            out, memory = guarded((48, columns), dtype, shift)
            got = compiled(image, [target], stream, num_threads=threads, out=[out], **options)[0]
            assert got is out
            assert torch.equal(out, expected)
            assert int(memory.isnan().sum()) == memory.numel() - out.numel()


def test_reads_only_the_image(compiled):
    """Pixels at the end of a page: reading past them would end the process."""
    import mmap

    for height, width in ((1, 1), (7, 11), (33, 65), (64, 43)):
        size = height * width * 3
        pages = mmap.mmap(-1, (size // mmap.PAGESIZE + 2) * mmap.PAGESIZE)
        end = (size // mmap.PAGESIZE + 1) * mmap.PAGESIZE
        if not protect_from(pages, end):
            pytest.skip("no mprotect here")
        image = np.frombuffer(pages, dtype=np.uint8, count=size, offset=end - size).reshape(height, width, 3)
        for target in (Target(28, 28), Target(56, 28), Target(28, 84)):
            for kind in ("bicubic", "lanczos"):
                compiled(image, [target], filter=kind)


def protect_from(pages, offset: int) -> bool:
    """Makes the page at `offset` unreadable."""
    import ctypes
    import mmap

    mprotect = getattr(ctypes.CDLL(None), "mprotect", None)
    if mprotect is None:
        return False
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages, offset))
    return mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0


def test_read_only_image_and_tensor(run, picture):
    image = picture(50, 60)
    expected = run(image, [Target(56, 56)])[0]
    image.flags.writeable = False
    assert torch.equal(run(image, [Target(56, 56)])[0], expected)
    assert torch.equal(run(torch.from_numpy(image.copy()), [Target(56, 56)])[0], expected)


def test_an_image_at_any_address(run, picture):
    image = picture(33, 47)
    memory = np.zeros(image.size + 64, dtype=np.uint8)
    expected = run(image, [Target(28, 56)])[0]
    for shift in (1, 3, 17, 63):
        moved = memory[shift : shift + image.size].reshape(image.shape)
        moved[:] = image
        assert torch.equal(run(moved, [Target(28, 56)])[0], expected)


def test_many_callers_at_once(picture):
    image, targets = picture(300, 400), [Target(140, 196), Target(308, 392)]
    expected = patchify(image, targets)
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda i: patchify(image, targets, num_threads=1 + i % 3), range(60)))
    assert all(torch.equal(rows, want) for made in results for rows, want in zip(made, expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_threads_work_after_a_fork(picture):
    image, target = picture(200, 200), Target(196, 196)
    expected = patchify(image, [target], num_threads=2)[0]
    child = os.fork()
    if child == 0:
        ok = torch.equal(patchify(image, [target], num_threads=2)[0], expected)
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.maxsize < 2**32, reason="64-bit only")
def test_source_of_more_than_2_31_bytes(picture):
    """Offsets are 64 bits wide: the last columns and rows of a 2.4 GB image are the right ones."""
    image = np.zeros((20000, 40000, 3), dtype=np.uint8)
    image[-56:, -56:] = picture(56, 56)
    box = (40000 - 56, 20000 - 56, 40000, 20000)
    rows = patchify(image, [Target(56, 56, box=box)])[0]
    assert torch.equal(rows, patchify(np.ascontiguousarray(image[-56:, -56:]), [Target(56, 56)])[0])
