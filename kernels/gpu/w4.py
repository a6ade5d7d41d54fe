"""Weights of 2 to 8 bits times activations of 16 or 8 bits: one kernel, whose decoder is a compile-time argument.

The weight is the left operand of the product and the tokens the right one, so that a wgmma of 16 columns serves a
single token. Weights are decoded in registers, on their way to the tensor cores, and are never written back to shared
memory. Sums over a group of columns are scaled in float32 behind the product.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from qfx.kernels.gpu import w4_few
from qfx.kernels.gpu.decode4 import E4M3_NIBBLES, INT4_TO_E4M3, INT4_TO_INT8, Decoder, decode
from qfx.kernels.gpu.dequantize4 import by_cublas
from qfx.kernels.gpu.launch import INTERPRET, Launcher, capability
from qfx.kernels.gpu.parts import counters, sum_parts
from qfx.kernels.gpu.pdl import launch_next, wait_for_previous
from qfx.kernels.gpu.tune import bucket, pick
from qfx.kernels.gpu.w4_config import MOST, Config, candidates, default
from qfx.kernels.gpu.w4_few import load_x
from qfx.kernels.gpu.w4_forms import run_form, takes_direct, takes_specialized


@triton.jit
def _tile_of(pid, tokens, rows, TOKENS: tl.constexpr):
    """Program number to (row tile, token tile): groups of TOKENS token tiles, so that what runs together shares."""
    width = TOKENS * rows
    group = pid // width
    size = tl.minimum(tokens - group * TOKENS, TOKENS)
    return (pid % width) // size, group * TOKENS + (pid % width) % size


@triton.jit
def _load_words(ptr, TOKENS: tl.constexpr):
    if TOKENS == 1:  # a weight is read once
        w = tl.load(ptr, eviction_policy="evict_first")
    else:
        w = tl.load(ptr)
    return w


@triton.jit
def _load_x(ptr, live, k, K, EVEN_K: tl.constexpr):
    return load_x(ptr, live if EVEN_K else live & (k < K))


@triton.jit
def _load_group(s_ptr, z_ptr, g, groups, stride, rn, ZERO: tl.constexpr, MIDDLE: tl.constexpr):
    """Scale and zero point of a group for the rows of a tile."""
    at = tl.minimum(g, groups - 1) * stride + rn  # K may end before the last block does
    if ZERO:
        z = tl.load(z_ptr + at)
    else:
        z = tl.full(rn.shape, MIDDLE, tl.uint8)
    return tl.load(s_ptr + at), z


@triton.jit
def _zero_of(z, z_ptr, g, groups, stride, rn, INSIDE: tl.constexpr):
    """The zero points of a group, which a decoder wants in the layout of the product.

    Triton passes that layout on to what is loaded in the same turn of the loop, not to what the turn before has loaded:
    then weights would go to shared memory and back instead.
    """
    if INSIDE:
        z = tl.load(z_ptr + tl.minimum(g, groups - 1) * stride + rn)
    return z


@triton.jit
def _minus(a, zero, DECODE: tl.constexpr, ZERO: tl.constexpr, MIDDLE: tl.constexpr):
    """Takes off what the decoder has not. Exact: all are integers up to 255."""
    if DECODE == "int4":
        a = a - zero.to(a.dtype)[:, None]
    elif ZERO and (DECODE == "int2" or DECODE == "int3" or DECODE == "int8"):
        a = a - (zero.to(tl.float32) - MIDDLE).to(a.dtype)[:, None]
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
def _kernel(
    x_ptr, x_scale_ptr, w_ptr, s_ptr, z_ptr, table_ptr, b_ptr, y_ptr, part_ptr, count_ptr,
    M, N, K, groups, x_stride, s_stride,
    DECODE: tl.constexpr, ASM: tl.constexpr, FACTOR: tl.constexpr, WORDS: tl.constexpr, HIGH: tl.constexpr,
    MIDDLE: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    SCALED: tl.constexpr, BIAS: tl.constexpr, F16: tl.constexpr, EVEN_K: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    pn, pt = _tile_of(tl.program_id(0), tl.cdiv(M, BT), tl.cdiv(N, BN), TOKENS)
    pk = tl.program_id(1)
    blocks = tl.cdiv(K, 128)
    steps = tl.cdiv(blocks, UNROLL)
    first = (steps * pk) // SPLIT
    last = (steps * (pk + 1)) // SPLIT
    INT: tl.constexpr = DECODE == "int4_int8"
    TILE: tl.constexpr = 128 * (WORDS + HIGH)  # elements
    INSIDE: tl.constexpr = ZERO and GROUP > 0 and not INT and DECODE != "int4"
    # Four groups in a block, but two codes in a word (or byte): a row's words are loaded by halves. If they were split
    # behind the decoder, the split would be the lowest bit of the registers' order, and a decoder that wants
    # neighbours in a register (`table_e4m3`) would get every other pair from 32 columns on.
    HALVED: tl.constexpr = GROUP == 32 and (DECODE == "int8" or DECODE == "table_e4m3")
    SPAN: tl.constexpr = WORDS // 2 if HALVED else WORDS
    rows = tl.arange(0, BN)
    rn = pn * BN + rows
    held = rn
    if BN > 128:  # an odd number of tiles of 128 rows: the last program has rows behind the last one in memory
        held = tl.minimum(rn, s_stride - 1)
    rt = pt * BT + tl.arange(0, BT)
    live = (rt < M)[None, :]
    # 128 rows of 128 columns are consecutive in memory; BN divides 128, or is a multiple of it
    if BN <= 128:
        tile = ((pn * BN) // 128).to(tl.int64) * blocks * TILE
        wp = w_ptr + (tile + ((pn * BN) % 128) * WORDS) + rows[:, None] * WORDS + tl.arange(0, SPAN)[None, :]
        hp = w_ptr + (tile + ((pn * BN) % 128) * HIGH + 128 * WORDS)  # a second plane
        if HIGH:
            hp += rows[:, None] * HIGH + tl.arange(0, HIGH)[None, :]
    else:
        tile = (held // 128).to(tl.int64) * blocks * TILE
        wp = w_ptr + (tile + (held % 128) * WORDS)[:, None] + tl.arange(0, SPAN)[None, :]
        hp = w_ptr + (tile + (held % 128) * HIGH + 128 * WORDS)[:, None]
        if HIGH:
            hp += tl.arange(0, HIGH)[None, :]
    wp += first * (UNROLL * TILE)
    hp += first * (UNROLL * TILE)
    wait_for_previous(PDL)
    WIDTH: tl.constexpr = GROUP if GROUP == 32 or GROUP == 64 else 128
    rk = tl.arange(0, WIDTH)
    xp = x_ptr + rt.to(tl.int64)[None, :] * x_stride + (first * (UNROLL * 128) + rk)[:, None]
    acc = tl.zeros((BN, BT), dtype=tl.int32 if INT and GROUP < 0 else tl.float32)
    plain = tl.full(rn.shape, 0 if DECODE == "int4" else MIDDLE, tl.uint8)
    # Scales and zero points are loaded one block ahead: their latency passes while a block is computed.
    if GROUP == 64:
        s0, z0 = _load_group(s_ptr, z_ptr, first * (UNROLL * 2), groups, s_stride, held, ZERO, MIDDLE)
        s1, z1 = _load_group(s_ptr, z_ptr, first * (UNROLL * 2) + 1, groups, s_stride, held, ZERO, MIDDLE)
    elif GROUP >= 128:
        s0, z0 = _load_group(s_ptr, z_ptr, first * (UNROLL * 128) // GROUP, groups, s_stride, held, ZERO, MIDDLE)
    else:
        s0, z0 = _load_group(s_ptr, z_ptr, 0, groups, s_stride, held, ZERO, MIDDLE)
    for step in range(first, last):
        for i in tl.static_range(UNROLL):
            block = step * UNROLL + i
            k = (block * 128 + rk)[:, None]
            # the last step may reach past the last block: read that one again, times masked columns of x
            ahead = i * TILE if EVEN_K else tl.minimum(i, blocks - 1 - step * UNROLL) * TILE
            w = _load_words(wp + ahead, TOKENS)
            h = None
            if HIGH:
                h = _load_words(hp + ahead, TOKENS)
            elif HALVED:
                h = _load_words(wp + (ahead + SPAN), TOKENS)
            at = xp + i * 128
            if GROUP < 0:  # one scale for all columns
                a = decode(w, z0, table_ptr, DECODE, ZERO, F16, ASM, h)
                acc = tl.dot(a, _load_x(at, live, k, K, EVEN_K), acc, out_dtype=acc.dtype)
            elif GROUP >= 128:
                x = _load_x(at, live, k, K, EVEN_K)
                g = (block + 1) * 128 // GROUP
                s_next, z_next = _load_group(s_ptr, z_ptr, g, groups, s_stride, held, ZERO, MIDDLE)
                z0 = _zero_of(z0, z_ptr, block * 128 // GROUP, groups, s_stride, held, INSIDE)
                a = decode(w, z0, table_ptr, DECODE, ZERO, F16, ASM, h)
                acc += _product(a, x, INT) * s0[:, None]
                s0, z0 = s_next, z_next
            elif GROUP == 64:
                x0, x1 = _load_x(at, live, k, K, EVEN_K), _load_x(at + 64, live, k + 64, K, EVEN_K)
                t0, u0 = _load_group(s_ptr, z_ptr, block * 2 + 2, groups, s_stride, held, ZERO, MIDDLE)
                t1, u1 = _load_group(s_ptr, z_ptr, block * 2 + 3, groups, s_stride, held, ZERO, MIDDLE)
                z0 = _zero_of(z0, z_ptr, block * 2, groups, s_stride, held, INSIDE)
                z1 = _zero_of(z1, z_ptr, block * 2 + 1, groups, s_stride, held, INSIDE)
                a0, a1 = _halves(decode(w, plain, table_ptr, DECODE, False, F16, ASM, h), BN, 128)
                acc += _product(_minus(a0, z0, DECODE, ZERO, MIDDLE), x0, INT) * s0[:, None]
                acc += _product(_minus(a1, z1, DECODE, ZERO, MIDDLE), x1, INT) * s1[:, None]
                s0, z0, s1, z1 = t0, u0, t1, u1
            else:
                x0, x1 = _load_x(at, live, k, K, EVEN_K), _load_x(at + 32, live, k + 32, K, EVEN_K)
                x2, x3 = _load_x(at + 64, live, k + 64, K, EVEN_K), _load_x(at + 96, live, k + 96, K, EVEN_K)
                if HALVED:
                    a0, a2 = _halves(decode(w, plain, table_ptr, DECODE, False, F16, ASM), BN, 64)
                    a1, a3 = _halves(decode(h, plain, table_ptr, DECODE, False, F16, ASM), BN, 64)
                else:
                    low, high = _halves(decode(w, plain, table_ptr, DECODE, False, F16, ASM, h), BN, 128)
                    a0, a1 = _halves(low, BN, 64)
                    a2, a3 = _halves(high, BN, 64)
                t0, u0 = _load_group(s_ptr, z_ptr, block * 4, groups, s_stride, held, ZERO, MIDDLE)
                t1, u1 = _load_group(s_ptr, z_ptr, block * 4 + 1, groups, s_stride, held, ZERO, MIDDLE)
                t2, u2 = _load_group(s_ptr, z_ptr, block * 4 + 2, groups, s_stride, held, ZERO, MIDDLE)
                t3, u3 = _load_group(s_ptr, z_ptr, block * 4 + 3, groups, s_stride, held, ZERO, MIDDLE)
                acc += _product(_minus(a0, u0, DECODE, ZERO, MIDDLE), x0, INT) * t0[:, None]
                acc += _product(_minus(a1, u1, DECODE, ZERO, MIDDLE), x1, INT) * t1[:, None]
                acc += _product(_minus(a2, u2, DECODE, ZERO, MIDDLE), x2, INT) * t2[:, None]
                acc += _product(_minus(a3, u3, DECODE, ZERO, MIDDLE), x3, INT) * t3[:, None]
        wp += UNROLL * TILE
        hp += UNROLL * TILE
        xp += UNROLL * 128
    launch_next(PDL)  # not sooner: what starts early takes room on some multiprocessors and not on others
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


@cache
def launcher(
    config: Config, decoder: Decoder, group: int, flags: tuple[bool, bool, bool, bool], columns: int, capable: int
) -> Launcher:
    """The kernel for one configuration; flags: zero points, scaled tokens, bias, float16."""
    zero, scaled, bias, f16 = flags
    pdl = capable >= 90
    limit = {"maxnreg": config.registers} if config.registers else {}
    return Launcher(
        _kernel, DECODE=decoder.kind, ASM=decoder.asm, FACTOR=decoder.factor, WORDS=decoder.words,
        HIGH=decoder.high, MIDDLE=decoder.middle, GROUP=group, ZERO=zero, SCALED=scaled, BIAS=bias, F16=f16,
        EVEN_K=columns % (128 * config.unroll) == 0, BN=config.bn, BT=config.bt,
        SPLIT=config.split, TOKENS=config.tokens, UNROLL=config.unroll, PDL=pdl,
        num_warps=config.warps, num_stages=config.stages, launch_pdl=pdl, **limit,
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
    second: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`x @ W.T + bias` from kernel layout.

    Args:
        x: `[tokens, in]`, its rows contiguous: bfloat16 or float16; int8 for `int4_int8`; float8_e4m3fn for
            `table_e4m3`.
        tiles: uint8 `[row tiles, column tiles, 128, 16 · bits]`, in the decoder's layout of `qfx.kernels.nibbles`.
        scale: float32 `[groups, 128 · row tiles]`.
        zero: uint8 of that shape, or None; integer decoders only.
        bias: `[out]`.
        rows: `out`.
        group: columns that share a scale: 32, 64, a multiple of 128, or all of them (-1, or their number).
        decoder: what a code means.
        x_scale: float32 `[tokens]` of a quantized x.
        table: the 16 values of a table decoder (Triton's interpreter reads them).
        second: float32 `[128 · row tiles]`, of which scales are whole multiples, 1 to 15; or None.
        dtype: of the output; x's if it is a float of 16 bits.

    Returns:
        `[tokens, out]`.
    """
    tokens, columns = x.shape
    dtype = dtype or x.dtype
    y = torch.empty((tokens, rows), dtype=dtype, device=x.device)
    if tokens == 0 or rows == 0:
        return y
    if group not in (32, 64) and group % 128:  # of another size there is only one
        group = -1
    sums = decoder is INT4_TO_INT8 and columns < MOST  # may run over whole rows
    if group < 128 or not sums:
        second = None
    flags = zero is not None, x_scale is not None, bias is not None, dtype == torch.float16
    capable = capability(x.device)
    if decoder is INT4_TO_E4M3 and INTERPRET:
        table = E4M3_NIBBLES
    words = tiles if decoder.kind in ("int4_int8", "table_e4m3") else tiles.view(torch.int16)

    def run(config: Config, words: Tensor) -> None:
        if config.chunk:
            by_cublas(x, words, scale, zero, table, bias, y, group, decoder, config.chunk)
            return
        if config.direct or config.specialized >= 0:
            octets = words.view(torch.uint8)
            run_form(config, x, x_scale, octets, scale, zero, bias, y, rows, group, decoder, flags, second)
            return
        if config.shared:
            shape = config.warps, config.bn, config.stages, config.registers
            even = columns % (128 * config.warps) == 0
            w4_few.launcher(*shape, decoder, group, (*flags, even), capable >= 90)(
                (-(-rows // config.bn), 1, 1), x, x_scale, words, scale, zero, table, bias, y,
                tokens, rows, columns, scale.shape[0], x.stride(0), scale.shape[1],
            )  # fmt: skip
            return
        count = -(-rows // config.bn) * -(-tokens // config.bt)
        part = arrived = None
        if config.split > 1:
            part = torch.empty(count * config.split * config.bn * config.bt, dtype=torch.float32, device=x.device)
            arrived = counters(count, x.device)
        launcher(config, decoder, group, flags, columns % 256, capable)(
            (count, config.split, 1), x, x_scale, words, scale, zero, table, bias, y, part, arrived,
            tokens, rows, columns, scale.shape[0], x.stride(0), scale.shape[1],
        )  # fmt: skip

    # float8 weights are as many bytes as int8 ones, and nearly as many instructions, but in `w4_direct`
    kind = "int4_int8" if decoder is INT4_TO_E4M3 and tokens > 8 else decoder.kind
    if second is not None and tokens > 32:
        kind = "multiples"  # the forms for fewer tokens do not look at `second`
    key = (kind, group, f"{rows}x{columns}", bucket(tokens))
    dense = x_scale is None  # an 8-bit input has no cuBLAS product with scales of groups

    def hopper() -> bool:
        known = decoder.kind in ("int4", "table", "int4_int8") or decoder is INT4_TO_E4M3
        return capable == 90 and known and takes_specialized(x, rows, group, zero, dtype)

    direct = tokens <= 16 and not INTERPRET and takes_direct(tokens, group, decoder)
    whole = (second is not None or (group < 0 and sums)) and tokens > 32 and hopper()
    rule = default(tokens, rows, columns, dense, group == 32 and decoder.kind in ("int3", "int8"), direct, whole)

    def tried() -> list[Config]:
        return candidates(tokens, rows, columns, dense, hopper(), direct, whole)

    config = pick("w4", key, rule, tried, run, words)
    unfit = (config.shared and not w4_few.takes(tokens, group)) or (config.specialized >= 0 and not hopper())
    if unfit or (config.direct and not direct):
        config = rule  # of a table that was made for another number of tokens, or another group
    chosen = config, decoder
    config = _fitting.get(chosen, config)
    while True:
        try:
            run(config, words)
            return y
        except OutOfResources:  # a device with less shared memory
            if config.stages <= 1:
                raise
            config = _fitting[chosen] = replace(config, stages=config.stages - 1)


_fitting: dict[tuple[Config, Decoder], Config] = {}
