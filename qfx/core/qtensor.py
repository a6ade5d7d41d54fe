"""Quantized tensors: `(decode(codes) - zero) * scale`, and the one place that computes scales.

Weights are canonical: `[out, in]`, or `[experts, out, in]`. Scales are `[..., rows, groups]` where rows is `out`, or 1
if the block spans all rows, and groups is the number of column blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import Codebook, Int
from .spec import QSpec

TINY = torch.finfo(torch.float32).tiny


@dataclass
class QTensor:
    """A quantized weight.

    Attributes:
        codes: `[..., out, in]`, dtype `spec.grid.dtype`.
        scale: float32 `[..., rows, groups]`; if the spec quantizes scales, what their codes stand for.
        zero: int32 of the scale's shape, or None if symmetric.
        spec: how it was quantized.
        g_idx: int64 `[in]`, the group of each column if groups are not consecutive (act_order without static groups).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: QSpec
    g_idx: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, `[..., out, in]`; computed in float32, then cast."""
        scale, zero = self.per_column()
        values = self.spec.grid.decode(self.codes)
        if zero is not None:
            values = values - zero
        return (values * scale).to(dtype)

    def per_column(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point broadcastable against the codes."""
        columns = self.codes.shape[-1]
        scale = spread(self.scale, columns, self.g_idx)
        return scale, None if self.zero is None else spread(self.zero, columns, self.g_idx)

    def to(self, device: torch.device | str) -> QTensor:
        """The same tensor on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, scales, and zero points."""
        inner, scales = self.spec.scale, self.scale.numel()
        extra = 0 if self.zero is None else self.zero.numel() * self.spec.grid.bits
        if inner is None:
            extra += 32 * scales
        else:
            extra += 8 * inner.grid.dtype.itemsize * scales + 32 * blocks_of_scales(self.scale.shape, inner).numel()
        return self.spec.grid.bits + extra / max(self.codes.numel(), 1)


