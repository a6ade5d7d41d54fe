"""Weights of 4 bits times activations of 16 or 8 bits: one kernel, whose decoder is a compile-time argument.

The weight is the left operand of the product and the tokens the right one, so that a wgmma of 16 columns serves a
single token. Weights are decoded in registers, on their way to the tensor cores, and are never written back to shared
memory. Sums over a group of columns are scaled in float32 behind the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfx.kernels.gpu.decode4 import int4_to_float, int4_to_int8, table8_asm, table16_asm, table_to_float, table_to_float8
from qfx.kernels.gpu.launch import INTERPRET, Launcher, interpreted
from qfx.kernels.gpu.parts import counters, sum_parts
from qfx.kernels.gpu.tune import bucket, pick


@triton.jit
def _tile_of(pid, tokens, rows, TOKENS: tl.constexpr):
    """Program number to (row tile, token tile): groups of TOKENS token tiles, so that what runs together shares."""
    width = TOKENS * rows
    group = pid // width
    size = tl.minimum(tokens - group * TOKENS, TOKENS)
    return (pid % width) // size, group * TOKENS + (pid % width) % size


@triton.jit
def _load_x(ptr, live, k, K, EVEN_K: tl.constexpr):
    mask = live if EVEN_K else live & (k < K)
    if ptr.dtype.element_ty == tl.int8:
        x = tl.load(ptr, mask=mask, other=0)
    else:
        x = tl.load(ptr, mask=mask, other=0.0)
        if interpreted and ptr.dtype.element_ty.primitive_bitwidth == 16:  # its dot of bfloat16 is wrong
            x = x.to(tl.float32)
    return x


@triton.jit
def _load_group(s_ptr, z_ptr, g, groups, stride, rn, ZERO: tl.constexpr):
    """Scale and zero point of a group for the rows of a tile."""
    at = tl.minimum(g, groups - 1) * stride + rn  # K may end before the last block does
    if ZERO:
        z = tl.load(z_ptr + at)
    else:
        z = tl.full(rn.shape, 8, tl.uint8)
    return tl.load(s_ptr + at), z


@triton.jit
def _decode(w, z, table_ptr, DECODE: tl.constexpr, ZERO: tl.constexpr, F16: tl.constexpr, ASM: tl.constexpr):
    if DECODE == "int4":
        a = int4_to_float(w, z.to(tl.float32)[:, None], F16)
    elif DECODE == "int4_int8":
        a = int4_to_int8(w, z[:, None], ZERO)
    elif DECODE == "table":
        a = table_to_float(w, table_ptr, ASM, F16)
    else:
        a = table_to_float8(w, table_ptr, ASM)
    return a


@triton.jit
def _minus(a, zero, DECODE: tl.constexpr):
    """Exact: both are integers below 16."""
    if DECODE == "int4":
        a = a - zero.to(a.dtype)[:, None]
    return a


@triton.jit
def _halves(a, N: tl.constexpr, K: tl.constexpr):
    """Columns 0..K/2-1 and K/2..K-1 of `[N, K]`; no data moves."""
    return tl.split(a.reshape(N, 2, K // 2).permute(0, 2, 1))


@triton.jit
def _product(a, x, INT: tl.constexpr):
    if INT:
        y = tl.dot(a, x, out_dtype=tl.int32).to(tl.float32)
    else:
        y = tl.dot(a, x, out_dtype=tl.float32)
    return y


@triton.jit
def w4_kernel(
    x_ptr, x_scale_ptr, w_ptr, s_ptr, z_ptr, table_ptr, b_ptr, y_ptr, part_ptr, count_ptr,
    M, N, K, groups, x_stride, s_stride,
    DECODE: tl.constexpr, ASM: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    SCALED: tl.constexpr, BIAS: tl.constexpr, F16: tl.constexpr, EVEN_K: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    pn, pt = _tile_of(tl.program_id(0), tl.cdiv(M, BT), tl.cdiv(N, BN), TOKENS)
    pk = tl.program_id(1)
    blocks = tl.cdiv(K, 128)
    first = (blocks * pk) // SPLIT
    last = (blocks * (pk + 1)) // SPLIT
    INT: tl.constexpr = DECODE == "int4_int8"
    WORDS: tl.constexpr = 32 if DECODE == "int4" or DECODE == "table" else 64  # 64 bytes in either case
    rows = tl.arange(0, BN)
    rn = pn * BN + rows
    rt = pt * BT + tl.arange(0, BT)
    live = (rt < M)[None, :]
    # 128 rows of 128 columns are consecutive in memory; BN is 64 or 128
    tile = ((pn * BN) // 128).to(tl.int64) * blocks * (128 * WORDS) + ((pn * BN) % 128) * WORDS
    wp = w_ptr + tile + first * (128 * WORDS) + rows[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    WIDTH: tl.constexpr = GROUP if GROUP == 32 or GROUP == 64 else 128
    rk = tl.arange(0, WIDTH)
    xp = x_ptr + rt.to(tl.int64)[None, :] * x_stride + (first * 128 + rk)[:, None]
    acc = tl.zeros((BN, BT), dtype=tl.int32 if INT and GROUP < 0 else tl.float32)
    # Scales and zero points are loaded one block ahead: their latency passes while a block is computed.
    if GROUP == 64:
        s0, z0 = _load_group(s_ptr, z_ptr, first * 2, groups, s_stride, rn, ZERO)
        s1, z1 = _load_group(s_ptr, z_ptr, first * 2 + 1, groups, s_stride, rn, ZERO)
    elif GROUP >= 128:
        s0, z0 = _load_group(s_ptr, z_ptr, first * 128 // GROUP, groups, s_stride, rn, ZERO)
    else:
        s0, z0 = _load_group(s_ptr, z_ptr, 0, groups, s_stride, rn, ZERO)
    for block in range(first, last):
        k = (block * 128 + rk)[:, None]
        if TOKENS == 1:  # a weight is read once
            w = tl.load(wp, eviction_policy="evict_first")
        else:
            w = tl.load(wp)
        if GROUP < 0:  # one scale for all columns
            a = _decode(w, z0, table_ptr, DECODE, ZERO, F16, ASM)
            acc = tl.dot(a, _load_x(xp, live, k, K, EVEN_K), acc, out_dtype=acc.dtype)
        elif GROUP >= 128:
            x = _load_x(xp, live, k, K, EVEN_K)
            s_next, z_next = _load_group(s_ptr, z_ptr, (block + 1) * 128 // GROUP, groups, s_stride, rn, ZERO)
            a = _decode(w, z0, table_ptr, DECODE, ZERO, F16, ASM)
            acc += _product(a, x, INT) * s0[:, None]
            s0, z0 = s_next, z_next
        elif GROUP == 64:
            x0, x1 = _load_x(xp, live, k, K, EVEN_K), _load_x(xp + 64, live, k + 64, K, EVEN_K)
            t0, u0 = _load_group(s_ptr, z_ptr, block * 2 + 2, groups, s_stride, rn, ZERO)
            t1, u1 = _load_group(s_ptr, z_ptr, block * 2 + 3, groups, s_stride, rn, ZERO)
            a0, a1 = _halves(_decode(w, z0 * 0, table_ptr, DECODE, False, F16, ASM), BN, 128)
            acc += _product(_minus(a0, z0, DECODE), x0, INT) * s0[:, None]
            acc += _product(_minus(a1, z1, DECODE), x1, INT) * s1[:, None]
            s0, z0, s1, z1 = t0, u0, t1, u1
        else:
            x0, x1 = _load_x(xp, live, k, K, EVEN_K), _load_x(xp + 32, live, k + 32, K, EVEN_K)
            x2, x3 = _load_x(xp + 64, live, k + 64, K, EVEN_K), _load_x(xp + 96, live, k + 96, K, EVEN_K)
            low, high = _halves(_decode(w, z0 * 0, table_ptr, DECODE, False, F16, ASM), BN, 128)
            a0, a1 = _halves(low, BN, 64)
            a2, a3 = _halves(high, BN, 64)
            t0, u0 = _load_group(s_ptr, z_ptr, block * 4, groups, s_stride, rn, ZERO)
            t1, u1 = _load_group(s_ptr, z_ptr, block * 4 + 1, groups, s_stride, rn, ZERO)
            t2, u2 = _load_group(s_ptr, z_ptr, block * 4 + 2, groups, s_stride, rn, ZERO)
            t3, u3 = _load_group(s_ptr, z_ptr, block * 4 + 3, groups, s_stride, rn, ZERO)
            acc += _product(_minus(a0, u0, DECODE), x0, INT) * t0[:, None]
            acc += _product(_minus(a1, u1, DECODE), x1, INT) * t1[:, None]
            acc += _product(_minus(a2, u2, DECODE), x2, INT) * t2[:, None]
            acc += _product(_minus(a3, u3, DECODE), x3, INT) * t3[:, None]
        wp += 128 * WORDS
        xp += 128
    total = acc.to(tl.float32)
    if GROUP < 0:
        total *= s0[:, None]
    done = True
    if SPLIT > 1:
        total, done = sum_parts(total, part_ptr, count_ptr, pt * tl.cdiv(N, BN) + pn, pk, live, BN, BT, SPLIT)
    if done:
        inside = rn < N
        if SCALED:  # one factor for each token; FACTOR undoes what the decoder multiplies by
            total *= tl.load(x_scale_ptr + rt, mask=rt < M, other=0.0)[None, :] * FACTOR
        if BIAS:
            total += tl.load(b_ptr + rn, mask=inside, other=0.0).to(tl.float32)[:, None]
        out = y_ptr + rt[None, :].to(tl.int64) * N + rn[:, None]
        tl.store(out, total.to(y_ptr.dtype.element_ty), mask=live & inside[:, None])


@dataclass(frozen=True)
class Decoder:
    """How nibbles become numbers.

    Attributes:
        kind: `int4`, `int4_int8`, `table` or `table_e4m3`.
        asm: PTX of a table's lookup.
        factor: what sums are multiplied by, with the scales of the tokens.
    """

    kind: str
    asm: str = ""
    factor: float = 1.0


INT4 = Decoder("int4")
INT4_TO_INT8 = Decoder("int4_int8", factor=1 / 16)
_NIBBLES = torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32).to(torch.float8_e4m3fn)
INT4_TO_E4M3 = Decoder("table_e4m3", table8_asm(tuple(_NIBBLES.view(torch.uint8).tolist())))
UINT4_TO_INT8 = Decoder("int4_int8")


def eight_bit_decoder(dtype: torch.dtype, zero: bool) -> Decoder:
    """The decoder of integer weights for activations of int8 or float8_e4m3fn."""
    if dtype == torch.int8:
        return UINT4_TO_INT8 if zero else INT4_TO_INT8
    return INT4_TO_E4M3


@cache
def table_decoder(values: tuple[float, ...], dtype: torch.dtype) -> Decoder:
    """The decoder of a table of 16 values that are rounded to bfloat16 or float16."""
    bits = torch.tensor(values, dtype=torch.float32).to(dtype).view(torch.uint16).tolist()
    return Decoder("table", table16_asm(tuple(bits)))


@dataclass(frozen=True)
class Config:
    """Rows and tokens of a tile, parts of K, warps, stages of the pipeline, and token tiles that share weights."""

    bn: int
    bt: int
    split: int
    warps: int
    stages: int
    tokens: int = 1


@cache
def launcher(config: Config, decoder: Decoder, group: int, flags: tuple[bool, bool, bool, bool, bool]) -> Launcher:
    """The kernel for one configuration; flags: zero points, scaled tokens, bias, float16, K a multiple of 128."""
    zero, scaled, bias, f16, even_k = flags
    return Launcher(
        w4_kernel, DECODE=decoder.kind, ASM=decoder.asm, FACTOR=decoder.factor, GROUP=group, ZERO=zero, SCALED=scaled,
        BIAS=bias, F16=f16, EVEN_K=even_k, BN=config.bn, BT=config.bt, SPLIT=config.split, TOKENS=config.tokens,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def w4(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    rows: int,
    group: int,
    decoder: Decoder,
    *,
    x_scale: Tensor | None = None,
    table: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`x @ W.T + bias` from kernel layout.

    Args:
        x: `[tokens, in]`, its rows contiguous: bfloat16 or float16; int8 for `int4_int8`; float8_e4m3fn for
            `table_e4m3`.
        tiles: uint8 `[row tiles, column tiles, 128, 64]`, in the decoder's layout of `qfx.kernels.nibbles`.
        scale: float32 `[groups, 128 · row tiles]`.
        zero: uint8 of that shape, or None; integer decoders only.
        bias: `[out]`.
        rows: `out`.
        group: columns that share a scale: 32, 64, a multiple of 128, or -1 for all of them.
        decoder: what a nibble means.
        x_scale: float32 `[tokens]` of a quantized x.
        table: the 16 values of a table decoder (Triton's interpreter reads them).
        dtype: of the output; x's if it is a float of 16 bits.

    Returns:
        `[tokens, out]`.
    """
    tokens, columns = x.shape
    dtype = dtype or x.dtype
    y = torch.empty((tokens, rows), dtype=dtype, device=x.device)
    if tokens == 0 or rows == 0:
        return y
    flags = zero is not None, x_scale is not None, bias is not None, dtype == torch.float16, columns % 128 == 0
    if decoder is INT4_TO_E4M3 and INTERPRET:
        table = _NIBBLES
    words = tiles.view(torch.int16) if decoder.kind in ("int4", "table") else tiles

    def run(config: Config, words: Tensor) -> None:
        count = -(-rows // config.bn) * -(-tokens // config.bt)
        part = arrived = None
        if config.split > 1:
            part = torch.empty(count * config.split * config.bn * config.bt, dtype=torch.float32, device=x.device)
            arrived = counters(count, x.device)
        launcher(config, decoder, group, flags)(
            (count, config.split, 1), x, x_scale, words, scale, zero, table, bias, y, part, arrived,
            tokens, rows, columns, scale.shape[0], x.stride(0), scale.shape[1],
        )  # fmt: skip

    key = (decoder.kind, rows, columns, bucket(tokens), group)
    config = pick("w4", key, default(tokens, rows, columns), lambda: candidates(tokens, rows, columns), run, words)
    run(config, words)
    return y


def default(tokens: int, rows: int, columns: int) -> Config:
    """A rule for shapes that nobody has measured: about four programs on each of an H200's 132 multiprocessors."""
    if tokens > 32:
        return Config(64, 64 if tokens <= 64 else 128, 1, 4, 3, 1 if tokens <= 128 else 8)
    bn = 64 if rows < 8192 else 128
    split = max(1, min(8, 528 // (-(-rows // bn)), columns // 512))
    return Config(bn, 16 if tokens <= 16 else 32, split, bn // 16, 5)


def candidates(tokens: int, rows: int, columns: int) -> list[Config]:
    """What `autotune` tries."""
    blocks = -(-columns // 128)
    found = []
    if tokens <= 32:
        bt = 16 if tokens <= 16 else 32
        for bn in (64, 128):
            tiles = -(-rows // bn)
            for split in (1, 2, 3, 4, 6, 7, 8, 12, 16):
                if split == 1 or (blocks // split >= 3 and tiles * split <= 2400):
                    found += [Config(bn, bt, split, bn // 16, stages) for stages in (4, 6)]
        return found
    for bt in (32, 64, 128):
        if bt > 2 * tokens or (tokens > 128 and bt < 128):
            continue
        for bn in (64, 128):
            for split in (1, 2, 3, 4):
                tiles = -(-rows // bn) * -(-tokens // bt)
                if split == 1 or (tiles * split <= 1600 and tokens <= 256):
                    grouping = (1,) if tokens <= 128 else (4, 16)
                    found += [Config(bn, bt, split, bn // 16, stages, g) for stages in (3, 4) for g in grouping]
    return found
