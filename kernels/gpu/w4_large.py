"""Weights of 4 bits times many tokens on Hopper: one warp loads by TMA, eight decode and multiply.

A tile is 256 rows of the weight by 64 or 128 tokens, or 128 rows by 64 to 256. The weight is the left operand of the
product and is decoded in registers, 16 columns while the tensor cores work on those before. Decoded weights are rounded
to the dtype of the activations, scale included, so that sums never leave the tensor cores. Work is a list of pieces
(a tile, a range of its columns), cut so that every multiprocessor gets the same amount. Not for Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qfx.kernels.gpu.gemm8_config import SHARED
from qfx.kernels.gpu.gluon_lookup import lookup
from qfx.kernels.gpu.launch import Launcher, capability
from qfx.kernels.gpu.parts import counters
from qfx.kernels.gpu.pieces import _halves, async_load, finish, piece, pieces, place
from qfx.kernels.gpu.shared_table import BYTES, LOOKUP, setup_asm


def _plane(kind: str, magic: str, plane: int, scaled: bool) -> str:
    """PTX: one nibble of each halfword of $1, less $2, times $3 + $4."""
    out = f"{{ .reg .b32 c, t; shr.b32 t, $1, {4 * plane}; lop3.b32 c, t, 0x000f000f, {magic}, 0xEA;"
    if scaled:
        return out + f"sub.{kind}x2 c, c, $2; mul.{kind}x2 t, c, $4; fma.rn.{kind}x2 $0, c, $3, t; }}"
    return out + f"sub.{kind}x2 $0, c, $2; }}"


@gluon.jit
def _decode(words, zero, scale, rest, DOT: gl.constexpr, ASM: gl.constexpr, PLANE: gl.constexpr, SCALED: gl.constexpr):
    """A nibble of each int16 as a float, less `zero`, times `scale + rest`; rounded once, but for 2⁻⁸ of that."""
    TEXT: gl.constexpr = ASM[PLANE]
    if SCALED:
        a = gl.inline_asm_elementwise(TEXT, "=r,r,r,r,r", [words, zero, scale, rest], zero.dtype, True, 2)
    else:
        a = gl.inline_asm_elementwise(TEXT, "=r,r,r", [words, zero], zero.dtype, True, 2)
    return gl.convert_layout(a, DOT, assert_trivial=True)


def _times(kind: str) -> str:
    """PTX: $1 times $2 + $3."""
    return f"{{ .reg .b32 t; mul.{kind}x2 t, $1, $3; fma.rn.{kind}x2 $0, $1, $2, t; }}"


@gluon.jit
def _scaled(values, scale, rest, DOT: gl.constexpr, ASM: gl.constexpr, SCALED: gl.constexpr):
    TEXT: gl.constexpr = ASM[1]
    if SCALED:
        values = gl.inline_asm_elementwise(TEXT, "=r,r,r,r", [values, scale, rest], values.dtype, True, 2)
    return gl.convert_layout(values, DOT, assert_trivial=True)


@gluon.jit
def _load(x, w, xs, ws, full, free, M, N, K, BT: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
          WHOLE: gl.constexpr):  # fmt: skip
    ROWS: gl.constexpr = ws.shape[1]
    _, blocks, alone, first, last, count = pieces(M, N, K, BT, WHOLE, ROWS)
    gdc_wait()
    step = 0
    for number in range(count):
        tile, k0, k1 = piece(number, blocks, alone, first, last)
        n, m = place(tile, M, N, BT, TOKENS, ROWS)
        for k in range(k0, k1):
            slot = step % STAGES
            # the slot's first turn finds the barrier of the turn before it already passed
            mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
            ready = full.index(slot)
            mbarrier.expect(ready, BT * 256 + ROWS * 64)
            words = ws.index(slot)
            for i in gl.static_range(ROWS // 128):  # tiles of memory have 128 rows
                row = ((n * (ROWS // 128) + i) * blocks + k) * 128
                async_load(w, [row, 0], ready, words.slice(i * 128, 128, 0))
            async_load(x, [m * BT, k * 128], ready, xs.index(2 * slot))
            async_load(x, [m * BT, k * 128 + 64], ready, xs.index(2 * slot + 1))
            step += 1
    gdc_launch_dependents()


@gluon.jit
def _groups(s_ptr, z_ptr, k, K, GROUP: gl.constexpr, stride, rows):
    """Scales and zero points of the one group or the two groups of a block of columns, for each row."""
    if GROUP < 0:
        s, z = _group(s_ptr, z_ptr, rows)
        return s, z, s, z
    k = gl.minimum(k, gl.cdiv(K, 128) - 1)
    s, z = _group(s_ptr, z_ptr, rows + k * 128 // GROUP * stride)
    if GROUP == 64:  # the last block may have half of its columns
        s1, z1 = _group(s_ptr, z_ptr, rows + gl.minimum(2 * k + 1, gl.cdiv(K, 64) - 1) * stride)
        return s, z, s1, z1
    return s, z, s, z


@gluon.jit
def _group(s_ptr, z_ptr, at):
    s = gl.load(s_ptr + at)
    if z_ptr is None:
        z = gl.full(at.shape, 8, gl.uint8, at.type.layout)
    else:
        z = gl.load(z_ptr + at)
    return s, z


@gluon.jit
def _operands(s, z, DOT: gl.constexpr, FLOAT: gl.constexpr):
    """For each row the number to take off, and the scale as a sum of two floats of 16 bits."""
    MAGIC: gl.constexpr = 2.0**FLOAT.fp_mantissa_width  # 1024 or 128
    zero = (z.to(gl.float32) + MAGIC).to(FLOAT)
    scale = s.to(FLOAT)
    rest = (s - scale.to(gl.float32)).to(FLOAT)
    LAYOUT: gl.constexpr = gl.SliceLayout(1, DOT)
    zero = gl.expand_dims(gl.convert_layout(zero, LAYOUT, assert_trivial=True), 1)
    scale = gl.expand_dims(gl.convert_layout(scale, LAYOUT, assert_trivial=True), 1)
    rest = gl.expand_dims(gl.convert_layout(rest, LAYOUT, assert_trivial=True), 1)
    return zero, scale, rest


@gluon.jit
def _multiply(
    x, y, xs, ws, staged, full, free, s_ptr, z_ptr, b_ptr, part_ptr, count_ptr, address, M, N, K, stride,
    GROUP: gl.constexpr, BT: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
    ASM: gl.constexpr, TABLE: gl.constexpr,
):  # fmt: skip
    """16 columns at a time are decoded while the tensor cores work on those before."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BT, 16])
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    FLOAT: gl.constexpr = x.dtype
    SCALED: gl.constexpr = GROUP > 0
    ROWS: gl.constexpr = ws.shape[1]
    tiles, blocks, alone, first, last, count = pieces(M, N, K, BT, WHOLE, ROWS)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
    gdc_wait()
    step = 0
    for number in range(count):
        tile, k0, k1 = piece(number, blocks, alone, first, last)
        n, m = place(tile, M, N, BT, TOKENS, ROWS)
        rn = gl.minimum(n * ROWS + rows, stride - 1)  # what lies beyond is not stored
        acc = gl.zeros([ROWS, BT], gl.float32, MMA)
        older = gl.zeros([ROWS, 16], FLOAT, DOT)
        oldest = older
        s, z, s1, z1 = _groups(s_ptr, z_ptr, k0, K, GROUP, stride, rn)
        for k in range(k0, k1):
            slot = step % STAGES
            zero, scale, rest = _operands(s, z, DOT, FLOAT)
            zero1, scale1, rest1 = _operands(s1, z1, DOT, FLOAT)
            if GROUP > 0:  # loaded one block ahead: the latency passes while a block is computed
                s, z, s1, z1 = _groups(s_ptr, z_ptr, k + 1, K, GROUP, stride, rn)
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            words = ws.index(slot).load(DOT)
            low, high = _halves(words, DOT)
            for i in gl.static_range(8):  # 16 columns each
                # a half of the words has 16 of each 32 columns; tables give four operands at once
                if TABLE:
                    if i % 4 == 0:
                        values = lookup(low if i == 0 else high, address, ASM, FLOAT)
                    if i % 4 < 2:
                        a = _scaled(values[i % 4], scale, rest, DOT, ASM, SCALED)
                    else:
                        a = _scaled(values[i % 4], scale1, rest1, DOT, ASM, SCALED)
                    columns = xs.index(2 * slot + i % 4 // 2).slice(i % 2 * 32 + i // 4 * 16, 16, 1)
                else:
                    half = low if i % 2 == 0 else high
                    if i < 4:
                        a = _decode(half, zero, scale, rest, DOT, ASM, i // 2, SCALED)
                    else:
                        a = _decode(half, zero1, scale1, rest1, DOT, ASM, i // 2, SCALED)
                    columns = xs.index(2 * slot + i // 4).slice(i % 4 * 16, 16, 1)
                acc = warpgroup_mma(a, columns.permute((1, 0)), acc, is_async=True)
                # two products go on while the next columns are decoded
                acc, oldest = warpgroup_mma_wait(2, deps=[acc, oldest])
                oldest = older
                older = a
                if i == 1:  # all of the last block is done
                    mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > k0)
            step += 1
        acc, older, oldest = warpgroup_mma_wait(0, deps=[acc, older, oldest])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        if GROUP < 0:
            acc = acc * gl.expand_dims(s, 1)
        finish(
            acc, y, staged, b_ptr, part_ptr, count_ptr, n, m, N, tile, tiles, k0, k1, blocks, alone, WHOLE, 0,
            ROWS=ROWS,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def _w4_large(
    x, w, y, s_ptr, z_ptr, b_ptr, part_ptr, count_ptr, M, N, K, stride,
    GROUP: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
    ASM: gl.constexpr, TABLE: gl.constexpr,
):  # fmt: skip
    address = 0
    if TABLE:
        SETUP: gl.constexpr = ASM[2]
        address = gl.inline_asm_elementwise(SETUP, "=r", [], gl.int32, False, 1)
    BT: gl.constexpr = x.block_shape[0]
    xs = gl.allocate_shared_memory(x.dtype, [2 * STAGES, BT, 64], x.layout)
    ROWS: gl.constexpr = y.block_shape[1]
    ws = gl.allocate_shared_memory(w.dtype, [STAGES, ROWS, 32], w.layout)
    staged = gl.allocate_shared_memory(y.dtype, [BT, ROWS], y.layout)
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
                    x, y, xs, ws, staged, full, free, s_ptr, z_ptr, b_ptr, part_ptr, count_ptr, address, M, N, K,
                    stride, GROUP, BT, TOKENS, STAGES, WHOLE, ASM, TABLE,
                ),
            ),
            (_load, (x, w, xs, ws, full, free, M, N, K, BT, TOKENS, STAGES, WHOLE)),
        ],
        [1],
        [24],
    )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """How one launch is cut.

    Attributes:
        bt: tokens of a tile: 64, 128, or 256 with 128 rows.
        stages: blocks of 128 columns in flight.
        tokens: token tiles that run together.
        whole: every program computes whole tiles; otherwise the last ones are split among all programs.
        programs: how many there are at most; 0 for one on each multiprocessor.
        rows: of a tile: 256 or 128.
    """

    bt: int = 128
    stages: int = 3
    tokens: int = 8
    whole: bool = False
    programs: int = 0
    rows: int = 256


