"""Device code that ends every row-wise kernel: a scale for each token, and codes.

Division. `x / s` is a correctly rounded division in the reference, and ties between two codes are common where x is
half precision, so that `x · (1/s)` would move every thousandth code. Here it is `q = x r`, `e = q s - x`, `q - e r`
with two fused multiply-adds and r = 1/s rounded to nearest: the same float32 as the division for every pair of
mantissas of bfloat16 or float16 x and a scale amax / reach (`tests/kernels/gpu/test_rowwise.py` goes through all of
them), so codes equal the reference's. With these signs -0 stays -0, which `x - q s` and `q + e r` would make 0. Below
2⁻¹⁰⁰ the remainder e may underflow, and a tie fall to the other side.

Rounding. Adding 1.5 · 2²³ rounds a float32 below 2²² half to even, and leaves the integer in its low bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfx.core.grid import Float, Int
from qfx.kernels.gpu.launch import interpreted
from qfx.kernels.quantize_rows import named_grid

FLOATS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""The dtypes that the kernels take, and their names in the tables of configurations."""
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def round_to(v, dtype: tl.constexpr):
    """Float32 rounded to a dtype, half to even."""
    if interpreted and dtype == tl.bfloat16:  # the interpreter's own cast rounds ties up and drops carries
        bits = v.to(tl.int32, bitcast=True)
        v = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return v.to(dtype)


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """Float32 rounded to the values of a dtype, still float32; two at a time, as single casts run at a quarter rate."""
    if interpreted or dtype == tl.float32:
        v = round_to(v, dtype).to(tl.float32)
    elif dtype == tl.bfloat16:
        v = tl.inline_asm_elementwise(
            "{.reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000;}",
            "=r,=r,r,r",
            [v],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        v = tl.inline_asm_elementwise(
            "{.reg .b32 t; .reg .b16 a, b; cvt.rn.f16x2.f32 t, $3, $2; mov.b32 {a, b}, t; "
            "cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}",
            "=r,=r,r,r",
            [v],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return v


@triton.jit
def sigmoid(v):
    """`1 / (1 + exp(-v))` to a few units in the last place; 0 where it is below the smallest normal float32."""
    if interpreted:
        v = 1.0 / (1.0 + tl.exp(-v))
    else:
        v = tl.inline_asm_elementwise(
            "{.reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, t;}",
            "=r,r",
            [v],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return v


@triton.jit
def divide(x, s, r):
    """`x / s` with r = 1/s; the sign of a zero is x's."""
    if interpreted:
        q = x / s
    else:
        # PTX, as Triton's own `-x` is 0 - x, an operation more; ptxas makes `neg` part of the multiply-add
        q = tl.inline_asm_elementwise(
            "{.reg .f32 e, n, q; mul.rn.f32 q, $1, $3; neg.f32 n, $1; fma.rn.f32 e, q, $2, n; neg.f32 n, $3; "
            "fma.rn.f32 $0, e, n, q;}",
            "=r,r,r,r",
            [x, s, r],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return q


@triton.jit
def scale_of(top, x_scale, REACH: tl.constexpr):
    """The static scale, or that of rows whose largest magnitude is `top`."""
    if x_scale is not None:
        s = tl.zeros_like(top) + tl.load(x_scale)
    else:
        s = tl.div_rn(top, tl.full(top.shape, REACH, tl.float32))
        s = tl.where(top > 0, tl.maximum(s, _TINY), 1.0)
    return s


@triton.jit
def encode(q, x_zero, KIND: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, CLAMP: tl.constexpr):
    """Codes of scaled values. A dynamic scale lets nothing but the outer half of a code's reach be clamped."""
    if KIND == "int":
        if x_zero is not None:  # the reference rounds, adds the zero point and clamps
            z = tl.load(x_zero)
            q = tl.minimum(tl.maximum(q, LO - z.to(tl.float32)), HI - z.to(tl.float32))
            codes = (q + _MAGIC).to(tl.int32, bitcast=True) + z
        else:
            if CLAMP:
                q = tl.minimum(tl.maximum(q, LO), HI)
            codes = (q + _MAGIC).to(tl.int32, bitcast=True)
        codes = codes.to(tl.int8 if LO < 0 else tl.uint8)
    else:
        if CLAMP:
            q = tl.clamp(q, LO, HI, propagate_nan=tl.PropagateNan.ALL)
        if interpreted:  # its cast differs in ties: round to the format's step first
            step = (q.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            if KIND == "e4m3":
                c = tl.maximum(step, 0.015625) * 1572864.0  # 1.5 · 2^20 of 2^-6
            else:
                c = tl.maximum(step, 6.103515625e-05) * 3145728.0  # 1.5 · 2^21 of 2^-14
            sign = q.to(tl.int32, bitcast=True) & -2147483648
            q = (((q + c) - c).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        codes = q.to(tl.float8e4nv if KIND == "e4m3" else tl.float8e5)
    return codes


@triton.jit
def keep(v):
    """The value itself, held in one register: without this it is unpacked twice, for its maximum and its code."""
    if not interpreted:
        v = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True, pack=1)
    return v


@triton.jit
def quantize_tile(
    y, codes, scale, x_scale, x_zero, row, at, mask, row_mask, top,
    KIND: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, REACH: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Codes of float32 y `[rows, columns]` to `codes + at`, scales of `top` to `scale + row`."""
    y = keep(y)
    s = scale_of(top, x_scale, REACH)
    r = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
    tl.store(scale + row, s, mask=row_mask)
    q = divide(y, s[:, None], r[:, None])
    tl.store(codes + at, encode(q, x_zero, KIND, LO, HI, CLAMP), mask=mask)


@dataclass(frozen=True)
class Tile:
    """How a row-wise kernel runs.

    Attributes:
        rows: tokens in a block.
        block: columns held at once, a power of two; fewer than a row has means that the row is read twice.
        warps: of 32 threads.
    """

    rows: int
    block: int
    warps: int


MAX_BLOCK = 32768
"""Columns that fit into the registers of one block of threads: 32 values a thread."""


@functools.cache
def default_tile(columns: int, tokens: int) -> Tile:
    """16 values a thread while there are fewer rows than multiprocessors' slots, then 32: more bytes in flight."""
    block = min(max(2, triton.next_power_of_2(columns)), MAX_BLOCK)  # casts take two values at a time
    rows = max(1, 2048 // block) if tokens > 512 else 1
    each = 16 if tokens <= 512 else 32
    return Tile(rows, block, min(32, max(1, rows * block // (32 * each))))


@functools.cache
def tiles(columns: int) -> tuple[Tile, ...]:
    """The candidates for rows of so many columns."""
    block = min(max(2, triton.next_power_of_2(columns)), MAX_BLOCK)  # casts take two values at a time
    found: dict[Tile, None] = {}
    for rows in (1, 2, 4, 8, 16):
        if rows > 1 and rows * block > 8192:
            break
        for each in (8, 16, 32, 64):
            warps = rows * block // (32 * each)
            if 1 <= warps <= 32:
                found[Tile(rows, block, warps)] = None
    if block > 8192:  # read twice, from memory and from the cache, by fewer threads
        found |= {Tile(1, 8192, 8): None, Tile(1, 8192, 16): None}
    return tuple(found) or (Tile(1, block, 1),)


@functools.cache
def grid_meta(x_grid: str, dynamic: bool) -> dict[str, Any]:
    """The compile-time arguments that describe a grid; an empty name writes values and no codes."""
    if not x_grid:
        return {"KIND": "", "LO": 0.0, "HI": 0.0, "REACH": 1.0, "CLAMP": False}
    grid = named_grid(x_grid)
    if isinstance(grid, Int):
        clamp = not (dynamic and grid.hi >= grid.reach)
        return {"KIND": "int", "LO": float(grid.lo), "HI": float(grid.hi), "REACH": grid.reach, "CLAMP": clamp}
    return {"KIND": x_grid, "LO": -grid.reach, "HI": grid.reach, "REACH": grid.reach, "CLAMP": not dynamic}


@functools.cache
def code_dtype(x_grid: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the first output: the grid's, or that of the values."""
    return named_grid(x_grid).dtype if x_grid else dtype


@functools.cache
def _has_e4m3(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def takes(x: Tensor, x_grid: str, x_scale: Tensor | None, x_zero: Tensor | None) -> str | None:
    """None if the kernels quantize x so, otherwise the reason why not."""
    if x.dtype not in FLOATS:
        return f"{x.dtype} is not bfloat16, float16 or float32"
    if not x_grid:
        return None
    grid = named_grid(x_grid)
    if isinstance(grid, Float):
        return None if x_grid != "e4m3" or _has_e4m3(x.device) else "no E4M3 on this device"
    if isinstance(grid, Int) and not grid.signed and (x_scale is None or x_zero is None):
        return f"{x_grid} needs a static scale and a zero point"
    return None


def outputs(x: Tensor, x_grid: str, keep_y: bool, summed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, values and sums of x's rows, uninitialized; those that are not wanted have no elements."""
    tokens, columns = x.shape
    y = x.new_empty((tokens, columns) if keep_y or not x_grid else (0,))
    total = x.new_empty((tokens, columns) if summed else (0,))
    if not x_grid:
        return x.new_empty(0), x.new_empty(0, dtype=torch.float32), y, total
    codes = x.new_empty((tokens, columns), dtype=code_dtype(x_grid, x.dtype))
    return codes, x.new_empty((tokens, 1), dtype=torch.float32), y, total


def as_rows(x: Tensor) -> Tensor:
    """Rows of x: `[tokens, columns]` with consecutive columns; a view where the strides allow it."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
