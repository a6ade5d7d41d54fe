"""Weights of few bits for many tokens: dequantized a few thousand rows at a time, and multiplied by cuBLAS.

From some hundreds of tokens on, a product is bound by the tensor cores, which cuBLAS keeps busier than a kernel that
decodes on the way. Rows pass through one buffer that stays in the L2 cache.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfx.kernels.gpu.decode4 import Decoder, decode
from qfx.kernels.gpu.launch import Launcher


@triton.jit
def _kernel(
    w_ptr, s_ptr, z_ptr, table_ptr, out_ptr,
    row_tile, N, K, groups, s_stride,
    DECODE: tl.constexpr, ASM: tl.constexpr, WORDS: tl.constexpr, HIGH: tl.constexpr, MIDDLE: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, F16: tl.constexpr,
):  # fmt: skip
    column_tile = tl.program_id(0)
    part = tl.program_id(1)  # 64 of the 128 rows of a tile
    rows = part % 2 * 64 + tl.arange(0, 64)
    tile = (row_tile + part // 2).to(tl.int64)
    w_ptr += (tile * tl.num_programs(0) + column_tile) * (128 * (WORDS + HIGH))
    w = tl.load(w_ptr + rows[:, None] * WORDS + tl.arange(0, WORDS)[None, :])
    high = None
    if HIGH:
        high = tl.load(w_ptr + 128 * WORDS + rows[:, None] * HIGH + tl.arange(0, HIGH)[None, :])
    rn = tile * 128 + rows
    k = column_tile * 128 + tl.arange(0, 128)
    a = decode(w, tl.full((64,), MIDDLE, tl.uint8), table_ptr, DECODE, False, F16, ASM, high).to(tl.float32)
    if GROUP < 0:
        at = rn[:, None]
    else:
        at = tl.minimum(k // GROUP, groups - 1)[None, :] * s_stride + rn[:, None]
    if ZERO:
        a += MIDDLE - tl.load(z_ptr + at).to(tl.float32)
    a *= tl.load(s_ptr + at)
    out = (part // 2 * 128 + rows).to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out_ptr + out, a.to(out_ptr.dtype.element_ty), mask=(rn < N)[:, None] & (k < K)[None, :])


@cache
def _launcher(decoder: Decoder, group: int, zero: bool, f16: bool) -> Launcher:
    return Launcher(
        _kernel, DECODE=decoder.kind, ASM=decoder.asm, WORDS=decoder.words, HIGH=decoder.high, MIDDLE=decoder.middle,
        GROUP=group, ZERO=zero, F16=f16, num_warps=4, num_stages=1,
    )  # fmt: skip


def dequantize(
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    out: Tensor,
    group: int,
    decoder: Decoder,
    first: int,
) -> None:
    """Writes rows `first` (a multiple of 128) and on of a weight in kernel layout to `out` `[rows, in]`."""
    rows, columns = out.shape
    launch = _launcher(decoder, group, zero is not None, out.dtype == torch.float16)
    grid = (words.shape[1], -(-rows // 64), 1)
    sizes = first // 128, first + rows, columns, scale.shape[0], scale.shape[1]
    launch(grid, words, scale, zero, table, out, *sizes)


def by_cublas(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    group: int,
    decoder: Decoder,
    chunk: int,
) -> None:
    """`x @ W.T + bias` into y `[tokens, out]`, `chunk` rows of W at a time (a multiple of 128)."""
    rows = y.shape[1]
    buffer = torch.empty((min(chunk, rows), x.shape[1]), dtype=x.dtype, device=x.device)
    for first in range(0, rows, chunk):
        w = buffer[: min(chunk, rows - first)]
        dequantize(words, scale, zero, table, w, group, decoder, first)
        out = y[:, first : first + len(w)]
        if bias is None:
            torch.mm(x, w.t(), out=out)
        else:
            torch.addmm(bias[first : first + len(w)].to(x.dtype), x, w.t(), out=out)
