"""`qfx::fp8_gemm` against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.spec import parse_scheme
from qfx.kernels.fp8_gemm import CASES, fp8_gemm, supports
from qfx.kernels.int8_gemm import ACTIVATIONS
from tests.kernels.law import DTYPES, U32, opcheck

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def operands(
    lead: tuple[int, ...], columns: int, rows: int, residual: bool, dtype: torch.dtype, codes: torch.dtype = E4M3
) -> Operands:
    """Random codes, values of about 1."""
    x, w = torch.randn(*lead, columns).to(codes), torch.randn(rows, columns).to(E4M3)
    x_scale, w_scale = torch.rand(*lead, 1), torch.rand(rows) / columns**0.5
    bias = torch.randn(rows).to(dtype)
    return x, x_scale, w, w_scale, bias, torch.randn(*lead, rows).to(dtype) if residual else None


def violation(out: Tensor, o: Operands, activation: str, dtype: torch.dtype) -> float:
    """The largest distance from float64 in units of its bound.

    A product of two codes is exact in float32. Its K terms are added with K roundings at most; then scales, bias,
    residual and activation round as in `test_int8_gemm`.
    """
    x, x_scale, w, w_scale, bias, residual = o
    scale = x_scale.double() * w_scale.double()
    plain = (x.double() @ w.double().t()) * scale
    plain = plain if bias is None else plain + bias.double()
    y = ACTIVATIONS[activation](plain)
    y = y if residual is None else y + residual.double()
    terms = (x.double().abs() @ w.double().abs().t()) * scale
    for extra in (bias, residual):
        terms = terms if extra is None else terms + extra.double().abs()
    tight = (x.shape[-1] + (32 if activation else 8)) * U32 * (1.13 * terms)
    info = torch.finfo(dtype)
    bound = tight + info.eps / 2 * (y.abs() + tight) + info.smallest_normal * info.eps
    assert out.shape == y.shape and out.dtype == dtype and out.is_contiguous()
    return ((out.double() - y).abs() / bound).max().item() if out.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "columns", "rows", "activation", "residual"), CASES)
def test_law(lead: tuple, columns: int, rows: int, activation: str, residual: bool, dtype: torch.dtype) -> None:
    for codes in (E4M3, E5M2):
        o = operands(lead, columns, rows, residual, dtype, codes)
        assert violation(fp8_gemm(*o, activation, dtype), o, activation, dtype) <= 1


def test_the_law_notices_a_wrong_scale_and_a_forgotten_bias() -> None:
    o = operands((16,), 64, 32, True, torch.bfloat16)
    assert violation(fp8_gemm(o[0], o[1] * (1 + 2**-6), *o[2:]), o, "", torch.bfloat16) > 1
    assert violation(fp8_gemm(*o[:4], None, o[5]), o, "", torch.bfloat16) > 1


@pytest.mark.parametrize(("lead", "columns", "rows", "activation", "residual"), CASES)
def test_opcheck(lead: tuple, columns: int, rows: int, activation: str, residual: bool) -> None:
    opcheck(fp8_gemm, (*operands(lead, columns, rows, residual, torch.float32), activation, torch.float32))


def test_refusals() -> None:
    o = operands((3,), 16, 8, True, torch.float32)
    with pytest.raises(KernelError, match="both are float8"):
        fp8_gemm(o[0].float(), *o[1:])
    with pytest.raises(KernelError, match="x_codes end in"):
        fp8_gemm(o[0][:, :8], *o[1:])
    with pytest.raises(KernelError, match="no activation"):
        fp8_gemm(*o, "tanh")
    assert supports(parse_scheme("FP8_DYNAMIC"), 64) is None
    assert "fp8_gemm: the input is not" in (supports(parse_scheme("W8A8"), 64) or "")
