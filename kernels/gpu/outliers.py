"""`qfx::int8_outlier_linear` on a GPU: one launch quantizes x and sets outliers apart, one computes both products."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qfx.kernels import int8_outlier_linear as op
from qfx.kernels.gpu import gemm8, rowwise
from qfx.kernels.gpu.launch import Launcher
from qfx.kernels.gpu.rowwise import Tile, quantize_tile, round_to


@triton.jit
def _split(
    x, inlier, columns, codes, scale, xo, tokens, x_stride, count, width,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BO: tl.constexpr, KIND: tl.constexpr,
    LO: tl.constexpr, HI: tl.constexpr, REACH: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    row_mask = row < tokens
    x_at, out = row[:, None] * x_stride, row[:, None] * D
    top = tl.zeros([ROWS], tl.float32)
    for start in tl.static_range(0, D, BLOCK):
        c = start + col
        y = tl.load(x + x_at + c, row_mask[:, None] & (c < D), 0.0).to(tl.float32)
        y = tl.where(tl.load(inlier + c, c < D, 0) != 0, y, 0.0)
        top = tl.maximum(top, tl.max(tl.abs(y), 1))
        if D <= BLOCK:
            mask = row_mask[:, None] & (c < D)
            quantize_tile(y, codes, scale, None, None, row, out + c, mask, row_mask, top, KIND, LO, HI, REACH, CLAMP)
    if D > BLOCK:
        for start in range(0, D, BLOCK):
            c = start + col
            mask = row_mask[:, None] & (c < D)
            y = tl.load(x + x_at + c, mask, 0.0).to(tl.float32)
            y = tl.where(tl.load(inlier + c, c < D, 0) != 0, y, 0.0)
            quantize_tile(y, codes, scale, None, None, row, out + c, mask, row_mask, top, KIND, LO, HI, REACH, CLAMP)
    # the outliers; padding, and channels that are none after all, as zeros
    for first in range(0, width, BO):
        j = first + tl.arange(0, BO)
        column = tl.load(columns + j, j < count, 0)
        picked = (j < count) & (tl.load(inlier + column) == 0)
        v = tl.load(x + x_at + column[None, :], row_mask[:, None] & picked[None, :], 0.0).to(tl.float32)
        wanted = row_mask[:, None] & (j < width)[None, :]
        tl.store(xo + (row[:, None] * width + j[None, :]), round_to(v, xo.dtype.element_ty), wanted)


@functools.cache
def _launcher(tile: Tile, columns: int, width: int) -> Launcher:
    grid = rowwise.grid_meta(op.GRID, True)
    outliers = min(64, triton.next_power_of_2(width))
    return Launcher(
        _split, D=columns, ROWS=tile.rows, BLOCK=tile.block, BO=outliers, **grid, num_warps=tile.warps, num_stages=1
    )


def split(x: Tensor, inlier: Tensor, columns: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of x without its outliers, and the outliers.

    Args:
        x: `[tokens, channels]`, consecutive channels.
        inlier: bool `[channels]`.
        columns: int32 `[n]`; those that inlier names are no outliers.
        width: columns of the third output, n or more.
        dtype: of the third output.

    Returns:
        int8 `[tokens, channels]`, float32 `[tokens, 1]`, and `[tokens, width]` of dtype.
    """
    tokens, channels = x.shape
    codes = torch.empty((tokens, channels), dtype=torch.int8, device=x.device)
    scale = torch.empty((tokens, 1), dtype=torch.float32, device=x.device)
    picked = torch.empty((tokens, width), dtype=dtype, device=x.device)
    if tokens:
        tile = rowwise.default_tile(channels, tokens)
        _launcher(tile, channels, width)(
            (-(-tokens // tile.rows), 1, 1),
            x,
            inlier.view(torch.int8),
            columns,
            codes,
            scale,
            picked,
            tokens,
            x.stride(0),
            columns.shape[0],
            width,
        )
    return codes, scale, picked


def outlier_linear(
    x: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_weight: Tensor | None,
    threshold: float,
    capacity: int,
) -> Tensor:
    """The op; arguments as its own, checked. `refusal` says what it does not take."""
    flat = rowwise.as_rows(x)
    if outlier_columns is not None and outlier_weight is not None:
        # one tensor of columns belongs to one weight, or to several of as many channels
        inlier = gemm8.kept(_inliers, outlier_columns, lambda c: op.inliers(c, flat.shape[1]))
        columns, weight = outlier_columns, outlier_weight.contiguous()
    else:
        columns, inlier, weight = op.outliers(flat, codes, w_scale, None, None, threshold, capacity)
    if columns.shape[0] == 0:
        columns, width = torch.zeros(1, dtype=torch.int32, device=x.device), 1
        q, scale, _ = split(flat, inlier, columns, width, torch.bfloat16)
        y = gemm8.product(q, scale, codes, w_scale, bias, None, "", x.dtype)
    else:
        q, scale, picked = split(flat, inlier, columns, weight.shape[1], weight.dtype)
        y = gemm8.product(q, scale, codes, w_scale, bias, None, "", x.dtype, outliers=(picked, weight))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


_inliers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def refusal(x: Tensor, codes: Tensor) -> str | None:
    """None if `outlier_linear` takes these, otherwise the reason why not."""
    if x.dtype not in rowwise.FLOATS:
        return f"outliers: {x.dtype} is not bfloat16, float16 or float32"
    return gemm8.refusal(codes, codes)
