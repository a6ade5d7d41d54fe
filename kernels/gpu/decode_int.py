"""Integers of 2, 3 and 8 bits to floats of 16 bits, in registers; each by its layout of `qfx.kernels.nibbles`.

A float that counts in ones (128 in bfloat16, 1024 in float16) takes an integer in its low bits: or-ing it in adds it.
As in `qfx.kernels.gpu.decode4`, joins, permutations and reshapes only rename registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qfx.kernels.gpu.launch import interpreted


@triton.jit
def int8_to_float(words, zero, ZERO: tl.constexpr, F16: tl.constexpr):
    """int16 `[n, 64]` (or half of that) of layout `bytes`, less `zero` `[n, 1]`, which is 128 unless ZERO; exact."""
    if interpreted:
        w = words.to(tl.int32)
        a0 = (w & 255).to(tl.float32) - zero
        a1 = ((w >> 8) & 255).to(tl.float32) - zero
    elif F16:
        z = (-1024.0 - zero).to(tl.float16)
        a0, a1 = tl.inline_asm_elementwise(
            asm="""{
            .reg .b32 c, t;
            lop3.b32 c, $2, 0x00ff00ff, 0x64006400, 0xEA; add.rn.f16x2 $0, c, $3;
            shr.b32 t, $2, 8; lop3.b32 c, t, 0x00ff00ff, 0x64006400, 0xEA; add.rn.f16x2 $1, c, $3;
            }""",
            constraints="=r,=r,r,r",
            args=[words, z],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        # bfloat16 has room for seven bits: p = 128 + those, and q = 256 or 128, as the eighth is 0 or 1 (it falls on
        # the lowest bit of the exponent); p - q is the integer less 128
        if ZERO:
            z = (128.0 - zero).to(tl.bfloat16)
            a0, a1 = tl.inline_asm_elementwise(
                asm="""{
                .reg .b32 m, n, p, q, t;
                mov.b32 m, 0xbf80bf80; mov.b32 n, 0x3f803f80;
                lop3.b32 p, $2, 0x007f007f, 0x43004300, 0xEA; lop3.b32 q, $2, 0x00800080, 0x43004300, 0xAE;
                fma.rn.bf16x2 p, q, m, p; fma.rn.bf16x2 $0, p, n, $3;
                shr.b32 t, $2, 8;
                lop3.b32 p, t, 0x007f007f, 0x43004300, 0xEA; lop3.b32 q, t, 0x00800080, 0x43004300, 0xAE;
                fma.rn.bf16x2 p, q, m, p; fma.rn.bf16x2 $1, p, n, $3;
                }""",
                constraints="=r,=r,r,r",
                args=[words, z],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            a0, a1 = tl.inline_asm_elementwise(
                asm="""{
                .reg .b32 m, p, q, t;
                mov.b32 m, 0xbf80bf80;
                lop3.b32 p, $2, 0x007f007f, 0x43004300, 0xEA; lop3.b32 q, $2, 0x00800080, 0x43004300, 0xAE;
                fma.rn.bf16x2 $0, q, m, p;
                shr.b32 t, $2, 8;
                lop3.b32 p, t, 0x007f007f, 0x43004300, 0xEA; lop3.b32 q, t, 0x00800080, 0x43004300, 0xAE;
                fma.rn.bf16x2 $1, q, m, p;
                }""",
                constraints="=r,=r,r",
                args=[words],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
    return tl.join(a0, a1).permute(0, 2, 1).reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def _field(words, high, AT: tl.constexpr, HIGH: tl.constexpr):
    u = ((words >> 2 * AT) & 3).to(tl.float32)
    if HIGH:
        u += ((high >> (2 * AT + 2) % 16) & 1).to(tl.float32) * 4.0
    return u


@triton.jit
def fields_to_float(words, high, zero, HIGH: tl.constexpr, F16: tl.constexpr, ASM: tl.constexpr):
    """int16 `[n, 16]` of layout `eighths`, less `zero` `[n, 1]`; exact.

    HIGH: layout `split`, with the third bits in int16 `[n, 8]` `high`.
    """
    if HIGH:  # columns 8.. of the words have their bits one higher
        if interpreted:
            shifted = high >> 1
        else:
            shifted = tl.inline_asm_elementwise("shr.b32 $0, $1, 1;", "=r,r", [high], tl.int16, is_pure=True, pack=2)
        high = tl.join(high, shifted).permute(0, 2, 1).reshape(words.shape[0], 16)
    else:
        high = words
    if interpreted:
        w, h = words.to(tl.int32), high.to(tl.int32)
        a0, a1 = _field(w, h, 0, HIGH) - zero, _field(w, h, 1, HIGH) - zero
        a2, a3 = _field(w, h, 2, HIGH) - zero, _field(w, h, 3, HIGH) - zero
        a4, a5 = _field(w, h, 4, HIGH) - zero, _field(w, h, 5, HIGH) - zero
        a6, a7 = _field(w, h, 6, HIGH) - zero, _field(w, h, 7, HIGH) - zero
    else:
        FLOAT: tl.constexpr = tl.float16 if F16 else tl.bfloat16
        ONES: tl.constexpr = 1024.0 if F16 else 128.0
        a0, a1, a2, a3, a4, a5, a6, a7 = tl.inline_asm_elementwise(
            asm=ASM,
            constraints="=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r",
            args=[words, high, (-ONES - zero).to(FLOAT), (-ONES / 4 - zero).to(FLOAT), (-ONES / 16 - zero).to(FLOAT)],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
    a = tl.join(tl.join(tl.join(a0, a1), tl.join(a2, a3)), tl.join(tl.join(a4, a5), tl.join(a6, a7)))
    a = a.permute(0, 4, 3, 2, 1).reshape(words.shape[0], 128)
    if interpreted:
        return a
    else:
        return a.to(FLOAT, bitcast=True)


def fields_asm(bits: int, f16: bool) -> str:
    """PTX of `fields_to_float`: three fields share a shift, since a float has room for all of them.

    A field that lies 2 i bits up counts 4^i times as much, which the product with 4^-i undoes.
    """
    magic = 0x64006400 if f16 else 0x43004300
    parts = (0x3C003C00, 0x34003400, 0x2C002C00) if f16 else (0x3F803F80, 0x3E803E80, 0x3D803D80)  # 1, 1/4, 1/16
    kind = "f16x2" if f16 else "bf16x2"
    out = "{ .reg .b32 c, h, w, p0, p1, p2;" + "".join(f"mov.b32 p{i}, {part};" for i, part in enumerate(parts))
    for i in range(8):
        place = i % 3
        if place == 0:
            out += f"shr.b32 w, $8, {2 * i}; shr.b32 h, $9, {2 * i};"
        if i == 7:
            out += "shl.b32 h, $9, 4;"  # the last field's bits lie in the lowest place
        out += f"lop3.b32 c, w, {0x00030003 << 2 * place}, {magic}, 0xEA;"
        if bits == 3:
            out += f"lop3.b32 c, h, {0x00040004 << 2 * place}, c, 0xEA;"
        out += f"fma.rn.{kind} ${i}, c, p{place}, ${10 + place};"
    return out + "}"
