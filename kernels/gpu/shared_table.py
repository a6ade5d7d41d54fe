"""Tables of 16 floats as 256 pairs in shared memory: a load for two weights, not seven byte permutations for four.

A byte of layout `pairs` is two codes whose values are neighbours in a register, so a byte is a place in a table of 256
registers. Each lane has a table of its own, 1 KB in one of the 32 banks: lanes look up different bytes at the same time
and never meet. Triton has no such loads; the array is declared in PTX, beside the shared memory that Triton manages.
Kernels of which several programs share a multiprocessor's shared memory have no room for it (`decode4.table16_asm`).
"""

from __future__ import annotations

from functools import cache

BYTES = 256 * 32 * 4
"""Of shared memory, which Triton does not count."""

LOOKUP = (
    "{ .reg .b32 t;"
    "and.b32 t, $4, 0xff; shl.b32 t, t, 7; add.u32 t, t, $5; ld.shared.b32 $0, [t];"
    "and.b32 t, $4, 0xff00; shr.u32 t, t, 1; add.u32 t, t, $5; ld.shared.b32 $1, [t];"
    "and.b32 t, $4, 0xff0000; shr.u32 t, t, 9; add.u32 t, t, $5; ld.shared.b32 $2, [t];"
    "shr.u32 t, $4, 24; shl.b32 t, t, 7; add.u32 t, t, $5; ld.shared.b32 $3, [t]; }"
)
"""PTX: the pairs of the four bytes of $4; $5 is the lane's address."""


@cache
def setup_asm(table: tuple[int, ...], warps: int) -> str:
    """PTX: fills the tables from 16 halfwords, waits for all `warps` of the program, and puts a lane's address in $0.

    A thread computes one or two pairs, or a part of one, and stores it for four lanes at a time. Threads that store in
    the same cycle begin at different lanes.
    """
    threads = 32 * warps
    stores = 2048 // threads  # of 16 bytes, by each thread; a pair takes eight
    turns = min(stores, 8)
    text = (
        "{ .shared .align 16 .b32 pairs[8192]; .reg .b32 base, thread, turn, pair, v, row, j, at;"
        "mov.u32 base, pairs; mov.u32 thread, %tid.x;"
        f"shr.u32 turn, thread, {(8 // turns).bit_length() - 1};"
    )
    for k in range(max(1, stores // 8)):
        text += f"mul.lo.u32 pair, thread, {stores}; shr.u32 pair, pair, 3; add.u32 pair, pair, {k};"
        text += _pair(table) + "shl.b32 row, pair, 7; add.u32 row, row, base;"
        if turns < 8:
            text += f"and.b32 j, thread, {8 // turns - 1}; mul.lo.u32 j, j, {16 * turns}; add.u32 row, row, j;"
        for i in range(turns):
            text += f"add.u32 j, turn, {i}; and.b32 j, j, {turns - 1}; shl.b32 j, j, 4; add.u32 at, row, j;"
            text += "st.shared.v4.b32 [at], {v, v, v, v};"
    return text + f"barrier.sync 0, {threads}; mov.u32 j, %laneid; shl.b32 j, j, 2; add.u32 $0, base, j; }}"


def _pair(table: tuple[int, ...]) -> str:
    """PTX: v, the halfwords whose places are the two nibbles of `pair`.

    Bits 0 to 2 of a place select one of eight bytes by a permutation, bit 3 one of two such results.
    """
    text = "{ .reg .b32 s, t, u, m, p, q, low, high; and.b32 s, pair, 0x77;"
    # 0xff for places from 8 on: a selector of 8 and more gives a byte's sign bit eight times
    text += "shl.b32 t, pair, 4; prmt.b32 m, t, pair, 0x00c8;"
    for name, shift in (("low", 0), ("high", 8)):
        values = [sum(((table[4 * i + j] >> shift) & 255) << (8 * j) for j in range(4)) for i in range(4)]
        t0, t1, t2, t3 = (f"0x{word:08x}" for word in values)
        text += f"mov.b32 p, {t0}; mov.b32 u, {t1}; prmt.b32 p, p, u, s;"
        text += f"mov.b32 q, {t2}; mov.b32 u, {t3}; prmt.b32 q, q, u, s; lop3.b32 {name}, m, q, p, 0xCA;"
    return text + "prmt.b32 v, low, high, 0x5140; }"
