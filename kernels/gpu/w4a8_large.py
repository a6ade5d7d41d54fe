"""Weights of 4 bits times many tokens of 8 bits on Hopper: one thread loads by TMA, two warpgroups multiply in turns.

A tile is 256 rows of the weight by 64 or 128 tokens. Each warpgroup has 128 of the rows, and works on 64 at a time: it
decodes a block of 128 columns in registers, gives it to the tensor cores as the left operand, and scales the sums of
that block while the tensor cores work for the other warpgroup. Only buffers that are full or free couple the two. Work
is a list of pieces (`pieces.py`). Not for Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from qfx.kernels.gpu.decode4 import HALVES
from qfx.kernels.gpu.launch import Launcher, capability
from qfx.kernels.gpu.parts import counters
from qfx.kernels.gpu.pieces import async_load, finish, piece, pieces, place
from qfx.kernels.gpu.w4_config import MOST
from qfx.kernels.gpu.w4_large import _descriptor, _processors
from qfx.kernels.gpu.w4a8_whole import multiply

# A word of layout `fours` has four columns in each half. Integers up to 8 in the low bits of an E4M3 are as many times
# 2⁻⁹, and a negative two's complement nibble n becomes 0x90 - n, which is (n ^ 0x8f) + 1.
_E4M3 = gl.constexpr("""{ .reg .b32 e, m, o, t;
shr.b32 t, $2, 3; and.b32 t, t, 0x01010101; mul.lo.u32 m, t, 0x8f; lop3.b32 e, $2, 0x0f0f0f0f, m, 0x6A; add.u32 e, e, t;
shr.b32 o, $2, 4;
shr.b32 t, $2, 7; and.b32 t, t, 0x01010101; mul.lo.u32 m, t, 0x8f; lop3.b32 o, o, 0x0f0f0f0f, m, 0x6A; add.u32 o, o, t;
prmt.b32 $0, e, o, 0x5140; prmt.b32 $1, e, o, 0x7362; }""")


@gluon.jit
def _wait_for_previous():
    """As in `pdl.py`."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, False, 1)


@gluon.jit
def _launch_next():
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, False, 1)


