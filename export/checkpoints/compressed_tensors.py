"""The format of compressed-tensors, which vLLM and transformers load.

Layouts of a linear `[out, in]` of `b` bits, with `c` the signed code, `s` its scale and `z` its zero point, so that
the weight is `(c - z) * s`:

- `pack-quantized`: `weight_packed` int32 `[out, ceil(in * b / 32)]`, the values `c + 2^(b-1)` from the lowest bits up;
  `weight_shape` int64 `[2]`; `weight_zero_point` int32 `[ceil(out * b / 32), groups]`, packed down the rows.
- `int-quantized`: `weight` int8, `weight_zero_point` int8 of the scale's shape.
- `float-quantized`, `naive-quantized`: `weight` float8_e4m3fn (the latter int8, too).

`weight_scale` is `[out, groups]`, or `[1]` for a tensor; `input_scale` and `input_zero_point` are `[1]`. Reference:
`compressed_tensors` 0.20, `compressors/pack_quantized` and `compressors/naive_quantized`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.errors import PackageError
from qfx.core.grid import Int
from qfx.core.qtensor import QTensor
from qfx.core.spec import QSpec, Scheme
from qfx.export.checkpoints._ct_config import LINEAR, MIXED, PACKED, Group, find_group, group_of, refusal
from qfx.export.checkpoints._format import LinearWeights

VERSION = "0.20.0"
"""The release of compressed-tensors whose layout this is."""


class CompressedTensors:
    """int8, float8 and packed integers of 2, 4 and 8 bits, each group of layers with a scheme of its own."""

    name = "compressed-tensors"

    def refuses(self, layer: LinearWeights) -> str | None:
        """As `Format` says."""
        reason = refusal(layer.scheme, layer.weight.g_idx is not None)
        return reason and f"{self.name} {reason}"

    def config(self, layers: Sequence[LinearWeights], floats: Sequence[str]) -> dict[str, Any]:
        """As `Format` says: one group for every scheme; linears that stay in float are ignored by name."""
        named: dict[str, list[str]] = {}
        for layer in layers:
            named.setdefault(json.dumps(group_of(layer.scheme)), []).append(layer.name)
        groups: list[dict[str, Any]] = [json.loads(text) for text in named]
        # by class while one scheme is for all: engines that join linears have other names for them
        targets = [[LINEAR]] if len(groups) == 1 else list(named.values())
        formats = {group["format"] for group in groups}
        return {
            "quant_method": self.name,
            "version": VERSION,
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": {"targets": t, **g} for i, (t, g) in enumerate(zip(targets, groups, strict=True))
            },
            "ignore": list(floats),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def write(self, layer: LinearWeights) -> dict[str, Tensor]:
        """As `Format` says. Scales have the layer's dtype if that holds every one of them, otherwise float32."""
        q, spec = layer.weight, layer.weight.spec
        whole = spec.block == (-1, -1)
        found: dict[str, Tensor] = {}
        if group_of(layer.scheme)["format"] == PACKED:
            found["weight_packed"] = pack(_unsigned(q.codes, spec), spec.grid.bits)
            found["weight_shape"] = torch.tensor(q.codes.shape, dtype=torch.int64)
        else:
            found["weight"] = _signed(q.codes, spec) if isinstance(spec.grid, Int) else q.codes
        scale = q.scale.reshape(1) if whole else q.scale
        found["weight_scale"] = _least_dtype(scale, layer.dtype)
        if q.zero is not None:
            if "weight_packed" in found and not whole:
                zero = pack(q.zero.to(torch.uint8).T.contiguous(), spec.grid.bits).T
            else:
                zero = (q.zero - 2 ** (spec.grid.bits - 1)).to(torch.int8).reshape(scale.shape)
            found["weight_zero_point"] = zero
        if layer.input_scale is not None:
            found["input_scale"] = _least_dtype(layer.input_scale.reshape(1), layer.dtype)
        if layer.input_zero is not None:
            found["input_zero_point"] = (layer.input_zero.reshape(1) - 128).to(torch.int8)
        if layer.bias is not None:
            found["bias"] = layer.bias
        return {leaf: t.contiguous() for leaf, t in found.items()}

    def leaves(self, config: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
        """As `Format` says."""
        group = find_group(config, name)
        if group is None:
            return None
        w, x = group.scheme.weight, group.scheme.input
        held: tuple[str, ...] = ("weight_packed", "weight_shape") if group.layout == PACKED else ("weight",)
        held += ("weight_scale",)
        held += () if w.symmetric else ("weight_zero_point",)
        held += ("weight_g_idx",) if group.g_idx else ()
        if x is not None and not x.dynamic:
            held += ("input_scale",) if x.symmetric else ("input_scale", "input_zero_point")
        return (*held, "bias")

    def read(
        self, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> LinearWeights:
        """As `Format` says."""
        group, leaves = find_group(config, name), self.leaves(config, name)
        if group is None or leaves is None:
            raise PackageError(f"{name} is not quantized by quantization_config; read it as it is")
        if lacking := sorted(set(leaves) - {"bias", "weight_g_idx"} - set(tensors)):
            raise PackageError(f"{name} lacks {lacking[0]}, which its scheme has; the checkpoint is incomplete")
        weight = _weight(name, group, tensors)
        zero = tensors.get("input_zero_point")
        return LinearWeights(
            name=name,
            weight=weight,
            scheme=Scheme(weight.spec, group.scheme.input),
            dtype=dtype,
            bias=tensors.get("bias"),
            input_scale=_scalar(name, tensors.get("input_scale"), torch.float32),
            input_zero=None if zero is None else _scalar(name, zero.to(torch.int32) + 128, torch.int32),
        )


def pack(values: Tensor, bits: int) -> Tensor:
    """Values of 2, 4 or 8 bits, uint8 `[rows, n]`, in words of 32 bits, int32 `[rows, ceil(n * bits / 32)]`."""
    padded = F.pad(values, (0, -values.shape[1] % (32 // bits)))
    parts = padded.unflatten(1, (-1, 8 // bits))
    packed = parts[..., 0].clone()
    for i in range(1, parts.shape[-1]):
        packed |= parts[..., i] << (i * bits)
    return packed.contiguous().view(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 `[rows, count]`."""
    packed = words.contiguous().view(torch.uint8)
    parts = [(packed >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.stack(parts, -1).flatten(1)[:, :count].contiguous()


def _unsigned(codes: Tensor, spec: QSpec) -> Tensor:
    """Codes counted from the lowest one; arithmetic of uint8 wraps, which is what signed codes need."""
    return codes.view(torch.uint8) + 2 ** (spec.grid.bits - 1) if spec.symmetric else codes


def _signed(codes: Tensor, spec: QSpec) -> Tensor:
    return codes if spec.symmetric else (codes - 2 ** (spec.grid.bits - 1)).view(torch.int8)


def _least_dtype(scale: Tensor, dtype: torch.dtype) -> Tensor:
    small = scale.to(dtype)
    return small if torch.equal(small.float(), scale) else scale


def _weight(name: str, group: Group, tensors: Mapping[str, Tensor]) -> QTensor:
    spec = group.scheme.weight
    bits, whole = spec.grid.bits, spec.block == (-1, -1)
    if group.layout == PACKED:
        out, columns = _shape(name, bits, tensors)
        codes = unpack(tensors["weight_packed"], bits, columns)
        codes = (codes - 2 ** (bits - 1)).view(torch.int8) if spec.symmetric else codes
    else:
        codes = tensors["weight"]
        want = torch.int8 if isinstance(spec.grid, Int) else spec.grid.dtype
        if codes.dtype != want or codes.dim() != 2:
            raise PackageError(f"{name}.weight is {codes.dtype} {list(codes.shape)}; its scheme has {want} [out, in]")
        out, columns = codes.shape
        if not spec.symmetric:
            codes = codes.view(torch.uint8) + 2 ** (bits - 1)
    if bits == 8 and spec.symmetric and isinstance(spec.grid, Int) and not bool((codes == -128).any()):
        spec = replace(spec, grid=Int(8, narrow=True))
    try:
        groups = spec.groups(columns)
    except ValueError as e:
        raise PackageError(f"{name}: {e}; the checkpoint and its config do not fit") from None
    shape = (1, 1) if whole else (out, groups)
    scale = tensors["weight_scale"]
    if scale.numel() != shape[0] * shape[1]:
        raise PackageError(f"{name}.weight_scale is {list(scale.shape)}; its scheme has {list(shape)}")
    zero = None
    if not spec.symmetric:
        zero = tensors["weight_zero_point"]
        if group.layout == PACKED and not whole:
            if list(zero.shape) != [-(-out * bits // 32), groups] or zero.dtype != torch.int32:
                raise PackageError(
                    f"{name}.weight_zero_point is {zero.dtype} {list(zero.shape)}, not packed down the rows"
                )
            zero = unpack(zero.T, bits, out).T.to(torch.int32)
        else:
            zero = zero.to(torch.int32).reshape(shape) + 2 ** (bits - 1)
        zero = zero.contiguous()
    return QTensor(codes.contiguous(), scale.float().reshape(shape), zero, spec, _g_idx(name, columns, groups, tensors))


def _shape(name: str, bits: int, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    packed, said = tensors["weight_packed"], tensors["weight_shape"].flatten().tolist()
    want = [said[0], -(-said[1] * bits // 32)] if len(said) == 2 else []
    if packed.dtype != torch.int32 or list(packed.shape) != want:
        raise PackageError(f"{name}.weight_packed is {packed.dtype} {list(packed.shape)} for a weight_shape of {said}")
    return int(said[0]), int(said[1])


def _g_idx(name: str, columns: int, groups: int, tensors: Mapping[str, Tensor]) -> Tensor | None:
    g_idx = tensors.get("weight_g_idx")
    if g_idx is None or bool((g_idx == -1).all()):  # what calibration did not set
        return None
    if list(g_idx.shape) != [columns] or not bool(((g_idx >= 0) & (g_idx < groups)).all()):
        raise PackageError(f"{name}.weight_g_idx has other groups than the {groups} of its {columns} columns")
    return g_idx.to(torch.int64)


def _scalar(name: str, value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    if value.numel() != 1:
        raise PackageError(f"{name} has an input scale or zero point of {list(value.shape)}; its scheme has one value")
    return value.reshape(()).to(dtype)
