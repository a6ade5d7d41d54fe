"""Hadamard transform in blocks of 16 to 128 columns, without leaving the registers, then codes.

One product of side 32 on the tensor cores takes the bits 5 4 3 2 0 of a column's number, and sums and differences of
float32 the bits 1 and 6, whose columns a thread loads itself: 2 additions for a value, and nothing is rounded before
the result. With these bits, 16 bytes that a thread loads are its left operand as they are. Warps meet only for the
largest value of a token.

Gluon states the layouts; not for Triton's interpreter.
"""

from __future__ import annotations

import functools

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from qfx.kernels.gpu import rowwise
from qfx.kernels.gpu.hadamard_registers import (
    all_warps,
    all_warps_layout,
    fold,
    halves,
    pack,
    step_matrix,
    warp_top,
    write_codes,
    write_values,
)
from qfx.kernels.gpu.launch import Launcher


@gluon.jit
def _butterfly(y, INNER: gl.constexpr):
    """Sums and differences along the bit of weight INNER."""
    OUTER: gl.constexpr = y.shape[0] // (2 * INNER)
    a, b = gl.split(y.reshape((OUTER, 2, INNER)).permute((0, 2, 1)))
    return gl.join(a + b, a - b).permute((0, 2, 1)).reshape((OUTER * 2 * INNER,))


@gluon.jit
def _kernel(
    x, h_ptr, out, scale, x_scale, x_zero, tokens, x_stride,
    D: gl.constexpr, T: gl.constexpr, W: gl.constexpr, BLOCK: gl.constexpr, NORM: gl.constexpr, AHEAD: gl.constexpr,
    IN: gl.constexpr, OUT: gl.constexpr, ALL: gl.constexpr,
    KIND: gl.constexpr, LO: gl.constexpr, HI: gl.constexpr, REACH: gl.constexpr, CLAMP: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    dtype: gl.constexpr = x.dtype.element_ty
    F16: gl.constexpr = dtype == gl.float16
    y_top = gl.allocate_shared_memory(gl.int32, [W], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    at = gl.arange(0, 32, gl.SliceLayout(1, B))[:, None] * 32 + gl.arange(0, 32, gl.SliceLayout(0, B))[None, :]
    h = gl.load(h_ptr + at)
    column = gl.arange(0, D // 2, IN)
    words = x.to(gl.pointer_type(gl.int32), bitcast=True)
    programs = gl.num_programs(0)
    token = gl.program_id(0)
    if AHEAD:
        ahead = gl.load(words + (token.to(gl.int64) * x_stride + column))
    while token < tokens:
        if AHEAD:
            w = ahead
            ahead = gl.load(words + (gl.minimum(token + programs, tokens - 1).to(gl.int64) * x_stride + column))
        else:
            w = gl.load(words + (token.to(gl.int64) * x_stride + column))
        # the bits (.., warps, 987, 6, 5, 43, 2, 1, 0) to (.., 6, warps, 1, 987) and (5, 2, 43, 0)
        v = halves(w, dtype).reshape((T, W, 8, 2, 2, 4, 2, 2, 2)).permute((0, 3, 1, 7, 2, 4, 6, 5, 8))
        v = gl.convert_layout(v.reshape((D // 32, 32)), A, assert_trivial=True)
        y = mma_v2(v, h, gl.zeros((D // 32, 32), gl.float32, MMA))
        y = y.reshape((T, 2, W, 2, 8, 2, 2, 4, 2)).permute((0, 2, 4, 1, 5, 7, 6, 3, 8)).reshape((D,))
        y = _butterfly(y, 2)
        if BLOCK > 64:
            y = _butterfly(y, 64)
        w = pack(y, NORM, F16)
        row = token.to(gl.int64) * D
        if KIND == "":
            write_values(w, out + row, OUT, dtype)
        else:
            top = 0.0
            if x_scale is None:
                top_words = w
                if T > 1:
                    top_words = fold(w, D // 4, F16)
                top_words = fold(fold(fold(fold(top_words, 32, F16), 16, F16), 2, F16), 1, F16)
                y_top.store(warp_top(top_words.reshape((W, 32)), F16))
                top = all_warps(y_top, ALL)
            write_codes(w, top, out + row, scale + token, x_scale, x_zero, OUT, KIND, LO, HI, REACH, CLAMP, F16)
        token += programs


def takes(columns: int, block: int, dtype: torch.dtype, warps: int = 8) -> bool:
    """Whether the kernel computes such rows with so many warps: 32 or 64 values a thread."""
    fitting = columns in (1024 * warps, 2048 * warps) and warps in (2, 4, 8)
    return dtype in (torch.bfloat16, torch.float16) and fitting and block in (16, 32, 64, 128)


@functools.cache
def layouts(columns: int, warps: int) -> tuple[gl.DistributedLinearLayout, gl.DistributedLinearLayout]:
    """Words as they are loaded, and the columns of the result."""
    high = list(range(10, 9 + warps.bit_length()))
    regs, lanes = [1, 2, 5, 6, *range(10 + len(high), columns.bit_length() - 1)], [3, 4, 7, 8, 9]
    words = gl.DistributedLinearLayout(
        [[1 << b - 1] for b in regs], [[1 << b - 1] for b in lanes], [[1 << b - 1] for b in high], [], [columns // 2]
    )
    result = gl.DistributedLinearLayout(
        [[1 << b] for b in [0, *regs]], [[1 << b] for b in lanes], [[1 << b] for b in high], [], [columns]
    )
    return words, result


@functools.cache
def matrix(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix of the product."""
    return step_matrix([0, 3, 4, 2, 5], block).to(dtype).to(device)


@functools.cache
def launcher(columns: int, block: int, x_grid: str, dynamic: bool, warps: int, ahead: bool) -> Launcher:
    """The kernel; its arguments are those of `hadamard.py`'s with one matrix, and x's stride in words."""
    words, result = layouts(columns, warps)
    return Launcher(
        _kernel, D=columns, T=columns // 1024 // warps, W=warps, BLOCK=block, NORM=block**-0.5, AHEAD=ahead, IN=words,
        OUT=result, ALL=all_warps_layout(warps), **rowwise.grid_meta(x_grid, dynamic), num_warps=warps,
    )  # fmt: skip
