"""8-bit GEMM for many tokens: TMA or pointers, one tile a CTA or persistent CTAs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl

from qfx.kernels.gpu.gemm8_config import Config, Operands, descriptor
from qfx.kernels.gpu.gemm8_epilogue import add_outliers, put, scaled, shifted
from qfx.kernels.gpu.launch import Launcher, capability
from qfx.kernels.gpu.rowwise import round_to


@triton.jit
def place(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, down the columns, so that both operands stay in L2."""
    tiles_m = tl.cdiv(M, BM)
    per_group = GROUP * tl.cdiv(N, BN)
    group = tile // per_group
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = tile % per_group
    return group * GROUP + inside % height, inside // height


@triton.jit
def _finish(
    acc,
    m,
    n,
    out,
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
    a_scale_step,
    b_scale_step,
    a_zero_step,
    outliers,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    TMA_OUT: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The epilogue of one tile, in PARTS column blocks: a smaller one needs less shared memory on its way out."""
    rows = (m * BM + tl.arange(0, BM))[:, None]
    if PARTS == 2:
        left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
    else:
        left, right = acc, acc
    for part in tl.static_range(PARTS):
        first = n * BN + part * (BN // PARTS)
        columns = (first + tl.arange(0, BN // PARTS))[None, :]
        y = left if part == 0 else right
        y = scaled(y, rows, columns, M, N, a_scale, b_scale, a_zero, b_sums, a_scale_step, b_scale_step, a_zero_step)
        if xo is not None:
            y = add_outliers(y, xo, wo, rows, columns, M, N, outliers, False, BO)
        y = shifted(y, rows, columns, M, N, bias, residual, ACTIVATION)
        if TMA_OUT:
            out.store([m * BM, first], round_to(y, out.dtype))
        else:
            put(y, out, rows, columns, M, N)


@triton.jit
def _large(
    a,
    b,
    out,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    TMA_OUT: tl.constexpr,
    PARTS: tl.constexpr,
    INT8: tl.constexpr,
    PROMOTE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    ACC: tl.constexpr = tl.int32 if INT8 else tl.float32
    m, n = place(tl.program_id(0), M, N, BM, BN, GROUP)
    acc = tl.zeros([BM, BN], dtype=ACC)
    if TMA:
        for k in tl.range(tl.cdiv(K, BK)):
            x = a.load([m * BM, k * BK])
            w = b.load([n * BN, k * BK])
            acc = tl.dot(x, w.T, acc, max_num_imprecise_acc=PROMOTE, out_dtype=ACC)
    else:
        inner = tl.arange(0, BK)[None, :]
        # rows past the end repeat the last one: they are not stored, and the loop needs no mask
        x_at = tl.minimum(tl.arange(0, BM), M - 1 - m * BM)[:, None] * a_stride + inner
        w_at = tl.minimum(tl.arange(0, BN), N - 1 - n * BN)[:, None] * b_stride + inner
        a += (m * BM).to(tl.int64) * a_stride
        b += (n * BN).to(tl.int64) * b_stride
        for k in tl.range(K // BK):
            x = tl.load(a + k * BK + x_at)
            w = tl.load(b + k * BK + w_at)
            acc = tl.dot(x, w.T, acc, max_num_imprecise_acc=PROMOTE, out_dtype=ACC)
        if K % BK != 0:
            k = K // BK
            inside = inner < K - k * BK
            x = tl.load(a + k * BK + x_at, inside, 0.0)
            w = tl.load(b + k * BK + w_at, inside, 0.0)
            acc = tl.dot(x, w.T, acc, max_num_imprecise_acc=PROMOTE, out_dtype=ACC)
    _finish(
        acc, m, n, out, a_scale, b_scale, bias, residual, a_zero, b_sums, xo, wo, M, N,
        a_scale_step, b_scale_step, a_zero_step, outliers, BM, BN, BO, TMA_OUT, PARTS, ACTIVATION,
    )  # fmt: skip


@triton.jit
def _persistent(
    a,
    b,
    out,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    TMA_OUT: tl.constexpr,
    PARTS: tl.constexpr,
    INT8: tl.constexpr,
    PROMOTE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    tl.static_assert(TMA, "the persistent form reads through TMA")
    ACC: tl.constexpr = tl.int32 if INT8 else tl.float32
    steps = tl.cdiv(K, BK)
    tl.assume(steps > 0)
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    programs = tl.num_programs(0)
    done = tl.program_id(0) - programs
    # one loop over all steps of all tiles: the next tile's loads are under way while this one is scaled and stored
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        m, n = place(tile, M, N, BM, BN, GROUP)
        acc = tl.zeros([BM, BN], dtype=ACC)
        for k in range(steps):
            x = a.load([m * BM, k * BK])
            w = b.load([n * BN, k * BK])
            acc = tl.dot(x, w.T, acc, max_num_imprecise_acc=PROMOTE, out_dtype=ACC)
        # counted anew, as the loop's own m and n already belong to the loads of the next tile
        done += programs
        m_done, n_done = place(done, M, N, BM, BN, GROUP)
        _finish(
            acc, m_done, n_done, out, a_scale, b_scale, bias, residual, a_zero, b_sums, xo, wo, M, N,
            a_scale_step, b_scale_step, a_zero_step, outliers, BM, BN, BO, TMA_OUT, PARTS, ACTIVATION,
        )  # fmt: skip


@cache
def _launcher(config: Config, int8: bool, activation: str, tma_out: bool) -> Launcher:
    return Launcher(
        _persistent if config.persistent else _large,
        num_warps=config.warps,
        num_stages=config.stages,
        BM=config.tokens,
        BN=config.channels,
        BK=config.depth,
        BO=16,
        GROUP=config.group,
        TMA=config.tma,
        TMA_OUT=tma_out,
        PARTS=config.parts,
        INT8=int8,
        PROMOTE=None if int8 or not config.promote else min(config.promote, config.depth),
        ACTIVATION=activation,
    )


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def _fitting(config: Config, residual: bool, activation: bool, four_bytes: bool) -> Config:
    """The configuration, for an epilogue that takes more registers and shared memory than scales and bias do."""
    if config.tokens * config.channels <= 16384 or not (residual or activation or four_bytes):
        return config
    persistent = config.persistent and not (residual and four_bytes)
    return replace(
        config, parts=2, stages=min(config.stages, 3) if persistent else config.stages, persistent=persistent
    )


def launch(config: Config, o: Operands) -> None:
    """Fills `o.out` by the normal form."""
    # sums in tensor memory (sm_100) pass through shared memory to meet a bias, too
    more = o.activation != "" or (o.bias is not None and capability(o.a.device) >= 100)
    config = _fitting(config, o.residual is not None, more, o.out.element_size() == 4)
    (m, k), n = o.a.shape, o.b.shape[0]
    tiles = -(-m // config.tokens) * -(-n // config.channels)
    a: object = o.a
    b: object = o.b
    out: object = o.out
    tma_out = config.tma and n * o.out.element_size() % 16 == 0
    if config.tma:
        a, b = descriptor(o.a, (config.tokens, config.depth)), descriptor(o.b, (config.channels, config.depth))
    if tma_out:
        out = descriptor(o.out, (config.tokens, config.channels // config.parts))
    grid = min(tiles, processors(o.a.device)) if config.persistent else tiles
    _launcher(config, o.int8, o.activation, tma_out)(
        (grid, 1, 1),
        a,
        b,
        out,
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
