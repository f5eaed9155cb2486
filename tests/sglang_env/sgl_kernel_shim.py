"""Stands in for SGLang's CPU kernel package, which is not on PyPI.

Without AMX, SGLang's CPU engine runs everything in plain torch; it still imports some helpers named *_cpu (speculative
decoding, KV moves) and binds a few operators at import. None of them is on the path of an ordinary request, so they
only have to exist.
"""

import torch as _torch

__version__ = "0.0.0+cpu.shim"


def __getattr__(name):
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def absent(*_, **__):
        raise NotImplementedError(f"sgl_kernel.{name}: SGLang's CPU kernel package is not installed")

    absent.__name__ = name
    return absent


# Bound at module level by models that the Qwen-VL processor imports: the schema is declared, without a kernel.
# Never declare convert_weight_packed: SGLang takes it as a sign of the AMX backend.
_library = _torch.library.Library("sgl_kernel", "FRAGMENT")
for _name in (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_gdn_gating_cpu",
):
    _library.define(_name + "() -> ()")
