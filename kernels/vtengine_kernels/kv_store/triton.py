"""The Triton implementation: one program per token moves its keys and its values."""

from __future__ import annotations

from torch import Tensor

from vtengine_kernels.triton_runtime import interpreted, launch, missing

if missing() is None:
    import triton
    import triton.language as tl

    # Suffix: W numbers of a token (all key heads).
    @triton.jit
    def _kv_store_kernel(
        k_ptr, v_ptr, keys_ptr, values_ptr, slots_ptr, k_stride, v_stride, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr
    ):
        token = tl.program_id(0).to(tl.int64)
        w_W = tl.arange(0, BLOCK_W)
        real_W = w_W < WIDTH
        k_W = tl.load(k_ptr + token * k_stride + w_W, mask=real_W)
        v_W = tl.load(v_ptr + token * v_stride + w_W, mask=real_W)
        at = tl.load(slots_ptr + token) * WIDTH
        tl.store(keys_ptr + at + w_W, k_W, mask=real_W)
        tl.store(values_ptr + at + w_W, v_W, mask=real_W)


def takes(keys: Tensor) -> bool:
    return keys.is_cuda or interpreted()


def block(width: int) -> int:
    return 1 << max(0, width - 1).bit_length()


def kv_store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Contract: the package's docstring."""
    k, v = _rows(k), _rows(v)
    width = k.shape[1] * k.shape[2]
    if len(k) and width:
        strides = (k.stride(0), v.stride(0))
        tensors = (k, v, keys, values, slots.contiguous())
        launch(_kv_store_kernel, (len(k),), *tensors, *strides, WIDTH=width, BLOCK_W=block(width))


def _rows(x: Tensor) -> Tensor:
    """The numbers of a token side by side."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
