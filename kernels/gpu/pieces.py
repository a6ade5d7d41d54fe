"""Tiles of a product on Hopper, cut so that every program gets the same amount of work, and their way to memory.

Work is a list of pieces: a tile and a range of its blocks of 128 columns. For Gluon kernels of eight warps, together or
in two partitions of four.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

# later versions of Triton gave these other names
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def pieces(M, N, K, BT: gl.constexpr, WHOLE: gl.constexpr, ROWS: gl.constexpr = 256):
    """This program's share: tiles that it computes alone, then `[first, last)` of the blocks of all other tiles."""
    tiles = gl.cdiv(N, ROWS) * gl.cdiv(M, BT)
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
    return tiles, blocks, alone, first, last, alone + streamed


@gluon.jit
def piece(i, blocks, alone, first, last):
    """Tile and range of blocks of a program's i-th piece."""
    streamed = first // blocks + i - alone
    tile = gl.where(i < alone, gl.program_id(0) + i * gl.num_programs(0), streamed)
    k0 = gl.where(i < alone, 0, gl.maximum(first - tile * blocks, 0))
    k1 = gl.where(i < alone, blocks, gl.minimum(last - tile * blocks, blocks))
    return tile, k0, k1


@gluon.jit
def place(tile, M, N, BT: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr = 256):
    """Tile number to (row tile, token tile): groups of TOKENS token tiles, so that what runs together shares."""
    tokens = gl.cdiv(M, BT)
    width = TOKENS * gl.cdiv(N, ROWS)
    group = tile // width
    size = gl.minimum(tokens - group * TOKENS, TOKENS)
    inside = tile % width
    return inside // size, group * TOKENS + inside % size


