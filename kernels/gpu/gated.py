"""`act(gate) · up` of rows: a program computes a part of one row, so that a single token has many programs."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfx.kernels.gpu.gated_quantize import activate
from qfx.kernels.gpu.launch import Launcher, capability
from qfx.kernels.gpu.pdl import ROOM, launch_next, wait_for_previous
from qfx.kernels.gpu.rowwise import round_to, rounded

BLOCK = 1024
"""Columns of a program: 8 values a thread, 16 bytes of half precision."""


@triton.jit
def _kernel(
    gate, up, y, g_stride, u_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, ROOM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    if ROOM:
        launch_next(PDL)
    PARTS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    at = tl.program_id(0)
    row = (at // PARTS).to(tl.int64)
    col = (at % PARTS) * BLOCK + tl.arange(0, BLOCK)
    mask = col < D
    g = tl.load(gate + (row * g_stride + col), mask=mask, other=0.0, eviction_policy="evict_first")
    if up is not None:
        u = tl.load(up + (row * u_stride + col), mask=mask, other=0.0, eviction_policy="evict_first")
    if not ROOM:
        launch_next(PDL)
    v = rounded(activate(g.to(tl.float32), ACT), g.dtype)
    if up is not None:
        v = rounded(v * u.to(tl.float32), g.dtype)
    tl.store(y + (row * D + col), round_to(v, g.dtype), mask=mask)


@functools.cache
def _launcher(columns: int, act: str, room: bool, pdl: bool) -> Launcher:
    meta = {"D": columns, "BLOCK": BLOCK, "ACT": act, "ROOM": room, "PDL": pdl}
    return Launcher(_kernel, **meta, num_warps=4, num_stages=1, launch_pdl=pdl)


def gated(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    """The op `qfx::gated`.

    Args:
        gate: `[tokens, columns]`, columns consecutive, at least one.
        up: of gate's shape and dtype, with its own row stride; or None.
        act: silu, gelu, gelu_tanh, relu or none.

    Returns:
        `[tokens, columns]` of gate's dtype.
    """
    tokens, columns = gate.shape
    y = torch.empty((tokens, columns), dtype=gate.dtype, device=gate.device)
    if tokens:
        programs = tokens * -(-columns // BLOCK)
        launch = _launcher(columns, act, programs <= ROOM, capability(gate.device) >= 90)
        launch((programs, 1, 1), gate, up, y, gate.stride(0), 0 if up is None else up.stride(0))
    return y
