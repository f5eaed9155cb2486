"""Which implementation of an op runs: what is available here, what is not and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from vtengine_kernels import library, triton_runtime

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Availability:
    """One implementation of one op. reason: what it runs on, or why it is missing; cost: what is slower where it is."""

    op: str
    impl: str
    available: bool
    reason: str
    cost: str = ""


def report() -> list[Availability]:
    """Every implementation of every op, the preferred one of an op first; what no "auto" takes stands last."""
    return [
        _native(
            "patchify", "images are prepared 10 to 100 times slower, with numpy, and need several times the memory"
        ),
        Availability("patchify", "ref", True, "numpy, one thread"),
        _triton("patchify"),  # for images that are brought to a GPU, where it is the only one
        _flash_attn3("prefix_attention"),
        _native(
            "prefix_attention", "decoding copies and pads its keys and values: 1.5 to 2 times slower at 64 requests"
        ),
        _triton("prefix_attention"),
        Availability("prefix_attention", "ref", True, "torch"),
        _flashinfer("prefix_attention", "paged attention"),
        _flash_attn3("paged_prefill"),
        _triton("paged_prefill"),
        Availability("paged_prefill", "ref", True, "torch; the engine gathers pages instead"),
        _flashinfer("paged_prefill", "paged attention"),
        _triton("kv_store"),
        Availability("kv_store", "torch", True, "torch, two indexed copies"),
        Availability("kv_store", "ref", True, "torch, one token at a time"),
        _flash("shared_prefix_attention"),
        Availability("shared_prefix_attention", "tiles", True, "torch, matrix products over tiles"),
        Availability("shared_prefix_attention", "ref", True, "torch"),
        _few_rows(),
        Availability("few_rows", "torch", True, "torch; the products of any number of rows"),
        _triton("layer_ops"),
        _native("layer_ops", "norms, gates and rotary embeddings of inference make three to five passes over memory"),
        Availability("layer_ops", "torch", True, "torch"),
        _flashinfer("layer_ops", "the gate in inference"),
        _triton("visual_scatter"),
        Availability("visual_scatter", "ref", True, "torch"),
        _triton("token_sample"),
        _native(
            "token_sample",
            "sampling takes 2 to 100 times as long: torch sorts the scores where top-k, top-p or min-p is set",
        ),
        Availability("token_sample", "torch", True, "torch"),
        Availability("token_sample", "ref", True, "torch, in float64"),
        *_rows("token_logprob"),
        *_rows("grpo_loss"),
    ]


def select(op: str, impl: str, modules: Mapping[str, ModuleType], like: Tensor) -> ModuleType:
    """The module that is to work on tensors like this one; "auto": the first that is here and takes them.

    Each of `modules` says with missing() why it is not here (or None), and with takes(tensor) what it works on.
    ValueError: no such impl, or it takes no such tensors. RuntimeError: it is not available here.
    """
    if impl == "auto":
        return next(module for module in modules.values() if module.takes(like) and module.missing() is None)
    if impl not in modules:
        raise ValueError(f"{op}: impl = {impl!r}: must be one of auto, {', '.join(modules)}")
    module = modules[impl]
    reason = module.missing()
    if reason is not None:
        raise RuntimeError(f"{op}: impl = {impl!r} is not available: {reason}")
    if not module.takes(like):
        raise ValueError(f"{op}: impl = {impl!r} takes no {like.dtype} on {like.device} of shape {list(like.shape)}")
    return module


def _few_rows() -> Availability:
    from vtengine_kernels import few_rows

    reason = few_rows.missing()
    return Availability("few_rows", "cpu", reason is None, reason or "C++ library, AVX-512 BF16: bfloat16 decoding")


def _flash(op: str) -> Availability:
    from vtengine_kernels.shared_prefix_attention import flash

    reason = flash.missing()
    return Availability(
        op, "flash", reason is None, reason or "torch's variable-length flash kernels, float16, bfloat16"
    )


def _flash_attn3(op: str) -> Availability:
    from vtengine_kernels import flash_attn3

    reason = flash_attn3.missing()
    return Availability(op, "flash", reason is None, reason or "flash-attn 3, float16, bfloat16")


def _flashinfer(op: str, does: str) -> Availability:
    from vtengine_kernels import flashinfer_paged

    reason = flashinfer_paged.missing()
    return Availability(
        op, "flashinfer", reason is None, reason or f"FlashInfer, {does}, float16, bfloat16; only by name"
    )


def _liger(op: str) -> Availability:
    from vtengine_kernels.token_logprob import liger

    reason = liger.missing()
    return Availability(op, "liger", reason is None, reason or "Liger's kernels for Hopper, bfloat16; only by name")


def _rows(op: str) -> list[Availability]:
    """An op on scores over a vocabulary: the same implementations for each."""
    return [
        _triton(op),
        _native(op, "more passes over the scores in training, which shows where the head is small"),
        Availability(op, "torch", True, "torch, in chunks"),
        Availability(op, "ref", True, "torch, all scores at once"),
        _liger(op),
    ]


def _triton(op: str) -> Availability:
    reason = triton_runtime.missing()
    if reason is not None:
        return Availability(op, "triton", False, reason)
    if triton_runtime.interpreted():
        return Availability(op, "triton", True, "Triton's interpreter, for tests")
    import torch

    if not torch.cuda.is_available():
        return Availability(op, "triton", False, "no CUDA device here")
    return Availability(op, "triton", True, f"Triton on {torch.cuda.get_device_name()}")


def _native(op: str, cost: str) -> Availability:
    try:
        library.load()
    except library.LibraryMissing as missing:
        return Availability(op, "cpu", False, str(missing), cost)
    sets = library.isas()
    slower = (
        "" if sets[0] == "avx512" else "2 to 4 times slower than with AVX-512 VBMI and VNNI, which this machine lacks"
    )
    return Availability(op, "cpu", True, f"C++ library, {sets[0]} (also {', '.join(sets[1:])})", slower)
