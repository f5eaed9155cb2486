"""What Triton kernels need, as the assembler that comes with Triton says; no GPU takes part.

Each of SPECS is compiled ahead of time for sm_80, sm_90 and sm_100, as a launch in the engine or the trainer does it
(pointers and strides that are multiples of 16 are known to be): registers per thread, bytes spilled, shared memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtengine_kernels.grpo_loss import triton as grpo_loss
from vtengine_kernels.kv_store import triton as kv_store
from vtengine_kernels.layer_ops import triton as layer_ops
from vtengine_kernels.paged_prefill import triton as paged_prefill
from vtengine_kernels.patchify import triton as patchify
from vtengine_kernels.prefix_attention import split
from vtengine_kernels.shared_prefix_attention import merge
from vtengine_kernels.token_logprob import triton as token_logprob
from vtengine_kernels.token_sample import levels, threshold
from vtengine_kernels.token_sample import triton as token_sample
from vtengine_kernels.visual_scatter import triton as visual_scatter

from tests.kernels.ahead_of_time import ARCHITECTURES, Needs, compiled

__all__ = ["ARCHITECTURES", "SPECS", "TABLES", "TESTS", "Spec", "needs", "run"]

TESTS = [
    "tests/kernels/test_grpo_loss_triton.py",
    "tests/kernels/test_token_sample.py",
    "tests/kernels/test_layer_ops_triton.py",
]
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


STRIDES = ("q_stride", "out_stride", "page_stride", "token_stride")
HEAD = ("row_stride", "into_stride", "vocabulary")  # 151,936 and 152,064 are multiples of 16


@dataclass(frozen=True)
class Spec:
    """One variant of a kernel. types: of the arguments that are neither "i32" nor constants. even: integers that are
    multiples of 16 with the sizes of Qwen2.5-VL."""

    op: str
    module: Any
    kernel: str
    variant: str
    types: Mapping[str, str] = field(hash=False)
    constants: Mapping[str, Any] | Callable[[int], Mapping[str, Any]] = field(hash=False)  # of the target
    num_warps: int = 4
    even: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.op}-{self.kernel}-{self.variant}".replace(" ", "-")


def _scores(dtype: str | None, *floats: str, **constants: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants of a kernel on rows of scores. dtype: of their gradients, None where it makes none."""
    columns = ("advantages", "weights", "old", "rollout", "ref", "logprobs", "entropies", "log_sums")
    pointers = (*columns, "to_logprob", "to_entropy")
    types = {"targets_ptr": "*i64", **{f"{name}_ptr": "*fp32" for name in ("scores", *pointers)}}
    types |= dict.fromkeys(("cold", "cap", *floats), "fp32")
    if dtype is not None:
        types["into_ptr"], constants["NARROW"] = f"*{dtype}", dtype != "fp32"
    return types, {"CAPPED": False, "BLOCK": token_logprob.MAX_BLOCK, **constants}


def _loss(dtype: str, variant: str, **changes: Any) -> Spec:
    plain = {"POLICY": 0, "DUAL": False, "KL": 0, "CORRECTED": False, "HAS_OLD": True}
    numbers = ("clip_low", "clip_high", "dual_clip", "kl_coef", "entropy_coef", "importance_cap", "most")
    found = _scores(dtype, *numbers, **{**plain, **changes})
    return Spec(
        "grpo_loss", grpo_loss, "_loss_gradients_kernel", f"{variant}, {dtype}", *found, token_logprob.NUM_WARPS, HEAD
    )


