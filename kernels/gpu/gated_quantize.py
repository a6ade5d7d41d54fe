"""`act(gate) · up` of rows, then codes: one read, one write. With neither, it quantizes rows as they are."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfx.kernels.gpu import rowwise, tune
from qfx.kernels.gpu.launch import Launcher, capability
from qfx.kernels.gpu.pdl import launch_next, wait_for_previous
from qfx.kernels.gpu.rowwise import Tile, quantize_tile, round_to, rounded, sigmoid


@triton.jit
def activate(v, ACT: tl.constexpr):
    """An activation function of float32."""
    if ACT == "relu":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "silu":
        v = v * sigmoid(v)
    elif ACT == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # (1 + tanh z) / 2 = sigmoid(2 z): nothing cancels
        v = v * sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    return v


@triton.jit
def _value(gate, up, g_at, u_at, mask, ACT: tl.constexpr, POLICY: tl.constexpr):
    g = tl.load(gate + g_at, mask=mask, other=0.0, eviction_policy=POLICY)
    v = activate(g.to(tl.float32), ACT)
    if up is not None:
        v = v * tl.load(up + u_at, mask=mask, other=0.0, eviction_policy=POLICY).to(tl.float32)
    if up is not None or ACT != "none":
        v = rounded(v, g.dtype)
    return v


@triton.jit
def _kernel(
    gate, up, codes, scale, x_scale, x_zero, tokens, g_stride, u_stride,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, KIND: tl.constexpr,
    LO: tl.constexpr, HI: tl.constexpr, REACH: tl.constexpr, CLAMP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    row_mask = row < tokens
    g_at, u_at, out = row[:, None] * g_stride, row[:, None] * u_stride, row[:, None] * D
    if D <= BLOCK:
        mask = row_mask[:, None] & (col < D)
        y = _value(gate, up, g_at + col, u_at + col, mask, ACT, "evict_first")
        launch_next(PDL)
        if KIND == "":
            tl.store(codes + (out + col), round_to(y, codes.dtype.element_ty), mask=mask)
        else:
            quantize_tile(
                y, codes, scale, x_scale, x_zero, row, out + col, mask, row_mask, tl.max(tl.abs(y), 1),
                KIND, LO, HI, REACH, CLAMP,
            )  # fmt: skip
    else:
        top = tl.zeros([ROWS], tl.float32)
        if KIND != "" and x_scale is None:
            for start in range(0, D, BLOCK):
                c = start + col
                y = _value(gate, up, g_at + c, u_at + c, row_mask[:, None] & (c < D), ACT, "evict_last")
                top = tl.maximum(top, tl.max(tl.abs(y), 1))
        for start in range(0, D, BLOCK):
            c = start + col
            mask = row_mask[:, None] & (c < D)
            y = _value(gate, up, g_at + c, u_at + c, mask, ACT, "evict_first")
            if KIND == "":
                tl.store(codes + (out + c), round_to(y, codes.dtype.element_ty), mask=mask)
            else:
                quantize_tile(
                    y, codes, scale, x_scale, x_zero, row, out + c, mask, row_mask, top,
                    KIND, LO, HI, REACH, CLAMP,
                )  # fmt: skip


@functools.cache
def _launcher(tile: Tile, columns: int, act: str, x_grid: str, dynamic: bool, pdl: bool) -> Launcher:
    grid = rowwise.grid_meta(x_grid, dynamic)
    return Launcher(
        _kernel, D=columns, ROWS=tile.rows, BLOCK=tile.block, ACT=act, **grid, PDL=pdl,
        num_warps=tile.warps, num_stages=1, launch_pdl=pdl,
    )  # fmt: skip


def gated_quantize(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    x_grid: str,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes of `act(gate) · up` rounded to gate's dtype, or that itself if x_grid is empty.

    Args:
        gate: `[tokens, columns]`, columns consecutive.
        up: of gate's shape and dtype, with its own row stride; or None.
        act: silu, gelu, gelu_tanh, relu or none.
        x_grid: name of a grid, or empty.
        x_scale: float32 scalar, or None for a scale of each token's own.
        x_zero: int32 scalar beside a static scale, or None.
        tile: chosen if None.

    Returns:
        Codes `[tokens, columns]`, scales float32 `[tokens, 1]` (empty without a grid).
    """
    tokens, columns = gate.shape
    codes = torch.empty((tokens, columns), dtype=rowwise.code_dtype(x_grid, gate.dtype), device=gate.device)
    scale = torch.empty((tokens, 1) if x_grid else (0,), dtype=torch.float32, device=gate.device)
    if tokens == 0:
        return codes, scale
    pdl = capability(gate.device) >= 90
    rest = (codes, scale, x_scale, x_zero, tokens, gate.stride(0), 0 if up is None else up.stride(0))

    def run(tile: Tile, g: Tensor) -> None:
        _launcher(tile, columns, act, x_grid, x_scale is None, pdl)((-(-tokens // tile.rows), 1, 1), g, up, *rest)

    if tile is None:
        bucket = tune.bucket(tokens)
        form = f"{act}-gated" if up is not None else act
        key = (x_grid or "values", form, rowwise.FLOATS[gate.dtype], columns, bucket)
        default = rowwise.default_tile(columns, bucket)
        tile = tune.pick("gated_quantize", key, default, lambda: rowwise.tiles(columns), run, gate)
    run(tile, gate)
    return codes, scale


def quantize_rows(
    x: Tensor, x_grid: str, x_scale: Tensor | None = None, x_zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of x `[tokens, columns]` and scales float32 `[tokens, 1]`; arguments as for `gated_quantize`."""
    return gated_quantize(x, None, "none", x_grid, x_scale, x_zero)
