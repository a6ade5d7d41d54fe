"""Configurations of the kernels of 4-bit weights: what to try, and what to take where nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

MOST = 1 << 17
"""Columns from which on the sum of a row of int8 products may not fit in 32 bits: 128 times 128 each."""

MEETING = 256
"""Rows times warps of `w4_direct` for 16 tokens, whose sums are in shared memory at the end, in 48 KB with a table."""


@dataclass(frozen=True)
class Config:
    """How one launch is cut.

    Attributes:
        bn: rows of a tile: 32 or more, a divisor or a multiple of 128.
        bt: tokens of a tile.
        split: programs that share the columns of a tile.
        warps: of a program.
        stages: of its pipeline.
        tokens: token tiles that run together, so that they share weights in the L2 cache.
        unroll: blocks of 128 columns in a step of the loop.
        registers: limit for a thread, so that more programs fit; 0 for none.
        chunk: if not 0, nothing of this: so many rows at a time are dequantized, and multiplied by cuBLAS.
        shared: whether the warps of a program share its columns instead of its rows (`w4_few`).
        direct: the same without shared memory (`w4_direct`); codes are loaded `stages` - 1 steps ahead,
            up to 3.
        specialized: not below 0 for `w4_large`, or `w4a8_large` for activations of 8 bits, with so many programs, or
            one on each multiprocessor; a split of 1 means whole tiles only. Of the other fields these take `tokens`,
            `bt`, `stages`, and `bn` (not where `w4a8_large` scales sums).
    """

    bn: int
    bt: int
    split: int
    warps: int
    stages: int
    tokens: int = 1
    unroll: int = 1
    registers: int = 0
    chunk: int = 0
    shared: bool = False
    specialized: int = -1
    direct: bool = False


@lru_cache(4096)
def default(
    tokens: int, rows: int, columns: int, dense: bool = False, crowded: bool = False, direct: bool = False,
    whole: bool = False,
) -> Config:  # fmt: skip
    """A rule for shapes that nobody has measured: about four programs on each of an H200's 132 multiprocessors.

    `crowded`: decoding leaves no registers for the sums of 128 tokens; `direct`: `w4_direct` takes it; `whole`:
    `w4a8_whole` does.
    """
    if direct:
        if tokens > 8 or rows >= 16384:
            return Config(32, 8, 1, 8 if columns > 2 * rows else 4, 1, direct=True)
        warps = 4 if rows > 4096 and columns <= 8192 else 8 if rows * 2 > columns else 16
        return Config(16, 8, 1, warps, 2, unroll=2 if warps < 16 else 1, direct=True)
    if whole and tokens > 32:
        return _whole(tokens)[0]
    if dense and tokens > 512:
        return Config(0, 0, 1, 0, 0, chunk=2048)
    if 32 < tokens <= 64:
        return Config(64, 64, max(1, min(4, 300 // -(-rows // 64))), 4, 3, 1, 1 if crowded else 2)
    if tokens > 64:
        return Config(64, 64 if crowded else 128, 1, 4, 3, 1 if tokens <= 128 else 8)
    split = max(1, min(8, 528 // (-(-rows // 64)), columns // 512))
    return Config(64, 16 if tokens <= 16 else 32, split, 4, 4)


def candidates(
    tokens: int, rows: int, columns: int, dense: bool = False, hopper: bool = False, direct: bool = False,
    whole: bool = False,
) -> list[Config]:  # fmt: skip
    """What `autotune` tries.

    `dense`: activations are floats, so that cuBLAS could multiply, too; `hopper`: so could `w4_large` or `w4a8_large`;
    `direct`: `w4_direct`; `whole`: `w4a8_whole`.
    """
    blocks = -(-columns // 128)
    if direct:  # with one token, or 16 and a table, faster than the others at all shapes at which both were measured
        return _direct(blocks) if tokens <= 8 else _direct_16(blocks)
    found = []
    if whole and tokens > 32:
        found = _whole(tokens)
        if tokens > 64:  # from 256 on faster than what W4A8 has otherwise, at all shapes at which both were measured
            return found
    elif hopper and not dense and tokens > 64:
        shares = ((1, 0, 8), (2, 0, 8), (2, 0, 16), (2, 128, 8))  # split, programs, token tiles
        for bt, stages in ((64, 6), (128, 4), (128, 5)):
            if bt == 128 or tokens <= 256:
                found += [Config(0, bt, split, 0, stages, t, specialized=n) for split, n, t in shares]
    if dense and tokens > 128:
        found = [Config(0, 0, 1, 0, 0, chunk=chunk) for chunk in (2048, 4096, 1 << 20) if chunk < 2 * rows]
    if dense and hopper and tokens > 32:
        for bn, bt, stages in ((256, 128, 3), (128, 128, 4), (128, 256, 2), (256, 64, 5), (128, 64, 6)):
            if bt // 2 < tokens and (bt > 64 or tokens <= 128):
                cuts = ((1, 0), (2, 0), (2, 128))  # split, programs
                found += [Config(bn, bt, split, 0, stages, 8, specialized=n) for split, n in cuts]
    if tokens <= 32:
        bt = 16 if tokens <= 16 else 32
        for split in (1, 2, 3, 4, 6, 8, 12):
            if split > 1 and (blocks // split < 4 or -(-rows // 64) * split > 1800):
                break
            found += [Config(64, bt, split, 4, stages, 1, 2) for stages in (3, 4)]
            found += [Config(64, bt, split, 4, stages) for stages in (3, 4, 6)]
            found.append(Config(64, bt, split, 4, 4, registers=72))
            # tokens come from the L2 cache, for each tile of rows anew
            found += [Config(128, bt, split, 8, 3, unroll=2), Config(128, bt, split, 8, 4)]
            found += [Config(128, bt, split, 4, stages) for stages in (3, 4)]
            if bt == 16:
                found.append(Config(256, bt, split, 8, 3))
        if tokens <= 8:
            for warps, stages in ((4, 3), (4, 4), (8, 3), (8, 4), (16, 3)):
                found += [Config(16, 8, 1, warps, stages, registers=limit, shared=True) for limit in (0, 64)]
            found.append(Config(32, 8, 1, 8, 3, shared=True))
        return found
    for bt in (32, 64, 128):
        if bt > 2 * tokens or (tokens > 128 and bt < 128):
            continue
        for split in (1, 2, 3, 4):
            if split > 1 and tokens > 256:
                break
            for tokens_together in (1,) if tokens <= 128 else (4, 16):
                common = (split, tokens_together)
                found += [Config(64, bt, common[0], 4, stages, common[1]) for stages in (3, 4)]
                found += [Config(128, bt, common[0], 8, stages, common[1]) for stages in (3, 4)]
                if bt < 128:
                    found.append(Config(128, bt, common[0], 8, 3, common[1], 1, 128))
                    found.append(Config(64, bt, common[0], 4, 3, common[1], 2))
                    found.append(Config(256, bt, common[0], 8, 3, common[1]))
    return found


def _whole(tokens: int) -> list[Config]:
    found = []
    for rows, bt, stages in ((128, 256, 3), (128, 256, 4), (128, 128, 6), (128, 64, 8), (256, 128, 5), (256, 64, 6)):
        if bt // 2 < tokens and (bt > 64 or tokens <= 512):
            shares = ((1, 0), (2, 0), (2, 128)) if tokens > 64 else ((1, 0), (2, 128))  # split, programs
            together = (8, 16) if tokens > 1024 else (8,)
            found += [Config(rows, bt, n, 0, stages, t, specialized=p) for n, p in shares for t in together]
    return found


def _direct_16(blocks: int) -> list[Config]:
    """For 9 to 16 tokens and a table. Where a thread takes a few more than 128 registers, one program less has room."""
    found = [c for c in _direct(blocks) if c.warps * c.bn <= MEETING and not c.registers]
    return [replace(c, registers=128) if (c.bn, c.unroll, c.stages) == (32, 1, 2) else c for c in found]


def _direct(blocks: int) -> list[Config]:
    found = [Config(rows, 8, 1, 4, 1, 1, 1, limit, direct=True) for rows, limit in ((16, 64), (32, 80))]
    for warps in (4, 8, 16):
        for unroll, rows, stages in (
            (1, 16, 1), (1, 16, 2), (2, 16, 1), (2, 16, 2), (4, 16, 1), (4, 16, 2), (1, 32, 1), (1, 32, 2), (2, 32, 1),
            (1, 16, 3), (1, 16, 4), (2, 16, 3), (2, 16, 4), (1, 32, 3), (1, 32, 4),
        ):  # fmt: skip
            if warps * unroll <= blocks:
                found.append(Config(rows, 8, 1, warps, stages, 1, unroll, direct=True))
    return found
