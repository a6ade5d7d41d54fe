"""What GPTQ and AWQ checkpoints share: codes packed in words of 32 bits, scales of 16 bits, shapes that are checked.

Packed values are a stream of bits that starts in the lowest bit of the first word: 32 values of b bits fill b words,
and with 3 bits a value may begin in one word and end in the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qfx.core.errors import PackageError
from qfx.core.grid import Int
from qfx.core.qtensor import QTensor
from qfx.core.spec import QSpec, Scheme, scheme_label

LEAVES = ("qweight", "qzeros", "scales")
HEAD = "lm_head"
"""What both formats call the linear that their readers keep in float unless told otherwise."""


def pack(values: Tensor, bits: int) -> Tensor:
    """Packs values along the last axis.

    Args:
        values: uint8 `[..., n]` below 2^bits; `n * bits` is a multiple of 32, and n of 32 if bits is 3.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 `[..., n * bits / 32]`, contiguous.
    """
    if bits == 8:
        return _view(values, torch.int32)
    octets = values.unflatten(-1, (-1, 8))
    # 8 values at a time, in one int64 word: they are whole bytes for every width
    word = octets[..., 0].to(torch.int64)
    for i in range(1, 8):
        word |= octets[..., i].to(torch.int64) << (bits * i)
    stream = torch.stack([(word >> (8 * j) & 255).to(torch.uint8) for j in range(bits)], -1)
    return _view(stream.flatten(-2), torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: uint8 `[..., n]` from int32 `[..., n * bits / 32]`."""
    stream = _view(words, torch.uint8)
    if bits == 8:
        return stream
    octets = stream.unflatten(-1, (-1, bits))
    word = octets[..., 0].to(torch.int64)
    for j in range(1, bits):
        word |= octets[..., j].to(torch.int64) << (8 * j)
    return torch.stack([(word >> (bits * i) & 2**bits - 1).to(torch.uint8) for i in range(8)], -1).flatten(-2)


def packed_together(bits: int) -> int:
    """How many values fill whole words of 32 bits."""
    return 32 if bits == 3 else 32 // bits


def refusal(scheme: Scheme, weight: QTensor, widths: Sequence[int]) -> str | None:
    """Why a weight is no weight-only integer of rows or groups with scales of 16 bits; None if it is.

    Args:
        scheme: of the linear.
        weight: codes `[out, in]` and scales.
        widths: bits that the format has.
    """
    spec, (out, columns) = weight.spec, weight.codes.shape
    bits = min((b for b in widths if b >= spec.grid.bits), default=widths[-1])
    signed = spec.symmetric
    block = (1, spec.block[1])
    near = scheme_label(Scheme(QSpec(Int(bits, signed, narrow=signed and bits == 8), block, symmetric=signed)))
    here = scheme_label(scheme)
    if not isinstance(spec.grid, Int) or spec.grid.bits not in widths:
        return f"has no {here}, its weights are integers of {_either(widths)} bits; nearest: {near}"
    if scheme.input is not None:
        return f"has no {here}, it does not quantize inputs; nearest: {near}"
    if spec.block[0] != 1:
        return f"has no {here}, every output channel has its own scale; nearest: {near}"
    if spec.scale is not None:
        return f"has no {here}, it does not quantize scales; nearest: {near}"
    if reason := scale_refusal(weight.scale):
        return reason
    some = packed_together(bits)
    if out % some or columns % some:
        return f"packs {some} rows and columns together, this weight is {out} x {columns}; keep it in float"
    return None


def scale_refusal(scale: Tensor) -> str | None:
    """Why float16, to which readers cast scales, has no such scale; None if it holds each to its own precision.

    A scale may round; none becomes infinite or 0.
    """
    half = scale.to(torch.float16)
    wrong = ~half.isfinite() | (half == 0)
    if not bool(wrong.any()):
        return None
    worst = float(scale[wrong][0])
    return f"has scales that readers hold in float16, where {worst:.3g} is {float(half[wrong][0])}; keep it in float"


def least_scale(scale: Tensor) -> Tensor:
    """The scales in float16 if that is what they are, otherwise as float32: no bit is lost."""
    half = scale.to(torch.float16)
    return half if torch.equal(half.float(), scale) else scale.to(torch.float32)


def take(format: str, name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`qweight`, `qzeros` and `scales` of a linear; the scales are made float32.

    Raises:
        PackageError: one is missing, is no matrix of its dtype, or a scale is not finite.
    """
    if lacking := [leaf for leaf in LEAVES if leaf not in tensors]:
        raise PackageError(f"{format}: {name} lacks {lacking[0]}; the checkpoint is incomplete, or keeps it in float")
    for leaf in LEAVES:
        t = tensors[leaf]
        good = t.is_floating_point() and t.itemsize in (2, 4) if leaf == "scales" else t.dtype == torch.int32
        if not good or t.dim() != 2:
            want = "floats of 16 or 32 bits" if leaf == "scales" else "int32"
            raise PackageError(f"{format}: {name}.{leaf} is {t.dtype} {list(t.shape)}, not a matrix of {want}")
    scales = tensors["scales"].to(torch.float32)
    if not bool(scales.isfinite().all()):
        raise PackageError(f"{format}: {name}.scales is not finite; the checkpoint is broken")
    return tensors["qweight"], tensors["qzeros"], scales


def groups_of(format: str, name: str, columns: int, size: int) -> int:
    """How many groups of `size` inputs (-1: all) there are; PackageError if the last one is not whole."""
    try:
        return QSpec(Int(8), (1, size)).groups(columns)
    except ValueError as e:
        raise PackageError(f"{format}: {name}: {e}; qfx computes whole groups only") from None


def check_shape(format: str, name: str, tensor: Tensor, want: Sequence[int]) -> None:
    """Raises PackageError if a tensor has not the shape that its config says."""
    if list(tensor.shape) != list(want):
        raise PackageError(f"{format}: {name} is {list(tensor.shape)}, its config says {list(want)}")


def named_within(name: str, part: str) -> bool:
    """Whether a path is, or lies under, a module that is named by a path or a part of one."""
    return f".{part.strip('.')}." in f".{name}."


def _either(widths: Sequence[int]) -> str:
    *most, last = map(str, widths)
    return f"{', '.join(most)} or {last}" if most else last


def _view(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.contiguous().view(dtype)`, also if an axis of size 1 has another stride than view wants."""
    return t.contiguous().flatten().view(dtype).view(*t.shape[:-1], -1)
