"""`qfx::gated` against the functions' formulas in float64, and bit for bit against PyTorch's own ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.kernels.gated import ACTS, CASES, gated
from tests.kernels.law import DTYPES, U32, opcheck
from tests.kernels.test_gated_quantize import exact, halves


def within(y: Tensor, gate: Tensor, up: Tensor | None, act: str) -> bool:
    """Whether y is the function times up, within what float32 and a rounding to y's dtype behind each allow."""
    info = torch.finfo(y.dtype)
    unit, tiny = info.eps / 2, info.smallest_normal * info.eps
    value, off = exact(gate, act)
    off = off + unit * (value.abs() + off) + tiny
    if up is not None:
        value, off = value * up.double(), off * up.double().abs() + U32 * (value * up.double()).abs()
        off = off + unit * (value.abs() + off) + tiny
    return bool(((y.double() - value).abs() <= off).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "channels", "act", "both"), CASES)
def test_law(lead: tuple[int, ...], channels: int, act: str, both: bool, dtype: torch.dtype) -> None:
    gate, up = halves(lead, channels, dtype)
    half = up if both else None
    y = gated(gate, half, act)
    assert y.dtype == dtype and y.shape == gate.shape and y.is_contiguous() and within(y, gate, half, act)
    assert torch.equal(y, ACTS[act](gate) * up if both else ACTS[act](gate))


@pytest.mark.parametrize("act", ACTS)
def test_functions_at_extremes(act: str) -> None:
    gate = torch.tensor([[0.0, -0.0, 20.0, -20.0, 90.0, -90.0, 1e4, -1e4]])
    assert within(gated(gate, None, act), gate, None, act)


@pytest.mark.parametrize(("lead", "channels", "act", "both"), CASES)
def test_opcheck(lead: tuple[int, ...], channels: int, act: str, both: bool) -> None:
    gate, up = halves(lead, channels, torch.float32)
    opcheck(gated, (gate, up if both else None, act))


def test_refusals() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(KernelError, match=r"^gated: no function 'swish'"):
        gated(x, x, "swish")
    with pytest.raises(KernelError, match=r"^gated: .*give equal ones"):
        gated(x, x.half())
    with pytest.raises(KernelError, match=r"^gated: .*give equal ones"):
        gated(x, x[:1])


def test_wrong_values_are_seen() -> None:
    gate, up = halves((9,), 64, torch.bfloat16)
    y = gated(gate, up)
    assert within(y, gate, up, "silu") and not within(y * (1 + 2.0**-5), gate, up, "silu")
    assert not within(gated(up, gate), gate, up, "silu")
