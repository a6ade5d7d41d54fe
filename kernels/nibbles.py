"""Where the codes of 128 columns go in a row of a tile, one layout for each way to decode them.

A weight is padded to tiles of 128 rows by 128 columns; a tile is consecutive memory, 16 bytes a row for each bit of a
code. Within a row of a tile, as codes in the order of memory (the one in the low bits of a byte first):

- `quarters`: nibble i of 16-bit word j is column 32 i + j: one and-or makes two neighbouring words' nibbles floats.
- `halves`: byte j holds columns j and 64 + j: a nibble in the upper half of a byte is 16 times itself.
- `pairs`: of 32-bit word j, nibbles 2 q and 2 q + 1 are columns 32 q + 2 j and 32 q + 2 j + 1: eight lookups at once,
  four of them in one byte permutation.
- `fours`: of 32-bit word j, nibbles 0..3 are columns 4 j.., nibbles 4..7 columns 64 + 4 j..: the same for bytes.
- `bytes`: byte i of 16-bit word j is column 64 i + j: `quarters` for 8 bits.
- `eighths`: 2-bit field i of 16-bit word j is column 16 i + j: `quarters` for 2 bits.
- `split`: 3 bits. The low two are laid out as `eighths`, for all rows of the tile; then come the high ones, 16 bytes a
  row: bits 2 i and 2 i + 1 of 16-bit word j are those of columns 16 i - 16 + j and 16 i - 8 + j, field 0 being the
  last. Shifted like the low bits, they land on the bit above them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.spec import Scheme
from qfx.kernels.pack import pack, unpack

TILE = 128
"""Rows and columns of a tile."""


class _Plane(NamedTuple):
    """Some bits of every code. The columns 0..127 as axes, and the order in which memory runs through these."""

    bits: int
    axes: tuple[int, ...]
    order: tuple[int, ...]
    shift: int = 0  # of these bits in a code
    roll: int = 0  # of the first axis


_LAYOUTS: dict[str, tuple[_Plane, ...]] = {
    "quarters": (_Plane(4, (4, 32), (1, 0)),),
    "halves": (_Plane(4, (2, 64), (1, 0)),),
    "pairs": (_Plane(4, (4, 16, 2), (1, 0, 2)),),
    "fours": (_Plane(4, (2, 16, 4), (1, 0, 2)),),
    "bytes": (_Plane(8, (2, 64), (1, 0)),),
    "eighths": (_Plane(2, (8, 16), (1, 0)),),
    "split": (_Plane(2, (8, 16), (1, 0)), _Plane(1, (8, 2, 8), (2, 0, 1), 2, 1)),
}
LAYOUTS = {name: sum(plane.bits for plane in planes) for name, planes in _LAYOUTS.items()}
"""The bits of a code by layout."""


def tile(codes: Tensor, layout: str) -> Tensor:
    """uint8 `[rows, columns]` to uint8 `[row tiles, column tiles, 128, 16 · bits]`, padded with zeros.

    Codes are below 2 to the power of the layout's bits. The last axes are a row and its bytes, but for `split`, whose
    tile is as its description says.
    """
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % TILE, 0, -rows % TILE))
    parts = []
    for plane in _LAYOUTS[layout]:
        u = padded if plane.bits == LAYOUTS[layout] else padded >> plane.shift & (1 << plane.bits) - 1
        u = u.unflatten(1, (-1, *plane.axes))
        u = u.roll(plane.roll, 2) if plane.roll else u
        u = u.permute(0, 1, *(2 + o for o in plane.order)).flatten(2)
        u = _join(u, plane.bits).unflatten(0, (-1, TILE)).transpose(1, 2)
        parts.append(u.flatten(2))
    tiles = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return tiles.unflatten(2, (TILE, -1)).contiguous()


def untile(tiles: Tensor, layout: str, rows: int, columns: int) -> Tensor:
    """The inverse of `tile`."""
    sizes = [TILE * TILE // 8 * plane.bits for plane in _LAYOUTS[layout]]
    codes = None
    for plane, octets in zip(_LAYOUTS[layout], tiles.flatten(2).split(sizes, 2), strict=True):
        u = _split(octets.unflatten(2, (TILE, -1)), plane.bits).transpose(1, 2).flatten(0, 1)
        back = [plane.order.index(i) for i in range(len(plane.order))]
        u = u.unflatten(2, [plane.axes[o] for o in plane.order]).permute(0, 1, *(2 + b for b in back))
        u = u.roll(-plane.roll, 2) if plane.roll else u
        u = u.flatten(1) << plane.shift if plane.shift else u.flatten(1)
        codes = u if codes is None else codes | u
    assert codes is not None
    return codes[:rows, :columns].contiguous()


def _join(fields: Tensor, bits: int) -> Tensor:
    """uint8 fields along the last axis to bytes, the first field lowest."""
    return sum((fields[..., i :: 8 // bits] << bits * i for i in range(1, 8 // bits)), fields[..., :: 8 // bits])


def _split(octets: Tensor, bits: int) -> Tensor:
    """The inverse of `_join`."""
    if bits == 8:
        return octets
    return torch.stack([octets >> i & (1 << bits) - 1 for i in range(0, 8, bits)], -1).flatten(-2)


def pad_scale(values: Tensor, rows: int) -> Tensor:
    """`[rows or 1, groups]` to `[groups, rows]`, the rows of a tile side by side, padded to whole tiles."""
    return F.pad(values.expand(rows, -1).t(), (0, -rows % TILE)).contiguous()


def prepare(
    stored: dict[str, Tensor | None], layout: str, *, bits: int, in_features: int, signed: bool, offset: int
) -> dict[str, Tensor | None]:
    """A stored weight in kernel layout.

    Args:
        stored: as `qfx.kernels.pack.store` gives it.
        layout: one of `LAYOUTS`.
        bits: of a stored code, at most the layout's.
        in_features: columns.
        signed: whether stored codes are two's complement.
        offset: added to signed codes and their zero points before the layout's low bits are kept.

    Returns:
        `tiles` as `tile` gives them; `scale` float32 and `zero` uint8 or None
        `[groups, 128 · row tiles]`; `order` int32 `[in]`, the column of x for each column of the tiles, or None.
    """
    codes, scale, zero, g_idx = (stored[k] for k in ("codes", "scale", "zero", "g_idx"))
    assert codes is not None and scale is not None
    u = codes if bits == 8 else unpack(codes, bits, in_features, signed)
    u = (u.view(torch.uint8) + offset if signed else u) & (1 << LAYOUTS[layout]) - 1
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
    """float32 `[out, in]` from the decoded codes `[out, in]` and what `prepare` gives beside the tiles."""
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


def check(op: str, x: Tensor, tiles: Tensor, widths: tuple[int, ...] = (4,)) -> None:
    """Raises KernelError unless the tiles have codes of one of these widths and as many columns as x."""
    sizes = [16 * bits for bits in widths]
    columns = tiles.shape[1] * TILE - x.shape[-1] if tiles.dim() == 4 else -1
    if not 0 <= columns < TILE or tiles.dtype != torch.uint8 or tiles.shape[3] not in sizes:
        raise KernelError(
            f"{op}: x {tuple(x.shape)} with tiles {tiles.dtype} {tuple(tiles.shape)}; tiles are uint8 "
            f"[row tiles, column tiles, {TILE}, {' or '.join(map(str, sizes))}] of as many columns as x"
        )
