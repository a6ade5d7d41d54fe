"""Hadamard transform of long rows whose columns are a power of two, in three products of side 16 to 64, then codes.

The transform is a product of one 2x2 step for each bit of a column's number, in any order, so each product takes the
bits that lie where a tensor core sums: in the lane's lowest two bits and in its registers. The result of a product of
side 16, rounded to 16 bits, is an operand of the next one as it is, in the same registers, with other bits of the
column in the lowest two bits of the lane. Only before the last product do values go to other warps:

    bits of the column      in registers             in the lane       in the warp
    loaded                  2 1 0, 8+w and up        7 6 5 4 3         8 to 7+w      w: log2 of the warps
    product of 4 3 1 0      2 1 5, 8+w and up        4 3 0 7 6         8 to 7+w
    product of 7 6 5 2      the same                 the same          the same
    shared memory           2 1, 10 and up           4 3 0 9 8         7 6 5         for 8 warps; 4 keep 5 in registers
    product of 8 and up     2 1 0, all but three     the others, 4 3   7 6 5

A block below 2^b columns has the identity for the bits from b on. The products are exact (±1, ±1/16 and a power of two
for each token that keeps every sum below 2^15), sums are float32, and the first two results are rounded to float16, to
a relative 2^-11 each: up to 2^-10 sum|x| / sqrt(B) in a result of a block of B. What underflows is off by 2^-25:
2^-35 of the token's largest |x| for each of the B/16 values of the first product that a result is a sum of, and 2^-31
for each of the B/256 of the second; sqrt(B) 2^-38 in all.

Gluon states the layouts; not for Triton's interpreter.
"""

from __future__ import annotations

import functools

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from qfx.kernels.gpu import rowwise
from qfx.kernels.gpu.launch import Launcher
from qfx.kernels.gpu.rowwise import divide, encode
from qfx.kernels.hadamard_matrix import hadamard_matrix

_TINY = gl.constexpr(torch.finfo(torch.float32).tiny)


@gluon.jit
def fold(w, INNER: gl.constexpr, F16: gl.constexpr = False):
    """The larger magnitudes of pairs of 16-bit floats, as their signs mean nothing: along one bit of w's index.

    That bit, of weight INNER, is in a thread's registers. One instruction for two words.
    """
    OUTER: gl.constexpr = w.shape[0] // (2 * INNER)
    TEXT: gl.constexpr = "max.xorsign.abs.f16x2 $0, $1, $2;" if F16 else "max.xorsign.abs.bf16x2 $0, $1, $2;"
    a, b = gl.split(w.reshape((OUTER, 2, INNER)).permute((0, 2, 1)))
    return gl.inline_asm_elementwise(TEXT, "=r,r,r", [a, b], gl.int32, True, 1).reshape((OUTER * INNER,))


@gluon.jit
def unpack(w, F16: gl.constexpr = False):
    """The two values of each word as float32."""
    if F16:
        low, high = gl.inline_asm_elementwise(
            "{.reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}",
            "=r,=r,r", [w], (gl.float32, gl.float32), True, 1,
        )  # fmt: skip
    else:
        low, high = (w << 16).to(gl.float32, bitcast=True), (w & -65536).to(gl.float32, bitcast=True)
    return low, high


