"""layer_ops: the C++ implementation errs no more than torch does, on any size, view and number of threads."""

from __future__ import annotations

import pytest
import torch
from vtengine_kernels import layer_ops
from vtengine_kernels.layer_ops import native, plain

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no C++ library: {native.missing()}")

DTYPES = (torch.float32, torch.bfloat16)


def numbers(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def tables(rows, size):
    angles = numbers(rows, 1, size // 2, seed=3, scale=20.0)
    return torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)


def cases(rows, size):
    """(op, its float32 arguments): every op on `rows` rows of about `size` numbers."""
    size += size % 2
    return [
        ("rms_norm", (numbers(rows, size, scale=5.0), numbers(size, seed=1), 1e-6)),
        ("swiglu", (numbers(rows, 2 * size, scale=8.0),)),
        ("rotary", (numbers(rows, 3, size), *tables(rows, size))),
    ]


def error(out, exact):
    return float((out.double() - exact).abs().max()) if out.numel() else 0.0


@pytest.mark.parametrize("size", [0, 1, 7, 16, 40, 192, 257, 3584])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_errs_no_more_than_torch(rows, size, isa):
    for op, arguments in cases(rows, size):
        exact = getattr(plain, op)(*(x.double() if isinstance(x, torch.Tensor) else x for x in arguments))
        out = getattr(native, op)(*arguments, isa=isa)
        assert out.shape == exact.shape and out.is_contiguous()
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        assert error(out, exact) <= error(getattr(plain, op)(*arguments), exact) + 3e-7 * largest, op


@pytest.mark.parametrize("size", [1, 7, 40, 257, 3584])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_bfloat16_is_float32_rounded_once(rows, size, isa):
    for op, (x, *rest) in cases(rows, size):
        found = getattr(native, op)(x.bfloat16(), *rest, isa=isa)
        exact = getattr(native, op)(x.bfloat16().float(), *rest, isa=isa)
        assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16()), op


def test_bfloat16_that_is_not_finite(isa):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, 1.0] * 9)
    payload = torch.full((1, 90), -1, dtype=torch.int16).view(torch.bfloat16)  # a NaN that rounding up would make 0
    assert native.swiglu(payload, isa=isa).isnan().all()
    found = native.swiglu(torch.cat((x, torch.full_like(x, 2.0))).bfloat16()[None], isa=isa)
    torch.testing.assert_close(
        found[0], (torch.nn.functional.silu(x.bfloat16().float()) * 2).bfloat16(), equal_nan=True
    )


def test_the_gate_keeps_its_ends(isa):
    gate = torch.tensor([0.0, -0.0, 1e4, -1e4, 80.0, -80.0, 1e-30, 3e30] * 3)
    out = native.swiglu(torch.cat((gate, torch.full_like(gate, 2.0)))[None], isa=isa)
    assert torch.allclose(out[0], torch.nn.functional.silu(gate) * 2, rtol=1e-6, atol=0)
    assert native.swiglu(torch.full((1, 2), float("nan")), isa=isa).isnan().all()


def test_an_infinite_gate_is_what_torch_makes_of_it(isa):
    gate = torch.tensor([torch.inf, -torch.inf, 1.0] * 9)  # whole vectors and a rest
    x = torch.cat((gate, numbers(27)))[None]
    out = native.swiglu(x, isa=isa)
    assert out[0, ::3].isinf().all()
    torch.testing.assert_close(out, plain.swiglu(x), equal_nan=True)


def test_a_row_depends_on_nothing_else_whatever_the_threads_and_the_view():
    before = torch.get_num_threads()
    for op, arguments in [(op, (x.to(kind), *rest)) for op, (x, *rest) in cases(700, 256) for kind in DTYPES]:
        x, rest = arguments[0], arguments[1:]
        whole = getattr(native, op)(x, *rest)
        wide = torch.full((len(x), x[0].numel() + 24), float("nan"), dtype=x.dtype)
        wide[:, : x[0].numel()] = x.flatten(1)
        view = wide[:, : x[0].numel()].unflatten(1, x.shape[1:])
        try:
            torch.set_num_threads(3)
            assert torch.equal(getattr(native, op)(view, *rest), whole)
        finally:
            torch.set_num_threads(before)
        one = [y[7:8] if op == "rotary" else y for y in rest]
        assert torch.equal(getattr(native, op)(x[7:8], *one), whole[7:8])


def test_gradients_are_left_to_torch():
    x = numbers(4, 32).requires_grad_()
    layer_ops.swiglu(x).sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        assert torch.equal(layer_ops.swiglu(x), native.swiglu(x))
        with pytest.raises(ValueError, match="takes no"):
            layer_ops.swiglu(x.half(), impl="cpu")
        assert layer_ops.swiglu(x.half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        ("rms_norm", [(3, 64), (32,)]),
        ("rms_norm", [(3, 64), (3, 64)]),
        ("rms_norm", [(64,), (64,)]),
        ("add_rms_norm", [(3, 32), (2, 32), (32,)]),
        ("swiglu", [(3, 63)]),
        ("swiglu", [(64,)]),
        ("rotary", [(3, 2, 32), (2, 1, 32), (2, 1, 32)]),
        ("rotary", [(3, 2, 32), (3, 1, 32), (3, 1, 16)]),
        ("rotary", [(3, 2, 31), (3, 1, 31), (3, 1, 31)]),
        ("rotary", [(3, 32), (3, 1, 32), (3, 1, 32)]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(op, shapes):
    arguments = [numbers(*shape) for shape in shapes] + [1e-6] * ("rms_norm" in op)
    with torch.inference_mode(), pytest.raises(ValueError, match=rf"^{op}: .*must be x(, y)? \["):
        getattr(layer_ops, op)(*arguments)


def test_weights_and_tables_of_sixteen_bits():
    x, weight = numbers(3, 2, 64), numbers(64, seed=1).bfloat16()
    cos, sin = (table.bfloat16() for table in tables(3, 64))
    with torch.inference_mode():
        assert torch.equal(layer_ops.rms_norm(x[:, 0], weight, 1e-6), layer_ops.rms_norm(x[:, 0], weight.float(), 1e-6))
        assert torch.equal(layer_ops.rotary(x, cos, sin), layer_ops.rotary(x, cos.float(), sin.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_that_is_normed(dtype):
    x, y, weight = (numbers(3, 64, seed=seed).to(dtype) for seed in (0, 1, 2))
    with torch.inference_mode():
        total, out = layer_ops.add_rms_norm(x, y, weight[0], 1e-6)
        assert torch.equal(total, x + y) and torch.equal(out, layer_ops.rms_norm(x + y, weight[0], 1e-6))
    with pytest.raises(ValueError, match="must be equal"):
        layer_ops.add_rms_norm(x, y.double(), weight[0], 1e-6)


def test_a_gate_with_zeros_behind():
    x = numbers(5, 26)
    out = layer_ops.swiglu(x, columns=16)
    assert torch.equal(out[:, :13], plain.swiglu(x)) and (out[:, 13:] == 0).all() and out.shape == (5, 16)
    with pytest.raises(ValueError, match="columns = 12 >= I"):
        layer_ops.swiglu(x, columns=12)
