"""token_logprob: log-probabilities of given tokens and the entropies of their distributions, from hidden states.

The scores of all rows never exist together: rows that are masked go first, the others pass in chunks. Gradients reach
hidden states, weight and low-rank factors, each only if it wants them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

from torch import Tensor

from vtengine_kernels.dispatch import select
from vtengine_kernels.token_logprob import chunked, eager, liger, native, ref, triton
from vtengine_kernels.token_logprob.head import BANNED, Head, LowRank, check

Impl = Literal["auto", "triton", "cpu", "torch", "ref", "liger"]

ROWS: dict[str, ModuleType] = {"triton": triton, "cpu": native, "torch": eager, "ref": ref, "liger": liger}
"""What works on a chunk's scores, or on all rows at once."""

WHOLE = (ref, liger)
"""Those that take all rows at once."""

__all__ = ["BANNED", "Head", "Impl", "LowRank", "token_logprob"]


def token_logprob(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    chunk: int = 1024,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """hidden [N, H], targets int64 [N], mask bool [N] -> (logprobs, entropies), float32 [N] each, natural logarithms.

    hidden and head.weight: float32 or bfloat16, on one device (float64: "ref" only, and float64 results). mask: rows
    where it is False cost nothing; their results, and the gradients of their hidden states, are exactly 0, whatever
    they hold. chunk: rows whose scores exist at the same time: memory is O(chunk x V) beside the gradients; the result
    does not depend on it beyond rounding. Sums are float32. NaN or infinite hidden states give their own rows results
    that are not finite. A target among the banned ids has a logprob near -1e30.
    impl: "triton": CUDA; "cpu": the C++ library; "torch": anywhere; "ref": plain torch with all scores at once;
    "liger": bfloat16 on Hopper, liger-kernel's own (coarser, and only by name: see `liger`).
    ValueError: shapes, dtypes, devices or ids that do not fit. RuntimeError: `impl` is not available here.
    """
    check(hidden, head, targets, mask, chunk)
    module = select("token_logprob", impl, ROWS, hidden)
    if mask is None:
        return _run(module, hidden, head, targets, chunk)
    rows = mask.nonzero()[:, 0]
    found = _run(module, hidden.index_select(0, rows), head, targets.index_select(0, rows), chunk)
    logprobs, entropies = (values.new_zeros(len(mask)).index_copy(0, rows, values) for values in found)
    return logprobs, entropies


def _run(module: Any, hidden: Tensor, head: Head, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    if module in WHOLE:
        found: tuple[Tensor, Tensor] = module.token_logprob(hidden, head, targets)
        return found
    return chunked.token_logprob(hidden, head, targets, chunk, module)
