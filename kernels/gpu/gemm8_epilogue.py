"""What the 8-bit GEMMs do behind the sum: zero point, scales, outlier columns, bias, activation, residual."""

from __future__ import annotations

import triton
import triton.language as tl

from qfx.kernels.gpu.launch import interpreted
from qfx.kernels.gpu.rowwise import round_to

ACTIVATIONS = ("", "relu", "silu", "gelu", "gelu_tanh")
"""Names that `activate` knows; `gelu` is exact, `gelu_tanh` is its approximation by tanh."""


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """One of `ACTIVATIONS` in float32."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # as torch does, NaN stays NaN
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2 u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y


@triton.jit
def scaled(acc, rows, columns, M, N, a_scale, b_scale, a_zero, b_sums, a_scale_step, b_scale_step, a_zero_step):
    """`(acc - zero · sums) · a_scale · b_scale` in float32.

    `rows` and `columns` are tokens and channels, shaped so that they broadcast to acc: it may be either way up.
    """
    if a_zero is not None:
        zero = tl.load(a_zero + rows * a_zero_step, rows < M, 0)
        acc = acc - zero * tl.load(b_sums + columns, columns < N, 0)
    sa = tl.load(a_scale + rows * a_scale_step, rows < M, 0.0)
    sb = tl.load(b_scale + columns * b_scale_step, columns < N, 0.0)
    return acc.to(tl.float32) * sa * sb


@triton.jit
def add_outliers(y, xo, wo, rows, columns, M, N, outliers, SWAPPED: tl.constexpr, BO: tl.constexpr):
    """Adds `xo @ wo.T`, both with `outliers` columns, to the tile; SWAPPED says that its rows are channels."""
    for k in range(0, outliers, BO):
        inner = k + tl.arange(0, BO)
        if SWAPPED:
            left = tl.load(wo + columns.to(tl.int64) * outliers + inner[None, :], columns < N, 0.0)
            right = tl.load(xo + rows.to(tl.int64) * outliers + inner[:, None], rows < M, 0.0)
        else:
            left = tl.load(xo + rows.to(tl.int64) * outliers + inner[None, :], rows < M, 0.0)
            right = tl.load(wo + columns.to(tl.int64) * outliers + inner[:, None], columns < N, 0.0)
        if interpreted:
            y += tl.dot(left.to(tl.float32), right.to(tl.float32))
        else:
            y = tl.dot(left, right, y)
    return y


@triton.jit
def shifted(y, rows, columns, M, N, bias, residual, ACTIVATION: tl.constexpr):
    """`act(y + bias) + residual`."""
    if bias is not None:
        y += tl.load(bias + columns, columns < N, 0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    if residual is not None:
        at = rows.to(tl.int64) * N + columns
        y += tl.load(residual + at, (rows < M) & (columns < N), 0.0).to(tl.float32)
    return y


@triton.jit
def put(y, out, rows, columns, M, N):
    """Stores a tile, either way up, to the `[M, N]` output."""
    tl.store(out + (rows.to(tl.int64) * N + columns), round_to(y, out.dtype.element_ty), (rows < M) & (columns < N))
