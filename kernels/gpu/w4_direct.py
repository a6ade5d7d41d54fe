"""Weights of 4 bits times up to 16 tokens: codes go from memory to registers and to the tensor cores, nowhere else.

A program owns 16 or 32 rows. As in `w4_few`, each of its warps multiplies every W-th block of 128 columns, and the
warps' sums meet in shared memory at the end. Here a thread also loads, 16 bytes at a time, exactly the codes that the
tensor core wants from it, and the tokens likewise: there is no shared memory and no barrier in the loop, which takes
two thirds of the instructions, and instructions are what limits `w4_few`. Tokens that do not exist are copies of the
last one, so that nothing is masked. Gluon states these layouts; not for Triton's interpreter.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qfx.kernels.gpu.decode4 import HALVES, HALVES_LESS_ZERO, Decoder
from qfx.kernels.gpu.gluon_lookup import lookup
from qfx.kernels.gpu.launch import Launcher
from qfx.kernels.gpu.shared_table import LOOKUP, setup_asm


def _nibble(plane: int, f16: bool) -> str:
    """PTX: nibble `plane` of each halfword of $1 as a float, plus $2; exact. See `decode4.int4_to_float`."""
    magic, one, kind = (0x64006400, 0x3C003C00, "f16x2") if f16 else (0x43004300, 0x3F803F80, "bf16x2")
    shift = f"shr.b32 t, $1, {4 * plane};" if plane else "mov.b32 t, $1;"
    body = f"lop3.b32 t, t, 0x000f000f, {magic}, 0xEA; fma.rn.{kind} $0, t, one, $2;"
    return f"{{ .reg .b32 t, one; mov.b32 one, {one}; {shift} {body} }}"


@gluon.jit
def _plane(w, z, ASM: gl.constexpr, PLANE: gl.constexpr):
    TEXT: gl.constexpr = ASM[PLANE]
    return gl.inline_asm_elementwise(TEXT, "=r,r,r", [w, z], z.dtype, True, 2)


@gluon.jit
def _halves(w, z, ZERO: gl.constexpr, ASM: gl.constexpr):
    TEXT: gl.constexpr = ASM[0]
    if ZERO:
        low, high = gl.inline_asm_elementwise(TEXT, "=r,=r,r,r", [w, z], (gl.int8, gl.int8), True, 4)
    else:
        low, high = gl.inline_asm_elementwise(TEXT, "=r,=r,r", [w], (gl.int8, gl.int8), True, 4)
    return low, high


@gluon.jit
def _lookup8(w, ASM: gl.constexpr):
    TEXT: gl.constexpr = ASM[0]
    return gl.inline_asm_elementwise(TEXT, "=r,=r,r", [w], (gl.float8e4nv, gl.float8e4nv), True, 4)


@gluon.jit
def _load(ptr, inside, block, blocks, B: gl.constexpr, EVEN: gl.constexpr):
    """The words of the step that begins with a block; a weight is read once. Behind the last step: any, or zeros."""
    TILE: gl.constexpr = 128 * 16
    if EVEN:
        w = gl.load(ptr + gl.minimum(block, blocks - B) * TILE, eviction_policy="evict_first")
    else:
        w = gl.load(ptr + block * TILE, mask=inside + block < blocks, other=0, eviction_policy="evict_first")
    return w


@gluon.jit
def _load_here(ptr, inside, left, EVEN: gl.constexpr):
    """The words of the step at `ptr`, with so many blocks left."""
    if EVEN:
        w = gl.load(ptr, eviction_policy="evict_first")
    else:
        w = gl.load(ptr, mask=inside < left, other=0, eviction_policy="evict_first")
    return w


@gluon.jit
def _parts(w, SPAN: gl.constexpr, LAYOUT: gl.constexpr):
    """32-bit words as the halfwords or bytes that they hold; no instruction."""
    if SPAN == 32:
        w = gl.join(w.to(gl.int16), (w >> 16).to(gl.int16)).reshape(w.shape[0], w.shape[1], 32)
    else:
        even = gl.join(w.to(gl.uint8), (w >> 16).to(gl.uint8))
        odd = gl.join((w >> 8).to(gl.uint8), (w >> 24).to(gl.uint8))
        w = gl.join(even, odd).reshape(w.shape[0], w.shape[1], 64)
    return gl.convert_layout(w, LAYOUT, assert_trivial=True)


@gluon.jit
def _tokens(ptr, k, K, EVEN: gl.constexpr):
    if EVEN:
        x = gl.load(ptr)
    else:
        x = gl.load(ptr, mask=k < K, other=0 if ptr.dtype.element_ty == gl.int8 else 0.0)
    return x


@gluon.jit
def _columns(ptr, k, K, BYTES: gl.constexpr, EVEN: gl.constexpr):
    """The tokens' columns of each plane; bytes have two planes, the first and the third."""
    x0 = _tokens(ptr, k, K, EVEN)
    if BYTES:
        x2 = _tokens(ptr + 64, k + 64, K, EVEN)
        return x0, x0, x2, x2
    x1, x2 = _tokens(ptr + 32, k + 32, K, EVEN), _tokens(ptr + 64, k + 64, K, EVEN)
    return x0, x1, x2, _tokens(ptr + 96, k + 96, K, EVEN)


