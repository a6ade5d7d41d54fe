"""8-bit GEMM for up to 8 tokens: the warps of a program share the columns, as in `w4_few`.

No sum has to be split between programs, so nothing meets in device memory.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

from qfx.kernels.gpu.gemm8_config import Config, Operands
from qfx.kernels.gpu.gemm8_epilogue import add_outliers, put, scaled, shifted
from qfx.kernels.gpu.launch import Launcher, capability
from qfx.kernels.gpu.pdl import launch_next, wait_for_previous


@triton.jit
def _few(
    a, b, out, a_scale, b_scale, bias, residual, a_zero, b_sums, xo, wo,
    M, N, K, a_stride, b_stride, a_scale_step, b_scale_step, a_zero_step, outliers,
    W: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
    INT8: tl.constexpr, EVEN_K: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    BT: tl.constexpr = 8  # the least that the tensor cores take
    n = tl.program_id(0)
    rt = tl.arange(0, BT)
    rn = tl.minimum(n * R + tl.arange(0, R), N - 1)
    rk = tl.arange(0, W)[:, None] * BK + tl.arange(0, BK)[None, :]
    wp = b + rn.to(tl.int64)[None, :, None] * b_stride + rk[:, None, :]
    xp = a + rt.to(tl.int64)[None, None, :] * a_stride + rk[:, :, None]
    live = (rt < M)[None, None, :]
    ACC: tl.constexpr = tl.int32 if INT8 else tl.float32
    acc = tl.zeros([W, R, BT], dtype=ACC)
    for k in range(0, K, W * BK):
        if EVEN_K:
            w = tl.load(wp, eviction_policy="evict_first")
            x = tl.load(xp, live, 0.0)
        else:
            w = tl.load(wp, (k + rk < K)[:, None, :], 0.0, eviction_policy="evict_first")
            x = tl.load(xp, live & (k + rk < K)[:, :, None], 0.0)
        acc = tl.dot(w, x, acc, out_dtype=ACC)
        wp += W * BK
        xp += W * BK
    launch_next(PDL)
    columns, rows = (n * R + tl.arange(0, R))[:, None], rt[None, :]
    total = tl.sum(acc, 0)
    y = scaled(total, rows, columns, M, N, a_scale, b_scale, a_zero, b_sums, a_scale_step, b_scale_step, a_zero_step)
    if xo is not None:
        y = add_outliers(y, xo, wo, rows, columns, M, N, outliers, True, BO)
    y = shifted(y, rows, columns, M, N, bias, residual, ACTIVATION)
    put(y, out, rows, columns, M, N)


@cache
def _launcher(config: Config, int8: bool, even_k: bool, activation: str, pdl: bool) -> Launcher:
    return Launcher(
        _few, W=config.warps, R=config.channels, BK=config.depth, BO=16, INT8=int8, EVEN_K=even_k,
        ACTIVATION=activation, PDL=pdl, num_warps=config.warps, num_stages=config.stages, launch_pdl=pdl,
    )  # fmt: skip


def launch(config: Config, o: Operands) -> None:
    """Fills `o.out` by this form."""
    (m, k), n = o.a.shape, o.b.shape[0]
    even = k % (config.warps * config.depth) == 0
    _launcher(config, o.int8, even, o.activation, capability(o.a.device) >= 90)(
        (-(-n // config.channels), 1, 1), o.a, o.b, o.out, o.a_scale, o.b_scale, o.bias, o.residual, o.a_zero,
        o.b_sums, o.xo, o.wo, m, n, k, o.a.stride(0), o.b.stride(0), int(o.a_scale.numel() > 1),
        int(o.b_scale.numel() > 1), 0 if o.a_zero is None else int(o.a_zero.numel() > 1),
        0 if o.xo is None else o.xo.shape[1],
    )  # fmt: skip
