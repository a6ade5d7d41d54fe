"""Where the nibbles of 128 columns go in the 64 bytes of a row of a tile, one layout for each way to decode them.

A weight is padded to tiles of 128 rows by 128 columns; a tile is 8 KB of consecutive memory. Within a row of a tile,
as nibbles in the order of memory (the low one of a byte first):

- `quarters`: nibble i of 16-bit word j is column 32 i + j: one and-or makes two neighbouring words' nibbles floats.
- `halves`: byte j holds columns j and 64 + j: a nibble in the upper half of a byte is 16 times itself.
- `pairs`: of 32-bit word j, nibbles 2 q and 2 q + 1 are columns 32 q + 2 j and 32 q + 2 j + 1: eight lookups at once,
  four of them in one byte permutation.
- `fours`: of 32-bit word j, nibbles 0..3 are columns 4 j.., nibbles 4..7 columns 64 + 4 j..: the same for bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.spec import Scheme
from qfx.kernels.pack import pack, unpack

TILE = 128
"""Rows and columns of a tile."""

# The columns 0..127 as axes, and the order in which memory runs through these.
_LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "quarters": ((4, 32), (1, 0)),
    "halves": ((2, 64), (1, 0)),
    "pairs": ((4, 16, 2), (1, 0, 2)),
    "fours": ((2, 16, 4), (1, 0, 2)),
}
LAYOUTS = tuple(_LAYOUTS)


def tile(nibbles: Tensor, layout: str) -> Tensor:
    """uint8 `[rows, columns]` below 16 to uint8 `[row tiles, column tiles, 128, 64]`, padded with zeros."""
    rows, columns = nibbles.shape
    axes, order = _LAYOUTS[layout]
    u = F.pad(nibbles, (0, -columns % TILE, 0, -rows % TILE)).unflatten(1, (-1, *axes))
    u = u.permute(0, 1, *(2 + o for o in order)).flatten(2)
    return (u[..., ::2] | u[..., 1::2] << 4).unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def untile(tiles: Tensor, layout: str, rows: int, columns: int) -> Tensor:
    """The inverse of `tile`."""
    axes, order = _LAYOUTS[layout]
    u = torch.stack([tiles & 15, tiles >> 4], -1).flatten(3).transpose(1, 2).flatten(0, 1)
    back = [order.index(i) for i in range(len(order))]
    u = u.unflatten(2, [axes[o] for o in order]).permute(0, 1, *(2 + b for b in back)).flatten(1)
    return u[:rows, :columns].contiguous()


def pad_scale(values: Tensor, rows: int) -> Tensor:
    """`[rows or 1, groups]` to `[groups, rows]`, the rows of a tile side by side, padded to whole tiles."""
    return F.pad(values.expand(rows, -1).t(), (0, -rows % TILE)).contiguous()


def prepare(
    stored: dict[str, Tensor | None], layout: str, *, bits: int, in_features: int, signed: bool, offset: int
) -> dict[str, Tensor | None]:
    """A stored weight of up to 4 bits in kernel layout.

    Args:
        stored: as `qfx.kernels.pack.store` gives it.
        layout: one of `LAYOUTS`.
        bits: of a stored code.
        in_features: columns.
        signed: whether stored codes are two's complement.
        offset: added to signed codes and their zero points before the low four bits are kept.

    Returns:
        `tiles` uint8 `[row tiles, column tiles, 128, 64]`; `scale` float32 and `zero` uint8 or None
        `[groups, 128 · row tiles]`; `order` int32 `[in]`, the column of x for each column of the tiles, or None.
    """
    codes, scale, zero, g_idx = (stored[k] for k in ("codes", "scale", "zero", "g_idx"))
    assert codes is not None and scale is not None
    u = unpack(codes, bits, in_features, signed)
    u = (u.view(torch.uint8) + offset if signed else u) & 15
    order = None if g_idx is None else torch.argsort(g_idx, stable=True)
    if order is not None:
        u = u.index_select(1, order)
    if signed and zero is not None:
        zero = zero + offset
    return {
        "tiles": tile(u, layout),
        "scale": pad_scale(scale, u.shape[0]),
        "zero": None if zero is None else pad_scale(zero, u.shape[0]),
        "order": None if order is None else order.to(torch.int32),
    }


def restore(
    prepared: dict[str, Tensor | None],
    layout: str,
    *,
    bits: int,
    in_features: int,
    out_features: int,
    signed: bool,
    offset: int,
) -> dict[str, Tensor | None]:
    """The stored weight that `prepare` was given, bit for bit; a scale for all rows comes back as one for each."""
    tiles, scale, zero, order = (prepared[k] for k in ("tiles", "scale", "zero", "order"))
    assert tiles is not None and scale is not None
    u, g_idx = untile(tiles, layout, out_features, in_features), None
    if order is not None:
        place = torch.argsort(order.long())
        u, g_idx = u.index_select(1, place), (place // (in_features // scale.shape[0])).to(torch.int32)
    zero = None if zero is None else zero[:, :out_features].t().contiguous()
    if signed and zero is not None:
        zero = zero - offset
    codes = (u - offset).view(torch.int8) if signed else u
    return {
        "codes": pack(codes.contiguous(), bits) if bits < 8 else codes,
        "scale": scale[:, :out_features].t().contiguous(),
        "zero": zero,
        "g_idx": g_idx,
    }


def dequantize_tiles(values: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> Tensor:
    """float32 `[out, in]` from the decoded nibbles `[out, in]` and what `prepare` gives beside the tiles."""
    rows = values.shape[0]
    scale = scale[:, :rows].t()
    offset = torch.zeros_like(scale) if zero is None else zero[:, :rows].t().float()
    if group < 0:
        return (values - offset) * scale
    return ((values.unflatten(1, (-1, group)) - offset.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)


def unordered(columns: Tensor, order: Tensor | None) -> Tensor:
    """Columns `[..., in]` in the order of the tiles back in the order of x: the inverse of `x[..., order]`."""
    return columns if order is None else torch.empty_like(columns).index_copy(-1, order.long(), columns)


def supports_group(op: str, scheme: Scheme, in_features: int) -> str | None:
    """None if the kernels take groups of this size, otherwise the reason why not."""
    try:
        groups = scheme.weight.groups(in_features)
    except ValueError as e:
        return f"{op}: {e}"
    size = in_features // groups
    if groups > 1 and size not in (32, 64) and size % TILE:
        return f"{op}: groups of {size}; it takes 32, 64, and multiples of {TILE}"
    return None if scheme.weight.block[0] in (1, -1) else f"{op}: blocks of {scheme.weight.block}"


def check(op: str, x: Tensor, tiles: Tensor) -> None:
    """Raises KernelError unless the tiles have as many columns as x."""
    if tiles.dim() != 4 or tiles.dtype != torch.uint8 or not 0 <= tiles.shape[1] * TILE - x.shape[-1] < TILE:
        raise KernelError(
            f"{op}: x {tuple(x.shape)} with tiles {tiles.dtype} {tuple(tiles.shape)}; tiles are uint8 "
            f"[row tiles, column tiles, {TILE}, 64] of as many columns as x"
        )
