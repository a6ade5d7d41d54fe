"""8-bit linears on a GPU by their registered ops: hundreds of random shapes each, against float64.

Inputs are strided or contiguous, tiny or huge in size and magnitude, with rows of zeros. Sums of small integers times
powers of two are rounded nowhere, so that such outputs are the exact ones, rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qfx.kernels.int8_gemm import ACTIVATIONS
from tests.kernels import test_int8_outlier_linear as outlier
from tests.kernels.gpu.draws import (
    DEVICE,
    LIMITS,
    REGIMES,
    bound,
    codes8,
    codes_right,
    integers,
    lost,
    normal,
    padded,
    peaks,
    powers,
    scales_right,
    shapes,
    worst,
)

pytest.importorskip("triton")

from qfx.kernels.gpu.linear8 import quantized

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("float32_sums")]
BF16, F16, F32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EACH = 20
"""Shapes of one test."""


class Gemm(NamedTuple):
    """The arguments of a GEMM of codes, in the order of the ops'."""

    x: Tensor
    x_scale: Tensor
    w: Tensor
    w_scale: Tensor
    bias: Tensor | None
    residual: Tensor | None
    activation: str
    dtype: torch.dtype


def gemm_violation(out: Tensor, g: Gemm, exact: bool, zero: Tensor | None = None) -> float:
    """As in `test_int8_gemm` and `test_fp8_gemm`; `exact` says that the sum over K is."""
    x = g.x.double() if zero is None else g.x.double() - zero.double()
    w = g.w.double()
    scale = g.x_scale.double().reshape(-1, 1) * g.w_scale.double().reshape(1, -1)
    acc = x @ w.t()
    y = acc * scale if g.bias is None else acc * scale + g.bias.double()
    y = ACTIVATIONS[g.activation](y)
    terms = (acc.abs() if exact else x.abs() @ w.abs().t()) * scale
    for extra in (g.bias, g.residual):
        terms = terms if extra is None else terms + extra.double().abs()
    y = y if g.residual is None else y + g.residual.double()
    roundings = (32 if g.activation else 8) + (0 if exact else x.shape[1])
    more = 0.0 if exact else 1.13 * lost(g.x, g.w) * scale
    assert out.dtype == g.dtype
    return worst(out, y, bound(y, 1.13 * terms, roundings, g.dtype, more))


def gemm_case(m: int, n: int, k: int, x: torch.dtype, w: torch.dtype, form: int, exact: bool) -> Gemm:
    """`form` chooses what comes behind the product; its last one has extreme scales."""
    many = form % 2 == 0
    dtype = (BF16, F32, F16, BF16)[form % 4]
    activation = ("", "gelu_tanh", "", "silu", "gelu", "relu")[form % 6]
    unit = 1.0 if exact else k**-0.5 / (64 * 64 if x == INT8 else 1)
    x_scale = powers((m, 1) if many else (1,), -2, 2)
    w_scale = powers((n,) if many else (1,), -2, 2) * (unit if x != INT8 else k**-0.5 / 64)
    if form == 3:
        x_scale = 10 ** torch.empty_like(x_scale).uniform_(-20, 20)
        w_scale = 10 ** torch.empty_like(w_scale).uniform_(-8, 8)
    elif x == INT8:
        x_scale /= 64
    bias = integers(1, n, 8, (F32, BF16)[form % 2]).reshape(-1) if form != 1 else None
    residual = integers(m, n, 8, dtype) if form in (1, 2, 4) else None
    a, b = codes8(m, k, x, exact), codes8(n, k, w, exact)
    step = 16 if k % 16 == 0 else 3
    return Gemm(
        padded(a, step) if many else a, x_scale, padded(b, 2 * step) if form == 4 else b, w_scale, bias, residual,
        activation, dtype,
    )  # fmt: skip


