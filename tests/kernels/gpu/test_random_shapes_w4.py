"""4-bit linears on a GPU by their registered ops: hundreds of random shapes each, against float64.

As in `test_random_shapes`; a weight is laid out from its nibbles directly, so that huge ones take no time.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qfx.kernels import nf4_linear, nibbles
from tests.kernels.gpu.draws import (
    DEVICE,
    LIMITS,
    bound,
    codes8,
    codes_right,
    integers,
    lost,
    multiple,
    normal,
    odd,
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
BF16, F16, F32, INT8, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn
EACH = 20
"""Shapes of one test."""


class Four(NamedTuple):
    """A weight of 4 bits: its tiles, scales `[groups, padded rows]`, zero points, and what it stands for."""

    tiles: Tensor
    scale: Tensor
    zero: Tensor | None
    w: Tensor


def four(n: int, k: int, group: int, layout: str, zeros: bool, signed: bool, values: Tensor | None = None) -> Four:
    """Random codes; scales are powers of two, so that products with integers are exact."""
    groups = 1 if group < 0 else k // group
    codes = torch.randint(0, 16, (n, k), device=DEVICE, dtype=torch.uint8)
    scale = powers((n, groups), -3, 0)
    zero = torch.randint(0, 16, (n, groups), device=DEVICE, dtype=torch.uint8) if zeros else None
    if values is not None:
        w = values.double()[codes.long()]
    elif zero is not None:
        w = codes.double() - zero.double().repeat_interleave(k // groups, 1)
    else:
        w = codes.double() - (16.0 * (codes > 7) if signed else 8.0)
    w = w * scale.double().repeat_interleave(k // groups, 1)
    padded_zero = None if zero is None else nibbles.pad_scale(zero, n)
    return Four(nibbles.tile(codes, layout), nibbles.pad_scale(scale, n), padded_zero, w)


def four_violation(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    exact: bool,
    dropped: Tensor | float = 0.0,
    half: float = 0.0,
) -> float:
    """As in `test_w4`; `half` is the rounding of a weight that is written in half precision first."""
    x = x.double()
    b = torch.zeros((), dtype=torch.float64, device=x.device) if bias is None else bias.double()
    y = x @ w.t() + b
    terms = y.abs() if exact else x.abs() @ w.abs().t() + b.abs()
    roundings = 4 if exact else 2 * (w.shape[1] + 8)
    return worst(out, y, bound(y, terms, roundings, out.dtype, dropped + (0.0 if exact else half) * terms))


FOUR_REGIMES = {
    "one token": lambda r, k: (1, odd(r, 1, 30000), k(r, 32, 1000)),
    "few tokens": lambda r, k: (odd(r, 3, 15), odd(r, 1, 30000), k(r, 32, 1000)),
    "split": lambda r, k: (odd(r, 17, 31), odd(r, 1, 4000), k(r, 4096, 28672)),
    "middle": lambda r, k: (odd(r, 33, 63), odd(r, 1, 3000), k(r, 32, 2048)),
    "more": lambda r, k: (odd(r, 257, 511), odd(r, 1, 3000), k(r, 32, 2048)),
    "many tokens": lambda r, k: (odd(r, 1025, 20000), odd(r, 1, 3000), k(r, 32, 2048)),
}
"""Tokens, output and input channels by how the 4-bit kernel is configured; k draws a multiple of the group."""


def four_shapes(name: str, group: int, number: int, products: str) -> list[tuple[int, int, int]]:
    """Of two regimes, by number."""

    def depth(r: Random, least: int, most: int) -> int:
        if group < 0 and number % 2:
            return odd(r, least, most)
        return multiple(r, max(group, 16), max(least, group), most)

    found = []
    for regime in (list(FOUR_REGIMES)[(number + i) % 6] for i in (0, 3)):
        draw = lambda r, d=regime: FOUR_REGIMES[d](r, depth)  # noqa: E731
        found += shapes(f"{name} {group} {regime}", EACH - 2, draw, products)
    return found


GROUPS = [32, 64, 128, 256, -1]
W4A16 = [(g, z, d) for d in (BF16, F16) for z in (False, True) for g in GROUPS]


@pytest.mark.parametrize(("group", "zeros", "dtype"), W4A16)
def test_w4a16(group: int, zeros: bool, dtype: torch.dtype) -> None:
    number = W4A16.index((group, zeros, dtype))
    for i, (m, n, k) in enumerate(four_shapes(f"w4a16 {zeros} {dtype}", group, number, "products")):
        exact = i % 2 == 0 or k > 4096
        f = four(n, k, group, "quarters", zeros, False)
        x = integers(m, k, 2, dtype) if exact else normal(m, k, dtype, (None, 1e-4, 100.0)[i % 3])
        order = torch.randperm(k, device=DEVICE).to(torch.int32) if i % 5 == 4 else None
        x = padded(x, 16) if i % 4 == 1 else x
        bias = integers(1, n, 8, dtype).reshape(-1) if group > 64 else None
        args = (x, f.tiles, f.scale, f.zero, order, bias, n, group)
        out = torch.ops.qfx.w4a16_linear(*args)
        picked = x if order is None else x[:, order.long()]
        half = torch.finfo(dtype).eps / 2 if m > 64 else 0.0
        assert four_violation(out, picked, f.w, bias, exact, half=half) <= 1, (m, n, k)
        assert i % 6 or torch.equal(torch.ops.qfx.w4a16_linear(*args), out)
    assert torch.ops.qfx.w4a16_linear(x[:0], *args[1:]).shape == (0, n)


W4A8 = [("int8_narrow", g, False) for g in GROUPS] + [("int8", g, True) for g in GROUPS[2:]]
W4A8 += [("e4m3", g, False) for g in GROUPS]


@pytest.mark.parametrize(("grid", "group", "zeros"), W4A8)
def test_w4a8(grid: str, group: int, zeros: bool) -> None:
    """The linear and, of the same codes, the GEMM."""
    number = W4A8.index((grid, group, zeros))
    dtype = (BF16, F16, F32)[number % 3]
    layout = "fours" if grid == "e4m3" else "halves"
    code = E4M3 if grid == "e4m3" else INT8
    for i, (m, n, k) in enumerate(four_shapes(f"w4a8 {grid} {zeros}", group, number, "products")):
        exact = i % 3 != 0 or k > 2048 or (code == E4M3 and m * n * k > LIMITS["summed"])
        f = four(n, k, group, layout, zeros, True)
        bias = integers(1, n, 8, dtype).reshape(-1) if group > 64 else None
        codes, x_scale = codes8(m, k, code, exact), powers((m, 1), -2, 0)
        codes = codes.clamp(-2, 2) if code == INT8 and exact else codes
        args = (codes, x_scale, f.tiles, f.scale, f.zero, None, bias, n, group, dtype)
        out = torch.ops.qfx.w4a8_gemm(*args)
        dropped = 0.0 if exact or code == INT8 else lost(codes, f.w) * x_scale.double()
        x = codes.double() * x_scale.double()
        assert four_violation(out, x, f.w, bias, exact, dropped) <= 1, (m, n, k)
        assert i % 6 or torch.equal(torch.ops.qfx.w4a8_gemm(*args), out)
    assert torch.ops.qfx.w4a8_gemm(codes[:0], x_scale[:0], *args[2:]).shape == (0, n)


@pytest.mark.parametrize(("grid", "group", "zeros"), W4A8)
def test_w4a8_linear(grid: str, group: int, zeros: bool) -> None:
    """One depth for a test: what quantizes rows is compiled for each."""
    number = W4A8.index((grid, group, zeros))
    dtype = (BF16, F16, F32)[number % 3]
    layout = "fours" if grid == "e4m3" else "halves"
    depth = (256, 768, 1280, 512)[number % 4] if group > 0 else (136, 1000)[number % 2]
    drawn = []
    for regime in (list(FOUR_REGIMES)[(number + i) % 6] for i in (0, 3)):
        draw = lambda r, d=regime: (*FOUR_REGIMES[d](r, lambda *_: 0)[:2], depth)  # noqa: E731
        drawn += shapes(f"{grid} {group} {regime}", EACH // 2 + 2, draw, "summed")
    for i, (m, n, k) in enumerate(drawn):
        f = four(n, k, group, layout, zeros, True)
        x = normal(m, k, dtype, (None, *peaks(dtype)[1:])[i % 3] if dtype != F16 else None)
        order = torch.randperm(k, device=DEVICE).to(torch.int32) if i % 5 == 4 else None
        x = padded(x, 16) if i % 4 == 1 else x
        bias = integers(1, n, 8, dtype).reshape(-1) if group > 64 else None
        args = (x, f.tiles, f.scale, f.zero, order, None, bias, n, group, grid)
        out = torch.ops.qfx.w4a8_linear(*args)
        picked = x if order is None else x[:, order.long()]
        q, s, _ = quantized(picked, grid, None, None, False)
        assert codes_right(picked, q, s, None, grid) and scales_right(picked, s, grid)
        dropped = lost(q, f.w) * s.double() if grid == "e4m3" else 0.0
        assert four_violation(out, q.double() * s.double(), f.w, bias, False, dropped) <= 1, (m, n, k)
    assert torch.equal(torch.ops.qfx.w4a8_linear(*args), out)
    assert torch.ops.qfx.w4a8_linear(x[:0], *args[1:]).shape == (0, n)


TABLES = [(32, "nf4"), (64, "nf4"), (64, "fp4_bnb"), (128, "nf4"), (-1, "e2m1")]
NF4 = [(group, table, dtype) for group, table in TABLES for dtype in (BF16, F16)]


@pytest.mark.parametrize(("group", "table", "dtype"), NF4)
def test_nf4(group: int, table: str, dtype: torch.dtype) -> None:
    values = nf4_linear.table(table, torch.device(DEVICE), dtype)
    number = NF4.index((group, table, dtype))
    for i, (m, n, k) in enumerate(four_shapes(f"nf4 {table} {dtype}", group, number, "products")):
        exact = table == "e2m1" and i % 2 == 0
        f = four(n, k, group, "pairs", False, False, values)
        x = integers(m, k, 2, dtype) if exact else normal(m, k, dtype, (None, 1e-4, 100.0)[i % 3])
        x = padded(x, 16) if i % 4 == 1 else x
        bias = integers(1, n, 8, dtype).reshape(-1) if group == 64 else None
        args = (x, f.tiles, f.scale, bias, n, group, table)
        out = torch.ops.qfx.nf4_linear(*args)
        half = torch.finfo(dtype).eps / 2 if m > 64 else 0.0
        assert four_violation(out, x, f.w, bias, exact, half=half) <= 1, (m, n, k)
        assert i % 6 or torch.equal(torch.ops.qfx.nf4_linear(*args), out)
    assert torch.ops.qfx.nf4_linear(x[:0], *args[1:]).shape == (0, n)


@pytest.mark.parametrize("layout", ["quarters", "halves", "fours", "pairs"])
def test_a_wrong_nibble_is_seen(layout: str) -> None:
    values = nf4_linear.table("e2m1", torch.device(DEVICE), BF16) if layout == "pairs" else None
    f = four(130, 4096, 128, layout, False, layout in ("halves", "fours"), values)
    x, one = integers(33, 4096, 1, BF16), torch.ones(33, 1, device=DEVICE)
    x[7] = 0
    x[7, 3712] = 1  # the first column of tile 29, which every layout holds in a row's first byte
    off = f.tiles.clone()
    off[1, 29, 1, 0] ^= 1
    outs = []
    for tiles in (f.tiles, off):
        if layout in ("quarters", "pairs"):
            more = (None, None) if layout == "quarters" else ()
            op = torch.ops.qfx.w4a16_linear if layout == "quarters" else torch.ops.qfx.nf4_linear
            tail = () if layout == "quarters" else ("e2m1",)
            outs.append(op(x, tiles, f.scale, *more, None, 130, 128, *tail))
        else:
            codes = x.to(E4M3 if layout == "fours" else INT8)
            outs.append(torch.ops.qfx.w4a8_gemm(codes, one, tiles, f.scale, None, None, None, 130, 128, F32))
    right, wrong = (four_violation(out, x, f.w, None, True) for out in outs)
    assert right <= 1 < wrong