def spread(per_group: Tensor, columns: int, g_idx: Tensor | None = None) -> Tensor:
    """Expands `[..., rows, groups]` to one value for each column, `[..., rows, columns]` (1 if there is one group)."""
    if g_idx is not None:
        return per_group.index_select(-1, g_idx)
    groups = per_group.shape[-1]
    return per_group if groups == 1 else per_group.repeat_interleave(columns // groups, dim=-1)


def blocked(w: Tensor, spec: QSpec) -> Tensor:
    """Views `[..., out, in]` as `[..., rows, groups, values]`: the last axis holds what shares a scale."""
    groups = spec.groups(w.shape[-1])
    if spec.block[0] == -1:
        return w.reshape(*w.shape[:-2], w.shape[-2], groups, -1).transpose(-3, -2).flatten(-2).unsqueeze(-3)
    if spec.block[0] != 1:
        raise ValueError(f"spec: blocks of {spec.block[0]} rows are not supported; use 1 or -1")
    return w.reshape(*w.shape[:-1], groups, -1)


def scale_from_range(lo: Tensor, hi: Tensor, spec: QSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover [lo, hi].

    Symmetric: `scale = max(|lo|, |hi|) / reach`, zero None. Asymmetric: the range is widened to hold 0, `scale = (hi -
        lo) /
    (2^b - 1)`, `zero = round(-lo / scale)`. An all-zero block has scale 1, or the least one if the scales are to be
    quantized: it has no say in their range. float32, the shape of `lo`.
    """
    lo, hi = lo.float(), hi.float()
    if spec.symmetric:
        top = torch.maximum(lo.abs(), hi.abs())
        empty = torch.full_like(top, 1 if spec.scale is None else TINY)
        return torch.where(top > 0, _divide(top, spec.grid.reach).clamp_min(TINY), empty), None
    assert isinstance(spec.grid, Int)
    lo, hi = lo.clamp_max(0), hi.clamp_min(0)
    span = hi - lo
    scale = torch.where(span > 0, _divide(span, 2**spec.grid.bits - 1).clamp_min(TINY), torch.ones_like(span))
    zero = (-lo / scale).round().clamp(spec.grid.lo, spec.grid.hi).to(torch.int32)
    return scale, zero


def _divide(x: Tensor, by: float) -> Tensor:
    """A true division on every device: CUDA turns division by a Python number into a product with its reciprocal."""
    return x / torch.full_like(x, by)


def blocks_of_scales(shape: torch.Size, inner: QSpec) -> torch.Size:
    """The shape of the second scales of scales `[..., rows, groups]`: one for each block of `QSpec.scale`."""
    rows, groups = shape[-2:]
    if inner.block[1] == -1:
        return torch.Size((*shape[:-2], 1 if inner.block[0] == -1 else rows))
    return torch.Size((*shape[:-2], -(-rows * groups // inner.block[1])))


def quantize_scale(scale: Tensor, spec: QSpec) -> tuple[Tensor, Tensor]:
    """Codes of a weight's scales, by `spec.scale`, and the second scales: a code times its second scale is the scale.

    A second scale has 16 significant bits, so that the product is exact and what was quantized once is quantized
    again without a change of a bit. No scale becomes zero.

    Args:
        scale: `[..., rows, groups]`, positive.
        spec: the weight's format.

    Returns:
        Codes of the scales' shape, and float32 `[..., blocks]`.
    """
    inner = spec.scale
    assert inner is not None and not isinstance(inner.grid, Codebook)
    flat = scale.float().flatten(-2)
    shape = blocks_of_scales(scale.shape, inner)
    size = flat.shape[-1] // shape[-1] if inner.block[1] == -1 else inner.block[1]
    blocks = F.pad(flat, (0, -flat.shape[-1] % size)).unflatten(-1, (shape[-1], size))
    top = blocks.amax(-1)
    second = scale_from_range(torch.zeros_like(top), top, inner)[0].view(torch.int32)
    second = ((second + 0x80) & -0x100).view(torch.float32)
    codes = inner.grid.encode((blocks / second.unsqueeze(-1)).clamp_min(inner.grid.least))
    return codes.flatten(-2)[..., : flat.shape[-1]].reshape(scale.shape), second


def dequantize_scale(codes: Tensor, second: Tensor, block: int) -> Tensor:
    """float32 scales `[..., rows, groups]` from what `quantize_scale` gives.

    `block` is how many scales share a second one, or -1: those of a row, or all, by how many second ones there are.
    """
    flat = codes.to(torch.float32).flatten(-2)
    size = flat.shape[-1] // second.shape[-1] if block == -1 else block
    if second.shape[-1] != 1:
        second = second.repeat_interleave(size, -1)[..., : flat.shape[-1]]
    return (flat * second).view(codes.shape)


def stored_scale(scale: Tensor, spec: QSpec) -> Tensor:
    """The scales that a weight gets: those given, or the nearest that the codes of its scales stand for."""
    return scale if spec.scale is None else dequantize_scale(*quantize_scale(scale, spec), spec.scale.block[1])


def encode(w: Tensor, scale: Tensor, zero: Tensor | None, spec: QSpec, g_idx: Tensor | None = None) -> QTensor:
    """Rounds a weight to the nearest codes of given scales.

    Args:
        w: `[..., out, in]`.
        scale: `[..., rows, groups]`; quantized first, if the spec says so.
        zero: of the scale's shape, or None.
        spec: the format.
        g_idx: the group of each column, if not consecutive.
    """
    scale = stored_scale(scale, spec)
    x = w.float() / spread(scale, w.shape[-1], g_idx)
    if zero is None:
        return QTensor(spec.grid.encode(x), scale, None, spec, g_idx)
    # round before the zero point is added: adding first would round half-way values by the zero's parity
    return QTensor(spec.grid.encode(x.round() + spread(zero, w.shape[-1], g_idx)), scale, zero, spec, g_idx)


def encode_minmax(w: Tensor, spec: QSpec) -> QTensor:
    """Rounds a weight `[..., out, in]` to the nearest codes of the scales that just cover each block."""
    blocks = blocked(w, spec)
    scale, zero = scale_from_range(blocks.amin(-1), blocks.amax(-1), spec)
    return encode(w, scale, zero, spec)


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor | None, spec: QSpec) -> Tensor:
    """Quantizes and dequantizes with scales that broadcast against x; the result has x's dtype."""
    y = x.float() / scale
    if zero is not None:
        codes = spec.grid.encode(y.round() + zero)
        return ((spec.grid.decode(codes) - zero) * scale).to(x.dtype)
    return (spec.grid.decode(spec.grid.encode(y)) * scale).to(x.dtype)


def dynamic_scale(x: Tensor, spec: QSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of an activation `[..., channels]` from its own values; broadcastable against x."""
    dims: tuple[int, ...]
    if spec.block == (1, -1):
        dims = (-1,)
    elif spec.block == (-1, -1):
        dims = tuple(range(x.dim()))
    else:
        raise ValueError(f"spec: activations in blocks of {spec.block} are not supported; use (1, -1) or (-1, -1)")
    return scale_from_range(x.amin(dims, keepdim=True), x.amax(dims, keepdim=True), spec)