FAMILIES = [("int8", INT8, INT8), ("fp8", E4M3, E4M3), ("fp8", E5M2, E4M3)]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("name", "x", "w"), FAMILIES, ids=["int8", "e4m3", "e5m2"])
def test_gemm(name: str, x: torch.dtype, w: torch.dtype, regime: str) -> None:
    op = torch.ops.qfx.int8_gemm if name == "int8" else torch.ops.qfx.fp8_gemm
    place = list(REGIMES).index(regime)
    for form in ((place + 2) % 5, (place + 4) % 5):
        for i, (m, n, k) in enumerate(shapes(f"{regime} {form} {x}", EACH, REGIMES[regime])):
            exact = x == INT8 or i % 2 == 0 or m * n * k > LIMITS["summed"]
            g = gemm_case(m, n, k, x, w, form, exact)
            out = op(*g)
            assert gemm_violation(out, g, exact) <= 1, (m, n, k, form)
        assert torch.equal(op(*g), out)
        empty = None if g.residual is None else g.residual[:0]
        x_scale = g.x_scale[:0] if g.x_scale.numel() > 1 else g.x_scale
        assert op(g.x[:0], x_scale, *g[2:5], empty, *g[6:]).shape == (0, n)


@pytest.mark.parametrize(("name", "x", "w"), FAMILIES, ids=["int8", "e4m3", "e5m2"])
def test_tiny_gemm(name: str, x: torch.dtype, w: torch.dtype) -> None:
    op = torch.ops.qfx.int8_gemm if name == "int8" else torch.ops.qfx.fp8_gemm
    for m, n, k in ((1, 1, 1), (1, 1, 16), (3, 1, 2), (2, 5, 1), (300, 1, 16)):
        g = gemm_case(m, n, k, x, w, 2, False)
        assert gemm_violation(op(*g), g, x == INT8) <= 1, (m, n, k)


@pytest.mark.parametrize(("name", "x", "w"), FAMILIES, ids=["int8", "e4m3", "e5m2"])
def test_a_wrong_code_of_a_gemm_is_seen(name: str, x: torch.dtype, w: torch.dtype) -> None:
    op = torch.ops.qfx.int8_gemm if name == "int8" else torch.ops.qfx.fp8_gemm
    exact = gemm_case(33, 65, 4096, x, w, 0, True)
    codes, off = torch.zeros_like(exact.x, dtype=F32), exact.w.float()
    codes[:, 4095] = 1  # the last column alone
    off[64, 4095] = float(off[64, 4095] == 0)
    codes, off = codes.to(x), off.to(w)
    exact = exact._replace(x=codes, bias=None)
    assert gemm_violation(op(*exact), exact, True) <= 1 < gemm_violation(op(*exact._replace(w=off)), exact, True)
    rough = gemm_case(33, 65, 256, x, w, 0, False)
    wrong = rough._replace(x_scale=rough.x_scale * 1.125)
    assert gemm_violation(op(*rough), rough, x == INT8) <= 1 < gemm_violation(op(*wrong), rough, x == INT8)


# grid, static scale, static zero point, one scale for all tokens, dtype of x, regime, depth
LINEARS = [
    ("int8_narrow", None, None, False, BF16, "one token", 512),
    ("int8", None, None, False, F16, "few tokens", 1008),
    ("int8_narrow", None, None, False, F32, "deep", 14336),
    ("int8_narrow", None, None, False, F32, "any depth", 1),
    ("int4_narrow", None, None, False, BF16, "middle", 320),
    ("int8_narrow", None, None, False, BF16, "many tokens", 4096),
    ("int8_narrow", None, None, False, F16, "many, any depth", 1001),
    ("int8_narrow", 0.02, None, False, F16, "any depth", 129),
    ("int8", 0.02, None, False, BF16, "wide", 64),
    ("uint8", 0.02, 77, False, BF16, "many tokens", 1024),
    ("uint8", 0.02, 201, False, F32, "few tokens", 992),
    ("uint4", 0.2, 7, False, F16, "middle", 256),
    ("uint8", None, None, False, BF16, "few tokens", 768),
    ("int8", None, None, True, BF16, "wide", 256),
    ("uint8", None, None, True, F32, "any depth", 99),
    ("e4m3", None, None, False, BF16, "one token", 512),
    ("e4m3", None, None, False, F32, "few tokens", 1008),
    ("e5m2", None, None, False, F16, "any depth", 1),
    ("e4m3", None, None, False, F16, "middle", 160),
    ("e5m2", None, None, False, BF16, "middle", 480),
    ("e4m3", None, None, False, BF16, "many tokens", 160),
    ("e4m3", None, None, False, F32, "many, any depth", 101),
    ("e4m3", None, None, True, BF16, "wide", 256),
    ("e4m3", 0.02, None, False, BF16, "any depth", 65),
    ("e5m2", 0.02, None, False, F32, "few tokens", 992),
    ("e4m3", 1.0, None, False, BF16, "deep", 28672),
    ("e4m3", 1.0, None, False, F16, "many tokens", 512),
    ("e5m2", 1.0, None, False, F32, "wide", 4096),
    ("e4m3", 1.0, None, False, F32, "deep", 16384),
    ("e5m2", 1.0, None, False, BF16, "many, any depth", 1023),
]


