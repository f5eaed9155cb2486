"""What Triton kernels need, as the assembler that comes with Triton says; no GPU takes part.

Each of SPECS is compiled ahead of time for sm_80, sm_90 and sm_100: registers per thread, bytes spilled, shared
memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtengine_kernels.grpo_loss import triton as grpo_loss
from vtengine_kernels.prefix_attention import split
from vtengine_kernels.prefix_attention import triton as prefix_attention
from vtengine_kernels.shared_prefix_attention import merge
from vtengine_kernels.token_logprob import triton as token_logprob
from vtengine_kernels.visual_scatter import triton as visual_scatter

from tests.kernels.ahead_of_time import ARCHITECTURES, Needs, compiled

__all__ = ["ARCHITECTURES", "SPECS", "TABLES", "TESTS", "Spec", "needs", "run"]

TESTS = ["tests/kernels/test_grpo_loss_triton.py"]
TABLES = {
    "triton-resources": {
        "columns": {
            "op": "Op",
            "kernel": "Kernel",
            "variant": "Variant",
            "target": "Target",
            "registers": "Registers",
            "spill_bytes": "Spilled bytes",
            "shared_bytes": "Shared memory, bytes",
        }
    }
}


@dataclass(frozen=True)
class Spec:
    """One variant of a kernel. types: of the arguments that are neither "i32" nor constants."""

    op: str
    module: Any
    kernel: str
    variant: str
    types: Mapping[str, str] = field(hash=False)
    constants: Mapping[str, Any] = field(hash=False)
    num_warps: int = 4

    @property
    def label(self) -> str:
        return f"{self.op}-{self.kernel}-{self.variant}".replace(" ", "-")


def _scores(dtype: str, *floats: str, **constants: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants of a kernel on rows of scores."""
    columns = ("advantages", "weights", "old", "rollout", "ref", "logprobs", "entropies", "log_sums")
    pointers = (*columns, "to_logprob", "to_entropy")
    types = {"scores_ptr": f"*{dtype}", "targets_ptr": "*i64", **{f"{name}_ptr": "*fp32" for name in pointers}}
    types |= dict.fromkeys(("cold", "cap", *floats), "fp32")
    return types, {"CAPPED": False, "BLOCK": token_logprob.MAX_BLOCK, **constants}


def _loss(dtype: str, variant: str, **changes: Any) -> Spec:
    plain = {"POLICY": 0, "DUAL": False, "KL": 0, "CORRECTED": False, "HAS_OLD": True}
    numbers = ("clip_low", "clip_high", "dual_clip", "kl_coef", "entropy_coef", "importance_cap", "most")
    found = _scores(dtype, *numbers, **{**plain, **changes})
    return Spec(
        "grpo_loss", grpo_loss, "_loss_gradients_kernel", f"{variant}, {dtype}", *found, token_logprob.NUM_WARPS
    )


def _attention(dtype: str, group: int, size: int) -> Spec:
    types = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr", "out_ptr"), f"*{dtype}")
    types |= {"tables_ptr": "*i64", "lengths_ptr": "*i64", "scale": "fp32"}
    constants = {"GROUP": group, "SIZE": size, "PAGE": 16, **prefix_attention.blocks(group, size)}
    variant = f"{group} heads of {size}, {dtype}"
    return Spec("prefix_attention", prefix_attention, "_prefix_attention_fwd_kernel", variant, types, constants)


def _split(dtype: str, group: int, size: int) -> Spec:
    types = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("tables_ptr", "lengths_ptr", "items_ptr"), "*i64")
    types |= dict.fromkeys(("parts_ptr", "lse_ptr"), "*fp32") | {"scale": "fp32"}
    constants = {"GROUP": group, "SIZE": size, "PAGE": 16, "SPAN": split.SPAN, "ROWS": split.ROWS}
    constants |= split.blocks(group, size, itemsize=2)
    return Spec("prefix_attention", split, "_span_kernel", f"{group} heads of {size}, {dtype}", types, constants)


def _merge(dtype: str, heads: int, size: int) -> Spec:
    types = dict.fromkeys(("out_ptr", "part_ptr"), f"*{dtype}") | dict.fromkeys(("lse_ptr", "part_lse_ptr"), "*fp32")
    constants = {"HEADS": heads, "SIZE": size, "INDEXED": True, **merge.blocks(heads, size)}
    variant = f"{heads} heads of {size}, {dtype}"
    return Spec("shared_prefix_attention", merge, "_merge_kernel", variant, types | {"rows_ptr": "*i64"}, constants)


SPECS = (
    *(
        Spec("token_logprob", token_logprob, kernel, variant, *_scores(dtype, CAPPED=capped), token_logprob.NUM_WARPS)
        for kernel in ("_statistics_kernel", "_gradients_kernel")
        for variant, dtype, capped in (("bf16", "bf16", False), ("capped, fp32", "fp32", True))
    ),
    _loss("bf16", "clip"),
    _loss("bf16", "everything", DUAL=True, KL=3, CORRECTED=True, CAPPED=True),
    _loss("fp32", "clipped-weight", POLICY=1, KL=2),
    _attention("bf16", 7, 128),
    _split("bf16", 7, 128),
    _merge("bf16", 28, 128),
    Spec(
        "visual_scatter",
        visual_scatter,
        "_segment_sum_kernel",
        "bf16",
        {"grad_ptr": "*bf16", "out_ptr": "*bf16", "order_ptr": "*i64", "starts_ptr": "*i64"},
        {"BLOCK_H": visual_scatter.BLOCK},
    ),
)


def needs(spec: Spec, arch: int, folder: Path) -> Needs:
    return compiled(getattr(spec.module, spec.kernel), spec.types, spec.constants, arch, folder, spec.num_warps)


def run(context: Any) -> list[dict[str, Any]]:
    rows = []
    for spec in SPECS[:2] if context.quick else SPECS:
        for arch in ARCHITECTURES:
            with tempfile.TemporaryDirectory() as folder:
                found = needs(spec, arch, Path(folder))
            rows.append(
                {
                    "op": spec.op,
                    "kernel": spec.kernel.strip("_"),
                    "variant": spec.variant,
                    "target": f"sm_{arch}",
                    "registers": found.registers,
                    "spill_bytes": found.spill_bytes,
                    "shared_bytes": found.shared_bytes,
                }
            )
    return rows