@gluon.jit
def _halves(a, LAYOUT: gl.constexpr):
    """The first and the second half of the columns; no data moves."""
    low, high = gl.split(a.reshape((a.shape[0], 2, a.shape[1] // 2)).permute((0, 2, 1)))
    low = gl.convert_layout(low, LAYOUT, assert_trivial=True)
    return low, gl.convert_layout(high, LAYOUT, assert_trivial=True)


@gluon.jit
def _arrive(count_ptr, tile, tiles, blocks, alone, PARTS: gl.constexpr, PART: gl.constexpr):
    """Which programs have pieces of a tile, and whether this one is the last of them to arrive.

    The counter returns to zero for the next launch.
    """
    programs = gl.num_programs(0)
    before = alone * programs
    total = (tiles - before) * blocks
    at = (tile - before) * blocks
    begin = ((at + 1) * programs - 1) // total  # the program that has the tile's first block
    end = ((at + blocks) * programs - 1) // total
    _barrier()  # all that this program has of the tile is stored
    counter = count_ptr + (tile - before) * PARTS + PART
    arrived = gl.atomic_add(counter, 1, sem="acq_rel")
    last = arrived == end - begin
    gl.store(counter, 0, mask=last)
    return begin, end, last


@gluon.jit
def _place_of(part_ptr, program, first, SIZE: gl.constexpr, PARTS: gl.constexpr, PART: gl.constexpr):
    """A program has at most one piece that continues a tile, and one that begins a tile and does not end it."""
    return part_ptr + ((program * 2 + gl.where(first, 1, 0)) * PARTS + PART).to(gl.int64) * SIZE


@gluon.jit
def _stage(acc, staged, bias, t_ptr, token, M, QUARTER: gl.constexpr, FACTOR: gl.constexpr):
    WIDTH: gl.constexpr = acc.shape[1]
    if t_ptr is not None:
        tokens = token + QUARTER * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, acc.type.layout))
        acc = acc * gl.expand_dims(gl.load(t_ptr + tokens, mask=tokens < M, other=0.0) * FACTOR, 0)
    staged.slice(QUARTER * WIDTH, WIDTH, 0).permute((1, 0)).store((acc + bias).to(staged.dtype))


@gluon.jit
def finish(
    acc, y, staged, b_ptr, part_ptr, count_ptr, n, m, N, tile, tiles, k0, k1, blocks, alone, WHOLE: gl.constexpr,
    PART: gl.constexpr, t_ptr=None, M=0, FACTOR: gl.constexpr = 1.0, ROWS: gl.constexpr = 256,
):  # fmt: skip
    """Stores rows of a tile, or adds them to what other programs have of it.

    `acc` is float32 `[A, BT]`, rows `A * PART` and up of ROWS, and `staged` is shared memory `[BT, A]` for them.
    `part_ptr` has room for two tiles for each program, and `count_ptr` has zeros, `ROWS / A` for each tile that is not
    computed by one program. Sums are in the order of their columns, whatever the order in which programs finish.
    `t_ptr` has a scale for each of M tokens, which is applied to the sum, times FACTOR.
    """
    A: gl.constexpr = acc.shape[0]
    BT: gl.constexpr = acc.shape[1]
    PARTS: gl.constexpr = ROWS // A
    WIDTH: gl.constexpr = BT // 4
    WARPS: gl.constexpr = gl.num_warps()
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BT // 2, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
    low, high = _halves(acc, HALF)
    c0, c1 = _halves(low, LAYOUT)
    c2, c3 = _halves(high, LAYOUT)
    rows = gl.arange(0, A, gl.SliceLayout(1, LAYOUT))
    done = k0 < k1  # always
    if not WHOLE:  # noqa: SIM102
        if (k0 > 0) | (k1 < blocks):
            SIZE: gl.constexpr = A * BT
            STEP: gl.constexpr = A * WIDTH
            columns = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
            at = gl.expand_dims(rows, 1) * WIDTH + gl.expand_dims(columns, 0)
            own = _place_of(part_ptr, gl.program_id(0), k0 == 0, SIZE, PARTS, PART) + at
            gl.store(own, c0, cache_modifier=".cg")
            gl.store(own + STEP, c1, cache_modifier=".cg")
            gl.store(own + 2 * STEP, c2, cache_modifier=".cg")
            gl.store(own + 3 * STEP, c3, cache_modifier=".cg")
            begin, end, done = _arrive(count_ptr, tile, tiles, blocks, alone, PARTS, PART)
            if done & (end - begin == 1):  # the sum of two is the same in either order
                other = _place_of(part_ptr, begin + end - gl.program_id(0), k0 > 0, SIZE, PARTS, PART) + at
                c0 += gl.load(other, cache_modifier=".cg")
                c1 += gl.load(other + STEP, cache_modifier=".cg")
                c2 += gl.load(other + 2 * STEP, cache_modifier=".cg")
                c3 += gl.load(other + 3 * STEP, cache_modifier=".cg")
            elif done:
                c0 = gl.zeros([A, WIDTH], gl.float32, LAYOUT)
                c1 = c0
                c2 = c0
                c3 = c0
                for p in range(begin, end + 1):
                    each = _place_of(part_ptr, p, p == begin, SIZE, PARTS, PART) + at
                    c0 += gl.load(each, cache_modifier=".cg")
                    c1 += gl.load(each + STEP, cache_modifier=".cg")
                    c2 += gl.load(each + 2 * STEP, cache_modifier=".cg")
                    c3 += gl.load(each + 3 * STEP, cache_modifier=".cg")
    if done:
        bias = 0.0
        if b_ptr is not None:
            rn = n * ROWS + PART * A + rows
            bias = gl.expand_dims(gl.load(b_ptr + rn, mask=rn < N, other=0.0).to(gl.float32), 1)
        tma.store_wait(0)  # what was staged before has left
        _barrier()
        _stage(c0, staged, bias, t_ptr, m * BT, M, 0, FACTOR)
        _stage(c1, staged, bias, t_ptr, m * BT, M, 1, FACTOR)
        _stage(c2, staged, bias, t_ptr, m * BT, M, 2, FACTOR)
        _stage(c3, staged, bias, t_ptr, m * BT, M, 3, FACTOR)
        fence_async_shared()
        _barrier()
        _async_store(y, [m * BT, n * ROWS + PART * A], staged)