@gluon.jit
def pack(y, factor, F16: gl.constexpr = False):
    """`y · factor` of neighbours in y `[columns]`, rounded to 16 bits, half to even: a word for two."""
    low, high = gl.split(y.reshape((y.shape[0] // 2, 2)))
    TEXT: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;" if F16 else "cvt.rn.bf16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(TEXT, "=r,r,r", [low * factor, high * factor], gl.int32, True, 1)


@gluon.jit
def halves(w, dtype: gl.constexpr):
    """The 16-bit floats that words hold; no instruction."""
    v = gl.join(w.to(gl.int16), (w >> 16).to(gl.int16))
    return v.reshape((2 * w.shape[0],)).to(dtype, bitcast=True)


@gluon.jit
def warp_top(w, F16: gl.constexpr = False):
    """The largest magnitude in `w [warps, words]` of each warp, as the bits of a float32."""
    low, high = unpack(w, F16)
    low = low.to(gl.int32, bitcast=True) & 0x7FFFFFFF
    return gl.max(gl.maximum(low, high.to(gl.int32, bitcast=True) & 0x7FFFFFFF), 1)


@gluon.jit
def all_warps(shared, ALL: gl.constexpr):
    """The largest of what the warps have stored."""
    return gl.max(shared.load(ALL), 0).to(gl.float32, bitcast=True)


@gluon.jit
def write_codes(
    w, top, out, scale, x_scale, x_zero,
    OUT: gl.constexpr, KIND: gl.constexpr, LO: gl.constexpr, HI: gl.constexpr, REACH: gl.constexpr,
    CLAMP: gl.constexpr, F16: gl.constexpr = False,
):  # fmt: skip
    """As `rowwise.quantize_tile`, of one row of words, to the pointer `out`."""
    if x_scale is not None:
        s = gl.load(x_scale)
    else:
        s = gl.where(top > 0, gl.maximum(gl.div_rn(top, REACH * 1.0), _TINY), 1.0)
    gl.store(scale, s)
    r = gl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=r,r", [s], gl.float32, True, 1)
    low, high = unpack(w, F16)
    low = encode(divide(low, s, r), x_zero, KIND, LO, HI, CLAMP)
    codes = gl.join(low, encode(divide(high, s, r), x_zero, KIND, LO, HI, CLAMP)).reshape((2 * w.shape[0],))
    gl.store(out + gl.arange(0, 2 * w.shape[0], OUT), gl.convert_layout(codes, OUT, assert_trivial=True))


@gluon.jit
def write_values(w, out, OUT: gl.constexpr, dtype: gl.constexpr):
    """The row of words itself."""
    v = gl.convert_layout(halves(w, dtype), OUT, assert_trivial=True)
    gl.store(out + gl.arange(0, 2 * w.shape[0], OUT), v)


@gluon.jit
def _top_of_input(w, T: gl.constexpr, W: gl.constexpr):
    if T > 4:
        w = fold(w, w.shape[0] // 2)
    if T > 2:
        w = fold(w, w.shape[0] // 2)
    w = fold(fold(fold(w, w.shape[0] // 2), 2), 1)
    return warp_top(w.reshape((W, 32)))


@gluon.jit
def _top_of_result(w, T: gl.constexpr, W: gl.constexpr):
    if T > 4:
        w = fold(w, w.shape[0] // 2)
    if T > 2:
        w = fold(w, w.shape[0] // 2)
    w = fold(w, 512 if W == 8 else 16)
    w = fold(fold(w, 2), 1)
    return warp_top(w.reshape((8, W, 4)).permute((1, 0, 2)).reshape((W, 32)))


@gluon.jit
def _exchange(t, shared, LOADED: gl.constexpr, T: gl.constexpr, W: gl.constexpr):
    """`t [D/16, 16]` of the bits (8 and up) 1 4 3 0, 2 7 6 5 to the right operand of the last product.

    16 bytes of shared memory are of one thread before and after. A row of it is 128 bytes of the bits 0 7 6, and the
    swizzle adds bits 9 and 8 to 7 and 6, so that eight threads that store or load together have all banks.
    """
    TR: gl.constexpr = T // 2
    WR: gl.constexpr = W // 4
    C5: gl.constexpr = 8 // W  # 2 where bit 5 stays in registers
    if T == 2:
        t = t.reshape((2, WR, 4, 2, 4, 2, 2, 4, 2)).permute((1, 8, 4, 2, 5, 7, 6, 3, 0))
        shared.store(t.reshape((shared.shape[0], 64)))
        t = shared.load(LOADED).reshape((WR, W // 4, C5, 4, 4, 2, 4, 2, 2, 2))
        # (Wr, c5 in the warp, c5 in registers, 43, 98, 0, 76, 2, 1, T)
        t = t.permute((0, 4, 9, 2, 7, 8, 6, 1, 3, 5))
    else:
        TH: gl.constexpr = T // 4
        t = t.reshape((TH, 4, WR, 4, 2, 4, 2, 2, 4, 2)).permute((0, 2, 7, 9, 5, 3, 6, 8, 4, 1))
        shared.store(t.reshape((shared.shape[0], 64)))
        t = shared.load(LOADED).reshape((TH, WR, 2, W // 4, C5, 4, 4, 2, 4, 2, 2, 2))
        # (T high, Wr, 2, c5 in the warp, c5 in registers, 43, 98, 0, 76, 1, T1, T0)
        t = t.permute((0, 1, 10, 6, 11, 4, 2, 9, 8, 3, 5, 7))
    return t.reshape((TR * WR * 8, 256))


@gluon.jit
def _kernel(
    x, h1_ptr, h2_ptr, h3_ptr, out, scale, x_scale, x_zero, tokens, x_stride,
    D: gl.constexpr, T: gl.constexpr, W: gl.constexpr, NORM: gl.constexpr, AHEAD: gl.constexpr,
    LOADED: gl.constexpr, OUT: gl.constexpr, ALL: gl.constexpr,
    KIND: gl.constexpr, LO: gl.constexpr, HI: gl.constexpr, REACH: gl.constexpr, CLAMP: gl.constexpr,
):  # fmt: skip
    K: gl.constexpr = T * W
    T1: gl.constexpr = 2 if T > 2 else 1
    IN: gl.constexpr = gl.BlockedLayout([4], [32], [W], [0])  # of words
    SIDE: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, W], [16, 8])
    DOWN: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
    A1: gl.constexpr = gl.DotOperandLayout(0, SIDE, 2)
    B1: gl.constexpr = gl.DotOperandLayout(1, SIDE, 2)
    A2: gl.constexpr = gl.DotOperandLayout(0, DOWN, 2)
    B2: gl.constexpr = gl.DotOperandLayout(1, DOWN, 2)
    dtype: gl.constexpr = x.dtype.element_ty
    DYNAMIC: gl.constexpr = KIND != "" and x_scale is None
    values = gl.allocate_shared_memory(gl.float16, [D // 64, 64], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    x_top = gl.allocate_shared_memory(gl.int32, [W], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    y_top = gl.allocate_shared_memory(gl.int32, [W], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    side = gl.arange(0, 16, gl.SliceLayout(1, A1))[:, None]
    h1 = gl.load(h1_ptr + (side * 16 + gl.arange(0, 16, gl.SliceLayout(0, A1))[None, :]))
    side = gl.arange(0, 16, gl.SliceLayout(1, B2))[:, None]
    h2 = gl.load(h2_ptr + (side * 16 + gl.arange(0, 16, gl.SliceLayout(0, B2))[None, :]))
    side = gl.arange(0, K, gl.SliceLayout(1, A1))[:, None]
    h3 = gl.load(h3_ptr + (side * K + gl.arange(0, K, gl.SliceLayout(0, A1))[None, :]))
    column = gl.arange(0, D // 2, IN)
    words = x.to(gl.pointer_type(gl.int32), bitcast=True)
    programs = gl.num_programs(0)
    token = gl.program_id(0)
    if AHEAD:
        ahead = gl.load(words + (token.to(gl.int64) * x_stride + column))
        x_top.store(_top_of_input(ahead, T, W))
        ahead_top = all_warps(x_top, ALL)
    while token < tokens:
        if AHEAD:
            w = ahead
            top = ahead_top
            ahead = gl.load(words + (gl.minimum(token + programs, tokens - 1).to(gl.int64) * x_stride + column))
        else:
            w = gl.load(words + (token.to(gl.int64) * x_stride + column))
            x_top.store(_top_of_input(w, T, W))
            top = all_warps(x_top, ALL)
        step = gl.maximum(top.to(gl.int32, bitcast=True) & 0x7F800000, 27 << 23)  # 2^-100
        # |x| / step is below 2, and a sum of 16 times 2^10 below 2^15; 1/16 in the second matrix keeps it there
        a = h1 * (((254 << 23) - step).to(gl.float32, bitcast=True) * 1024.0).to(dtype)
        factor = step.to(gl.float32, bitcast=True) * (NORM / 64.0)
        v = halves(w, dtype).reshape((T, W, 8, 4, 2, 2, 2)).permute((5, 3, 6, 0, 4, 1, 2)).reshape((16, D // 16))
        v = gl.convert_layout(v, B1, assert_trivial=True)
        t = mma_v2(a, v, gl.zeros((16, D // 16), gl.float32, SIDE)).to(gl.float16)
        t = t.reshape((2, 4, 2, T, 2, W, 8)).permute((3, 5, 0, 1, 2, 4, 6)).reshape((D // 16, 16))
        t = gl.convert_layout(t, A2, assert_trivial=True)
        t = mma_v2(t, h2, gl.zeros((D // 16, 16), gl.float32, DOWN)).to(gl.float16)
        t = gl.convert_layout(_exchange(t, values, LOADED, T, W), B1, assert_trivial=True)
        y = mma_v2(h3, t, gl.zeros((K, 256), gl.float32, SIDE))
        # (T high, Wr, T1, W, T0, 5, 2, 1, warps, 43, 0) to the order of the columns
        y = y.reshape((T // 2 // T1, W // 4, T1, 4, 2, 8 // W, 2, 2, W, 4, 2))
        w = pack(y.permute((0, 2, 4, 1, 3, 8, 5, 9, 6, 7, 10)).reshape((D,)), factor)
        if AHEAD:
            x_top.store(_top_of_input(ahead, T, W))
        row = token.to(gl.int64) * D
        if KIND == "":
            write_values(w, out + row, OUT, dtype)
        else:
            y_max = top
            if DYNAMIC:
                y_top.store(_top_of_result(w, T, W))
                y_max = all_warps(y_top, ALL)
            write_codes(w, y_max, out + row, scale + token, x_scale, x_zero, OUT, KIND, LO, HI, REACH, CLAMP)
        if AHEAD:
            ahead_top = all_warps(x_top, ALL)
        token += programs


def takes(columns: int, block: int, dtype: torch.dtype, warps: int = 8) -> bool:
    """Whether the kernel computes such rows: bfloat16, as float16 is no better than what is rounded in between."""
    power = columns & (columns - 1) == 0 and block & (block - 1) == 0
    fitting = columns in {4: (4096, 8192), 8: (4096, 8192, 16384)}.get(warps, ())
    return dtype == torch.bfloat16 and power and fitting and 512 <= block <= columns


def all_warps_layout(warps: int) -> gl.DistributedLinearLayout:
    """A value of every warp, all in each thread."""
    bits = warps.bit_length() - 1
    return gl.DistributedLinearLayout([[1 << i] for i in range(bits)], [[0]] * 5, [[0]] * bits, [], [warps])


def sums(columns: int, warps: int) -> list[int]:
    """The bits of the last product in the order of its index: a pair, two of the lane, a second register, others."""
    low, bits = 7 + warps.bit_length(), columns.bit_length() - 1
    return [low, 8, 9, *range(low + 1, min(low + 2, bits)), *range(10, low), *range(low + 2, bits)]


@functools.cache
def layouts(columns: int, warps: int) -> tuple[gl.DistributedLinearLayout, gl.DistributedLinearLayout]:
    """What is loaded from shared memory, and the result: see the table of bits above."""
    w, bits = warps.bit_length() - 1, columns.bit_length() - 1
    t, low = bits - 8 - w, 8 + w  # `low` is the lowest bit of those that are in registers from the start
    rest = sums(columns, warps)[3:]
    # positions of bits in a row of shared memory, then of its rows
    order = [low, low + 1, 1] if t > 1 else [low, 1, 2]
    order += [6, 7, 0, 8, 9, 3, 4, 5] + ([2] if t > 1 else []) + list(range(10, low)) + list(range(low + 2, bits))
    place = {bit: [0, 1 << i] if i < 6 else [1 << (i - 6), 0] for i, bit in enumerate(order)}
    spare = [5] if warps == 4 else []
    lanes, in_warps = [8, 9, 0, 3, 4], [b for b in (5, 6, 7) if b not in spare]
    loaded = gl.DistributedLinearLayout(
        [place[b] for b in [low, *rest, 1, 2, *spare]], [place[b] for b in lanes], [place[b] for b in in_warps], [],
        [columns // 64, 64],
    )  # fmt: skip
    rows = [low, 8, 9]  # of the last product: in the lane
    result = gl.DistributedLinearLayout(
        [[1 << b] for b in [0, 1, 2, *spare, *rest]], [[1 << b] for b in [3, 4, *rows]],
        [[1 << b] for b in in_warps], [], [columns],
    )  # fmt: skip
    return loaded, result


def step_matrix(bits: list[int], block: int) -> Tensor:
    """The transform of these bits of a column's number, lowest first; identity for those outside of a block."""
    h = torch.ones(1, 1)
    h2 = hadamard_matrix(2)
    assert h2 is not None
    for bit in bits:
        h = torch.kron(h2 if 1 << bit < block else torch.eye(2), h)
    return h


@functools.cache
def matrices(columns: int, block: int, warps: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices of the three products; the first one is multiplied by a power of two for each token."""
    third = step_matrix(sums(columns, warps), block)
    first, second = step_matrix([0, 3, 4, 1], block), step_matrix([5, 6, 7, 2], block) / 16
    return first.to(torch.bfloat16).to(device), second.half().to(device), third.half().to(device)


@functools.cache
def launcher(columns: int, block: int, x_grid: str, dynamic: bool, warps: int, ahead: bool) -> Launcher:
    """The kernel; its arguments are those of `hadamard.py`'s with three matrices, and x's stride in words."""
    grid = rowwise.grid_meta(x_grid, dynamic)
    loaded, result = layouts(columns, warps)
    return Launcher(
        _kernel, D=columns, T=columns // 256 // warps, W=warps, NORM=block**-0.5, AHEAD=ahead, LOADED=loaded,
        OUT=result, ALL=all_warps_layout(warps), **grid, num_warps=warps,
    )  # fmt: skip
