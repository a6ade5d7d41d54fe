"""`qfx::wxa16_linear`: weights of 2, 3 or 8 bits, laid out for the GPU kernel, times float activations (W2A16, W8A16).

What `qfx::w4a16_linear` is for 4 bits. Other widths take the next larger one: 1 bit takes 2, and 5 to 7 take 8.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.grid import Int
from qfx.core.spec import Scheme
from qfx.kernels import nibbles
from qfx.kernels._cuda import on_cuda

CASES = [
    ((16,), 128, 128, "W8A16_G128"),
    ((1,), 256, 64, "W8A16_G64"),
    ((3,), 160, 33, "W8A16_ASYM_G32"),
    ((2, 3), 136, 24, "W8A16_CHANNEL"),
    ((7,), 256, 17, "W8A16_ASYM_G128"),
    ((5,), 512, 9, "W6A16_G256"),
    ((16,), 128, 130, "W2A16_G128"),
    ((1,), 256, 64, "W2A16_ASYM_G64"),
    ((3,), 160, 33, "W2A16_G32"),
    ((2, 3), 136, 24, "W2A16_ASYM_CHANNEL"),
    ((5,), 256, 9, "W1A16_ASYM_G256"),
    ((16,), 128, 130, "W3A16_G128"),
    ((1,), 256, 64, "W3A16_G64"),
    ((3,), 160, 33, "W3A16_ASYM_G32"),
    ((2, 3), 136, 24, "W3A16_CHANNEL"),
    ((7,), 256, 17, "W3A16_ASYM_G128"),
    ((4,), 40, 24, "W8A16_G40"),
    ((0,), 128, 8, "W8A16_TENSOR"),
]
"""(leading dims, in_features, out_features, scheme)."""

WIDTHS = {2: "eighths", 3: "split", 8: "bytes"}
"""The layout of each width."""


@torch.library.custom_op("qfx::wxa16_linear", mutates_args=())
def wxa16_linear(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group: int,
) -> Tensor:
    """`F.linear(x, w, bias)` with the weight dequantized.

    Args:
        x: `[..., in]`, any float dtype.
        tiles: codes as `prepare` lays them out, uint8 `[row tiles, column tiles, 128, 16 · bits]`.
        scale: float32 `[groups, 128 · row tiles]`.
        zero: uint8 of that shape, or None: half of the codes lie below it.
        order: int32 `[in]`, the column of x for each column of the tiles, or None.
        bias: `[out]` or None.
        out_features: `out`.
        group: columns of a group, or -1 for one group.

    Returns:
        `[..., out]` of x's dtype.

    Raises:
        KernelError: the tiles have another width, or do not have as many columns as x.
    """
    return _reference(x, tiles, scale, zero, order, bias, out_features, group)


def _reference(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group: int,
) -> Tensor:
    nibbles.check("wxa16_linear", x, tiles, tuple(WIDTHS))
    w = _weight(tiles, scale, zero, out_features, x.shape[-1], group).to(x.dtype)
    if order is not None:
        x = x.index_select(-1, order)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def _weight(
    tiles: Tensor, scale: Tensor, zero: Tensor | None, out_features: int, in_features: int, group: int
) -> Tensor:
    """float32 `[out, in]`, its columns in the order of the tiles."""
    width = tiles.shape[-1] // 16
    values = nibbles.untile(tiles, WIDTHS[width], out_features, in_features).float()
    if zero is None:
        values -= 2 ** (width - 1)
    return nibbles.dequantize_tiles(values, scale, zero, group)


@wxa16_linear.register_fake
def _(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group: int,
) -> Tensor:
    nibbles.check("wxa16_linear", x, tiles, tuple(WIDTHS))
    return x.new_empty((*x.shape[:-1], out_features))


@on_cuda(wxa16_linear)
def _(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group: int,
) -> Tensor:
    if x.dtype not in (torch.bfloat16, torch.float16):  # tensor cores take no wider floats
        return _reference(x, tiles, scale, zero, order, bias, out_features, group)
    from qfx.kernels.gpu.decode4 import int_decoder
    from qfx.kernels.gpu.w4 import w4

    flat = x.reshape(-1, x.shape[-1])
    if order is not None:
        flat = flat.index_select(-1, order)
    elif flat.stride(-1) != 1:
        flat = flat.contiguous()
    y = w4(flat, tiles, scale, zero, bias, out_features, group, int_decoder(tiles.shape[3] // 16, x.dtype))
    return y.view(*x.shape[:-1], out_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tiles, scale, zero, order, bias, out_features, group = inputs
    ctx.save_for_backward(tiles, scale, zero, order)
    ctx.sizes = out_features, x.shape[-1], group
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tiles, scale, zero, order = ctx.saved_tensors
    w = _weight(tiles, scale, zero, *ctx.sizes).to(grad.dtype)
    flat = grad.reshape(-1, grad.shape[-1])
    x_grad = nibbles.unordered(flat @ w, order).reshape(*grad.shape[:-1], w.shape[1])
    bias_grad = None if ctx.bias_dtype is None else flat.sum(0).to(ctx.bias_dtype)
    return x_grad, None, None, None, None, bias_grad, None, None


wxa16_linear.register_autograd(_backward, setup_context=_setup)


def width_of(bits: int) -> int:
    """The bits that a code of so many bits takes in the tiles."""
    return next(width for width in WIDTHS if bits <= width)


def supports(scheme: Scheme, in_features: int, g_idx: bool = False) -> str | None:
    """None if the op computes a linear of this scheme, otherwise the reason why not."""
    w = scheme.weight
    if scheme.input is not None:
        return "wxa16_linear: the input is quantized"
    if not isinstance(w.grid, Int) or w.grid.bits == 4:
        return "wxa16_linear: the weight is not integers of 1 to 3 or 5 to 8 bits"
    return nibbles.supports_group("wxa16_linear", scheme, in_features)


def prepare(stored: dict[str, Tensor | None], *, bits: int, in_features: int, signed: bool) -> dict[str, Tensor | None]:
    """A stored weight in kernel layout: `tiles`, `scale`, `zero`, `order`."""
    width = width_of(bits)
    size = {"bits": bits, "in_features": in_features}
    return nibbles.prepare(stored, WIDTHS[width], signed=signed, offset=2 ** (width - 1), **size)


def restore(
    prepared: dict[str, Tensor | None], *, bits: int, in_features: int, out_features: int, signed: bool
) -> dict[str, Tensor | None]:
    """The inverse of `prepare`."""
    width = width_of(bits)
    size = {"bits": bits, "in_features": in_features, "out_features": out_features}
    return nibbles.restore(prepared, WIDTHS[width], signed=signed, offset=2 ** (width - 1), **size)
