"""The 8-bit GEMM against sums in float64: int8 products are exact, fp8 sums within what their accumulator keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx.kernels.gpu.gemm8 import gemm8
from qfx.kernels.gpu.gemm8_config import Config
from qfx.kernels.gpu.launch import INTERPRET

interpreted = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
SMALL = [
    Config("skinny", 16, 64, 32, 2, 4),
    Config("skinny", 16, 64, 32, 2, 4, split=3),
    Config("skinny", 32, 64, 32, 2, 4, tma=False),
    Config("skinny", 16, 128, 64, 2, 4, split=2, tma=False),
    Config("large", 32, 64, 32, 2, 4),
    Config("large", 32, 64, 32, 2, 4, persistent=True, parts=2, group=2),
    Config("large", 32, 32, 32, 2, 4, tma=False, group=1),
]
SHAPES = [(1, 64, 32), (5, 70, 160), (20, 33, 80), (33, 130, 64), (3, 1, 16)]


def codes(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random codes with a row of zeros and one of extremes."""
    if dtype == INT8:
        x = torch.randint(-128, 128, (rows, columns), dtype=dtype)
    else:
        x = torch.randn(rows, columns).to(dtype)
    x[rows // 3] = 0
    x[rows // 2] = -128 if dtype == INT8 else torch.finfo(dtype).max / 256
    return x.to(device)


def expected(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias=None, residual=None, outliers=None) -> Tensor:
    """In float64, in which products and sums of codes are exact."""
    y = (a.double() @ b.double().t()) * a_scale.double() * b_scale.double()
    if outliers is not None:
        y = y + outliers[0].double() @ outliers[1].double().t()
    y = y if bias is None else y + bias.double()
    return y if residual is None else y + residual.double()


def bound(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, y: Tensor, extra: Tensor, lossy: int = 0) -> Tensor:
    """How far float32 may be from `expected`: one rounding each of the sum (int8), the products with two scales, and
    the additions, each at most 2⁻²⁴ of the absolute sum of all terms.

    fp8 also rounds in K additions. With `lossy` = p it drops, inside the tensor core, up to 2⁻¹³ of the largest value
    of a step for each of its 32 addends and the running sum, over the p/32 steps of p products.
    """
    k = a.shape[1]
    terms = (a.double().abs() @ b.double().abs().t()) * a_scale.double() * b_scale.double()
    roundings = 8 if a.dtype == INT8 else k + 8
    return roundings * 2.0**-24 * (terms + extra) + lossy / 32 * 33 * 2.0**-13 * terms + 2.0**-24 * y.abs()


def check(m: int, n: int, k: int, dtype: torch.dtype, config: Config | None, device: str = "cpu", lossy: int = 0):
    a, b = codes(m, k, dtype, device), codes(n, k, dtype, device)
    a_scale, b_scale = torch.rand(m, 1, device=device) + 0.1, torch.rand(n, device=device) + 0.1
    bias, residual = torch.randn(n, device=device), torch.randn(m, n, device=device) * 8
    out = gemm8(a, b, a_scale, b_scale, bias, residual, "", torch.float32, config=config)
    y = expected(a, b, a_scale, b_scale, bias, residual)
    extra = bias.abs() + residual.abs()
    assert out.shape == (m, n) and out.dtype == torch.float32
    assert ((out.double() - y).abs() <= bound(a, b, a_scale, b_scale, y, extra, lossy)).all()
    # without scales integers come out as they are, as long as float32 holds them
    ones = torch.ones(1, device=device)
    plain = gemm8(a, b, ones, ones, out_dtype=torch.float32, config=config)
    if dtype == INT8:
        exact = a.double() @ b.double().t()
        assert torch.equal(plain.double()[exact.abs() <= 2**24], exact[exact.abs() <= 2**24])


@interpreted
@pytest.mark.parametrize("config", SMALL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_exact(shape: tuple[int, int, int], config: Config) -> None:
    check(*shape, INT8, config)


@interpreted
@pytest.mark.parametrize("config", [SMALL[1], SMALL[2], SMALL[5]], ids=str)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_fp8(dtype: torch.dtype, config: Config) -> None:
    check(5, 70, 160, dtype, config)


@interpreted
@pytest.mark.parametrize("config", [SMALL[2], SMALL[3], SMALL[6]], ids=str)
def test_pointers_take_any_depth_and_stride(config: Config) -> None:
    check(7, 33, 41, INT8, config)
    check(2, 5, 3, INT8, config)
    a, b = codes(9, 61, INT8)[:, 3:50], codes(20, 70, INT8)[::2, 1:48]
    y = gemm8(a, b, torch.ones(1), torch.ones(1), out_dtype=torch.float32, config=config)
    assert torch.equal(y.double(), a.double() @ b.double().t())


@interpreted
@pytest.mark.parametrize("config", SMALL, ids=str)
def test_zero_point(config: Config) -> None:
    a, b = codes(6, 48, INT8), codes(40, 48, INT8)
    zero, sums = torch.tensor(-77, dtype=torch.int32), b.sum(1, dtype=torch.int32)
    out = gemm8(a, b, torch.ones(()), torch.ones(40), None, None, "", torch.float32, zero, sums, config=config)
    assert torch.equal(out.double(), (a.double() + 77) @ b.double().t())


ACTIVATIONS = {
    "": lambda y: y,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}


@interpreted
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("config", [SMALL[1], SMALL[5]], ids=str)
def test_activation_and_bfloat16(config: Config, name: str) -> None:
    a, b = codes(6, 48, INT8), codes(40, 48, INT8)
    a_scale, b_scale = torch.rand(6, 1) / 100, torch.rand(40) / 100
    bias, residual = torch.randn(40).bfloat16(), torch.randn(6, 40).bfloat16()
    y = expected(a, b, a_scale, b_scale, bias)
    y32 = ACTIVATIONS[name](y) + residual.double()
    out = gemm8(a, b, a_scale, b_scale, bias, residual, name, config=config)
    assert out.dtype == torch.bfloat16
    # float32 roundings of values below 64 and of exp, each a few units of 2⁻²⁴, then one rounding to bfloat16
    assert ((out.double() - y32).abs() <= 2.0**-8 * y32.abs() + 64 * 16 * 2.0**-24).all()


@interpreted
@pytest.mark.parametrize("config", [SMALL[0], SMALL[1], SMALL[4], SMALL[6]], ids=str)
def test_outliers(config: Config) -> None:
    a, b = codes(6, 48, INT8), codes(40, 48, INT8)
    a_scale, b_scale = torch.rand(6, 1), torch.rand(40)
    xo, wo = (torch.randn(6, 32) * 100).bfloat16(), torch.randn(40, 32).bfloat16()
    out = gemm8(a, b, a_scale, b_scale, out_dtype=torch.float32, outliers=(xo, wo), config=config)
    y = expected(a, b, a_scale, b_scale, outliers=(xo, wo))
    extra = 32 * (xo.double().abs() @ wo.double().abs().t())
    assert ((out.double() - y).abs() <= bound(a, b, a_scale, b_scale, y, extra)).all()


@interpreted
def test_split_sums_do_not_depend_on_each_other() -> None:
    a, b = codes(20, 96, E4M3), codes(70, 96, E4M3)
    scale = torch.ones(1)
    config = Config("skinny", 16, 64, 32, 2, 4, split=3)
    first = gemm8(a, b, scale, scale, out_dtype=torch.float32, config=config)
    assert all(torch.equal(gemm8(a, b, scale, scale, out_dtype=torch.float32, config=config), first) for _ in range(3))


def test_no_tokens() -> None:
    y = gemm8(codes(3, 16, INT8)[:0], codes(5, 16, INT8), torch.ones(0, 1), torch.ones(5))
    assert y.shape == (0, 5) and y.dtype == torch.bfloat16
