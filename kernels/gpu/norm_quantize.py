"""RMSNorm or LayerNorm of rows, behind an optional residual sum, then codes or values: one read, one write."""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from qfx.kernels.gpu import rowwise, tune
from qfx.kernels.gpu.launch import Launcher, capability
from qfx.kernels.gpu.pdl import ROOM, launch_next, prefetch, wait_for_previous
from qfx.kernels.gpu.rowwise import Tile, keep, quantize_tile, round_to, rounded


@triton.jit
def _mean(v, D: tl.constexpr):
    return tl.sum(v, 1) * (1.0 / D)


@triton.jit
def _kernel(
    x, residual, gain, bias, total, y, codes, scale, x_scale, x_zero, tokens, x_stride, r_stride, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CENTER: tl.constexpr, CAST_FIRST: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
    KIND: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, REACH: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    if gain is not None:
        prefetch(gain, D, BLOCK, PDL)
    if bias is not None:
        prefetch(bias, D, BLOCK, PDL)
    wait_for_previous(PDL)
    launch_next(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    row_mask, col_mask = row < tokens, col < D
    mask = row_mask[:, None] & col_mask
    at = row[:, None] * D + col
    loaded = tl.load(x + (row[:, None] * x_stride + col), mask=mask, other=0.0, eviction_policy="evict_first")
    v = loaded.to(tl.float32)
    if EARLY and gain is not None:  # few tokens: do not wait twice; many: the registers hold other tokens
        g = tl.load(gain + col, mask=col_mask, other=0.0, eviction_policy="evict_last")
    if residual is not None:
        at_r = row[:, None] * r_stride + col
        r = tl.load(residual + at_r, mask=mask, other=0.0, eviction_policy="evict_first")
        v = rounded(v + r.to(tl.float32), loaded.dtype)
        tl.store(total + at, round_to(v, loaded.dtype), mask=mask)
    v = keep(v)
    if CENTER:
        v = tl.where(col_mask, v - _mean(v, D)[:, None], 0.0)
    deviation = tl.sqrt_rn(_mean(v * v, D) + eps)
    v = v * tl.div_rn(tl.full(deviation.shape, 1.0, tl.float32), deviation)[:, None]
    if CAST_FIRST:
        v = rounded(v, loaded.dtype)
    if gain is not None:
        if not EARLY:
            g = tl.load(gain + col, mask=col_mask, other=0.0, eviction_policy="evict_last")
        v = v * g.to(tl.float32)
    if bias is not None:
        v = v + tl.load(bias + col, mask=col_mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    v = rounded(v, loaded.dtype)
    if y is not None:
        tl.store(y + at, round_to(v, loaded.dtype), mask=mask)
    if KIND != "":
        quantize_tile(
            v, codes, scale, x_scale, x_zero, row, at, mask, row_mask, tl.max(tl.abs(v), 1), KIND, LO, HI, REACH, CLAMP
        )


@functools.cache
def _launcher(
    tile: Tile, columns: int, center: bool, cast_first: bool, x_grid: str, flags: tuple[bool, ...]
) -> Launcher:
    dynamic, early, pdl = flags
    grid = rowwise.grid_meta(x_grid, dynamic)
    meta = {"D": columns, "ROWS": tile.rows, "BLOCK": tile.block, "CENTER": center, "CAST_FIRST": cast_first}
    return Launcher(_kernel, **meta, EARLY=early, PDL=pdl, **grid, num_warps=tile.warps, num_stages=1, launch_pdl=pdl)


def whole_rows(columns: int) -> list[Tile]:
    """The candidates that hold a row."""
    return [tile for tile in rowwise.tiles(columns) if tile.block >= columns]


def norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    cast_first: bool,
    x_grid: str,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    keep_y: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `qfx::norm_quantize` of x `[tokens, columns]`, at most `rowwise.MAX_BLOCK` columns, and at least 1."""
    tokens, columns = x.shape
    codes, scale, y, total = rowwise.outputs(x, x_grid, keep_y, residual is not None)
    if tokens == 0:
        return codes, scale, y, total
    rest = (
        residual, gain, bias, total if residual is not None else None, y if y.numel() else None,
        codes, scale, x_scale, x_zero, tokens, x.stride(0), 0 if residual is None else residual.stride(0), eps,
    )  # fmt: skip
    pdl = capability(x.device) >= 90

    def run(tile: Tile, x: Tensor) -> None:
        programs = -(-tokens // tile.rows)  # where more of them wait, that costs more than the launch
        flags = x_scale is None, tokens <= 512, pdl and programs <= ROOM
        _launcher(tile, columns, center, cast_first, x_grid, flags)((programs, 1, 1), x, *rest)

    if tile is None:
        bucket = tune.bucket(tokens)
        form = ("layer" if center else "rms") + ("" if residual is None else "-residual") + ("-y" if keep_y else "")
        key = (x_grid or "values", form, rowwise.FLOATS[x.dtype], columns, bucket)
        default = rowwise.default_tile(columns, bucket)
        tile = tune.pick("norm_quantize", key, default, lambda: whole_rows(columns), run, x)
    run(tile, x)
    return codes, scale, y, total
