"""What the ops over tiled integer weights and float inputs share: `w4a16_linear` and `wxa16_linear`.

The width of a code is read off the tiles: a row of a tile of 128 columns has 16 bytes for each bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.kernels import nibbles

LAYOUTS = {2: "eighths", 3: "split", 4: "quarters", 8: "bytes"}
"""The layout of each width."""


def reference(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group: int,
) -> Tensor:
    """`F.linear(x, w, bias)` with the weight dequantized; arguments as those of the ops."""
    w = weight(tiles, scale, zero, out_features, x.shape[-1], group).to(x.dtype)
    if order is not None:
        x = x.index_select(-1, order)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def weight(
    tiles: Tensor, scale: Tensor, zero: Tensor | None, out_features: int, in_features: int, group: int
) -> Tensor:
    """float32 `[out, in]`, its columns in the order of the tiles."""
    width = tiles.shape[-1] // 16
    values = nibbles.untile(tiles, LAYOUTS[width], out_features, in_features).float()
    if zero is None:
        values -= 2 ** (width - 1)
    return nibbles.dequantize_tiles(values, scale, zero, group)


def fake(op: str, widths: tuple[int, ...]) -> Callable[..., Tensor]:
    """The fake implementation of an op that takes these widths."""

    def empty(x: Tensor, tiles: Tensor, *rest: Any) -> Tensor:
        nibbles.check(op, x, tiles, widths)
        *_, out_features, _group = rest
        return x.new_empty((*x.shape[:-1], out_features))

    return empty


def on_gpu(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group: int,
) -> Tensor:
    """The same on CUDA tensors."""
    if x.dtype not in (torch.bfloat16, torch.float16):  # tensor cores take no wider floats
        return reference(x, tiles, scale, zero, order, bias, out_features, group)
    from qfx.kernels.gpu.decode4 import int_decoder
    from qfx.kernels.gpu.w4 import w4

    flat = x.reshape(-1, x.shape[-1])
    if order is not None:
        flat = flat.index_select(-1, order)
    elif flat.stride(-1) != 1:
        flat = flat.contiguous()
    y = w4(flat, tiles, scale, zero, bias, out_features, group, int_decoder(tiles.shape[3] // 16, x.dtype))
    return y.view(*x.shape[:-1], out_features)


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what `backward` reads."""
    x, tiles, scale, zero, order, bias, out_features, group = inputs
    ctx.save_for_backward(tiles, scale, zero, order)
    ctx.sizes = out_features, x.shape[-1], group
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; codes and scales are constants."""
    tiles, scale, zero, order = ctx.saved_tensors
    w = weight(tiles, scale, zero, *ctx.sizes).to(grad.dtype)
    flat = grad.reshape(-1, grad.shape[-1])
    x_grad = nibbles.unordered(flat @ w, order).reshape(*grad.shape[:-1], w.shape[1])
    bias_grad = None if ctx.bias_dtype is None else flat.sum(0).to(ctx.bias_dtype)
    return x_grad, None, None, None, None, bias_grad, None, None