@cache
def beside_table(config: Config) -> Config:
    """The same with as many stages as the shared memory that a table leaves has room for; another tile if none."""
    room = SHARED - BYTES - 2 * config.bt * config.rows
    stages = min(config.stages, room // (256 * config.bt + 64 * config.rows))
    return replace(config, stages=stages) if stages > 1 else replace(config, bt=128, rows=128, stages=4)


@cache
def launcher(config: Config, group: int, f16: bool, table: tuple[int, ...]) -> Launcher:
    """The kernel for one configuration; `table`: 16 halfwords, if codes are places in a table."""
    # 0x4300 is 128 in bfloat16, 0x6400 is 1024 in float16, and the last bit is worth 1: or-ing a nibble in adds it
    form = ("f16", "0x64006400") if f16 else ("bf16", "0x43004300")
    if table:
        asm: tuple[str, ...] = (LOOKUP, _times(form[0]), setup_asm(table, 8))
    else:
        asm = tuple(_plane(*form, i, group > 0) for i in range(4))
    return Launcher(
        _w4_large,
        GROUP=group,
        TOKENS=config.tokens,
        STAGES=config.stages,
        WHOLE=config.whole,
        ASM=asm,
        TABLE=bool(table),
        num_warps=8,
        launch_pdl=True,
    )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def _layout(block: tuple[int, int], dtype: str) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, dtype))


