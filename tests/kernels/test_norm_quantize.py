"""`qfx::norm_quantize` against norms in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.kernels.norm_quantize import CASES, norm_quantize
from qfx.kernels.quantize_rows import codes_of
from tests.kernels.law import DTYPES, U32, opcheck


def within(y: Tensor, x: Tensor, gain: Tensor | None, bias: Tensor | None, eps: float, center: bool) -> bool:
    """Whether y is the norm of x within what float32 sums and at most two roundings to y's dtype allow.

    A mean of D float32 values takes D roundings of its sum and one of its quotient: it is off by (D + 1) u times the
    mean of magnitudes. A scale is off by half of what the mean square is, and 6 roundings (square, eps, root,
    reciprocal, product, and the difference to the mean).
    """
    x = x.double()
    n = x.shape[-1]
    magnitude = x.abs().mean(-1, keepdim=True)
    if center:
        x = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    v = x * scale
    off = v.abs() * (n / 2 + 8) * U32 * 1.01
    if center:  # a wrong mean shifts all values, and adds to the variance
        shift = (n + 2) * U32 * magnitude * scale
        off = off + shift + v.abs() * shift * (2 + shift)
    info = torch.finfo(y.dtype)
    unit, tiny = info.eps / 2, info.smallest_normal * info.eps
    off = off + unit * (v.abs() + off) + tiny  # if the normalized value is cast first
    if gain is not None:
        v, off = v * gain.double(), off * gain.double().abs() + U32 * (v * gain.double()).abs()
    if bias is not None:
        v = v + bias.double()
        off = off + U32 * (v.abs() + off)
    return bool(((y.double() - v).abs() <= off + unit * (v.abs() + off) + tiny).all())


def operands(lead: tuple[int, ...], channels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, residual, gain and bias; the first token is zero if there are several, one channel is large."""
    x, residual = torch.randn(2, *lead, channels)
    x[..., channels // 2] *= 20
    flat, other = x.view(-1, channels), residual.view(-1, channels)
    if len(flat) > 1:
        flat[0], other[0] = 0, 0
    return tuple(t.to(dtype) for t in (x, residual, torch.randn(channels), torch.randn(channels)))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "channels", "grid", "center", "cast_first"), CASES)
def test_law(lead, channels: int, grid: str, center: bool, cast_first: bool, dtype, with_residual: bool) -> None:
    x, residual, gain, bias = operands(lead, channels, dtype)
    extra = residual if with_residual else None
    offset = bias if center else None
    codes, scale, y, total = norm_quantize(x, extra, gain, offset, 1e-5, center, cast_first, grid, keep_y=True)
    if with_residual:
        assert torch.equal(total, x + residual)
    else:
        assert total.numel() == 0
    assert y.dtype == dtype and y.shape == x.shape
    assert within(y, total if with_residual else x, gain, offset, 1e-5, center)
    if grid:
        expected = codes_of(y, grid, None, None)
        assert torch.equal(codes.float(), expected[0].float()) and torch.equal(scale, expected[1])
    else:
        assert codes.numel() == 0 and scale.numel() == 0


def test_equals_the_usual_modules() -> None:
    """LayerNorm of torch, and RMSNorm as it is usually written: cast, then times the gain."""
    x, _, gain, bias = operands((4,), 48, torch.bfloat16)
    y = norm_quantize(x, None, gain, bias, 1e-5, True, False, "")[2]
    assert (y.float() - torch.nn.functional.layer_norm(x, (48,), gain, bias, 1e-5).float()).abs().max() < 2**-6
    y = norm_quantize(x, None, gain, None, 1e-6, False, True, "")[2]
    v = x.float()
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(y, gain * v.to(torch.bfloat16))


@pytest.mark.parametrize(("lead", "channels", "grid", "center", "cast_first"), CASES)
def test_opcheck(lead, channels: int, grid: str, center: bool, cast_first: bool) -> None:
    x, residual, gain, bias = operands(lead, channels, torch.float32)
    opcheck(norm_quantize, (x, residual, gain, bias, 1e-5, center, cast_first, grid))
    opcheck(norm_quantize, (x, None, None, None, 1e-5, center, cast_first, grid), {"keep_y": True})


def test_static_scale() -> None:
    x, scale, zero = torch.randn(5, 8), torch.tensor(0.01), torch.tensor(90, dtype=torch.int32)
    codes, scales, y, _ = norm_quantize(x, x_grid="uint8", x_scale=scale, x_zero=zero, keep_y=True)
    assert (scales == scale).all() and scales.shape == (5, 1)
    assert torch.equal(codes.float(), (y / scale).round().add(90).clamp(0, 255))


def test_refusals() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(KernelError, match="give equal ones"):
        norm_quantize(x, x.half())
    with pytest.raises(KernelError, match="give one for each"):
        norm_quantize(x, gain=torch.ones(3))
    with pytest.raises(KernelError, match="zero point"):
        norm_quantize(x, x_grid="uint8")
