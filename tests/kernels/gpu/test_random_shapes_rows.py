"""Row-wise kernels by their registered ops: hundreds of random shapes each, against float64.

A kernel is compiled for a number of columns, so that each test has one, and many numbers of tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx.kernels.hadamard import transform
from qfx.kernels.quantize_rows import codes_of
from tests.kernels.gpu.draws import DEVICE, codes_right, normal, padded, peaks, rows, scales_right
from tests.kernels.law import DTYPES
from tests.kernels.test_gated_quantize import within as gated_within
from tests.kernels.test_norm_quantize import within as norm_within

pytest.importorskip("triton")

from qfx.kernels.gpu import hadamard as had
from qfx.kernels.gpu.tune import bucket
from tests.kernels.gpu.test_rowwise import hadamard_bound

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("float32_sums")]
BF16, F16, F32 = DTYPES[1], DTYPES[2], DTYPES[0]
ops = torch.ops.qfx


def strided(x: Tensor, number: int) -> Tensor:
    """As it is, or columns of a wider tensor, at a multiple of 16 bytes or not."""
    return (x, padded(x, 8, 8), padded(x, 3, 1))[number % 3]


def same_codes(codes: Tensor, scale: Tensor, y: Tensor, grid: str) -> bool:
    """Codes and scales of y, bit for bit where y is half precision; otherwise as near as float32 tells."""
    if y.dtype == F32:
        return scales_right(y, scale, grid) and codes_right(y, codes, scale, None, grid)
    expected, scales = codes_of(y, grid, None, None)
    off = codes.view(torch.uint8) != expected.view(torch.uint8)
    if bool(off.any()):
        r, c = off.nonzero()[0].tolist()
        values, places = (codes.float() != expected.float()).sum(), scale != scales
        print(f"{int(off.sum())} codes differ, {int(values)} of them as numbers, and {int(places.sum())} scales")
        print(f"[{r}, {c}] of {tuple(y.shape)}: {float(y[r, c])!r} over {float(scale[r])!r} ({float(scales[r])!r})")
        print(f"is {float(codes[r, c])}, not {float(expected[r, c])}")
    return torch.equal(scale, scales) and not bool(off.any())


QUANTIZE = [
    (1, "int8_narrow"), (2, "e4m3"), (3, "int8"), (17, "int4_narrow"), (33, "e5m2"), (64, "int8_narrow"),
    (100, "int2_narrow"), (255, "e4m3"), (1000, "int8_narrow"), (1024, "e4m3"), (1537, "int8"), (4096, "int8_narrow"),
    (5001, "e5m2"), (8192, "e4m3"), (11008, "int8_narrow"), (14336, "e4m3"), (28672, "int8_narrow"), (28671, "int8"),
    (40000, "int8_narrow"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "grid"), QUANTIZE)
def test_quantize_rows(columns: int, grid: str) -> None:
    number = QUANTIZE.index((columns, grid))
    dtype = DTYPES[number % 3]
    for i, tokens in enumerate(rows(f"quantize {columns}", 17, columns)):
        # below 2^-100, what is left of a quotient underflows: there, codes are right within a rounding
        peak = peaks(dtype)[i % 3] if dtype != BF16 or i % 3 != 1 else 1e-20
        x = strided(normal(tokens, columns, dtype, peak), number)
        codes, scale = ops.quantize_rows(x, grid)
        assert codes.shape == x.shape and scale.shape == (tokens, 1)
        assert same_codes(codes, scale, x, grid), (tokens, columns)
    assert all(torch.equal(a, b) for a, b in zip(ops.quantize_rows(x, grid), (codes, scale), strict=True))


@pytest.mark.parametrize(
    ("grid", "zero"), [("uint8", 77), ("uint4", 9), ("int8", None), ("e4m3", None), ("e5m2", None)]
)
def test_quantize_rows_static(grid: str, zero: int | None) -> None:
    for columns in (129, 4096):
        for i, tokens in enumerate(rows(f"static {grid} {columns}", 9, columns)):
            x_scale = torch.tensor((0.02, 0.3, 1e-3)[i % 3], device=DEVICE)
            point = None if zero is None else torch.tensor(zero, dtype=torch.int32, device=DEVICE)
            x = strided(normal(tokens, columns, DTYPES[i % 3] if columns == 129 else BF16), 1)
            codes, scale = ops.quantize_rows(x, grid, x_scale, point)
            assert torch.equal(scale, x_scale.expand(tokens, 1))
            assert codes_right(x, codes, scale, point, grid), (tokens, columns)


GATED = [
    (1, "silu", "", True), (5, "gelu", "int8_narrow", True), (64, "gelu_tanh", "e4m3", True),
    (127, "relu", "int8", False), (1000, "silu", "int8_narrow", True), (1024, "none", "e5m2", True),
    (3333, "gelu_tanh", "", False),
    (4096, "relu", "e4m3", True), (8192, "gelu", "", True), (11008, "silu", "int8_narrow", True),
    (14336, "silu", "e4m3", True), (14335, "gelu_tanh", "int4_narrow", True), (28672, "silu", "int8_narrow", False),
    (33000, "silu", "int8_narrow", True),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "act", "grid", "both"), GATED)
def test_gated_quantize(columns: int, act: str, grid: str, both: bool) -> None:
    number = GATED.index((columns, act, grid, both))
    dtype = DTYPES[number % 3]
    for i, tokens in enumerate(rows(f"gated {columns}", 23, columns)):
        peak = peaks(dtype)[i % 3]
        two = strided(normal(tokens, 2 * columns, dtype, None if both else peak), number)
        gate, up = two[:, :columns], two[:, columns:] if both else None
        if both and peak is not None:  # the product stays finite
            up = up * (peak if dtype != F16 else 1e-3)
        y, none = ops.gated_quantize(gate, up, act, "")
        assert not none.numel() and gated_within(y, gate, up, act), (tokens, columns)
        if grid:
            codes, scale = ops.gated_quantize(gate, up, act, grid)
            assert same_codes(codes, scale, y, grid), (tokens, columns)
    assert torch.equal(ops.gated_quantize(gate, up, act, "")[0], y)


NORM = [
    (1, "int8_narrow", False, True), (7, "e4m3", True, False), (64, "int8_narrow", False, True),
    (200, "", True, False), (768, "int8", True, False), (1000, "e5m2", False, False), (2048, "e4m3", False, True),
    (4096, "int8_narrow", False, True), (4095, "int4_narrow", False, False), (5120, "int8_narrow", True, False),
    (8192, "e4m3", False, True), (12288, "", False, True), (28672, "int8_narrow", False, True),
    (32768, "int8", True, True),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "grid", "center", "cast_first"), NORM)
def test_norm_quantize(columns: int, grid: str, center: bool, cast_first: bool) -> None:
    number = NORM.index((columns, grid, center, cast_first))
    dtype, many = DTYPES[number % 3], number % 2 == 0
    gain = torch.randn(columns, device=DEVICE).to(dtype if many else F32) if number % 5 else None
    bias = torch.randn(columns, device=DEVICE).to(dtype) if center else None
    for i, tokens in enumerate(rows(f"norm {columns}", 23, columns)):
        # squares are of float32, and have to be finite
        peak = (None, 2e-5, 3e4)[i % 3] if dtype == F16 else (None, 1e-30, 1e15)[i % 3]
        x = strided(normal(tokens, columns, dtype, peak), number)
        residual = strided(normal(tokens, columns, dtype, peak if dtype != F16 else None), number + 1) if many else None
        args = (x, residual, gain, bias, 1e-5, center, cast_first, grid, None, None, True)
        codes, scale, y, total = ops.norm_quantize(*args)
        if residual is not None:
            assert torch.equal(total, x + residual)
        read = x if residual is None else total
        assert norm_within(y, read, gain, bias, 1e-5, center), (tokens, columns)
        assert not grid or same_codes(codes, scale, y, grid), (tokens, columns)
    assert all(torch.equal(a, b) for a, b in zip(ops.norm_quantize(*args), (codes, scale, y, total), strict=True))


HADAMARD = [
    (1, 1, ""), (64, 64, "int8_narrow"), (256, 32, "e4m3"), (192, 192, "int8"), (768, 48, "int8_narrow"),
    (1024, 1024, "int8_narrow"), (1536, 768, "e4m3"), (4096, 4096, "int8_narrow"), (4096, 128, "e5m2"),
    (8192, 8192, "int8_narrow"), (8192, 64, "e4m3"), (11008, 128, "int8_narrow"), (14336, 14336, "int8_narrow"),
    (28672, 28672, "int8_narrow"), (28672, 1024, "e4m3"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "block", "grid"), HADAMARD)
def test_hadamard(columns: int, block: int, grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # values and codes by the same plan, so that they are of the same bits
    monkeypatch.setattr(had.tune, "pick", lambda op, key, default, *_: default)
    number = HADAMARD.index((columns, block, grid))
    dtype = DTYPES[(1, 2, 1, 0)[number % 4]]
    for i, tokens in enumerate(rows(f"hadamard {columns} {block}", 21, columns)):
        x = strided(normal(tokens, columns, dtype, (None, *peaks(dtype)[1:])[i % 3] if dtype != F16 else None), number)
        exact = transform(x.double(), block)
        y, _ = ops.hadamard(x, block)
        plans = had.plans(columns, block, bucket(tokens), dtype) or had.plans(block, block, bucket(tokens), dtype)
        if x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0:  # otherwise these are not taken
            plans += had.plans_in_registers(columns, block, bucket(tokens), dtype)
        if plans:  # any of them may be chosen
            allowed = torch.zeros_like(exact)
            for plan in {(p.form, p.side, p.width): p for p in plans}.values():
                allowed = torch.maximum(allowed, hadamard_bound(x, block, plan, exact))
        else:
            terms = x.double().abs().unflatten(-1, (-1, block)).sum(-1, keepdim=True) / block**0.5
            info = torch.finfo(dtype)
            off = (block.bit_length() + 40) * 2.0**-23 * terms.expand(-1, -1, block).flatten(-2)
            allowed = off + info.eps / 2 * (exact.abs() + off) + info.smallest_normal * info.eps
        assert bool(((y.double() - exact).abs() <= allowed).all()), (tokens, columns, block)
        if grid:
            codes, scale = ops.hadamard(x, block, grid)
            assert same_codes(codes, scale, y, grid), (tokens, columns, block)
    assert torch.equal(ops.hadamard(x, block)[0], y)


@pytest.mark.parametrize(("columns", "block"), [(4096, 128), (2048, 64), (1024, 1024), (8192, 128)])
def test_codes_of_every_plan(columns: int, block: int) -> None:
    """A scale is that of the largest value of the whole token, however its columns are spread over warps."""
    x = normal(600, columns, BF16)
    plans = had.plans(columns, block, bucket(600), BF16)
    for plan in {(p.rows, p.warps, p.form): p for p in plans}.values():
        y, _ = had.hadamard(x, block, plan=plan)
        codes, scale = had.hadamard(x, block, "int8_narrow", plan=plan)
        assert same_codes(codes, scale, y, "int8_narrow"), plan


def test_wrong_values_are_seen() -> None:
    """A scale one unit off, a code one off, a value behind the functions a few units off."""
    x = normal(33, 256, BF16)
    codes, scale = ops.quantize_rows(x, "int8_narrow")
    assert same_codes(codes, scale, x, "int8_narrow") and codes_right(x, codes, scale, None, "int8_narrow")
    assert not same_codes(codes, scale * (1 + 2.0**-22), x, "int8_narrow")
    off = codes.clone()
    off[32, 255] += 1
    assert not same_codes(off, scale, x, "int8_narrow") and not codes_right(x, off, scale, None, "int8_narrow")
    up = torch.randn_like(x)
    y, _ = ops.gated_quantize(x, up, "silu", "")
    assert gated_within(y, x, up, "silu") and not gated_within(y * (1 + 2.0**-6), x, up, "silu")
    y = ops.norm_quantize(x, None, None, None, 1e-5, False, True, "", None, None, True)[2]
    assert norm_within(y, x, None, None, 1e-5, False) and not norm_within(y * (1 + 2.0**-6), x, None, None, 1e-5, False)
    y, _ = ops.hadamard(x, 256)
    exact, plan = transform(x.double(), 256), had.plans(256, 256, bucket(33), BF16)[0]
    allowed = hadamard_bound(x, 256, plan, exact)
    assert bool(((y.double() - exact).abs() <= allowed).all())
    assert not bool(((y.double().roll(1, 0) - exact).abs() <= allowed).all())
    assert not bool(((y.double() * (1 + 2.0**-6) - exact).abs() <= allowed).all())
