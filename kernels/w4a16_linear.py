"""`qfx::w4a16_linear`: weights of up to 4 bits, laid out for the GPU kernel, times float activations (W4A16).

`qfx::wna16_linear` computes the same from codes as they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.core.grid import Int
from qfx.core.spec import Scheme
from qfx.kernels import _tiled, nibbles
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

WIDTHS = (4,)
"""Bits of a code in the tiles."""
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
    nibbles.check("w4a16_linear", x, tiles, WIDTHS)
    return _tiled.reference(x, tiles, scale, zero, order, bias, out_features, group)


w4a16_linear.register_fake(_tiled.fake("w4a16_linear", WIDTHS))
on_cuda(w4a16_linear)(_tiled.on_gpu)
w4a16_linear.register_autograd(_tiled.backward, setup_context=_tiled.setup)


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
    return nibbles.prepare(stored, _tiled.LAYOUTS[4], bits=bits, in_features=in_features, signed=signed, offset=OFFSET)


def restore(
    prepared: dict[str, Tensor | None], *, bits: int, in_features: int, out_features: int, signed: bool
) -> dict[str, Tensor | None]:
    """The inverse of `prepare`."""
    size = {"in_features": in_features, "out_features": out_features}
    return nibbles.restore(prepared, _tiled.LAYOUTS[4], bits=bits, signed=signed, offset=OFFSET, **size)
