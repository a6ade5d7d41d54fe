"""`qfx::w4a16_linear`: weights of up to 4 bits, laid out for the GPU kernel, times float activations (W4A16).

`qfx::wna16_linear` computes the same from codes as they are stored.
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
    ((16,), 128, 128, "W4A16_G128"),
    ((1,), 256, 64, "W4A16_G64"),
    ((3,), 160, 33, "W4A16_G32"),
    ((2, 3), 136, 24, "W4A16_CHANNEL"),
    ((7,), 256, 17, "W4A16_ASYM_G128"),
    ((5,), 64, 16, "W3A16_ASYM_G32"),
    ((5,), 512, 9, "W2A16_G256"),
    ((0,), 128, 8, "W4A16_TENSOR"),
]
"""(leading dims, in_features, out_features, scheme)."""

LAYOUT = "quarters"
OFFSET = 8
"""Added to signed codes: the kernel takes off a zero point, which is 8 without one."""


@torch.library.custom_op("qfx::w4a16_linear", mutates_args=())
def w4a16_linear(
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
        tiles: codes as `prepare` lays them out, uint8 `[row tiles, column tiles, 128, 64]`.
        scale: float32 `[groups, 128 · row tiles]`.
        zero: uint8 of that shape, or None: 8.
        order: int32 `[in]`, the column of x for each column of the tiles, or None.
        bias: `[out]` or None.
        out_features: `out`.
        group: columns of a group, or -1 for one group.

    Returns:
        `[..., out]` of x's dtype.

    Raises:
        KernelError: the tiles do not have as many columns as x.
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
    nibbles.check("w4a16_linear", x, tiles)
    w = _weight(tiles, scale, zero, out_features, x.shape[-1], group).to(x.dtype)
    if order is not None:
        x = x.index_select(-1, order)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def _weight(
    tiles: Tensor, scale: Tensor, zero: Tensor | None, out_features: int, in_features: int, group: int
) -> Tensor:
    """float32 `[out, in]`, its columns in the order of the tiles."""
    values = nibbles.untile(tiles, LAYOUT, out_features, in_features).float()
    if zero is None:
        values -= OFFSET
    return nibbles.dequantize_tiles(values, scale, zero, group)


@w4a16_linear.register_fake
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
    nibbles.check("w4a16_linear", x, tiles)
    return x.new_empty((*x.shape[:-1], out_features))


@on_cuda(w4a16_linear)
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
    from qfx.kernels.gpu.decode4 import INT4
    from qfx.kernels.gpu.w4 import w4

    flat = x.reshape(-1, x.shape[-1])
    if order is not None:
        flat = flat.index_select(-1, order)
    elif flat.stride(-1) != 1:
        flat = flat.contiguous()
    y = w4(flat, tiles, scale, zero, bias, out_features, group, INT4)
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


w4a16_linear.register_autograd(_backward, setup_context=_setup)


def supports(scheme: Scheme, in_features: int, g_idx: bool = False) -> str | None:
    """None if the op computes a linear of this scheme, otherwise the reason why not."""
    w = scheme.weight
    if scheme.input is not None:
        return "w4a16_linear: the input is quantized"
    if not isinstance(w.grid, Int) or w.grid.bits > 4:
        return "w4a16_linear: the weight is not integers of at most 4 bits"
    return nibbles.supports_group("w4a16_linear", scheme, in_features)


def prepare(stored: dict[str, Tensor | None], *, bits: int, in_features: int, signed: bool) -> dict[str, Tensor | None]:
    """A stored weight in kernel layout: `tiles`, `scale`, `zero`, `order`."""
    return nibbles.prepare(stored, LAYOUT, bits=bits, in_features=in_features, signed=signed, offset=OFFSET)


def restore(
    prepared: dict[str, Tensor | None], *, bits: int, in_features: int, out_features: int, signed: bool
) -> dict[str, Tensor | None]:
    """The inverse of `prepare`."""
    size = {"in_features": in_features, "out_features": out_features}
    return nibbles.restore(prepared, LAYOUT, bits=bits, signed=signed, offset=OFFSET, **size)
