"""8-bit GEMM for few tokens: the weights are the M operand, so that 16 tokens are enough for wgmma.

The K dimension is split over CTAs where there are fewer channels than the device has room for. Partial sums go through
a workspace; the CTA that arrives last adds them in a fixed order, so the result does not depend on who was first.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from qfx.kernels.gpu.gemm8_config import Config, Operands, descriptor
from qfx.kernels.gpu.gemm8_epilogue import add_outliers, put, scaled, shifted
from qfx.kernels.gpu.launch import Launcher, capability
from qfx.kernels.gpu.parts import counters, sum_parts
from qfx.kernels.gpu.pdl import launch_next, wait_for_previous


@triton.jit
def _skinny(
    a,
    b,
    out,
    work,
    counts,
    a_scale,
    b_scale,
    bias,
    residual,
    a_zero,
    b_sums,
    xo,
    wo,
    M,
    N,
    K,
    a_stride,
    b_stride,
    a_scale_step,
    b_scale_step,
    a_zero_step,
    outliers,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    INT8: tl.constexpr,
    PROMOTE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    pid = tl.program_id(0)
    tiles_t = tl.cdiv(M, BT)
    # tiles of the same weights next to each other: all but one read them from L2
    t = pid % tiles_t
    part = (pid // tiles_t) % SPLIT
    n = pid // tiles_t // SPLIT
    steps = tl.cdiv(K, BK)
    first, last = part * steps // SPLIT, (part + 1) * steps // SPLIT

    ACC: tl.constexpr = tl.int32 if INT8 else tl.float32
    acc = tl.zeros([BN, BT], dtype=ACC)
    if TMA:
        for k in tl.range(first, last):
            w = b.load([n * BN, k * BK])
            x = a.load([t * BT, k * BK])
            acc = tl.dot(w, x.T, acc, max_num_imprecise_acc=PROMOTE, out_dtype=ACC)
    else:
        inner = tl.arange(0, BK)[None, :]
        w_rows = tl.minimum(tl.arange(0, BN), N - 1 - n * BN)[:, None]
        x_rows = tl.arange(0, BT)[:, None]
        w_at = w_rows * b_stride + inner
        x_at = x_rows * a_stride + inner
        wanted = x_rows < M - t * BT
        b += (n * BN).to(tl.int64) * b_stride
        a += (t * BT).to(tl.int64) * a_stride
        for k in tl.range(first, tl.minimum(last, K // BK)):
            w = tl.load(b + k * BK + w_at, eviction_policy="evict_first")
            x = tl.load(a + k * BK + x_at, wanted, 0.0, eviction_policy="evict_last")
            acc = tl.dot(w, x.T, acc, max_num_imprecise_acc=PROMOTE, out_dtype=ACC)
        if last > K // BK:  # what is left of K when it is no multiple of BK
            k = K // BK
            inside = inner < K - k * BK
            w = tl.load(b + k * BK + w_at, inside, 0.0)
            x = tl.load(a + k * BK + x_at, wanted & inside, 0.0)
            acc = tl.dot(w, x.T, acc, max_num_imprecise_acc=PROMOTE, out_dtype=ACC)

    launch_next(PDL)
    columns = (n * BN + tl.arange(0, BN))[:, None]
    rows = (t * BT + tl.arange(0, BT))[None, :]
    last_one = True
    if SPLIT > 1:
        acc, last_one = sum_parts(acc, work, counts, n * tiles_t + t, part, rows < M, BN, BT, SPLIT)
    if last_one:
        y = scaled(acc, rows, columns, M, N, a_scale, b_scale, a_zero, b_sums, a_scale_step, b_scale_step, a_zero_step)
        if xo is not None:
            y = add_outliers(y, xo, wo, rows, columns, M, N, outliers, True, BO)
        y = shifted(y, rows, columns, M, N, bias, residual, ACTIVATION)
        put(y, out, rows, columns, M, N)


@cache
def _launcher(config: Config, int8: bool, activation: str, pdl: bool) -> Launcher:
    return Launcher(
        _skinny,
        num_warps=config.warps,
        num_stages=config.stages,
        BT=config.tokens,
        BN=config.channels,
        BK=config.depth,
        BO=16,
        SPLIT=config.split,
        TMA=config.tma,
        INT8=int8,
        # fp8 sums inside wgmma keep about 14 bits: add them up in float32 every so many products
        PROMOTE=None if int8 or not config.promote else min(config.promote, config.depth),
        ACTIVATION=activation,
        PDL=pdl,
        launch_pdl=pdl,
    )


def launch(config: Config, o: Operands) -> None:
    """Fills `o.out` by the swapped form."""
    (m, k), n = o.a.shape, o.b.shape[0]
    tiles_t, tiles_n = -(-m // config.tokens), -(-n // config.channels)
    tiles = tiles_t * tiles_n
    work = counts = None
    if config.split > 1:
        size = tiles * config.split * config.tokens * config.channels
        work = torch.empty(size, dtype=torch.int32 if o.int8 else torch.float32, device=o.a.device)
        counts = counters(-(-tiles // 16) * 16, o.a.device)
    a: object = o.a
    b: object = o.b
    if config.tma:
        a, b = descriptor(o.a, (config.tokens, config.depth)), descriptor(o.b, (config.channels, config.depth))
    _launcher(config, o.int8, o.activation, capability(o.a.device) >= 90)(
        (tiles * config.split, 1, 1),
        a,
        b,
        o.out,
        work,
        counts,
        o.a_scale,
        o.b_scale,
        o.bias,
        o.residual,
        o.a_zero,
        o.b_sums,
        o.xo,
        o.wo,
        m,
        n,
        k,
        o.a.stride(0),
        o.b.stride(0),
        int(o.a_scale.numel() > 1),
        int(o.b_scale.numel() > 1),
        0 if o.a_zero is None else int(o.a_zero.numel() > 1),
        0 if o.xo is None else o.xo.shape[1],
    )