@gluon.jit
def _needed(a0, a1, a2, a3, b0, b1, b2, b3, WHOLE: gl.constexpr, PARTS: gl.constexpr):
    """The scales b where they are used; those of other planes stay a, so that the loop carries nothing for them."""
    if not WHOLE:
        a0 = b0
    if PARTS > 1:
        a2 = b2
    if PARTS == 4:
        a1, a3 = b1, b3
    return a0, a1, a2, a3


@gluon.jit
def _at(block, rows, groups, stride, GROUP: gl.constexpr, PART: gl.constexpr):
    """Where the scale of a part of a block of 128 columns is; blocks behind the last one read some that exists."""
    if GROUP <= 0:
        g = block * 0
    elif GROUP < 128:
        g = block * (128 // GROUP) + PART
    else:
        g = block // (GROUP // 128)
    return gl.minimum(g, groups - 1) * stride + rows


@gluon.jit
def _scales(ptr, block, rows, groups, stride, GROUP: gl.constexpr):
    """The scales of the four planes of a block of columns."""
    s = gl.load(ptr + _at(block, rows, groups, stride, GROUP, 0))
    if GROUP == 64:
        s1 = gl.load(ptr + _at(block, rows, groups, stride, GROUP, 1))
        return s, s, s1, s1
    if GROUP == 32:
        s1 = gl.load(ptr + _at(block, rows, groups, stride, GROUP, 1))
        s2 = gl.load(ptr + _at(block, rows, groups, stride, GROUP, 2))
        return s, s1, s2, gl.load(ptr + _at(block, rows, groups, stride, GROUP, 3))
    return s, s, s, s


@gluon.jit
def _zeros(ptr, block, rows, groups, stride, GROUP: gl.constexpr, FLOAT: gl.constexpr, ONES: gl.constexpr):
    """The zero points of the four planes as `_nibble` wants them: with what its trick adds to each code, negative."""
    z0, z1, z2, z3 = _scales(ptr, block, rows, groups, stride, GROUP)
    z0 = (-ONES - z0.to(gl.float32)).to(FLOAT)[:, :, None]
    z1 = (-ONES - z1.to(gl.float32)).to(FLOAT)[:, :, None]
    z2 = (-ONES - z2.to(gl.float32)).to(FLOAT)[:, :, None]
    z3 = (-ONES - z3.to(gl.float32)).to(FLOAT)[:, :, None]
    return z0, z1, z2, z3


@gluon.jit
def _w4_direct(
    x_ptr, x_scale_ptr, w_ptr, s_ptr, z_ptr, b_ptr, y_ptr,
    M, N, K, groups, x_stride, s_stride,
    KIND: gl.constexpr, ASM: gl.constexpr, FLOAT: gl.constexpr, ONES: gl.constexpr, FACTOR: gl.constexpr,
    GROUP: gl.constexpr, ZERO: gl.constexpr, SCALED: gl.constexpr, BIAS: gl.constexpr,
    W: gl.constexpr, U: gl.constexpr, R: gl.constexpr, T: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    INT: gl.constexpr = KIND == "int4_int8"
    BYTES: gl.constexpr = INT or KIND == "table_e4m3"
    SPAN: gl.constexpr = 64 if BYTES else 32  # halfwords or bytes of a row, and the columns of a plane
    PARTS: gl.constexpr = 128 // GROUP if GROUP == 32 or GROUP == 64 else 1
    WHOLE: gl.constexpr = GROUP < 0
    TILE: gl.constexpr = 128 * 16  # words
    B: gl.constexpr = W * U
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    CODES: gl.constexpr = gl.DotOperandLayout(0, MMA, SPAN // 4)
    WORDS: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)  # the same as 32-bit words: 16 bytes of a thread
    TOKENS: gl.constexpr = gl.DotOperandLayout(1, MMA, SPAN // 4)
    blocks = gl.cdiv(K, 128)
    pn = gl.program_id(0)
    wb = gl.arange(0, B, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))[:, None]
    wr = gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))[None, :]
    zb = gl.arange(0, B, gl.SliceLayout(1, gl.SliceLayout(2, CODES)))[:, None]
    zr = pn * R + gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, CODES)))[None, :]
    wk = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, :][:, None, :]
    xb = gl.arange(0, B, gl.SliceLayout(1, gl.SliceLayout(2, TOKENS)))[:, None][:, :, None]
    xk = gl.arange(0, SPAN, gl.SliceLayout(0, gl.SliceLayout(2, TOKENS)))[None, :][:, :, None]
    xn = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(1, TOKENS)))[None, :][:, None, :]
    sb = gl.arange(0, B, gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None]
    sr = pn * R + gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :]
    # 128 rows of 128 columns are consecutive in memory, and R divides 128
    tile = ((pn * R) // 128).to(gl.int64) * blocks * TILE
    wp = w_ptr + (tile + ((pn * R) % 128) * 16) + ((wb * TILE + wr * 16)[:, :, None] + wk)
    xp = x_ptr + (gl.minimum(xn, M - 1).to(gl.int64) * x_stride + (xb * 128 + xk))
    k = xb * 128 + xk + xn * 0
    inside = wb[:, :, None] + (wr * 0)[:, :, None] + wk * 0
    acc = gl.zeros([B, R, T], gl.int32 if INT and WHOLE else gl.float32, MMA)
    w = _load(wp, inside, 0, blocks, B, EVEN)
    s0, s1, s2, s3 = _scales(s_ptr, sb, sr, groups, s_stride, GROUP)
    address = 0
    if KIND == "table":
        SETUP: gl.constexpr = ASM[1]
        address = gl.inline_asm_elementwise(SETUP, "=r", [], gl.int32, False, 1)
    # names that end in p, q, n: of the next step, of the one behind it, of the last one that is loaded
    if AHEAD > 1:
        w_p = _load(wp, inside, B, blocks, B, EVEN)
        s0p, s1p, s2p, s3p = _scales(s_ptr, B + sb, sr, groups, s_stride, GROUP)
    if AHEAD > 2:
        w_q = _load(wp, inside, 2 * B, blocks, B, EVEN)
        s0q, s1q, s2q, s3q = _scales(s_ptr, 2 * B + sb, sr, groups, s_stride, GROUP)
    if PDL:
        gdc_wait()
    for block in range(0, blocks, B):
        if AHEAD:  # their latency passes while this step is computed
            w_n = _load(wp, inside, block + AHEAD * B, blocks, B, EVEN)
            s0n, s1n, s2n, s3n = _scales(s_ptr, block + AHEAD * B + sb, sr, groups, s_stride, GROUP)
        else:
            w = _load_here(wp, inside, blocks - block, EVEN)
            if not WHOLE:
                s0, s1, s2, s3 = _scales(s_ptr, block + sb, sr, groups, s_stride, GROUP)
        codes = _parts(w, SPAN, CODES)
        if AHEAD:
            x0, x1, x2, x3 = _columns(xp + block * 128, k + block * 128, K, BYTES, EVEN)
        else:
            x0, x1, x2, x3 = _columns(xp, k + block * 128, K, BYTES, EVEN)
        if BYTES:
            none = gl.zeros([B, R, T], gl.int32 if INT else gl.float32, MMA)
            if INT:
                z = codes
                if ZERO:
                    z = gl.load(z_ptr + _at(block + zb, zr, groups, s_stride, GROUP, 0))[:, :, None]
                a0, a2 = _halves(codes, z, ZERO, ASM)
            else:
                a0, a2 = _lookup8(codes, ASM)
            if WHOLE:
                acc = mma_v2(a2, x2, mma_v2(a0, x0, acc))
            else:
                acc += mma_v2(a2, x2, mma_v2(a0, x0, none)).to(gl.float32) * s0[:, :, None]
        else:
            if KIND == "table":
                a0, a1, a2, a3 = lookup(codes, address, ASM, FLOAT)
            else:
                z0 = gl.full([B, R, SPAN], -ONES - 8.0, FLOAT, CODES)
                z1 = z0
                z2 = z0
                z3 = z0
                if ZERO:
                    z0, z1, z2, z3 = _zeros(z_ptr, block + zb, zr, groups, s_stride, GROUP, FLOAT, ONES)
                a0, a1 = _plane(codes, z0, ASM, 0), _plane(codes, z1, ASM, 1)
                a2, a3 = _plane(codes, z2, ASM, 2), _plane(codes, z3, ASM, 3)
            none = gl.zeros([B, R, T], gl.float32, MMA)
            if WHOLE:
                acc = mma_v2(a3, x3, mma_v2(a2, x2, mma_v2(a1, x1, mma_v2(a0, x0, acc))))
            elif PARTS == 1:
                acc += mma_v2(a3, x3, mma_v2(a2, x2, mma_v2(a1, x1, mma_v2(a0, x0, none)))) * s0[:, :, None]
            elif PARTS == 2:
                acc += mma_v2(a1, x1, mma_v2(a0, x0, none)) * s0[:, :, None]
                acc += mma_v2(a3, x3, mma_v2(a2, x2, none)) * s2[:, :, None]
            else:
                acc += mma_v2(a0, x0, none) * s0[:, :, None]
                acc += mma_v2(a1, x1, none) * s1[:, :, None]
                acc += mma_v2(a2, x2, none) * s2[:, :, None]
                acc += mma_v2(a3, x3, none) * s3[:, :, None]
        if AHEAD == 0:  # pointers that count up take fewer registers, with nothing loaded ahead
            wp += B * TILE
            xp += B * 128
        elif AHEAD == 1:
            w = w_n
            s0, s1, s2, s3 = _needed(s0, s1, s2, s3, s0n, s1n, s2n, s3n, WHOLE, PARTS)
        else:
            w = w_p
            s0, s1, s2, s3 = _needed(s0, s1, s2, s3, s0p, s1p, s2p, s3p, WHOLE, PARTS)
            if AHEAD == 2:
                w_p = w_n
                s0p, s1p, s2p, s3p = _needed(s0p, s1p, s2p, s3p, s0n, s1n, s2n, s3n, WHOLE, PARTS)
            else:
                w_p = w_q
                w_q = w_n
                s0p, s1p, s2p, s3p = _needed(s0p, s1p, s2p, s3p, s0q, s1q, s2q, s3q, WHOLE, PARTS)
                s0q, s1q, s2q, s3q = _needed(s0q, s1q, s2q, s3q, s0n, s1n, s2n, s3n, WHOLE, PARTS)
    if PDL:
        gdc_launch_dependents()
    total = gl.sum(acc, 0).to(gl.float32)
    rn = pn * R + gl.arange(0, R, gl.SliceLayout(1, gl.SliceLayout(0, MMA)))
    rt = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(0, MMA)))
    if WHOLE:
        total *= gl.load(s_ptr + rn)[:, None]
    if SCALED:  # one factor for each token; FACTOR undoes what the decoder multiplies by
        total *= gl.load(x_scale_ptr + gl.minimum(rt, M - 1))[None, :] * FACTOR
    if BIAS:
        total += gl.load(b_ptr + rn, mask=rn < N, other=0.0).to(gl.float32)[:, None]
    out = y_ptr + rt[None, :] * N + rn[:, None]
    gl.store(out, total.to(y_ptr.dtype.element_ty), mask=(rt < M)[None, :] & (rn < N)[:, None])


