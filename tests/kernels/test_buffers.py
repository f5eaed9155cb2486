"""Memory that is used again: never while anyone can still see it, never more than the limit."""

from __future__ import annotations

import gc
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from vtengine_kernels.buffers import ALIGNMENT, SMALLEST, BufferPool, size_class

BIG = (512, 1176)  # 2.4 MB in float32


def test_memory_comes_back_and_is_used_again():
    pool = BufferPool(1 << 30)
    first = pool.empty(BIG, torch.float32)
    address = first.data_ptr()
    assert address % ALIGNMENT == 0 and first.shape == BIG and first.is_contiguous()
    assert pool.free_bytes == 0
    del first
    assert pool.free_bytes >= BIG[0] * BIG[1] * 4
    assert pool.empty(BIG, torch.bfloat16).data_ptr() != address  # another size, another block
    assert pool.empty(BIG, torch.float32).data_ptr() == address


@pytest.mark.parametrize(
    "keep",
    [
        lambda t: t[5:7],
        lambda t: t.view(-1)[-1:],
        lambda t: t.numpy(),
        lambda t: t.detach(),
        lambda t: memoryview(t.numpy()),
        lambda t: t.untyped_storage(),
    ],
)
def test_any_view_keeps_the_memory(keep):
    pool = BufferPool(1 << 30)
    tensor = pool.empty(BIG, torch.float32)
    kept = keep(tensor)
    del tensor
    gc.collect()
    assert pool.free_bytes == 0
    del kept
    gc.collect()
    assert pool.free_bytes > 0


def test_small_tensors_are_not_pooled():
    pool = BufferPool(1 << 30)
    tensor = pool.empty((4, 1176), torch.float32)
    del tensor
    assert pool.free_bytes == 0


def test_the_limit_holds_and_the_oldest_go():
    pool = BufferPool(6 << 20)
    tensors = [pool.empty(BIG, torch.float32) for _ in range(4)]
    last = tensors[-1].data_ptr()
    while tensors:
        tensors.pop(0)
        assert pool.free_bytes <= 6 << 20
    assert pool.empty(BIG, torch.float32).data_ptr() == last
    pool.release()
    assert pool.free_bytes == 0


def test_no_pool_at_all():
    pool = BufferPool(0)
    tensor = pool.empty(BIG, torch.float32)
    del tensor
    assert pool.free_bytes == 0
    with pytest.raises(ValueError, match="limit_bytes = -1"):
        BufferPool(-1)


def test_threads_never_share_memory():
    pool = BufferPool(32 << 20)

    def use(seed: int) -> bool:
        rng = random.Random(seed)
        held: list[tuple[int, torch.Tensor]] = []
        for step in range(40):
            rows = rng.choice([256, 300, 512])
            tensor = pool.empty((rows, 1176), torch.float32).fill_(100 * seed + step)
            held.append((100 * seed + step, tensor))
            if len(held) > 3:
                number, old = held.pop(rng.randrange(4))
                if not bool((old == number).all()):
                    return False
        return True

    with ThreadPoolExecutor(4) as workers:
        assert all(workers.map(use, range(4)))
    assert pool.free_bytes <= 32 << 20


def test_tensors_in_cycles_come_back_in_a_collection():
    pool = BufferPool(1 << 30)
    for _ in range(50):
        cycle: list[object] = [pool.empty(BIG, torch.float32)]
        cycle.append(cycle)
    del cycle
    gc.collect()
    assert pool.free_bytes > 0


def test_size_classes():
    for size in [SMALLEST, SMALLEST + 1, 3_000_000, 302_000_000, 1 << 33]:
        assert size <= size_class(size) <= size * 1.13
