"""`qfx::gated_quantize` against the functions' formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.kernels.gated_quantize import ACTS, CASES, gated_quantize
from qfx.kernels.quantize_rows import codes_of
from tests.kernels.law import DTYPES, U32, opcheck


def exact(v: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """The function in float64, and what float32 may be off.

    A sigmoid of float32 z is off by the rounding of z in the exponent, |z| 2⁻²³, and 8 units for two instructions that
    are good to two units, a sum and a product; z of gelu_tanh takes 5 roundings itself. 1 + erf (and 1 + tanh, in
    torch) loses what erf is off, 4 units of 1. Below the smallest normal float32 a sigmoid may be zero.
    """
    v = v.double()
    tiny = torch.finfo(torch.float32).tiny * v.abs()
    if act == "silu":
        return v / (1 + (-v).exp()), (v.abs() + 8) * 2 * U32 * (v / (1 + (-v).exp())).abs() + tiny
    if act == "gelu":
        return v * torch.special.ndtr(v), 6 * U32 * v.abs()
    if act == "gelu_tanh":
        z = 2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)
        y = v / (1 + (-z).exp())
        return y, (6 * z.abs() + 8) * 2 * U32 * y.abs() + 6 * U32 * v.abs()
    return (v.clamp_min(0) if act == "relu" else v), torch.zeros_like(v)


def within(y: Tensor, gate: Tensor, up: Tensor | None, act: str) -> bool:
    """Whether y is the function times up, within what float32 and one rounding to y's dtype allow."""
    value, off = exact(gate, act)
    if up is not None:
        value, off = value * up.double(), off * up.double().abs() + U32 * (value * up.double()).abs()
    info = torch.finfo(y.dtype)
    bound = off + info.eps / 2 * (value.abs() + off) + info.smallest_normal * info.eps
    return bool(((y.double() - value).abs() <= bound).all())


def halves(lead: tuple[int, ...], channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two halves of one tensor; the first token is zero if there are several."""
    both = torch.randn(*lead, 2 * channels) * 3
    flat = both.view(-1, 2 * channels)
    if len(flat) > 1:
        flat[0] = 0
    both = both.to(dtype)
    return both[..., :channels], both[..., channels:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "channels", "grid", "act", "gated"), CASES)
def test_law(lead: tuple[int, ...], channels: int, grid: str, act: str, gated: bool, dtype: torch.dtype) -> None:
    gate, up = halves(lead, channels, dtype)
    half = up if gated else None
    y, empty = gated_quantize(gate, half, act, "")
    assert y.dtype == dtype and y.shape == gate.shape and empty.numel() == 0 and y.is_contiguous()
    assert within(y, gate, half, act)
    if grid:
        codes, scale = gated_quantize(gate, half, act, grid)
        expected = codes_of(y, grid, None, None)
        assert torch.equal(codes.float(), expected[0].float()) and torch.equal(scale, expected[1])


@pytest.mark.parametrize("act", ACTS)
def test_functions_at_extremes(act: str) -> None:
    gate = torch.tensor([[0.0, -0.0, 20.0, -20.0, 90.0, -90.0, 1e4, -1e4]])
    assert within(gated_quantize(gate, None, act, "")[0], gate, None, act)


@pytest.mark.parametrize(("lead", "channels", "grid", "act", "gated"), CASES)
def test_opcheck(lead: tuple[int, ...], channels: int, grid: str, act: str, gated: bool) -> None:
    gate, up = torch.randn(*lead, channels), torch.randn(*lead, channels)
    opcheck(gated_quantize, (gate, up if gated else None, act, grid))


def test_static_scale() -> None:
    gate, scale, zero = torch.randn(5, 8), torch.tensor(0.01), torch.tensor(9, dtype=torch.int32)
    codes, scales = gated_quantize(gate, None, "relu", "uint8", scale, zero)
    assert (scales == scale).all() and scales.shape == (5, 1)
    assert torch.equal(codes.float(), (gate.relu() / scale).round().add(9).clamp(0, 255))


def test_refusals() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(KernelError, match="no function 'swish'"):
        gated_quantize(x, x, "swish")
    with pytest.raises(KernelError, match="give equal ones"):
        gated_quantize(x, x.half())
    with pytest.raises(KernelError, match="give equal ones"):
        gated_quantize(x, x[:1])