@gluon.jit
def _load(x, w, s, xs, ws, ss, full, free, M, N, K, GROUP: gl.constexpr, BT: gl.constexpr, TOKENS: gl.constexpr,
          STAGES: gl.constexpr, WHOLE: gl.constexpr):  # fmt: skip
    ROWS: gl.constexpr = ws.shape[1]
    _, blocks, alone, first, last, count = pieces(M, N, K, BT, WHOLE, ROWS)
    _wait_for_previous()
    step = 0
    for number in range(count):
        tile, k0, k1 = piece(number, blocks, alone, first, last)
        n, m = place(tile, M, N, BT, TOKENS, ROWS)
        for k in range(k0, k1):
            slot = step % STAGES
            # the slot's first turn finds the barrier of the turn before it already passed
            mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
            ready = full.index(slot)
            mbarrier.expect(ready, BT * 128 + ROWS * 64 + (ROWS * 4 if GROUP > 0 else 0))
            octets = ws.index(slot)
            for i in gl.static_range(ROWS // 128):  # tiles of memory have 128 rows
                row = ((n * (ROWS // 128) + i) * blocks + k) * 128
                async_load(w, [row, 0], ready, octets.slice(i * 128, 128, 0))
            async_load(x, [m * BT, k * 128], ready, xs.index(slot))
            if GROUP > 0:
                async_load(s, [k * 128 // GROUP, n * ROWS], ready, ss.index(slot))
            step += 1
    _launch_next()


@gluon.jit
def _scales(scales, FIRST: gl.constexpr, MMA: gl.constexpr):
    """Of 64 rows from FIRST on, `[64, 1]`."""
    return scales.slice(FIRST, 64, 1).permute((1, 0)).load(MMA)


@gluon.jit
def _decode(octets, INT: gl.constexpr, DOT: gl.constexpr):
    """Bytes `[64, 32]` to 32 columns of the first 64 and 32 of the last 64."""
    if INT:
        low, high = gl.inline_asm_elementwise(HALVES, "=r,=r,r", [octets], (gl.int8, gl.int8), True, 4)
    else:
        low, high = gl.inline_asm_elementwise(_E4M3, "=r,=r,r", [octets], (gl.float8e4nv, gl.float8e4nv), True, 4)
    low = gl.convert_layout(low, DOT, assert_trivial=True)
    return low, gl.convert_layout(high, DOT, assert_trivial=True)


@gluon.jit
def _product(octets, columns, acc, INT: gl.constexpr, DOT: gl.constexpr):
    """Starts 64 rows times 128 columns: bytes `[64, 64]`, tokens `[BT, 128]`. Returns the sums to be.

    `acc` is where they will be. If that were zeros, and not what was there before, it would be other registers.
    """
    low, high = _decode(octets.slice(0, 32, 1).load(DOT), INT, DOT)
    acc = warpgroup_mma(low, columns.slice(0, 32, 1).permute((1, 0)), acc, use_acc=False, is_async=True)
    acc = warpgroup_mma(high, columns.slice(64, 32, 1).permute((1, 0)), acc, is_async=True)
    second = octets.slice(32, 32, 1).load(DOT)
    acc = warpgroup_mma_wait(1, deps=[acc])
    low, high = _decode(second, INT, DOT)
    acc = warpgroup_mma(low, columns.slice(32, 32, 1).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])
    return warpgroup_mma(high, columns.slice(96, 32, 1).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _float(acc, MAGIC: gl.constexpr):
    """Integers below 2²² as float32: by an addition to the bits of a float that counts in ones, or by a conversion."""
    if acc.dtype == gl.float32:
        return acc
    elif MAGIC:
        return (acc + 0x4B400000).to(gl.float32, bitcast=True) - 12582912.0
    else:
        return acc.to(gl.float32)


@gluon.jit
def _multiply(
    y, xs, ws, ss, staged, full, free, t_ptr, s_ptr, b_ptr, part_ptr, count_ptr, M, N, K, stride,
    PART: gl.constexpr, GROUP: gl.constexpr, BT: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    WHOLE: gl.constexpr, FACTOR: gl.constexpr, MAGIC: gl.constexpr,
):  # fmt: skip
    """Rows 128 · PART and up of every tile."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 32])
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    INT: gl.constexpr = xs.dtype == gl.int8
    SUM: gl.constexpr = gl.int32 if INT else gl.float32
    tiles, blocks, alone, first, last, count = pieces(M, N, K, BT, WHOLE)
    _wait_for_previous()
    step = 0
    for number in range(count):
        tile, k0, k1 = piece(number, blocks, alone, first, last)
        n, m = place(tile, M, N, BT, TOKENS)
        acc = warpgroup_mma_init(gl.zeros([64, BT], SUM, MMA))
        total0 = gl.zeros([64, BT], gl.float32, MMA)
        total1 = gl.zeros([64, BT], gl.float32, MMA)
        scale0 = gl.full([64, 1], 1.0, gl.float32, MMA)
        scale1 = scale0
        for k in range(k0, k1):
            slot = step % STAGES
            # the lower rows of the block before, or nothing
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > k0)
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            octets = ws.index(slot).slice(PART * 128, 64, 0)
            total1 += _float(acc, MAGIC) * scale1
            acc = _product(octets, xs.index(slot), acc, INT, DOT)
            if GROUP > 0:
                scale0 = _scales(ss.index(slot), PART * 128, MMA)
                scale1 = _scales(ss.index(slot), PART * 128 + 64, MMA)
            acc = warpgroup_mma_wait(0, deps=[acc])
            octets = ws.index(slot).slice(PART * 128 + 64, 64, 0)
            total0 += _float(acc, MAGIC) * scale0
            acc = _product(octets, xs.index(slot), acc, INT, DOT)
            step += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        total1 += _float(acc, MAGIC) * scale1
        if GROUP < 0:
            rows = s_ptr + gl.minimum(n * 256 + PART * 128, stride - 128) + gl.arange(0, 64, gl.SliceLayout(1, MMA))
            total0 *= gl.expand_dims(gl.load(rows), 1)
            total1 *= gl.expand_dims(gl.load(rows + 64), 1)
        finish(
            total0, y, staged.index(PART), b_ptr, part_ptr, count_ptr, n, m, N, tile, tiles, k0, k1, blocks, alone,
            WHOLE, 2 * PART, t_ptr, M, FACTOR,
        )  # fmt: skip
        finish(
            total1, y, staged.index(PART), b_ptr, part_ptr, count_ptr, n, m, N, tile, tiles, k0, k1, blocks, alone,
            WHOLE, 2 * PART + 1, t_ptr, M, FACTOR,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def _rows(
    y, xs, ws, ss, staged, full, free, t_ptr, s_ptr, b_ptr, part_ptr, count_ptr, M, N, K, stride,
    PART: gl.constexpr, GROUP: gl.constexpr, BT: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    WHOLE: gl.constexpr, FACTOR: gl.constexpr, MAGIC: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Half of the rows of every tile, from half PART on, with sums over whole rows or scaled ones."""
    if SUMS:
        multiply(
            y, xs, ws, ss, staged, full, free, t_ptr, s_ptr, b_ptr, part_ptr, count_ptr, M, N, K, stride,
            PART, GROUP > 0, BT, TOKENS, STAGES, WHOLE, FACTOR,
        )  # fmt: skip
    else:
        _multiply(
            y, xs, ws, ss, staged, full, free, t_ptr, s_ptr, b_ptr, part_ptr, count_ptr, M, N, K, stride,
            PART, GROUP, BT, TOKENS, STAGES, WHOLE, FACTOR, MAGIC,
        )  # fmt: skip


@gluon.jit
def _w4a8_large(
    x, w, s, y, t_ptr, s_ptr, b_ptr, part_ptr, count_ptr, M, N, K, stride,
    GROUP: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr, FACTOR: gl.constexpr,
    MAGIC: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    BT: gl.constexpr = x.block_shape[0]
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, BT, 128], x.layout)
    ROWS: gl.constexpr = s.block_shape[1]
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, ROWS, 64], w.layout)
    ss = gl.allocate_shared_memory(s.dtype, [STAGES, 1, ROWS], s.layout)
    staged = gl.allocate_shared_memory(y.dtype, [2, BT, 64], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)  # both warpgroups
    fence_async_shared()
    # ptxas lets products overlap in partitions behind the first one only where none of these has few registers: so the
    # first one loads, four warps for the work of one thread.
    gl.warp_specialize(
        [
            (_load, (x, w, s, xs, ws, ss, full, free, M, N, K, GROUP, BT, TOKENS, STAGES, WHOLE)),
            (
                _rows,
                (
                    y, xs, ws, ss, staged, full, free, t_ptr, s_ptr, b_ptr, part_ptr, count_ptr, M, N, K, stride,
                    0, GROUP, BT, TOKENS, STAGES, WHOLE, FACTOR, MAGIC, SUMS,
                ),
            ),
            (
                _rows,
                (
                    y, xs, ws, ss, staged, full, free, t_ptr, s_ptr, b_ptr, part_ptr, count_ptr, M, N, K, stride,
                    1, GROUP, BT, TOKENS, STAGES, WHOLE, FACTOR, MAGIC, SUMS,
                ),
            ),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """How one launch is cut.

    Attributes:
        bt: tokens of a tile.
        stages: blocks of 128 columns in flight.
        tokens: token tiles that run together.
        whole: every program computes whole tiles; otherwise the last ones are split among all programs.
        programs: how many there are at most; 0 for one on each multiprocessor.
        magic: sums become floats by additions and not by conversions.
        bn: rows of a tile: 256, or 128 where sums run over whole rows.
    """

    bt: int = 128
    stages: int = 4
    tokens: int = 8
    whole: bool = False
    programs: int = 0
    magic: bool = False
    bn: int = 256


@cache
def launcher(config: Config, group: int, factor: float, sums: bool) -> Launcher:
    """The kernel for one configuration; `sums`: those of `w4a8_whole`."""
    return Launcher(
        _w4a8_large,
        GROUP=group,
        TOKENS=config.tokens,
        STAGES=config.stages,
        WHOLE=config.whole,
        FACTOR=factor,
        MAGIC=config.magic,
        SUMS=sums,
        num_warps=4,
        launch_pdl=True,
    )


_FORMS = {torch.int8: ("int8", 1 / 16), torch.float8_e4m3fn: ("float8e4nv", 2.0**9)}
"""By the dtype of the activations: its name in Triton, and the factor that undoes what the decoder multiplies by."""


def supports(x: Tensor, rows: int, group: int, zero: Tensor | None, dtype: torch.dtype) -> str | None:
    """None if `w4a8_large` takes these activations, groups and output on this GPU, otherwise the reason why not."""
    if capability(x.device) != 90:
        return "w4a8_large: made for compute capability 9.0"
    if x.dtype not in _FORMS:
        return f"w4a8_large: activations of {x.dtype}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"w4a8_large: an output of {dtype}"
    if zero is not None:
        return "w4a8_large: zero points"
    if rows % 8 or x.shape[1] % 16 or x.stride(0) % 16 or x.data_ptr() % 16:
        return "w4a8_large: rows of x and y that do not start at multiples of 16 bytes"
    if group > 0 and group % 128:
        return f"w4a8_large: groups of {group}; it takes multiples of 128"
    return None


def w4a8_large(
    x: Tensor,
    x_scale: Tensor,
    tiles: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: int,
    group: int,
    dtype: torch.dtype = torch.bfloat16,
    config: Config = Config(),
    out: Tensor | None = None,
    second: Tensor | None = None,
) -> Tensor:
    """`x · x_scale @ W.T + bias` from kernel layout, for many tokens.

    Args:
        x: int8 or float8_e4m3fn `[tokens, in]`, its rows contiguous.
        x_scale: float32, one for each token.
        tiles: uint8 `[row tiles, column tiles, 128, 64]`, two's complement in layout `halves`, or `fours` for E4M3.
        scale: float32 `[groups, 128 · row tiles]`.
        bias: `[out]`.
        rows: `out`.
        group: columns that share a scale: a multiple of 128, or -1 for all of them.
        dtype: of the output: bfloat16 or float16.
        config: how the launch is cut.
        out: `[tokens, out]` of that dtype, contiguous, to be filled; or None.
        second: float32 `[128 · row tiles]`, of which the scales are whole multiples, 1 to 15, for int8; or None.

    Returns:
        `[tokens, out]`.
    """
    tokens, columns = x.shape
    y = torch.empty((tokens, rows), dtype=dtype, device=x.device) if out is None else out
    if tokens == 0 or rows == 0:
        return y
    form, factor = _FORMS[x.dtype]
    sums = x.dtype == torch.int8 and (group < 0 or second is not None) and columns < MOST
    if sums and group > 0:
        factor = 1.0  # codes are decoded as they are
    bt, bn, blocks = config.bt, config.bn if sums else 256, tiles.shape[1]
    count = -(-rows // bn) * -(-tokens // bt)
    programs = config.programs or _processors(x.device)
    programs = min(programs, count if config.whole else count * blocks)
    part = arrived = None
    if not config.whole:
        part = torch.empty(programs * 2 * bn * bt, dtype=torch.float32, device=x.device)
        arrived = counters(bn // 64 * min(count, 2 * programs), x.device)
    kind = "bfloat16" if y.dtype == torch.bfloat16 else "float16"
    launcher(config, group, factor, sums)(
        (programs, 1, 1),
        _descriptor(x, [tokens, columns], x.stride(0), (bt, 128), form),
        _descriptor(tiles, [tiles.shape[0] * blocks * 128, 64], 64, (128, 64), "uint8"),
        _descriptor(scale, list(scale.shape), scale.shape[1], (1, bn), "float32"),
        _descriptor(y, [tokens, rows], rows, (bt, 64), kind),
        x_scale, second if sums and group > 0 else scale, bias, part, arrived, tokens, rows, columns, scale.shape[1],
    )  # fmt: skip
    return y
