"""Random shapes, random operands, and how far an output may be from float64.

A kernel is compiled anew for each configuration and for each class of its sizes (1, multiples of 16, others). Shapes
are drawn within a regime, whose members share these, so that many shapes take few compilations.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qfx.core.grid import Float, Int
from qfx.core.qtensor import dynamic_scale
from qfx.core.spec import QSpec
from qfx.kernels.quantize_rows import named_grid
from tests.kernels.law import U32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Shape = tuple[int, int, int]
LIMITS = {"elements": 2**26, "output": 2**23, "products": 2**34, "summed": 2**29}
"""Elements of an operand and of an output, products of one GEMM, and of one whose partial sums are followed."""


def odd(r: random.Random, least: int, most: int) -> int:
    """An odd number: never a multiple of 16."""
    return 2 * r.randint(least // 2, (most - 1) // 2) + 1


def multiple(r: random.Random, of: int, least: int, most: int) -> int:
    """A multiple of a number."""
    return of * r.randint(-(-least // of), most // of)


REGIMES: dict[str, Callable[[random.Random], Shape]] = {
    "one token": lambda r: (1, odd(r, 1001, 30000), multiple(r, 16, 16, 512)),
    "few tokens": lambda r: (odd(r, 3, 15), odd(r, 1, 5000), multiple(r, 16, 528, 1008)),
    "deep": lambda r: (odd(r, 17, 31), odd(r, 3, 1023), multiple(r, 16, 8192, 28672)),
    "any depth": lambda r: (odd(r, 3, 15), odd(r, 3, 3000), odd(r, 17, 511)),
    "wide": lambda r: (odd(r, 3, 15), odd(r, 11601, 30000), multiple(r, 16, 16, 4096)),
    "middle": lambda r: (odd(r, 65, 127), odd(r, 3, 3000), multiple(r, 16, 16, 512)),
    "many tokens": lambda r: (odd(r, 1025, 20000), multiple(r, 16, 16, 4096), multiple(r, 16, 16, 4096)),
    "many, any depth": lambda r: (odd(r, 1025, 20000), odd(r, 3, 3000), odd(r, 17, 1500)),
}
"""Tokens, output and input channels by how the 8-bit GEMM is configured; "deep" shares a product's depth."""


def shapes(name: str, count: int, draw: Callable[[random.Random], Shape], products: str = "products") -> list[Shape]:
    """`count` shapes within the limits, always the same ones for a name."""
    r, found = random.Random(name), []
    for _ in range(1000 * count):
        m, n, k = draw(r)
        fits = max(m * k, n * k) <= LIMITS["elements"] and m * n <= LIMITS["output"]
        if fits and m * n * k <= LIMITS[products]:
            found.append((m, n, k))
        if len(found) == count:
            return found
    raise ValueError(f"{name}: hardly any shape is within the limits")


def padded(x: Tensor, more: int, before: int = 0) -> Tensor:
    """The same values as columns of a wider tensor, whose other columns are extreme."""
    wide = x.new_empty(x.shape[0], x.shape[1] + more + before)
    wide.view(torch.uint8).fill_(0x7B)  # large in every dtype, and finite
    view = wide[:, before : before + x.shape[1]]
    view.copy_(x)
    return view


