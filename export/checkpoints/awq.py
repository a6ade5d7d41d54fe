"""The format of AWQ checkpoints, version `gemm`, as AutoAWQ writes it and vLLM, SGLang and transformers read it.

A linear `[out, in]` is, with `u` the code of 4 bits counted from the lowest one, so that the weight is
`(u - zero) * scale`:

- `qweight` int32 `[in, out / 8]`: u; a word holds 8 neighbouring outputs, from its lowest bits up those at 0, 2, 4, 6,
  1, 3, 5, 7.
- `qzeros` int32 `[groups, out / 8]`: zero points, in the same order.
- `scales` `[groups, out]`, `bias` `[out]`.

A symmetric weight has zero points of 8, and a weight with no other zero points comes back as a symmetric one. Scales
are float16 where that holds them bit for bit and otherwise float32, which qfx reads as they were; other readers cast
them to the model's dtype, an error of at most 2^-11 of the scale in float16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qfx.core.errors import PackageError
from qfx.core.grid import Int
from qfx.core.qtensor import QTensor
from qfx.core.spec import QSpec, Scheme, scheme_label
from qfx.export.checkpoints._format import LinearWeights
from qfx.export.checkpoints._words import (
    HEAD,
    LEAVES,
    check_shape,
    groups_of,
    least_scale,
    named_within,
    pack,
    refusal,
    take,
    unpack,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of 8 neighbours, at each place of a word."""
_PLACES = tuple(ORDER.index(i) for i in range(8))
MIDDLE = 8


class Awq:
    """Weights of 4 bits in groups or rows, the same for all linears, with zero points."""

    name = "awq"

    def refuses(self, layer: LinearWeights) -> str | None:
        """As `Format` says."""
        if reason := refusal(layer.scheme, layer.weight, (4,)):
            return f"{self.name} {reason}"
        if layer.weight.g_idx is not None:
            return (
                f"{self.name} has no g_idx; let gptq take static_groups=True or act_order=False, or use format='gptq'"
            )
        if named_within(layer.name, HEAD):
            return f"{self.name} keeps {HEAD} in float; give it the scheme None"
        return None

    def config(self, layers: Sequence[LinearWeights], floats: Sequence[str]) -> dict[str, Any]:
        """As `Format` says; all groups have one size, since the config has but one."""
        sizes = {layer.weight.spec.block[1]: layer for layer in layers}
        if len(sizes) > 1:
            (_, a), (_, b), *_ = sizes.items()
            raise PackageError(
                f"awq: {a.name} is {scheme_label(a.scheme)} and {b.name} {scheme_label(b.scheme)}, but a checkpoint "
                "has one group size; use one scheme, or format='gptq'"
            )
        return {
            "quant_method": self.name,
            "version": "gemm",
            "bits": 4,
            "group_size": next(iter(sizes), 128),
            "zero_point": True,
            "modules_to_not_convert": list(floats),
        }

    def write(self, layer: LinearWeights) -> dict[str, Tensor]:
        """As `Format` says."""
        q = layer.weight
        # arithmetic of uint8 wraps, which is what signed codes need
        codes = q.codes.view(torch.uint8) + MIDDLE & 15 if q.zero is None else q.codes
        zero = torch.full_like(q.scale, MIDDLE) if q.zero is None else q.zero
        found = {
            "qweight": _pack(codes.T),
            "qzeros": _pack(zero.to(torch.uint8).T),
            "scales": least_scale(q.scale).T.contiguous(),
        }
        return found if layer.bias is None else {**found, "bias": layer.bias.contiguous()}

    def leaves(self, config: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
        """As `Format` says."""
        _group_size(config)
        kept = (HEAD, *(config.get("modules_to_not_convert") or ()))
        return None if any(named_within(name, part) for part in kept) else (*LEAVES, "bias")

    def read(
        self, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> LinearWeights:
        """As `Format` says."""
        size = _group_size(config)
        qweight, qzeros, scales = take(self.name, name, tensors)
        columns, out = qweight.shape[0], qweight.shape[1] * 8
        groups = groups_of(self.name, name, columns, size)
        check_shape(self.name, f"{name}.scales", scales, (groups, out))
        check_shape(self.name, f"{name}.qzeros", qzeros, (groups, out // 8))
        codes, zero = _unpack(qweight).T, _unpack(qzeros).T.to(torch.int32)
        symmetric = bool((zero == MIDDLE).all())
        if symmetric:
            codes = (codes - MIDDLE).view(torch.int8)
        spec = QSpec(Int(4, signed=symmetric), (1, size), symmetric=symmetric)
        weight = QTensor(codes.contiguous(), scales.T.contiguous(), None if symmetric else zero.contiguous(), spec)
        return LinearWeights(name, weight, Scheme(spec), dtype, tensors.get("bias"))


def _pack(values: Tensor) -> Tensor:
    """uint8 `[rows, out]` to int32 `[rows, out / 8]`."""
    return pack(values.unflatten(-1, (-1, 8))[..., ORDER].flatten(-2), 4)


def _unpack(words: Tensor) -> Tensor:
    return unpack(words, 4).unflatten(-1, (-1, 8))[..., _PLACES].flatten(-2)


def _group_size(config: Mapping[str, Any]) -> int:
    """The size of the groups of a config that qfx reads; PackageError if it does not."""
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise PackageError(f"awq: version is {version!r}; qfx reads 'gemm'")
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise PackageError(f"awq: bits is {bits!r}; the format has 4")
    size = config.get("group_size", config.get("q_group_size"))
    if type(size) is not int or not (size > 0 or size == -1):
        raise PackageError(f"awq: group_size is {size!r}; qfx reads positive sizes and -1")
    return size
