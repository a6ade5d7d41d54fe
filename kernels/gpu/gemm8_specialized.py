"""8-bit GEMM for many tokens on Hopper with warps of two kinds: one loads by TMA, eight multiply.

`tl.dot` waits for each product of integers before it starts the next one (only float sums are left in flight), which
leaves the tensor cores idle between steps. Here a step's products are started before those of the last one have
ended, and the loads of the next tile go on while this one is scaled and stored. Not for Triton's interpreter.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qfx.kernels.gpu.gemm8_config import Config, Operands
from qfx.kernels.gpu.gemm8_epilogue import scaled, shifted
from qfx.kernels.gpu.gemm8_large import place, processors
from qfx.kernels.gpu.launch import Launcher

# names that newer Tritons changed
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _load(a, b, xs, ws, full, free, M, N, K, GROUP: gl.constexpr, STAGES: gl.constexpr):
    BM: gl.constexpr = a.block_shape[0]
    BN: gl.constexpr = b.block_shape[0]
    BK: gl.constexpr = a.block_shape[1]
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, BN), gl.num_programs(0)):
        m, n = place(tile, M, N, BM, BN, GROUP)
        for k in range(gl.cdiv(K, BK)):
            slot = step % STAGES
            # the slot's first turn finds the barrier of the turn before it already passed
            mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
            ready = full.index(slot)
            mbarrier.expect(ready, (BM + BN) * BK)
            _load_tile(a, [m * BM, k * BK], ready, xs.index(slot))
            _load_tile(b, [n * BN, k * BK], ready, ws.index(slot))
            step += 1


@gluon.jit
def _multiply(
    a, b, out, xs, ws, staged, full, free, a_scale, b_scale, bias, residual, a_zero, b_sums,
    M, N, K, a_scale_step, b_scale_step, a_zero_step,
    GROUP: gl.constexpr, STAGES: gl.constexpr, INT8: gl.constexpr, LAYOUT: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = a.block_shape[0]
    BN: gl.constexpr = b.block_shape[0]
    BK: gl.constexpr = a.block_shape[1]
    ACC: gl.constexpr = gl.int32 if INT8 else gl.float32
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, BM) * gl.cdiv(N, BN), gl.num_programs(0)):
        m, n = place(tile, M, N, BM, BN, GROUP)
        acc = gl.zeros([BM, BN], ACC, LAYOUT)
        for k in range(gl.cdiv(K, BK)):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            acc = warpgroup_mma(xs.index(slot), ws.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            # at most this step is under way: the slot of the last one is free
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))

        rows = gl.expand_dims(m * BM + gl.arange(0, BM, gl.SliceLayout(1, LAYOUT)), 1)
        columns = gl.expand_dims(n * BN + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT)), 0)
        y = scaled(acc, rows, columns, M, N, a_scale, b_scale, a_zero, b_sums, a_scale_step, b_scale_step, a_zero_step)
        y = shifted(y, rows, columns, M, N, bias, residual, ACTIVATION)
        tma.store_wait(0)  # the last tile has left
        _barrier()
        staged.store(y.to(out.dtype))
        fence_async_shared()
        _barrier()
        _store_tile(out, [m * BM, n * BN], staged)
    tma.store_wait(0)


@gluon.jit
def _specialized(
    a, b, out, a_scale, b_scale, bias, residual, a_zero, b_sums,
    M, N, K, a_scale_step, b_scale_step, a_zero_step,
    GROUP: gl.constexpr, STAGES: gl.constexpr, INT8: gl.constexpr, LAYOUT: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = a.block_shape[0]
    BN: gl.constexpr = b.block_shape[0]
    BK: gl.constexpr = a.block_shape[1]
    xs = gl.allocate_shared_memory(a.dtype, [STAGES, BM, BK], a.layout)
    ws = gl.allocate_shared_memory(b.dtype, [STAGES, BN, BK], b.layout)
    staged = gl.allocate_shared_memory(out.dtype, [BM, BN], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    a, b, out, xs, ws, staged, full, free, a_scale, b_scale, bias, residual, a_zero, b_sums,
                    M, N, K, a_scale_step, b_scale_step, a_zero_step, GROUP, STAGES, INT8, LAYOUT, ACTIVATION,
                ),
            ),
            (_load, (a, b, xs, ws, full, free, M, N, K, GROUP, STAGES)),
        ],
        [1],
        [24],
    )  # fmt: skip


@cache
def _launcher(config: Config, int8: bool, activation: str) -> Launcher:
    width = min(config.channels, 128 if int8 else 256)
    layout = gl.NVMMADistributedLayout([3, 0], [config.warps, 1], [16, width, 32])
    return Launcher(
        _specialized,
        num_warps=config.warps,
        GROUP=config.group,
        STAGES=config.stages,
        INT8=int8,
        LAYOUT=layout,
        ACTIVATION=activation,
    )


@cache
def _shared_layout(block: tuple[int, int], dtype: Any) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, dtype))


_NAMES = {"torch.int8": "int8", "torch.float8_e4m3fn": "float8e4nv", "torch.float8_e5m2": "float8e5"}


def _descriptor(x: Tensor, block: tuple[int, int]) -> Any:
    """A descriptor without its checks, which callers made."""
    name = str(x.dtype)
    d = object.__new__(TensorDescriptor)
    d.base, d.shape, d.strides, d.block_shape, d.padding = x, list(x.shape), list(x.stride()), list(block), "zero"
    d.layout = _shared_layout(block, _NAMES.get(name, name.removeprefix("torch.")))
    return d


def launch(config: Config, o: Operands) -> None:
    """Fills `o.out`; takes scales and a bias only."""
    (m, k), n = o.a.shape, o.b.shape[0]
    tiles = -(-m // config.tokens) * -(-n // config.channels)
    _launcher(config, o.int8, o.activation)(
        (min(tiles, processors(o.a.device)), 1, 1),
        _descriptor(o.a, (config.tokens, config.depth)),
        _descriptor(o.b, (config.channels, config.depth)),
        _descriptor(o.out, (config.tokens, config.channels)),
        o.a_scale,
        o.b_scale,
        o.bias,
        o.residual,
        o.a_zero,
        o.b_sums,
        m,
        n,
        k,
        int(o.a_scale.numel() > 1),
        int(o.b_scale.numel() > 1),
        0 if o.a_zero is None else int(o.a_zero.numel() > 1),
    )
