"""`qfx::int8_gemm` against float64, in which products and sums of codes are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.spec import parse_scheme
from qfx.kernels.int8_gemm import ACTIVATIONS, CASES, int8_gemm, supports
from tests.kernels.law import DTYPES, U32, opcheck

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def operands(lead: tuple[int, ...], columns: int, rows: int, residual: bool, dtype: torch.dtype) -> Operands:
    """Random codes, values of about 1."""
    x = torch.randint(-128, 128, (*lead, columns), dtype=torch.int8)
    w = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    w[0] = -128
    if x.numel():
        x.view(-1, columns)[-1] = -128
    x_scale, w_scale = torch.rand(*lead, 1) / 64, torch.rand(rows) / 64 / columns
    bias = torch.randn(rows).to(dtype)
    return x, x_scale, w, w_scale, bias, torch.randn(*lead, rows).to(dtype) if residual else None


def violation(out: Tensor, o: Operands, activation: str, dtype: torch.dtype) -> float:
    """The largest distance from float64 in units of its bound.

    float32 rounds the sum, two products, the bias' addition, the residual's, and the reference's own scales: 8 units
    of 2⁻²⁴ of all terms' magnitudes cover them. An activation has slope at most 1.13 and adds roundings of its own,
    32 units of its input's magnitude. The cast rounds once.
    """
    x, x_scale, w, w_scale, bias, residual = o
    scale = x_scale.double() * w_scale.double()
    plain = (x.double() @ w.double().t()) * scale
    plain = plain if bias is None else plain + bias.double()
    y = ACTIVATIONS[activation](plain)
    y = y if residual is None else y + residual.double()
    terms = (x.double() @ w.double().t()).abs() * scale
    for extra in (bias, residual):
        terms = terms if extra is None else terms + extra.double().abs()
    tight = (32 if activation else 8) * U32 * (1.13 * terms)
    info = torch.finfo(dtype)
    bound = tight + info.eps / 2 * (y.abs() + tight) + info.smallest_normal * info.eps
    assert out.shape == y.shape and out.dtype == dtype and out.is_contiguous()
    return ((out.double() - y).abs() / bound).max().item() if out.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "columns", "rows", "activation", "residual"), CASES)
def test_law(lead: tuple, columns: int, rows: int, activation: str, residual: bool, dtype: torch.dtype) -> None:
    o = operands(lead, columns, rows, residual, dtype)
    assert violation(int8_gemm(*o, activation, dtype), o, activation, dtype) <= 1


def test_one_scale_no_bias_and_exact_integers() -> None:
    x, _, w, *_ = operands((7,), 1100, 9, False, torch.float32)
    one = torch.ones(1)
    out = int8_gemm(x, one, w, one, out_dtype=torch.float32)
    exact = x.double() @ w.double().t()
    small = exact.abs() <= 2**24
    assert small.any() and torch.equal(out.double()[small], exact[small])


def test_the_law_notices_a_wrong_scale_and_a_forgotten_residual() -> None:
    o = operands((16,), 64, 32, True, torch.bfloat16)
    assert violation(int8_gemm(o[0], o[1] * (1 + 2**-6), *o[2:]), o, "", torch.bfloat16) > 1
    assert violation(int8_gemm(*o[:5], None), o, "", torch.bfloat16) > 1
    assert violation(int8_gemm(*o, "relu"), o, "", torch.bfloat16) > 1


@pytest.mark.parametrize(("lead", "columns", "rows", "activation", "residual"), CASES)
def test_opcheck(lead: tuple, columns: int, rows: int, activation: str, residual: bool) -> None:
    opcheck(int8_gemm, (*operands(lead, columns, rows, residual, torch.float32), activation, torch.float32))


def test_refusals() -> None:
    o = operands((3,), 16, 8, True, torch.float32)
    for change, reason in (
        ({0: o[0][:, :8]}, "x_codes end in `in`"),
        ({0: o[0].float()}, "both are int8"),
        ({1: torch.ones(2)}, "2 scales for 3 tokens"),
        ({5: torch.ones(8)}, "a residual"),
        ({6: "tanh"}, "no activation 'tanh'"),
        ({7: torch.float64}, "no output of"),
    ):
        args = [*o, "", torch.float32]
        for i, value in change.items():
            args[i] = value
        with pytest.raises(KernelError, match=reason):
            int8_gemm(*args)
    assert supports(parse_scheme("W8A8"), 64) is None
    assert "zero point" in (supports(parse_scheme("W8A8_STATIC_ASYM"), 64) or "")
    assert "int8_gemm: the input is not" in (supports(parse_scheme("FP8"), 64) or "")
