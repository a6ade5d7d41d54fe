"""Codes to what the tensor cores multiply, in registers: nibbles here, other widths in `qfx.kernels.gpu.decode_int`.

Every decoder takes a tile, 16 bytes a row for each bit, which stand for 128 columns, and returns `[rows, 128]`. Bytes
are laid out (`qfx.kernels.nibbles`) so that each thread already holds the columns that the product wants from it: the
joins, permutations and reshapes below only rename registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from qfx.kernels.gpu.decode_int import fields_asm, fields_to_float, int8_to_float
from qfx.kernels.gpu.launch import interpreted


@triton.jit
def int4_to_float(words, zero, F16: tl.constexpr):
    """int16 `[n, 32]` of layout `quarters`, less `zero` `[n, 1]`; exact."""
    if interpreted:
        w = words.to(tl.int32)
        a0 = (w & 15).to(tl.float32) - zero
        a1 = ((w >> 4) & 15).to(tl.float32) - zero
        a2 = ((w >> 8) & 15).to(tl.float32) - zero
        a3 = ((w >> 12) & 15).to(tl.float32) - zero
    elif F16:
        # 0x6400 is 1024 and its last bit is worth 1: or-ing a nibble in adds it
        z = (zero + 1024.0).to(tl.float16)
        a0, a1, a2, a3 = tl.inline_asm_elementwise(
            asm="""{
            .reg .b32 c, t;
            lop3.b32 c, $4, 0x000f000f, 0x64006400, 0xEA; sub.f16x2 $0, c, $5;
            shr.b32 t, $4, 4;  lop3.b32 c, t, 0x000f000f, 0x64006400, 0xEA; sub.f16x2 $1, c, $5;
            shr.b32 t, $4, 8;  lop3.b32 c, t, 0x000f000f, 0x64006400, 0xEA; sub.f16x2 $2, c, $5;
            shr.b32 t, $4, 12; lop3.b32 c, t, 0x000f000f, 0x64006400, 0xEA; sub.f16x2 $3, c, $5;
            }""",
            constraints="=r,=r,=r,=r,r,r",
            args=[words, z],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        # 0x4300 is 128 in bfloat16; the difference is a product with 1 and a sum, which sm_80 has, and is exact too
        z = (-128.0 - zero).to(tl.bfloat16)
        a0, a1, a2, a3 = tl.inline_asm_elementwise(
            asm="""{
            .reg .b32 c, t, one;
            mov.b32 one, 0x3f803f80;
            lop3.b32 c, $4, 0x000f000f, 0x43004300, 0xEA; fma.rn.bf16x2 $0, c, one, $5;
            shr.b32 t, $4, 4;  lop3.b32 c, t, 0x000f000f, 0x43004300, 0xEA; fma.rn.bf16x2 $1, c, one, $5;
            shr.b32 t, $4, 8;  lop3.b32 c, t, 0x000f000f, 0x43004300, 0xEA; fma.rn.bf16x2 $2, c, one, $5;
            shr.b32 t, $4, 12; lop3.b32 c, t, 0x000f000f, 0x43004300, 0xEA; fma.rn.bf16x2 $3, c, one, $5;
            }""",
            constraints="=r,=r,=r,=r,r,r",
            args=[words, z],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return tl.join(tl.join(a0, a1), tl.join(a2, a3)).permute(0, 3, 2, 1).reshape(words.shape[0], 128)


HALVES = tl.constexpr("{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0; }")
"""PTX: both nibbles of each byte of $2, as 16 times an int8."""
HALVES_LESS_ZERO = tl.constexpr(
    "{ .reg .b32 t, u;"
    "lop3.b32 t, $2, 0x0f0f0f0f, 0x80808080, 0xEA; sub.u32 t, t, $3; xor.b32 $0, t, 0x80808080; shr.b32 u, $2, 4;"
    "lop3.b32 t, u, 0x0f0f0f0f, 0x80808080, 0xEA; sub.u32 t, t, $3; xor.b32 $1, t, 0x80808080; }"
)
"""PTX: both nibbles, less the byte of $3. 128 + nibble - zero stays in 113..143, so that no byte borrows from its
neighbour; then the sign bit is flipped."""


@triton.jit
def int4_to_int8(octets, zero, ZERO: tl.constexpr):
    """uint8 `[n, 64]` of layout `halves` as int8.

    Symmetric: 16 times the two's complement nibble, since a nibble in the upper half of a byte is just that.
    Asymmetric: the nibble less `zero` `[n, 1]` (uint8).
    """
    if interpreted:
        p = octets.to(tl.int32)
        if ZERO:
            low = ((p & 15) - zero.to(tl.int32)).to(tl.int8)
            high = ((p >> 4) - zero.to(tl.int32)).to(tl.int8)
        else:
            low = ((p << 4) & 255).to(tl.int8)
            high = (p & 240).to(tl.int8)
    elif ZERO:
        low, high = tl.inline_asm_elementwise(
            asm=HALVES_LESS_ZERO,
            constraints="=r,=r,r,r",
            args=[octets, zero],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = tl.inline_asm_elementwise(
            asm=HALVES,
            constraints="=r,=r,r",
            args=[octets],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return tl.join(low, high).permute(0, 2, 1).reshape(octets.shape[0], 128)


@triton.jit
def table_to_float(words, table_ptr, ASM: tl.constexpr, F16: tl.constexpr):
    """int16 `[n, 32]` of layout `pairs` through a table of 16 floats.

    `prmt` looks up four bytes at a time: the low bytes of the table's entries, then the high ones.
    """
    if interpreted:
        w = words.to(tl.int32)
        nibbles = tl.join(tl.join(w & 15, (w >> 8) & 15), tl.join((w >> 4) & 15, (w >> 12) & 15))
        # axes: row, pair of columns, word of the register, upper byte of the word, upper nibble of the byte
        nibbles = nibbles.reshape(words.shape[0], 16, 2, 2, 2).permute(0, 2, 3, 1, 4).reshape(words.shape[0], 128)
        a = tl.load(table_ptr + nibbles).to(tl.float32)
    else:
        a0, a1, a2, a3 = tl.inline_asm_elementwise(
            asm=ASM,
            constraints="=r,=r,=r,=r,r",
            args=[words],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
        a = tl.join(tl.join(a0, a1), tl.join(a2, a3)).permute(0, 3, 2, 1).reshape(words.shape[0], 128)
        if F16:
            a = a.to(tl.float16, bitcast=True)
        else:
            a = a.to(tl.bfloat16, bitcast=True)
    return a


@triton.jit
def table_to_float8(octets, table_ptr, ASM: tl.constexpr):
    """uint8 `[n, 64]` (or half of that) of layout `fours` through a table of 16 float8_e4m3 values.

    A register's four bytes have to be neighbours: their eight nibbles trade places.
    """
    if interpreted:
        p = octets.to(tl.int32)
        nibbles = tl.join(p & 15, p >> 4).reshape(octets.shape[0], octets.shape[1] // 4, 2, 4).permute(0, 2, 1, 3)
        a = tl.load(table_ptr + nibbles.reshape(octets.shape[0], 2 * octets.shape[1]))
    else:
        low, high = tl.inline_asm_elementwise(
            asm=ASM, constraints="=r,=r,r", args=[octets], dtype=(tl.float8e4nv, tl.float8e4nv), is_pure=True, pack=4
        )
        a = tl.join(low, high).permute(0, 2, 1).reshape(octets.shape[0], 2 * octets.shape[1])
    return a


@triton.jit
def decode(
    w, z, table_ptr, DECODE: tl.constexpr, ZERO: tl.constexpr, F16: tl.constexpr, ASM: tl.constexpr, high=None
):  # fmt: skip
    """The words of a tile as `[n, 128]`, by the kind of the decoder.

    z `[n]` is the zero points of the rows; `high` the words of the second plane, where there is one.
    """
    if DECODE == "int2" or DECODE == "int3":
        a = fields_to_float(w, high, z.to(tl.float32)[:, None], DECODE == "int3", F16, ASM)
    elif DECODE == "int8":
        a = int8_to_float(w, z.to(tl.float32)[:, None], ZERO, F16)
    elif DECODE == "int4":
        a = int4_to_float(w, z.to(tl.float32)[:, None], F16)
    elif DECODE == "int4_int8":
        a = int4_to_int8(w, z[:, None], ZERO)
    elif DECODE == "table":
        a = table_to_float(w, table_ptr, ASM, F16)
    else:
        a = table_to_float8(w, table_ptr, ASM)
    return a


def _lookup(out: str, selector: str, mask: str, table: list[int]) -> str:
    """PTX: four bytes of a 16-byte table.

    The four lowest nibbles of `selector` say which of its lower half, or of its upper half where `mask` is 0xff.
    """
    t0, t1, t2, t3 = (f"0x{t:08x}" for t in table)
    return (
        f"mov.b32 u, {t1}; mov.b32 v, {t3}; mov.b32 p, {t0}; prmt.b32 p, p, u, {selector};"
        f"mov.b32 q, {t2}; prmt.b32 q, q, v, {selector}; lop3.b32 {out}, {mask}, q, p, 0xCA;"
    )


def _selectors(words: str) -> str:
    """PTX: s and r, the lower three bits of nibbles 0 to 3 and 4 to 7; n and m, bytes of 0xff where the fourth is set.

    A selector of 8 and more gives a byte's sign bit eight times: the fourth bit of an odd nibble is one, and shifted by
    four bits that of an even nibble is.
    """
    return (
        f"shl.b32 t, {words}, 4; and.b32 s, {words}, 0x77777777; shr.u32 r, s, 16;"
        f"prmt.b32 n, t, {words}, 0xd9c8; prmt.b32 m, t, {words}, 0xfbea;"
    )


def _bytes_to_words(values: list[int]) -> list[int]:
    return [sum(values[4 * i + j] << (8 * j) for j in range(4)) for i in range(4)]


def table8_asm(table: tuple[int, ...]) -> str:
    """PTX of `table_to_float8` for 16 bytes."""
    entries = _bytes_to_words(list(table))
    body = _selectors("$2") + _lookup("$0", "s", "n", entries) + _lookup("$1", "r", "m", entries)
    return "{ .reg .b32 m, n, p, q, r, s, t, u, v;" + body + "}"


def table16_asm(table: tuple[int, ...]) -> str:
    """PTX of `table_to_float` for 16 halfwords."""
    low, high = _bytes_to_words([t & 255 for t in table]), _bytes_to_words([t >> 8 for t in table])
    body = _selectors("$4")
    for selector, mask, first, second in (("s", "n", "$0", "$1"), ("r", "m", "$2", "$3")):
        body += _lookup("l", selector, mask, low) + _lookup("h", selector, mask, high)
        body += f"prmt.b32 {first}, l, h, 0x5140; prmt.b32 {second}, l, h, 0x7362;"
    return "{ .reg .b32 h, l, m, n, p, q, r, s, t, u, v;" + body + "}"


@dataclass(frozen=True)
class Decoder:
    """How codes become numbers.

    Attributes:
        kind: `int2`, `int3`, `int4`, `int8`, `int4_int8`, `table` or `table_e4m3`.
        asm: PTX of a table's lookup, or of `fields_to_float`.
        factor: what sums are multiplied by, with the scales of the tokens.
        words: elements in a row of a tile: int16, or bytes for activations of 8 bits.
        high: of these in a row of a second plane, which follows the first plane's 128 rows.
        middle: the zero point without one.
        table: of kind `table`, the 16 halfwords.
    """

    kind: str
    asm: str = ""
    factor: float = 1.0
    words: int = 32
    high: int = 0
    middle: int = 8
    table: tuple[int, ...] = ()


INT4 = Decoder("int4")
INT8 = Decoder("int8", words=64, middle=128)
INT4_TO_INT8 = Decoder("int4_int8", factor=1 / 16, words=64)
E4M3_NIBBLES = torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32).to(torch.float8_e4m3fn)
INT4_TO_E4M3 = Decoder("table_e4m3", table8_asm(tuple(E4M3_NIBBLES.view(torch.uint8).tolist())), words=64)
UINT4_TO_INT8 = Decoder("int4_int8", words=64)


def eight_bit_decoder(dtype: torch.dtype, zero: bool) -> Decoder:
    """The decoder of integer weights for activations of int8 or float8_e4m3fn."""
    if dtype == torch.int8:
        return UINT4_TO_INT8 if zero else INT4_TO_INT8
    return INT4_TO_E4M3


@cache
def table_decoder(values: tuple[float, ...], dtype: torch.dtype) -> Decoder:
    """The decoder of a table of 16 values that are rounded to bfloat16 or float16."""
    bits = torch.tensor(values, dtype=torch.float32).to(dtype).view(torch.uint16).tolist()
    return Decoder("table", table16_asm(tuple(bits)), table=tuple(bits))


@cache
def int_decoder(bits: int, dtype: torch.dtype) -> Decoder:
    """The decoder of integers of 2, 3, 4 or 8 bits for bfloat16 or float16."""
    if bits in (4, 8):
        return INT4 if bits == 4 else INT8
    asm = fields_asm(bits, dtype == torch.float16)
    return Decoder(f"int{bits}", asm, words=16, high=8 if bits == 3 else 0, middle=2 ** (bits - 1))
