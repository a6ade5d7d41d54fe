"""Gradients of the ops that lowering puts in place of the stored ones, against autograd through what they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.qtensor import quantize_scale
from qfx.kernels import fp8_gemm, int8_gemm, nf4_linear, nibbles, w4a8_linear, w4a16_linear
from qfx.kernels.int8_gemm import ACTIVATIONS
from qfx.kernels.pack import plain_scale, store
from tests.kernels import test_fp8_gemm, test_int8_gemm
from tests.kernels.law import Case, make_case, opcheck


def near(got: Tensor | None, expected: Tensor) -> bool:
    """Equal within float32 roundings of sums of a hundred terms."""
    assert got is not None and got.dtype == expected.dtype and got.shape == expected.shape
    return bool(((got - expected).abs() <= 2.0**-17 * expected.abs().max()).all())


def through_weight(case: Case, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of input and bias by autograd through the dequantized weight."""
    x, bias = case.x.detach().clone().requires_grad_(), case.bias.detach().clone().requires_grad_()
    F.linear(x, case.weight.dequantize(), bias).backward(grad)
    return x.grad, bias.grad


def stored(case: Case, module, **more) -> list[Tensor | None]:
    grid = case.weight.spec.grid
    sizes = {"bits": grid.bits, "in_features": case.weight.codes.shape[1], "signed": grid.signed}
    given, inner = plain_scale(store(case.weight), case.weight.spec), case.weight.spec.scale
    if inner is not None:
        given["second"] = quantize_scale(case.weight.scale, case.weight.spec)[1]
    prepared = module.prepare(given, **sizes, **more)
    return list(prepared.values())


LINEARS = [
    (w4a16_linear, ((2, 3), 256, 33, "W4A16_ASYM_G64"), True),
    (w4a16_linear, ((5,), 136, 24, "W4A16_CHANNEL"), False),
    (w4a8_linear, ((2, 3), 256, 33, "W4A8_G64"), True),
    (w4a8_linear, ((4,), 256, 17, "W4A8_ASYM_G128"), False),
    (w4a8_linear, ((4,), 256, 17, "W4AFP8"), False),
    (w4a8_linear, ((2, 3), 256, 33, "W4A8_DQ"), True),
]


@pytest.mark.parametrize(("module", "shape", "act_order"), LINEARS, ids=lambda v: v[3] if isinstance(v, tuple) else "")
def test_linear(module, shape: tuple, act_order: bool) -> None:
    case = make_case(*shape, act_order=act_order)
    grid = {"x_grid": case.input["x_grid"]} if case.scheme.input else {}
    tiles, scale, zero, order, *second = stored(case, module, **grid)
    assert (order is not None) == act_order
    group = -1 if case.weight.scale.shape[1] == 1 else shape[1] // case.weight.scale.shape[1]
    op = module.w4a8_linear if grid else module.w4a16_linear
    grad = torch.randn(*shape[0], shape[2])
    x_grad, bias_grad = through_weight(case, grad)
    x, bias = case.x.requires_grad_(), case.bias.requires_grad_()
    args = (x, tiles, scale, zero, order, *second, bias, shape[2], group, *grid.values())
    op(*args).backward(grad)
    assert near(x.grad, x_grad) and near(bias.grad, bias_grad)
    opcheck(op, args)


@pytest.mark.parametrize("name", nf4_linear.TABLES)
def test_nf4(name: str) -> None:
    w = torch.randn(33, 128)
    codes, absmax = nf4_linear.quantize(w, 64, name)
    tiles, scale = nf4_linear.prepare(codes, absmax)
    exact = nf4_linear.table(name, w.device)[codes.long()] * absmax.repeat_interleave(64, 1)
    x, bias, grad = torch.randn(2, 3, 128), torch.randn(33), torch.randn(2, 3, 33)
    inputs = [t.clone().requires_grad_() for t in (x, bias, x, bias)]
    F.linear(inputs[0], exact, inputs[1]).backward(grad)
    args = (inputs[2], tiles, scale, inputs[3], 33, 64, name)
    nf4_linear.nf4_linear(*args).backward(grad)
    assert near(inputs[2].grad, inputs[0].grad) and near(inputs[3].grad, inputs[1].grad)
    opcheck(nf4_linear.nf4_linear, args)


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", ["int8", "e4m3", "e5m2"])
def test_gemm(family: str, activation: str, one_scale: bool) -> None:
    if family == "int8":
        op, (x, x_scale, w, w_scale, bias, residual) = (
            int8_gemm.int8_gemm,
            test_int8_gemm.operands((2, 3), 40, 24, True, torch.float32),
        )
    else:
        codes = torch.float8_e4m3fn if family == "e4m3" else torch.float8_e5m2
        op, (x, x_scale, w, w_scale, bias, residual) = (
            fp8_gemm.fp8_gemm,
            test_fp8_gemm.operands((2, 3), 40, 24, True, torch.float32, codes),
        )
    x_scale = x_scale.reshape(-1)[:1] if one_scale else x_scale
    grad = torch.randn(2, 3, 24)
    leaves = [t.clone().requires_grad_() for t in (x_scale, bias, residual)]
    y = F.linear(x.float() * leaves[0], w.float() * w_scale[:, None], leaves[1])
    (ACTIVATIONS[activation](y) + leaves[2]).backward(grad)
    expected = [t.grad for t in leaves]
    leaves = [t.clone().requires_grad_() for t in (x_scale, bias, residual)]
    args = (x, leaves[0], w, w_scale, leaves[1], leaves[2], activation, torch.float32)
    op(*args).backward(grad)
    assert all(near(leaf.grad, want) for leaf, want in zip(leaves, expected, strict=True))
    if not one_scale:
        opcheck(op, args)


@pytest.mark.parametrize("scheme", ["W4A8", "W4AFP8", "W4A8_DQ"])
def test_w4a8_gemm(scheme: str) -> None:
    case = make_case((6,), 256, 24, scheme)
    tiles, scale, zero, _, second = stored(case, w4a8_linear, x_grid=case.input["x_grid"])
    assert (second is not None) == (scheme == "W4A8_DQ")
    dtype = torch.float8_e4m3fn if scheme == "W4AFP8" else torch.int8
    x = torch.randint(-8, 9, (6, 256)).to(dtype)
    x_scale, bias, grad = torch.rand(6, 1), torch.randn(24), torch.randn(6, 24)
    leaves = [t.clone().requires_grad_() for t in (x_scale, bias, x_scale, bias)]
    F.linear(x.float() * leaves[0], case.weight.dequantize(), leaves[1]).backward(grad)
    args = (x, leaves[2], tiles, scale, zero, second, leaves[3], 24, 128, torch.float32)
    w4a8_linear.w4a8_gemm(*args).backward(grad)
    assert near(leaves[2].grad, leaves[0].grad) and near(leaves[3].grad, leaves[1].grad)
    opcheck(w4a8_linear.w4a8_gemm, args)


def test_a_wrong_order_is_seen() -> None:
    order = torch.randperm(64).to(torch.int32)
    x = torch.randn(3, 64)
    assert torch.equal(nibbles.unordered(x[:, order.long()], order), x)
    assert not near(nibbles.unordered(x[:, order.long()], order.roll(1)), x)
