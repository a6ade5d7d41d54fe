"""How weight codes are stored: bits packed along the input axis, and the numbers that they stand for.

A row is a little-endian stream of bits, the first code in the lowest bits: 8 codes of b bits fill b bytes, so that
column 8i starts at byte b·i for every width. For 4 bits the even column is the low nibble (the layout of ONNX' INT4
and UINT4). Rows are padded with zero bits to a multiple of 8 columns. A signed code is stored as the low b bits of its
two's complement: -1 of four bits is 0b1111.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.grid import Codebook, Int
from qfx.core.qtensor import QTensor, blocks_of_scales, dequantize_scale, quantize_scale
from qfx.core.spec import QSpec

CASES: list[tuple[int, tuple[int, ...]]] = [
    (bits, (3, columns)) for bits in range(1, 9) for columns in (1, 7, 8, 33, 64)
]
CASES += [(4, (2, 3, 13)), (3, (2, 3, 13)), (5, (0, 9)), (8, (5, 24))]
"""(bits, shape of the codes)."""

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed_columns(columns: int, bits: int) -> int:
    """Bytes of a packed row of `columns` codes."""
    return -(-columns // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs integer codes along the last axis.

    Args:
        codes: int8 or uint8 `[..., out, in]`; only the low `bits` bits of each are kept.
        bits: 1 to 8.

    Returns:
        uint8 `[..., out, ceil(in / 8) * bits]`.

    Raises:
        KernelError: the codes are not int8 or uint8, or the width is not 1 to 8.
    """
    if codes.dtype not in (torch.int8, torch.uint8) or not 1 <= bits <= 8:
        raise KernelError(f"pack: {codes.dtype} codes of {bits} bits; use int8 or uint8, 1 to 8 bits")
    octets = F.pad(codes.view(torch.uint8), (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    mask = 2**bits - 1
    # one int64 word for 8 codes: a column at a time, so that at most two words for each octet are alive
    word = (octets[..., 0] & mask).to(torch.int64)
    for i in range(1, 8):
        word |= (octets[..., i] & mask).to(torch.int64) << (bits * i)
    stream = [(word >> (8 * j) & 255).to(torch.uint8) for j in range(bits)]
    return torch.stack(stream, -1).flatten(-2)


def unpack(packed: Tensor, bits: int, columns: int, signed: bool) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: uint8 `[..., out, ceil(columns / 8) * bits]`.
        bits: 1 to 8.
        columns: codes in a row.
        signed: whether the codes are two's complement.

    Returns:
        int8 if signed, otherwise uint8, contiguous `[..., out, columns]`.

    Raises:
        KernelError: the packed rows do not have the length that `columns` codes have.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_columns(columns, bits):
        raise KernelError(
            f"unpack: {packed.dtype} rows of {packed.shape[-1]} bytes; {columns} codes of {bits} bits are "
            f"{packed_columns(columns, bits)} bytes of uint8"
        )
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes = (packed.unsqueeze(-1) >> shifts).flatten(-2)
    else:
        octets = packed.unflatten(-1, (-1, bits))
        word = octets[..., 0].to(torch.int64)
        for j in range(1, bits):
            word = word | octets[..., j].to(torch.int64) << (8 * j)
        codes = torch.stack([(word >> (bits * i) & 255).to(torch.uint8) for i in range(8)], -1).flatten(-2)
    codes = codes[..., :columns] & (2**bits - 1)
    if not signed:
        return codes.contiguous()
    sign = 2 ** (bits - 1)  # flipping it and taking it away extends it: uint8 wraps around
    return (codes ^ sign).sub(sign).view(torch.int8).contiguous()


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    g_idx: Tensor | None = None,
    *,
    bits: int,
    columns: int,
    signed: bool,
    table: str = "",
    scale_scale: Tensor | None = None,
    scale_block: int = 0,
) -> Tensor:
    """The weight that stored codes stand for, bit-equal to `QTensor.dequantize`.

    Args:
        codes: packed uint8 if `bits` < 8, otherwise int8, uint8 or float8 `[..., out, in]`.
        scale: `[..., rows, groups]`, rows being `out` or 1; any float dtype, or the codes of quantized scales.
        zero: integers of the scale's shape, or None.
        g_idx: int32 or int64 `[in]`, the group of each column, or None if groups are consecutive.
        bits: bits of a code.
        columns: `in`.
        signed: whether packed codes are two's complement; those of a codebook are not.
        table: the name of the codebook, or "": a code is its own value.
        scale_scale: float32 `[..., blocks]` of quantized scales, or None.
        scale_block: how many scales share one of those, or -1: those of a row, or all, by how many of them there are.

    Returns:
        float32 `[..., out, in]`.
    """
    if bits < 8:
        codes = unpack(codes, bits, columns, signed and not table)
    values = Codebook(table).decode(codes) if table else codes.to(torch.float32)
    scale = scale.to(torch.float32) if scale_scale is None else dequantize_scale(scale, scale_scale, scale_block)
    if g_idx is not None:
        if zero is not None:
            values = values - zero.index_select(-1, g_idx)
        return values * scale.index_select(-1, g_idx)
    # groups as an axis of their own: broadcasting writes no [out, in] copy of the scales
    values = values.unflatten(-1, (scale.shape[-1], -1))
    if zero is not None:
        values = values - zero.unsqueeze(-1)
    return (values * scale.unsqueeze(-1)).flatten(-2)


def store(q: QTensor) -> dict[str, Tensor | None]:
    """The tensors that hold a weight, as the linear ops and `dequantize` take them.

    Returns:
        `codes` (packed below 8 bits), `scale` float32, `zero` uint8 or None, `g_idx` int32 or None, `scale_scale` None;
        of quantized scales, `scale` is their codes and `scale_scale` float32 `[..., blocks]`.

    Raises:
        KernelError: a zero point lies outside 0..255, or the scales are not those that `encode` gives.
    """
    zero, bits = q.zero, q.spec.grid.bits
    if zero is not None:
        if not zero.is_meta and zero.numel() and (int(zero.min()) < 0 or int(zero.max()) > 255):
            raise KernelError("store: a zero point lies outside 0..255; clamp it to the grid")
        zero = zero.to(torch.uint8)
    codes = pack(q.codes, bits) if bits < 8 else q.codes
    g_idx = None if q.g_idx is None else q.g_idx.to(torch.int32)
    stored = {"codes": codes, "scale": q.scale.to(torch.float32), "zero": zero, "g_idx": g_idx}
    return store_scale(stored, q.spec)


def store_scale(plain: Mapping[str, Tensor | None], spec: QSpec) -> dict[str, Tensor | None]:
    """A weight with float32 scales as `store` gives it: with the codes of its scales, if the spec quantizes those.

    Raises:
        KernelError: the scales are not what such codes stand for.
    """
    if spec.scale is None:
        return {**plain, "scale_scale": None}
    scale = plain["scale"]
    assert scale is not None
    codes, second = quantize_scale(scale, spec)
    if not scale.is_meta and not torch.equal(dequantize_scale(codes, second, spec.scale.block[1]), scale):
        raise KernelError(
            "store: the scales are not on the grid of their own spec; qfx.core.qtensor.encode rounds them"
        )
    return {**plain, "scale": codes, "scale_scale": second}


def plain_scale(stored: Mapping[str, Tensor | None], spec: QSpec) -> dict[str, Tensor | None]:
    """The inverse of `store_scale`: the same weight with float32 scales, as kernels lay it out."""
    plain = {key: value for key, value in stored.items() if key != "scale_scale"}
    if spec.scale is not None:
        codes, second = stored["scale"], stored["scale_scale"]
        assert codes is not None and second is not None
        plain["scale"] = dequantize_scale(codes, second, spec.scale.block[1])
    return plain


def kernel_scale(stored: Mapping[str, Tensor | None], spec: QSpec) -> dict[str, Tensor | None]:
    """`plain_scale`, for a weight that is to come back bit for bit.

    Raises:
        KernelError: `store_scale` would not give the same codes.
    """
    plain = plain_scale(stored, spec)
    if spec.scale is not None:
        scale = plain["scale"]
        assert scale is not None
        again = dict(zip(("scale", "scale_scale"), quantize_scale(scale, spec), strict=True))
        for key, value in again.items():
            was = stored[key]
            assert was is not None
            if not value.is_meta and not torch.equal(value.view(torch.uint8), was.view(torch.uint8)):
                raise KernelError("lower: other codes of scales than qfx would give; they stay as they are stored")
    return plain


def layout(spec: QSpec) -> tuple[int, bool, str, int]:
    """What `dequantize` needs to know of a format: `bits`, `signed`, `table`, `scale_block`."""
    grid = spec.grid
    signed, table = isinstance(grid, Int) and grid.signed, grid.name if isinstance(grid, Codebook) else ""
    return grid.bits, signed, table, 0 if spec.scale is None else spec.scale.block[1]


def dequantize_stored(stored: Mapping[str, Tensor | None], spec: QSpec, columns: int) -> Tensor:
    """The weight, float32 `[..., out, in]`, that `store` was given."""
    bits, signed, table, block = layout(spec)
    codes, scale, zero, g_idx = (stored[key] for key in ("codes", "scale", "zero", "g_idx"))
    assert codes is not None and scale is not None
    form: dict[str, Any] = {"bits": bits, "columns": columns, "signed": signed, "table": table}
    return dequantize(codes, scale, zero, g_idx, **form, scale_scale=stored.get("scale_scale"), scale_block=block)


def empty_store(
    spec: QSpec, shape: tuple[int, ...], g_idx: bool = False, device: torch.device | str | None = None
) -> dict[str, Tensor | None]:
    """What `store` gives for a weight `[..., out, in]` of this shape: codes 0, scales 1."""
    bits, columns = spec.grid.bits, shape[-1]
    if bits < 8:
        codes = torch.zeros(*shape[:-1], packed_columns(columns, bits), dtype=torch.uint8, device=device)
    else:
        codes = torch.zeros(shape, dtype=spec.grid.dtype, device=device)
    scales = torch.Size((*shape[:-2], 1 if spec.block[0] == -1 else shape[-2], spec.groups(columns)))
    inner = spec.scale
    second = None
    if inner is not None:
        second = torch.ones(blocks_of_scales(scales, inner), device=device, dtype=torch.float32)
    return {
        "codes": codes,
        "scale": torch.ones(scales, device=device).to(torch.float32 if inner is None else inner.grid.dtype),
        "zero": None if spec.symmetric else torch.zeros(scales, dtype=torch.uint8, device=device),
        "g_idx": torch.zeros(columns, dtype=torch.int32, device=device) if g_idx else None,
        "scale_scale": second,
    }


def restore(stored: Mapping[str, Tensor | None], spec: QSpec, columns: int) -> QTensor:
    """The weight that `store` was given."""
    plain = plain_scale(stored, spec)
    codes, scale, zero, g_idx = (plain[key] for key in ("codes", "scale", "zero", "g_idx"))
    assert codes is not None and scale is not None
    bits, signed, *_ = layout(spec)
    if bits < 8:
        codes = unpack(codes, bits, columns, signed)
    zero = None if zero is None else zero.to(torch.int32)
    return QTensor(codes, scale, zero, spec, None if g_idx is None else g_idx.to(torch.int64))


def apply_to_bits(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Applies `fn`, as `Module._apply` gets it, to a tensor that must keep its dtype.

    `fn` sees the tensor's bits as integers, so that a cast of floating-point tensors passes over
    float8 codes and float32 scales while a move to another device is carried out.
    """
    bits = tensor.view(_SAME_SIZE[tensor.element_size()])
    moved = fn(bits)
    if moved.dtype != bits.dtype:  # `Module.type(dst)` casts integers as well
        moved = bits.to(moved.device)
    return moved.view(tensor.dtype)
