"""Weights of 4 bits times int8 tokens on Hopper, where sums run over whole rows and stay in the tensor cores.

They can if a row has one scale, or if the scales of its groups are whole multiples of one, up to 15: a code times its
group's multiple is an int8, exactly. Three instructions make four such weights, so that the product takes about as long
as that of stored int8 weights, from half of their bytes. A tile is 256 rows by 64 or 128 tokens, or 128 rows by 64 to
256. A part of `w4a8_large`, whose loads and stores these are.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from qfx.kernels.gpu.decode4 import HALVES
from qfx.kernels.gpu.pieces import finish, piece, pieces, place

# A byte of layout `halves` has column j below column 64 + j. A two's complement nibble with its upper bit turned is the
# code + 8. Times the multiple m, plus 128 - 8 m, it is from 8 to 233: no byte of four reaches into the next one. With
# its upper bit turned a byte is less by 128.
_MULTIPLES = gl.constexpr("""{ .reg .b32 t;
lop3.b32 t, $2, 0x0f0f0f0f, 0x08080808, 0x6A; mad.lo.u32 t, t, $3, $7; xor.b32 $0, t, 0x80808080;
shr.b32 t, $2, 4;
lop3.b32 t, t, 0x0f0f0f0f, 0x08080808, 0x6A; mad.lo.u32 t, t, $3, $7; xor.b32 $1, t, 0x80808080; }""")


@gluon.jit
def _decode(octets, multiple, start, MULTIPLES: gl.constexpr, DOT: gl.constexpr):
    """Bytes `[64, 32]` to 32 columns of the first 64 and 32 of the last 64; `multiple` and `start` are `[64, 1]`."""
    if MULTIPLES:
        args = [octets, multiple, start]
        low, high = gl.inline_asm_elementwise(_MULTIPLES, "=r,=r,r,r,r,r,r,r,r,r,r", args, (gl.int8, gl.int8), True, 4)
    else:
        low, high = gl.inline_asm_elementwise(HALVES, "=r,=r,r", [octets], (gl.int8, gl.int8), True, 4)
    low = gl.convert_layout(low, DOT, assert_trivial=True)
    return low, gl.convert_layout(high, DOT, assert_trivial=True)


@gluon.jit
def _multiples(scales, inverse, FIRST: gl.constexpr, DOT: gl.constexpr):
    """Of 64 rows from FIRST on, the multiple and what `_MULTIPLES` adds to a product with it, int32 `[64, 1]`."""
    s = scales.slice(FIRST, 64, 1).permute((1, 0)).load(DOT)
    # a float that counts in ones has a whole number in its low bits
    m = (s * inverse + 12582912.0).to(gl.int32, bitcast=True) & 15
    return m, -0x7F7F7F80 - m * 0x08080808  # 128 - 8 m in each byte


@gluon.jit
def _columns(columns, AT: gl.constexpr):
    """32 columns of the tokens `[BT, 128]`, as the right operand."""
    return columns.slice(AT, 32, 1).permute((1, 0))


@gluon.jit
def _block(octets, columns, sums, multiple, start, FIRST: gl.constexpr, MULTIPLES: gl.constexpr, DOT: gl.constexpr):
    """64 rows from FIRST on, times a block of 128 columns, added to `sums`.

    Two products go on while the second half is decoded. That all end here, and not while the next rows are decoded, is
    ptxas' condition for products that overlap; those of the other warpgroup fill the gap.
    """
    rows = octets.slice(FIRST, 64, 0)
    low, high = _decode(rows.slice(0, 32, 1).load(DOT), multiple, start, MULTIPLES, DOT)
    sums = warpgroup_mma(low, _columns(columns, 0), sums, is_async=True)
    sums = warpgroup_mma(high, _columns(columns, 64), sums, is_async=True)
    low, high = _decode(rows.slice(32, 32, 1).load(DOT), multiple, start, MULTIPLES, DOT)
    sums = warpgroup_mma_wait(2, deps=[sums])
    sums = warpgroup_mma(low, _columns(columns, 32), sums, is_async=True)
    sums = warpgroup_mma(high, _columns(columns, 96), sums, is_async=True)
    return warpgroup_mma_wait(0, deps=[sums])


@gluon.jit
def multiply(
    y, xs, ws, ss, staged, full, free, t_ptr, s_ptr, b_ptr, part_ptr, count_ptr, M, N, K, stride,
    PART: gl.constexpr, MULTIPLES: gl.constexpr, BT: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    WHOLE: gl.constexpr, FACTOR: gl.constexpr,
):  # fmt: skip
    """Half of the rows of every tile, from half PART on; `s_ptr` has the scale of each row."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT if BT < 256 else 128, 32])
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    ROWS: gl.constexpr = ws.shape[1]
    FIRST: gl.constexpr = PART * (ROWS // 2)
    tiles, blocks, alone, first, last, count = pieces(M, N, K, BT, WHOLE, ROWS)
    gdc_wait()
    step = 0
    for number in range(count):
        tile, k0, k1 = piece(number, blocks, alone, first, last)
        n, m = place(tile, M, N, BT, TOKENS, ROWS)
        at = s_ptr + gl.minimum(n * ROWS + FIRST, stride - ROWS // 2)  # what lies beyond is not stored
        sums0 = gl.zeros([64, BT], gl.int32, MMA)
        sums1 = sums0
        rows = at + gl.arange(0, 64, gl.SliceLayout(1, DOT))
        inverse0 = gl.expand_dims(1.0 / gl.load(rows), 1)
        inverse1 = inverse0
        if ROWS == 256:
            inverse1 = gl.expand_dims(1.0 / gl.load(rows + 64), 1)
        for _k in range(k0, k1):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            multiple, start = 0, 0
            if MULTIPLES:
                multiple, start = _multiples(ss.index(slot), inverse0, FIRST, DOT)
            sums0 = _block(ws.index(slot), xs.index(slot), sums0, multiple, start, FIRST, MULTIPLES, DOT)
            if ROWS == 256:
                if MULTIPLES:
                    multiple, start = _multiples(ss.index(slot), inverse1, FIRST + 64, DOT)
                sums1 = _block(ws.index(slot), xs.index(slot), sums1, multiple, start, FIRST + 64, MULTIPLES, DOT)
            mbarrier.arrive(free.index(slot))
            step += 1
        scale = at + gl.arange(0, 64, gl.SliceLayout(1, MMA))
        total = sums0.to(gl.float32) * gl.expand_dims(gl.load(scale), 1)
        finish(
            total, y, staged.index(PART), b_ptr, part_ptr, count_ptr, n, m, N, tile, tiles, k0, k1, blocks, alone,
            WHOLE, FIRST // 64, t_ptr, M, FACTOR, ROWS,
        )  # fmt: skip
        if ROWS == 256:
            total = sums1.to(gl.float32) * gl.expand_dims(gl.load(scale + 64), 1)
            finish(
                total, y, staged.index(PART), b_ptr, part_ptr, count_ptr, n, m, N, tile, tiles, k0, k1, blocks, alone,
                WHOLE, FIRST // 64 + 1, t_ptr, M, FACTOR, ROWS,
            )  # fmt: skip
    tma.store_wait(0)