def normal(m: int, k: int, dtype: torch.dtype, peak: float | None = None) -> Tensor:
    """Normal values with a row of zeros and a large channel; the largest magnitude is `peak`, if that is given."""
    x = torch.randn(m, k, device=DEVICE)
    x[:, k // 2] *= 20
    if m > 1:
        x[m // 2] = 0
    if peak is not None and m:
        x *= peak / x.abs().amax().clamp_min(1e-3)
    return x.to(dtype)


def peaks(dtype: torch.dtype) -> tuple[float | None, ...]:
    """Magnitudes to try: usual ones, tiny ones, huge ones."""
    return (None, 2e-5, 3e4) if dtype == torch.float16 else (None, 1e-30, 1e30)


def integers(m: int, k: int, most: int, dtype: torch.dtype) -> Tensor:
    """Small integers, whose products and sums no format rounds."""
    return torch.randint(-most, most + 1, (m, k), device=DEVICE).to(dtype)


def powers(shape: tuple[int, ...], least: int, most: int) -> Tensor:
    """float32 powers of two."""
    return torch.exp2(torch.randint(least, most + 1, shape, device=DEVICE).float())


def codes8(m: int, k: int, dtype: torch.dtype, exact: bool = False) -> Tensor:
    """Random codes; small integers if sums have to be exact. One row is zero, one of the largest magnitude."""
    if exact and dtype != torch.int8:
        return integers(m, k, 1, dtype)
    if dtype == torch.int8:
        x = torch.randint(-128, 128, (m, k), device=DEVICE, dtype=dtype)
    else:
        x = torch.randn(m, k, device=DEVICE)
    if m > 2:
        x[m // 3] = 0
        x[m // 2] = -128 if dtype == torch.int8 else torch.finfo(dtype).max / 256
    return x.to(dtype)


def lost(x: Tensor, w: Tensor) -> Tensor:
    """How much of `x @ w.T` of float8 values a tensor core may drop, wherever it starts a sum anew.

    A step adds 32 products to the running sum after shifting all 33 to the largest one's exponent, where it keeps 13
    bits behind the leading one. Whichever earlier step the sum started at, it is the difference of two of the sums so
    far, plus what was lost since.
    """
    each = 33 * 2.0**-13
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64, device=x.device)
    least, most, off = total.clone(), total.clone(), total.clone()
    for a, b in zip(x.split(32, 1), w.split(32, 1), strict=True):
        a, b = a.double(), b.double()
        reach = torch.maximum(total - least, most - total)
        off = off + each * torch.maximum(reach + off, a.abs() @ b.abs().t())
        total = total + a @ b.t()
        least, most = torch.minimum(least, total), torch.maximum(most, total)
    return off


def bound(y: Tensor, terms: Tensor, roundings: int, dtype: torch.dtype, more: Tensor | float = 0.0) -> Tensor:
    """`roundings` of float32 on all terms' magnitudes, `more`, and one rounding to the output's dtype."""
    n = roundings * U32
    tight = n / (1 - n) * terms + more
    info = torch.finfo(dtype)
    return tight + info.eps / 2 * (y.abs() + tight) + info.smallest_normal * info.eps


def worst(out: Tensor, y: Tensor, allowed: Tensor) -> float:
    """The largest distance in units of the bound; infinite for NaN.

    What rounds to the power of two behind the largest number of a format becomes infinite, so that an infinity of the
    right sign is as far off as the exact value is below that power.
    """
    assert out.shape == y.shape and out.is_contiguous()
    if not out.numel():
        return 0.0
    info = torch.finfo(out.dtype)
    beyond = info.max / (1 - info.eps / 2)
    right = out.isinf() & ((out > 0) == (y > 0))
    off = torch.where(right, (beyond - y.abs()).clamp_min(0), (out.double() - y).abs())
    ratio = (off / allowed).max()
    return float(ratio) if bool(ratio.isfinite()) else float("inf")


def codes_right(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, name: str) -> bool:
    """Whether codes are the nearest ones to `x / scale`, or as near within two roundings of the quotient."""
    if not x.numel():
        return True
    grid = named_grid(name)
    ratio = x.double() / scale.double()
    if isinstance(grid, Float):
        ratio = ratio.clamp(-grid.reach, grid.reach)
        nearest = grid.encode(ratio.float()).double()
        off = (codes.double() - ratio).abs() - (nearest - ratio).abs()
        return bool((off <= 2.0**-21 * ratio.abs()).all())
    shift = 0.0 if zero is None else zero.double()
    low, high = grid.lo - shift, grid.hi - shift
    if codes.dtype == torch.int8 and grid.hi == 255:  # the same, less 128
        low, high = low - 128, high - 128
    wanted = torch.minimum(torch.maximum(ratio, torch.zeros_like(ratio) + low), torch.zeros_like(ratio) + high)
    return bool(((codes.double() - shift - wanted).abs() <= 0.5 + 2.0**-22 * ratio.abs()).all())


def scales_right(x: Tensor, scale: Tensor, name: str) -> bool:
    """Whether dynamic scales of tokens are those of the definition, bit for bit."""
    grid = named_grid(name)
    symmetric = not isinstance(grid, Int) or grid.signed
    expected, _ = dynamic_scale(x.float(), QSpec(grid, (1, -1), symmetric=symmetric, dynamic=True))
    return torch.equal(scale, expected)


def rows(name: str, count: int, columns: int) -> Iterator[int]:
    """Numbers of tokens for rows of so many columns: none, one (of some), few (up to 512), many."""
    r = random.Random(name)
    most = min(20000, LIMITS["output"] // columns)
    yield 0
    yield 1 if r.random() < 0.4 else 3
    for i in range(count - 2):
        yield odd(r, 515, most) if i % 3 == 0 and most > 600 else odd(r, 3, min(511, most))
