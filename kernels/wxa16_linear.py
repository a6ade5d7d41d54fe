"""`qfx::wxa16_linear`: weights of 2, 3 or 8 bits, laid out for the GPU kernel, times float activations (W2A16, W8A16).

What `qfx::w4a16_linear` is for 4 bits. Other widths take the next larger one: 1 bit takes 2, and 5 to 7 take 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.core.grid import Int
from qfx.core.spec import Scheme
from qfx.kernels import _tiled, nibbles
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

WIDTHS = (2, 3, 8)
"""Bits of a code in the tiles."""


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
    nibbles.check("wxa16_linear", x, tiles, WIDTHS)
    return _tiled.reference(x, tiles, scale, zero, order, bias, out_features, group)


wxa16_linear.register_fake(_tiled.fake("wxa16_linear", WIDTHS))
on_cuda(wxa16_linear)(_tiled.on_gpu)
wxa16_linear.register_autograd(_tiled.backward, setup_context=_tiled.setup)


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
    return nibbles.prepare(stored, _tiled.LAYOUTS[width], signed=signed, offset=2 ** (width - 1), **size)


def restore(
    prepared: dict[str, Tensor | None], *, bits: int, in_features: int, out_features: int, signed: bool
) -> dict[str, Tensor | None]:
    """The inverse of `prepare`."""
    width = width_of(bits)
    size = {"bits": bits, "in_features": in_features, "out_features": out_features}
    return nibbles.restore(prepared, _tiled.LAYOUTS[width], signed=signed, offset=2 ** (width - 1), **size)
