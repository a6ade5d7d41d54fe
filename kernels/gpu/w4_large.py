"""Weights of 4 bits times many tokens on Hopper: one warp loads by TMA, two warpgroups decode and multiply.

A tile is 256 rows of the weight by 128 tokens; each warpgroup has 128 of the rows. Weights are decoded in registers
into the left operand of the product while the tensor cores work on what was decoded before. Sums stay in one set of
registers: before a new group of columns starts they are multiplied by the ratio of the old scale to the new one.
Work is a list of pieces (a tile, a range of its columns), cut so that every multiprocessor gets the same amount.
Not for Triton's interpreter.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon


def _planes(shift: int, kind: str, magic: str) -> str:
    """PTX: nibbles at bits `shift` and `shift + 4` of each halfword of $2, masked by $3, as floats less $4."""
    out = "{ .reg .b32 c, t;"
    for i in range(2):
        out += f"shr.b32 t, $2, {shift + 4 * i};" if shift + i else "mov.b32 t, $2;"
        out += f"lop3.b32 c, t, $3, {magic}, 0xEA; sub.{kind}x2 ${i}, c, $4;"
    return out + "}"


# 0x4300 is 128 in bfloat16, 0x6400 is 1024 in float16, and the last bit is worth 1: or-ing a nibble in adds it
_BF16_LOW, _BF16_HIGH = (gl.constexpr(_planes(s, "bf16", "0x43004300")) for s in (0, 8))
_F16_LOW, _F16_HIGH = (gl.constexpr(_planes(s, "f16", "0x64006400")) for s in (0, 8))


@gluon.jit
def _decode(words, keep, zero, DOT: gl.constexpr, HIGH: gl.constexpr):
    """Two of the four planes of nibbles of int16 `[n, 32]` (`quarters`) as floats `[n, 64]`: no data moves."""
    if zero.dtype == gl.float16:
        ASM: gl.constexpr = _F16_HIGH if HIGH else _F16_LOW
    else:
        ASM: gl.constexpr = _BF16_HIGH if HIGH else _BF16_LOW
    a0, a1 = gl.inline_asm_elementwise(
        asm=ASM,
        constraints="=r,=r,r,r,r",
        args=[words, keep, zero],
        dtype=(zero.dtype, zero.dtype),
        is_pure=True,
        pack=2,
    )
    a = gl.join(a0, a1).permute((0, 2, 1)).reshape((words.shape[0], 64))
    return gl.convert_layout(a, DOT, assert_trivial=True)


@gluon.jit
def _share(pid, programs, total):
    return (total * pid) // programs


@gluon.jit
def _pieces(M, N, K, BT: gl.constexpr, WHOLE: gl.constexpr):
    """This program's share: tiles that it computes alone, then `[first, last)` of the blocks of all other tiles."""
    tiles = gl.cdiv(N, 256) * gl.cdiv(M, BT)
    blocks = gl.cdiv(K, 128)
    pid, programs = gl.program_id(0), gl.num_programs(0)
    if WHOLE:
        alone = (tiles - pid + programs - 1) // programs
        first = 0
        last = 0
    else:
        waves = gl.maximum(tiles // programs - 1, 0)  # what is left for the streams is at least a tile for each
        alone = waves
        rest = (tiles - waves * programs) * blocks
        first = waves * programs * blocks + (rest * pid) // programs
        last = waves * programs * blocks + (rest * (pid + 1)) // programs
    streamed = gl.where(last > first, (last - 1) // blocks - first // blocks + 1, 0)
    return blocks, alone, first, last, alone + streamed


@gluon.jit
def _piece(i, blocks, alone, first, last):
    """Tile and range of blocks of a program's i-th piece."""
    streamed = first // blocks + i - alone
    tile = gl.where(i < alone, gl.program_id(0) + i * gl.num_programs(0), streamed)
    k0 = gl.where(i < alone, 0, gl.maximum(first - tile * blocks, 0))
    k1 = gl.where(i < alone, blocks, gl.minimum(last - tile * blocks, blocks))
    return tile, k0, k1


@gluon.jit
def _place(tile, M, N, BT: gl.constexpr, TOKENS: gl.constexpr):
    """Tile number to (row tile, token tile): groups of TOKENS token tiles, so that what runs together shares."""
    tokens = gl.cdiv(M, BT)
    width = TOKENS * gl.cdiv(N, 256)
    group = tile // width
    size = gl.minimum(tokens - group * TOKENS, TOKENS)
    inside = tile % width
    return inside // size, group * TOKENS + inside % size


@gluon.jit
def _load(x, w, xs, ws, full, free, M, N, K, BT: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
          WHOLE: gl.constexpr):  # fmt: skip
    blocks, alone, first, last, pieces = _pieces(M, N, K, BT, WHOLE)
    step = 0
    for i in range(pieces):
        tile, k0, k1 = _piece(i, blocks, alone, first, last)
        n, m = _place(tile, M, N, BT, TOKENS)
        for k in range(k0, k1):
            slot = step % STAGES
            # the slot's first turn finds the barrier of the turn before it already passed
            mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
            ready = full.index(slot)
            mbarrier.expect(ready, BT * 256 + 2 * 128 * 64)
            tma.async_copy_global_to_shared(w, [(2 * n * blocks + k) * 128, 0], ready, ws.index(2 * slot))
            tma.async_copy_global_to_shared(w, [((2 * n + 1) * blocks + k) * 128, 0], ready, ws.index(2 * slot + 1))
            tma.async_copy_global_to_shared(x, [m * BT, k * 128], ready, xs.index(2 * slot))
            tma.async_copy_global_to_shared(x, [m * BT, k * 128 + 64], ready, xs.index(2 * slot + 1))
            step += 1


@gluon.jit
def _group(s_ptr, z_ptr, g, stride, rows, live, F16: gl.constexpr):
    """Scale and zero point of a group for the rows of a warpgroup."""
    s = gl.load(s_ptr + g * stride + rows, mask=live, other=1.0)
    if z_ptr is None:
        z = gl.full(rows.shape, 8, gl.uint8, rows.type.layout)
    else:
        z = gl.load(z_ptr + g * stride + rows, mask=live, other=0)
    return s, z


@gluon.jit
def _operands(s, z, DOT: gl.constexpr, FLOAT: gl.constexpr):
    """Mask of a nibble and the number to take off, for each row; a group whose scale counts as zero decodes to 0."""
    MAGIC: gl.constexpr = 1024.0 if FLOAT == gl.float16 else 128.0
    dead = gl.abs(s) < 2.0**-64
    keep = gl.where(dead, 0, 15).to(gl.int16)
    zero = (gl.where(dead, 0.0, z.to(gl.float32)) + MAGIC).to(FLOAT)
    keep = gl.convert_layout(keep, gl.SliceLayout(1, DOT), assert_trivial=True)
    zero = gl.convert_layout(zero, gl.SliceLayout(1, DOT), assert_trivial=True)
    return gl.expand_dims(keep, 1), gl.expand_dims(zero, 1)


@gluon.jit
def _consume(
    x, y, xs, ws, staged, full, free, s_ptr, z_ptr, b_ptr, part_ptr, count_ptr, M, N, K, stride,
    GROUP: gl.constexpr, BT: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """Rows 128 HALF ... of every tile."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    FLOAT: gl.constexpr = x.dtype
    blocks, alone, first, last, pieces = _pieces(M, N, K, BT, WHOLE)
    rows = gl.arange(0, 128, gl.SliceLayout(1, MMA))
    step = 0
    for i in range(pieces):
        tile, k0, k1 = _piece(i, blocks, alone, first, last)
        n, m = _place(tile, M, N, BT, TOKENS)
        rn = n * 256 + HALF * 128 + rows
        live = rn < stride
        acc = gl.zeros([128, BT], gl.float32, MMA)
        a1 = gl.zeros([128, 64], FLOAT, DOT)
        unit = gl.full([128], 1.0, gl.float32, gl.SliceLayout(1, MMA))
        s, z = _group(s_ptr, z_ptr, gl.maximum(k0 * 128 // GROUP, 0) if GROUP > 0 else 0, stride, rn, live, False)
        if GROUP < 0:
            unit = s
            keep, zero = _operands(s, z, DOT, FLOAT)
        for k in range(k0, k1):
            slot = step % STAGES
            if GROUP > 0:
                keep, zero = _operands(s, z, DOT, FLOAT)
                new = gl.where(gl.abs(s) < 2.0**-64, unit, s)
                ratio = gl.where(new == unit, 1.0, unit / new)
                unit = new
                # loaded one block ahead: its latency passes while a block is computed
                g = gl.minimum(k + 1, blocks - 1) * 128 // GROUP
                s, z = _group(s_ptr, z_ptr, g, stride, rn, live, False)
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            words = ws.index(2 * slot + HALF).load(DOT)
            a0 = _decode(words, keep, zero, DOT, False)
            if GROUP > 0:
                acc, a1 = warpgroup_mma_wait(0, deps=[acc, a1])
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > k0)
                acc = acc * gl.expand_dims(ratio, 1)
                acc = warpgroup_mma(a0, xs.index(2 * slot).permute((1, 0)), acc, is_async=True)
            else:
                acc = warpgroup_mma(a0, xs.index(2 * slot).permute((1, 0)), acc, is_async=True)
                acc, a1 = warpgroup_mma_wait(1, deps=[acc, a1])
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > k0)
            a1 = _decode(words, keep, zero, DOT, True)
            acc = warpgroup_mma(a1, xs.index(2 * slot + 1).permute((1, 0)), acc, is_async=True)
            acc, a0 = warpgroup_mma_wait(1, deps=[acc, a0])
            step += 1
        acc, a1 = warpgroup_mma_wait(0, deps=[acc, a1])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        acc = acc * gl.expand_dims(unit, 1)

        done = True
        if not WHOLE:
            if (k0 > 0) | (k1 < blocks):
                acc, done = _join_parts(acc, part_ptr, count_ptr, tile, first, blocks, alone, HALF, MMA)
        if done:
            if b_ptr is not None:
                bias = gl.load(b_ptr + rn, mask=rn < N, other=0.0).to(gl.float32)
                acc = acc + gl.expand_dims(bias, 1)
            tma.store_wait(0)  # the last tile has left
            gl.thread_barrier()
            staged.index(HALF).permute((1, 0)).store(acc.to(y.dtype))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(y, [m * BT, n * 256 + HALF * 128], staged.index(HALF))
    tma.store_wait(0)
