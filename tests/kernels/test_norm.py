"""`qfx::norm` against norms in float64, and bit for bit against the ops that it stands for."""

from __future__ import annotations

import pytest
import torch

from qfx.core.errors import KernelError
from qfx.kernels.norm import CASES, norm
from qfx.kernels.norm_quantize import norm_quantize
from tests.kernels.law import DTYPES, opcheck
from tests.kernels.test_norm_quantize import operands, within


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "channels", "center", "cast_first"), CASES)
def test_law(lead, channels: int, center: bool, cast_first: bool, dtype: torch.dtype, with_residual: bool) -> None:
    x, residual, gain, bias = operands(lead, channels, dtype)
    extra, offset = residual if with_residual else None, bias if center else None
    y, total = norm(x, extra, gain, offset, 1e-5, center, cast_first)
    if with_residual:
        assert torch.equal(total, x + residual)
    else:
        assert total.numel() == 0
    assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
    assert within(y, total if with_residual else x, gain, offset, 1e-5, center)
    coded = norm_quantize(x, extra, gain, offset, 1e-5, center, cast_first, keep_y=True)
    assert torch.equal(y, coded[2]) and torch.equal(total, coded[3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_rounds_where_models_do(dtype: torch.dtype) -> None:
    """Cast, then times the gain; or times a float32 gain, then cast. They differ."""
    x, residual, gain, _ = operands((6,), 48, dtype)
    h = x + residual
    f = h.float()
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)
    first, last = (norm(x, residual, gain, None, 1e-6, False, cast_first)[0] for cast_first in (True, False))
    assert torch.equal(first, gain * f.to(dtype)) and torch.equal(last, (f * gain.float()).to(dtype))
    assert torch.equal(first, last) == (dtype == torch.float32)


def test_strided_rows() -> None:
    wide = torch.randn(4, 3, 100)
    x, residual = wide[..., :40], wide[..., 50:90]
    y, total = norm(x, residual)
    assert y.is_contiguous() and total.is_contiguous() and torch.equal(total, x + residual)
    assert within(y, total, None, None, 1e-6, False)


@pytest.mark.parametrize(("lead", "channels", "center", "cast_first"), CASES)
def test_opcheck(lead, channels: int, center: bool, cast_first: bool) -> None:
    x, residual, gain, bias = operands(lead, channels, torch.float32)
    opcheck(norm, (x, residual, gain, bias, 1e-5, center, cast_first))
    opcheck(norm, (x, None, None, None, 1e-5, center, cast_first))


def test_refusals() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(KernelError, match=r"^norm: .*give equal ones"):
        norm(x, x.half())
    with pytest.raises(KernelError, match=r"^norm: .*give one for each"):
        norm(x, gain=torch.ones(3))
