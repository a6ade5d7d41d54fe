"""Weights of 2 to 8 bits times up to 8 tokens: the warps of a program share the columns, not the rows.

A program owns 16 or 32 rows. Each of its warps multiplies every W-th block of 128 columns by its own slice of the
tokens (a product with a batch axis, of which Triton gives each warp one), and the warps' sums meet in shared memory.
So a row's columns never have to be split between programs, whose sums would meet in device memory: that costs more
than a microsecond, a tenth of what a large layer takes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl

from qfx.kernels.gpu.decode4 import Decoder, decode
from qfx.kernels.gpu.launch import Launcher, interpreted
from qfx.kernels.gpu.pdl import launch_next, wait_for_previous


@triton.jit
def _kernel(
    x_ptr, x_scale_ptr, w_ptr, s_ptr, z_ptr, table_ptr, b_ptr, y_ptr,
    M, N, K, groups, x_stride, s_stride,
    DECODE: tl.constexpr, ASM: tl.constexpr, FACTOR: tl.constexpr, WORDS: tl.constexpr, HIGH: tl.constexpr,
    MIDDLE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    SCALED: tl.constexpr, BIAS: tl.constexpr, F16: tl.constexpr, EVEN_K: tl.constexpr,
    W: tl.constexpr, R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    BT: tl.constexpr = 8  # the least that the tensor cores take
    INT: tl.constexpr = DECODE == "int4_int8"
    INSIDE: tl.constexpr = ZERO and GROUP > 0 and not INT and DECODE != "int4"
    TILE: tl.constexpr = 128 * (WORDS + HIGH)  # elements
    pn = tl.program_id(0)
    blocks = tl.cdiv(K, 128)
    rows = tl.arange(0, R)
    warp = tl.arange(0, W)
    rt = tl.arange(0, BT)
    rn = pn * R + rows
    live = rt < M
    # 128 rows of 128 columns are consecutive in memory, and R divides 128
    tile = ((pn * R) // 128).to(tl.int64) * blocks * TILE
    words = rows[None, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    wp = w_ptr + (tile + ((pn * R) % 128) * WORDS) + warp[:, None, None] * TILE + words
    if HIGH:  # the second plane of a tile
        words = rows[None, :, None] * HIGH + tl.arange(0, HIGH)[None, None, :]
        hp = w_ptr + (tile + ((pn * R) % 128) * HIGH + 128 * WORDS) + warp[:, None, None] * TILE + words
    rk = warp[:, None] * 128 + tl.arange(0, 128)[None, :]
    xp = x_ptr + rt.to(tl.int64)[None, None, :] * x_stride + rk[:, :, None]
    STEP: tl.constexpr = 128 if GROUP <= 0 else GROUP
    acc = tl.zeros((W, R, BT), tl.float32)
    sp = tl.minimum(warp * 128 // STEP, groups - 1)[:, None] * s_stride + rn[None, :]
    s = tl.load(s_ptr + sp)
    z = tl.load(z_ptr + sp) if ZERO else tl.full((W, R), MIDDLE, tl.uint8)
    for block in range(0, blocks, W):
        if EVEN_K:
            w = tl.load(wp, eviction_policy="evict_first")
            x = load_x(xp, live[None, None, :])
        else:
            w = tl.load(wp, mask=(block + warp < blocks)[:, None, None], other=0)
            x = load_x(xp, live[None, None, :] & (block * 128 + rk < K)[:, :, None])
        h = None
        if HIGH:
            if EVEN_K:
                h = tl.load(hp, eviction_policy="evict_first").reshape(W * R, HIGH)
            else:
                h = tl.load(hp, mask=(block + warp < blocks)[:, None, None], other=0).reshape(W * R, HIGH)
            hp += W * TILE
        if GROUP > 0:  # the scales of the next blocks: their latency passes while these are computed
            sp = tl.minimum((block + W + warp) * 128 // STEP, groups - 1)[:, None] * s_stride + rn[None, :]
            s_next = tl.load(s_ptr + sp)
            z_next = tl.load(z_ptr + sp) if ZERO else z
        if INSIDE:  # see `qfx.kernels.gpu.w4`
            z = tl.load(z_ptr + tl.minimum((block + warp) * 128 // STEP, groups - 1)[:, None] * s_stride + rn[None, :])
        flat = decode(w.reshape(W * R, WORDS), z.reshape(W * R), table_ptr, DECODE, ZERO, F16, ASM, h)
        a = flat.reshape(W, R, 128)
        if INT:
            t = tl.dot(a, x, out_dtype=tl.int32).to(tl.float32)
        else:
            t = tl.dot(a, x, out_dtype=tl.float32)
        acc += t * s[:, :, None]
        if GROUP > 0:
            s, z = s_next, z_next
        wp += W * TILE
        xp += W * 128
    launch_next(PDL)
    total = tl.sum(acc, 0)
    inside = rn < N
    if SCALED:
        total *= tl.load(x_scale_ptr + rt, mask=live, other=0.0)[None, :] * FACTOR
    if BIAS:
        total += tl.load(b_ptr + rn, mask=inside, other=0.0).to(tl.float32)[:, None]
    out = y_ptr + rt[None, :] * N + rn[:, None]
    tl.store(out, total.to(y_ptr.dtype.element_ty), mask=live[None, :] & inside[:, None])


@triton.jit
def load_x(ptr, mask):
    """A tile of the tokens."""
    if ptr.dtype.element_ty == tl.int8:
        x = tl.load(ptr, mask=mask, other=0)
    else:
        x = tl.load(ptr, mask=mask, other=0.0)
        if interpreted and ptr.dtype.element_ty.primitive_bitwidth == 16:  # its dot of bfloat16 is wrong
            x = x.to(tl.float32)
    return x


def takes(tokens: int, group: int) -> bool:
    """Whether this form computes so many tokens with groups of this size."""
    return tokens <= 8 and (group < 0 or group % 128 == 0)


@cache
def launcher(
    warps: int, rows: int, stages: int, registers: int, decoder: Decoder, group: int, flags: tuple[bool, ...], pdl: bool
) -> Launcher:
    """The kernel; flags: zero points, scaled tokens, bias, float16, K a multiple of 128 · warps."""
    zero, scaled, bias, f16, even_k = flags
    limit: dict[str, Any] = {"maxnreg": registers} if registers else {}
    return Launcher(
        _kernel, DECODE=decoder.kind, ASM=decoder.asm, FACTOR=decoder.factor, WORDS=decoder.words,
        HIGH=decoder.high, MIDDLE=decoder.middle, GROUP=group, ZERO=zero, SCALED=scaled, BIAS=bias, F16=f16,
        EVEN_K=even_k, W=warps, R=rows, PDL=pdl,
        num_warps=warps, num_stages=stages, launch_pdl=pdl, **limit,
    )  # fmt: skip