@pytest.mark.parametrize(("grid", "static", "point", "per_tensor", "dtype", "regime", "depth"), LINEARS)
def test_linear(
    grid: str,
    static: float | None,
    point: int | None,
    per_tensor: bool,
    dtype: torch.dtype,
    regime: str,
    depth: int,
) -> None:
    int8, exact = "int" in grid, static == 1.0
    x_scale = None if static is None else torch.tensor(static, device=DEVICE)
    x_zero = None if point is None else torch.tensor(point, dtype=torch.int32, device=DEVICE)
    budget = "products" if int8 or exact else "summed"
    draw = lambda r: (*REGIMES[regime](r)[:2], depth)  # noqa: E731
    number = LINEARS.index((grid, static, point, per_tensor, dtype, regime, depth))
    for i, (m, n, k) in enumerate(shapes(f"{grid} {regime} {depth}", EACH + 2, draw, budget)):
        x = integers(m, k, 1, dtype) if exact else normal(m, k, dtype, peaks(dtype)[0 if static else i % 3])
        x = padded(x, 8) if number % 2 else x
        w = codes8(n, k, INT8 if int8 else (E4M3, E5M2)[number % 5 == 0], exact)
        w_scale = powers((n, 1), -2, 2) / (1 if exact else 128 * k)
        bias = None if number % 3 == 2 else integers(1, n, 8, dtype).reshape(-1)
        args = (x, w, w_scale, bias, x_scale, *([x_zero] if int8 else []), grid, per_tensor)
        op = torch.ops.qfx.int8_linear if int8 else torch.ops.qfx.fp8_linear
        out = op(*args)
        q, s, z = quantized(x, grid, x_scale, x_zero, per_tensor)
        assert codes_right(x, q, s, z, grid), (m, n, k)
        assert static or per_tensor or scales_right(x, s, grid)
        g = Gemm(q, s, w, w_scale, bias, None, "", dtype)
        assert gemm_violation(out, g, int8 or exact, z) <= 1, (m, n, k)
    assert torch.equal(op(*args), out) and op(x[:0], *args[1:]).shape == (0, n)


OUTLIERS = [(BF16, 0.0), (F16, 0.0), (F32, 0.0), (BF16, 6.0), (F16, 6.0), (F32, 6.0)]


@pytest.mark.parametrize(("dtype", "threshold"), OUTLIERS)
def test_outlier_linear(dtype: torch.dtype, threshold: float) -> None:
    for regime, depth in (("few tokens", 544), ("any depth", 129), ("many tokens", 512)):
        drawn = shapes(f"{regime} {dtype} {threshold}", EACH, lambda r, k=depth, d=regime: (*REGIMES[d](r)[:2], k))
        for i, (m, n, k) in enumerate(drawn):
            with torch.device(DEVICE):
                o = outlier.make((m,), k, n, 11, threshold)
            # quotients of half precision are exact in the kernel, so that ties fall as in the definition
            o.x, o.bias = (o.x.to(BF16) if dtype == F32 else o.x).to(dtype), o.bias.to(dtype)
            o.x = padded(o.x, 16) if i % 2 else o.x
            out = torch.ops.qfx.int8_outlier_linear(*o.args)
            assert outlier.violation(out, o) <= 1, (m, n, k)
        assert torch.equal(torch.ops.qfx.int8_outlier_linear(*o.args), out)
        o.x = o.x[:0]
        assert torch.ops.qfx.int8_outlier_linear(*o.args).shape == (0, n)


def test_forgotten_outliers_are_seen() -> None:
    with torch.device(DEVICE):
        o = outlier.make((33,), 256, 65, 3, 0.0, BF16)
    out = torch.ops.qfx.int8_outlier_linear(*o.args)
    without = torch.ops.qfx.int8_outlier_linear(*o.args[:5], o.weight * 0, *o.args[6:])
    assert outlier.violation(out, o) <= 1 < outlier.violation(without, o)
