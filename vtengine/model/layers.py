"""Parts shared by the vision tower and the language model: norm, feed-forward, rotary embedding."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vtengine_kernels import layer_ops

from vtengine.model.linear import Linear, linear

PIECE_BYTES = 16


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the mean square is taken in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_ops.rms_norm(x, self.weight, self.eps)

    def added(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(x + y, the norm of it)."""
        if y.dtype != x.dtype:  # under torch.autocast products have 16 bits, and what they are added to has not
            x = x + y
            return x, self(x)
        return layer_ops.add_rms_norm(x, y, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix: gate's rows first."""

    padding = 0
    """Zeros behind each row of down's memory, see store_aligned."""

    def __init__(self, size: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_up = Linear(size, 2 * inner, bias=bias)
        self.down = Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.gate_up(x), self.down.weight
        lacking = _to_whole_pieces(weight) if type(self.down) is Linear else 0  # an adapter's has products of its own
        if not lacking:
            return self.down(layer_ops.swiglu(x))
        columns = weight.shape[1] + lacking
        if not torch.is_inference_mode_enabled():
            return linear(F.pad(layer_ops.swiglu(x), (0, lacking)), F.pad(weight, (0, lacking)), self.down.bias)
        stored = self.has_behind(lacking)
        whole = weight.as_strided((len(weight), columns), (columns, 1)) if stored else F.pad(weight, (0, lacking))
        return linear(layer_ops.swiglu(x, columns=columns), whole, self.down.bias)

    def has_behind(self, zeros: int) -> bool:
        """Whether so many lie behind each row of down."""
        weight = self.down.weight
        return self.padding == zeros and weight.stride() == (weight.shape[1] + zeros, 1)


def store_aligned(model: nn.Module) -> None:
    """Rows of SwiGLU's last matrix get zeros behind them where they end between two pieces of 16 bytes on CUDA.

    cuBLAS has its fast tiles for rows of such pieces only; in Qwen2.5-VL's tower they have 6840 bytes. Values, shapes
    and names stay, and weights can be copied in and saved as before. For models that are only read; in others the zeros
    are put behind a copy for every product. A model that is stored so stays where it is: graphs may hold its addresses.
    """
    for module in model.modules():
        if isinstance(module, SwiGLU) and (padding := _to_whole_pieces(module.down.weight)):
            weight = module.down.weight
            if not module.has_behind(padding):
                weight.data = F.pad(weight.data, (0, padding))[:, : weight.shape[1]]
                module.padding = padding


def _to_whole_pieces(weight: Tensor) -> int:
    """How many numbers a row lacks; 0 also where nothing asks for whole pieces."""
    return -weight.shape[1] % (PIECE_BYTES // weight.element_size()) if weight.is_cuda else 0


@functools.cache  # without end: CUDA graphs hold the addresses
@torch.inference_mode(False)
def inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """float32 [dim / 2]: theta ** (-2i / dim)."""
    # Always computed on the CPU: the rounding of pow differs between devices, and angles multiply it by the position.
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return (1.0 / theta**steps).to(device)


def rotary_tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """angles float32 [N, D/2] -> (cos, signed sin), each float32 [N, 1, D], as `layer_ops.rotary` takes them."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)