def takes(tokens: int, group: int, decoder: Decoder) -> bool:
    """Whether this form computes so many tokens with such codes and groups.

    With 9 to 16 tokens only tables: there integers are faster elsewhere, and these are not.
    """
    if tokens > (16 if decoder.table else 8) or decoder.kind not in ("int4", "table", "int4_int8", "table_e4m3"):
        return False
    return group < 0 or group % 128 == 0 or (group in (32, 64) and decoder.kind in ("int4", "table"))


@cache
def launcher(
    shape: tuple[int, int, int, int, int], decoder: Decoder, group: int, flags: tuple[bool, ...], many: bool, pdl: bool
) -> Launcher:
    """The kernel.

    Args:
        shape: warps; steps of 128 columns that a warp takes at once; rows; how many steps ahead codes are loaded, up to
            3; limit of a thread's registers, or 0.
        decoder: what a code means.
        group: columns that share a scale, or -1.
        flags: zero points, scaled tokens, bias, float16, columns a multiple of what a turn of the loop takes.
        many: 16 tokens and not 8.
        pdl: programmatic dependent launch.
    """
    warps, unroll, rows, ahead, registers = shape
    zero, scaled, bias, f16, even = flags
    limit: dict[str, Any] = {"maxnreg": registers} if registers else {}
    asm: tuple[str, ...] = (decoder.asm,)
    if decoder.kind == "table":
        asm = LOOKUP, setup_asm(decoder.table, warps)
    elif decoder.kind == "int4":
        asm = tuple(_nibble(plane, f16) for plane in range(4))
    elif decoder.kind == "int4_int8":
        asm = ((HALVES_LESS_ZERO if zero else HALVES).value,)
    return Launcher(
        _w4_direct, KIND=decoder.kind, ASM=asm, FLOAT=gl.float16 if f16 else gl.bfloat16, ONES=1024.0 if f16 else 128.0,
        FACTOR=decoder.factor, GROUP=group, ZERO=zero, SCALED=scaled, BIAS=bias, W=warps, U=unroll, R=rows,
        T=16 if many else 8, AHEAD=ahead, EVEN=even, PDL=pdl, num_warps=warps, launch_pdl=pdl, **limit,
    )  # fmt: skip