def _descriptor(x: Tensor, shape: list[int], stride: int, block: tuple[int, int], dtype: str) -> Any:
    """A descriptor without its checks, which `supports` made."""
    d = object.__new__(TensorDescriptor)
    d.base, d.shape, d.strides, d.block_shape, d.padding = x, shape, [stride, 1], list(block), "zero"
    d.layout = _layout(block, dtype)
    return d


def supports(x: Tensor, rows: int, group: int) -> str | None:
    """None if `w4_large` takes these activations and groups on this GPU, otherwise the reason why not."""
    if capability(x.device) != 90:
        return "w4_large: made for compute capability 9.0"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"w4_large: activations of {x.dtype}"
    if rows % 8 or x.shape[1] % 8 or x.stride(0) % 8 or x.data_ptr() % 16:
        return "w4_large: rows of x and y that do not start at multiples of 16 bytes"
    if group > 0 and group % 128 and group != 64:
        return f"w4_large: groups of {group}; it takes 64 and multiples of 128"
    return None


def w4_large(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    rows: int,
    group: int,
    config: Config = Config(),
    out: Tensor | None = None,
    table: tuple[int, ...] = (),
) -> Tensor:
    """`x @ W.T + bias` from kernel layout, for many tokens.

    Args:
        x: bfloat16 or float16 `[tokens, in]`, its rows contiguous.
        tiles: uint8 `[row tiles, column tiles, 128, 64]`, layout `quarters`; `pairs` with a table.
        scale: float32 `[groups, 128 · row tiles]`; rounded to 16 bits with the weight.
        zero: uint8 of that shape, or None.
        bias: `[out]`.
        rows: `out`.
        group: columns that share a scale: 64, a multiple of 128, or -1 for all of them.
        config: how the launch is cut.
        out: `[tokens, out]` of x's dtype, contiguous, to be filled; or None.
        table: 16 values of x's dtype, their bits, if codes are places in a table.

    Returns:
        `[tokens, out]` of x's dtype.
    """
    if table:
        config = beside_table(config)
    tokens, columns = x.shape
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device) if out is None else out
    if tokens == 0 or rows == 0:
        return y
    dtype = "bfloat16" if x.dtype == torch.bfloat16 else "float16"
    bt, blocks = config.bt, tiles.shape[1]
    count = -(-rows // config.rows) * -(-tokens // bt)
    programs = config.programs or _processors(x.device)
    programs = min(programs, count if config.whole else count * blocks)
    part = arrived = None
    if not config.whole:
        part = torch.empty(programs * 2 * config.rows * bt, dtype=torch.float32, device=x.device)
        arrived = counters(min(count, 2 * programs), x.device)
    words = tiles.view(torch.int16)
    launcher(config, group, x.dtype == torch.float16, table)(
        (programs, 1, 1),
        _descriptor(x, [tokens, columns], x.stride(0), (bt, 64), dtype),
        _descriptor(words, [tiles.shape[0] * blocks * 128, 32], 32, (128, 32), "int16"),
        _descriptor(y, [tokens, rows], rows, (bt, config.rows), dtype),
        scale, zero, bias, part, arrived, tokens, rows, columns, scale.shape[1],
    )  # fmt: skip
    return y