def _spans(dtype: str, rows: int, group: int, size: int) -> Spec:
    """rows: that share a span."""
    types = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("tables_ptr", "lengths_ptr", "items_ptr"), "*i64")
    types |= dict.fromkeys(("parts_ptr", "lse_ptr"), "*fp32") | {"scale_log2": "fp32"}
    fixed: dict[str, Any] = {"GROUP": group, "SIZE": size, "PAGE": 16, "SPAN": split.SPAN, "ROWS": rows}
    if rows == 1:
        del types["items_ptr"]
        fixed["items_ptr"] = None

    def constants(arch: int) -> dict[str, Any]:
        return fixed | split.blocks(rows, group, size, 2, arch // 10)

    variant = f"{group} heads of {size}, {dtype}, {'alone' if rows == 1 else f'{rows} siblings'}"
    return Spec("prefix_attention", split, "_span_kernel", variant, types, constants, even=STRIDES)


def _norm(dtype: str, size: int, added: bool) -> Spec:
    types = {f"{name}_ptr": f"*{dtype}" for name in ("x", "y", "weight", "sum", "out")} | {"eps": "fp32"}
    constants: dict[str, Any] = layer_ops.norm_blocks(size)
    warps = constants.pop("num_warps")
    if not added:
        del types["y_ptr"]
        constants["y_ptr"] = None
    variant = f"{'sum' if added else 'alone'}, {size}, {dtype}"
    even = ("size", "x_stride", "y_stride")
    return Spec("layer_ops", layer_ops, "_rms_norm_kernel", variant, types, constants, warps, even)


def _merge_spans(dtype: str, size: int) -> Spec:
    types = {"parts_ptr": "*fp32", "lse_ptr": "*fp32", "lengths_ptr": "*i64", "out_ptr": f"*{dtype}"}
    constants = {"SIZE": size, "SPAN": split.SPAN, **split.merge_blocks(size)}
    return Spec("prefix_attention", split, "_merge_spans_kernel", f"heads of {size}, {dtype}", types, constants, 1)


def _rotary(dtype: str, heads: int, size: int) -> Spec:
    types = {"x_ptr": f"*{dtype}", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": f"*{dtype}"}
    constants = layer_ops.blocks(heads, size)
    variant = f"{heads} heads of {size}, {dtype}"
    even = ("row_stride", "head_stride", "heads")
    return Spec("layer_ops", layer_ops, "_rotary_kernel", variant, types, constants, even=even)


def _prefill(dtype: str, group: int, size: int) -> Spec:
    types = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr", "out_ptr"), f"*{dtype}") | {"scale_log2": "fp32"}
    types |= dict.fromkeys(("tables_ptr", "lengths_ptr", "offsets_ptr"), "*i64")

    def constants(arch: int) -> dict[str, int]:
        return {"GROUP": group, "SIZE": size, "PAGE": 16, **paged_prefill.blocks(group, size, 2, arch // 10)}

    warps = paged_prefill.warps(constants(90)["BLOCK_M"])
    variant = f"{group} heads of {size}, {dtype}"
    return Spec("paged_prefill", paged_prefill, "_paged_prefill_kernel", variant, types, constants, warps, STRIDES)


def _sample(kernel: str, variant: str) -> Spec:
    """Of "greedy", "a draw" and "truncated"."""
    others = {"draws": "fp64", "sum": "fp64", "where": "i32", "last": "i32"}
    others |= dict.fromkeys(("ids", "top_k", "totals"), "i64")
    module = next(module for module in (token_sample, levels, threshold) if hasattr(module, kernel))
    function = getattr(module, kernel)
    names = [name.removesuffix("_ptr") for name in function.arg_names if name.endswith("_ptr")]
    absent = {"greedy": ("temperature", "draws", "least", "last"), "a draw": ("least", "last"), "truncated": ()}[
        variant
    ]
    types = {f"{name}_ptr": f"*{others.get(name, 'fp32')}" for name in names if name not in absent}
    sizes = {"BLOCK": token_sample.MAX_BLOCK, "PARTS": 64}
    sizes |= {name: getattr(threshold, name) for name in ("LEVELS", "EVEN", "SAMPLE", "CAPACITY", "CHUNK")}
    known: dict[str, Any] = {name: value for name, value in sizes.items() if name in function.arg_names}
    known |= {f"{name}_ptr": None for name in names if name in absent}
    warps = {"_threshold_kernel": threshold.SEARCH_WARPS, "levels_kernel": 4}.get(kernel, token_sample.NUM_WARPS)
    return Spec("token_sample", module, kernel, variant, types, known, warps, HEAD)


def _patchify(kernel: str, variant: str, blocks: Mapping[str, Any], to: str = "") -> Spec:
    """Of five taps, as where the size hardly changes."""
    out, table = ("*i16" if variant == "to patches" else "*u8"), {"table_ptr": "*fp32"}
    types = {"source_ptr": "*u8", "out_ptr": out, "first_ptr": "*i32", "weight_ptr": "*i32"}
    constants = {"TAPS": 5, "ONE_ROUND": True, "BITS": 22, **blocks}
    even: tuple[str, ...] = ("columns", "source_row", "out_row")
    if kernel != "_down_kernel":
        types, even = types | table, ()
        constants |= {"COMPUTED": True, "FRAMES": 1, "PATCH": 14}
    if to:
        constants["TO"] = to
    warps = constants.pop("num_warps")
    return Spec("patchify", patchify, kernel, variant, types, constants, warps, even)


def _merge(dtype: str, heads: int, size: int) -> Spec:
    types = dict.fromkeys(("out_ptr", "part_ptr"), f"*{dtype}") | dict.fromkeys(("lse_ptr", "part_lse_ptr"), "*fp32")
    constants = {"HEADS": heads, "SIZE": size, "INDEXED": True, **merge.blocks(heads, size)}
    variant = f"{heads} heads of {size}, {dtype}"
    return Spec("shared_prefix_attention", merge, "_merge_kernel", variant, types | {"rows_ptr": "*i64"}, constants)


THRESHOLD = ("levels_kernel", "totals_kernel", "_gather_kernel", "_threshold_kernel")

SPECS = (
    *(
        Spec(
            "token_logprob",
            token_logprob,
            kernel,
            variant,
            *_scores(dtype, CAPPED=capped),
            token_logprob.NUM_WARPS,
            HEAD,
        )
        for kernel, variant, dtype, capped in (
            ("_statistics_kernel", "plain", None, False),
            ("_statistics_kernel", "capped", None, True),
            ("_gradients_kernel", "bf16", "bf16", False),
            ("_gradients_kernel", "capped, fp32", "fp32", True),
        )
    ),
    _loss("bf16", "clip"),
    _loss("bf16", "everything", DUAL=True, KL=3, CORRECTED=True, CAPPED=True),
    _loss("fp32", "clipped-weight", POLICY=1, KL=2),
    _patchify("_across_kernel", "to units", patchify.ACROSS, "units"),
    _patchify("_across_kernel", "to patches", patchify.ACROSS, "patches"),
    _patchify("_down_kernel", "to pixels", patchify.DOWN),
    _patchify("_down_patches_kernel", "to patches", patchify.DOWN_PATCHES),
    Spec(
        "kv_store",
        kv_store,
        "_kv_store_kernel",
        "4 heads of 128, bf16",
        dict.fromkeys(("k_ptr", "v_ptr", "keys_ptr", "values_ptr"), "*bf16") | {"slots_ptr": "*i64"},
        {"WIDTH": 512, "BLOCK_W": kv_store.block(512)},
        even=("k_stride", "v_stride"),
    ),
    _norm("bf16", 3584, False),
    _norm("bf16", 3584, True),
    _rotary("bf16", 32, 128),
    _rotary("bf16", 32, 80),
    Spec(
        "layer_ops",
        layer_ops,
        "_swiglu_kernel",
        "bf16",
        {"x_ptr": "*bf16", "out_ptr": "*bf16"},
        {"BLOCK": layer_ops.GATE_BLOCK},
        even=("row_stride", "size", "columns"),
    ),
    _prefill("bf16", 7, 128),
    _spans("bf16", 1, 7, 128),
    _spans("bf16", split.ROWS, 7, 128),
    _merge_spans("bf16", 128),
    _merge("bf16", 28, 128),
    *(
        _sample(kernel, variant)
        for kernel in ("_blocks_kernel", "_pick_kernel")
        for variant in ("greedy", "a draw", "truncated")
    ),
    *(_sample(kernel, "truncated") for kernel in THRESHOLD),
    Spec(
        "visual_scatter",
        visual_scatter,
        "_segment_sum_kernel",
        "bf16",
        {"grad_ptr": "*bf16", "out_ptr": "*bf16", "order_ptr": "*i64", "starts_ptr": "*i64"},
        {"BLOCK_H": visual_scatter.BLOCK},
        even=("columns",),
    ),
)


def needs(spec: Spec, arch: int, folder: Path) -> Needs:
    kernel = getattr(spec.module, spec.kernel)
    constants = spec.constants(arch) if callable(spec.constants) else spec.constants
    return compiled(kernel, spec.types, constants, arch, folder, spec.num_warps, spec.even)


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
