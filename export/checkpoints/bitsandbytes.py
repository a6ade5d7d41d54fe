"""The format of bitsandbytes, which transformers, vLLM and PEFT load: NF4, FP4 and LLM.int8.

Tables of 16 values (`bitsandbytes.functional.QuantState`), for a linear `[out, in]` in blocks of n weights:

- `weight` uint8 `[out * in / 2, 1]`: the codes of `[out, in]` in the order of memory, the even one in the high nibble.
- `weight.absmax` float32 `[out * in / n]`: the scales; `weight.quant_map` float32 `[16]`: the table.
- `weight.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON as uint8, with block size, dtype and shape.
- Nested, `weight.absmax` is uint8, and a scale is `nested_quant_map[absmax] * nested_absmax + nested_offset` with one
  `weight.nested_absmax` for 256 scales. The map is in the file: the codes of qfx' quantized scales have a map of their
  own values and no offset, which loses no bit. What bitsandbytes itself has nested comes back with plain scales.

LLM.int8 (`Linear8bitLt`): `weight` int8 `[out, in]`, `SCB` float32 `[out]`, 127 times the scale, and `weight_format` 0.
Its readers quantize each row of inputs to 8 bits, which is W8A8; a threshold of 0 keeps no columns of them in float.
The nearest SCB / 127 may be the neighbour of a scale, an error of 2^-23: all else comes back bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qfx.core.errors import PackageError
from qfx.core.grid import CODEBOOKS, E4M3, E5M2, Codebook, Float, Grid, Int
from qfx.core.qtensor import QTensor, dequantize_scale, quantize_scale, stored_scale
from qfx.core.spec import QSpec, Scheme, scheme_label
from qfx.export.checkpoints._format import LinearWeights
from qfx.export.checkpoints._words import HEAD, named_within

TABLES = {"nf4": "nf4", "fp4": "fp4_bnb"}
"""The name of a table in qfx, by that in bitsandbytes."""
KINDS = {table: kind for kind, table in TABLES.items()}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256
"""The only block of scales for which bitsandbytes has kernels."""
STATE = "weight.quant_state.bitsandbytes__"
LEAVES = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
INT8 = Scheme(QSpec(Int(8, narrow=True)), QSpec(Int(8, narrow=True), dynamic=True))


class BitsAndBytes:
    """NF4 or FP4 in blocks of 32 to 4096 weights, with nested scales or without; or W8A8 as LLM.int8."""

    name = "bitsandbytes"

    def refuses(self, layer: LinearWeights) -> str | None:
        """As `Format` says."""
        scheme, spec = layer.scheme, layer.weight.spec
        if isinstance(spec.grid, Int) and spec.grid.bits == 8:
            near = None if scheme == INT8 else scheme_label(INT8)
        else:
            near = _nearest(scheme)
        if near is not None:
            return f"{self.name} has no {scheme_label(scheme)}; nearest: {near}"
        if spec.scale is not None and not torch.equal(stored_scale(layer.weight.scale, spec), layer.weight.scale):
            return f"{self.name} has no scales that are not on the grid of their own spec; round them first"
        return None

    def config(self, layers: Sequence[LinearWeights], floats: Sequence[str]) -> dict[str, Any]:
        """As `Format` says; all linears are NF4, or all FP4, or all W8A8, since the config has but one kind."""
        kinds = {_kind(layer.weight.spec): layer for layer in layers}
        if len(kinds) > 1:
            a, b, *_ = (f"{layer.name} is {scheme_label(layer.scheme)}" for layer in kinds.values())
            raise PackageError(f"bitsandbytes: {a} and {b}, but a checkpoint has one kind of weights; use one scheme")
        kind = next(iter(kinds), "nf4")
        dtypes = [str(layer.dtype).removeprefix("torch.") for layer in layers] or ["float32"]
        return {
            "quant_method": self.name,
            "load_in_4bit": kind in TABLES,
            "load_in_8bit": kind not in TABLES,
            "bnb_4bit_quant_type": kind if kind in TABLES else "fp4",
            "bnb_4bit_use_double_quant": any(layer.weight.spec.scale is not None for layer in layers),
            "bnb_4bit_compute_dtype": max(dict.fromkeys(dtypes), key=dtypes.count),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0 if kind in TABLES else 0.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_skip_modules": list(floats),
        }

    def write(self, layer: LinearWeights) -> dict[str, Tensor]:
        """As `Format` says."""
        q = layer.weight
        kind = _kind(q.spec)
        found = _write_table(layer, kind) if kind in TABLES else _write_int8(q)
        if layer.bias is not None:
            found["bias"] = layer.bias
        return {leaf: t.contiguous() for leaf, t in found.items()}

    def leaves(self, config: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
        """As `Format` says."""
        kept = config.get("llm_int8_skip_modules")
        if any(named_within(name, part) or name.endswith(part) for part in ([HEAD] if kept is None else kept)):
            return None
        if _in_8bit(config):
            return ("weight", "SCB", "weight_format", "bias")
        return (*LEAVES, *(STATE + kind for kind in TABLES), "bias")

    def read(
        self, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> LinearWeights:
        """As `Format` says."""
        read = _read_int8 if _in_8bit(config) else _read_table
        weight = read(name, tensors)
        scheme = INT8 if _in_8bit(config) else Scheme(weight.spec)
        return LinearWeights(name, weight, scheme, dtype, tensors.get("bias"))


def _nearest(scheme: Scheme) -> str | None:
    """None for a table of 16 values that bitsandbytes has, otherwise the name of the nearest scheme."""
    spec = scheme.weight
    known = isinstance(spec.grid, Codebook) and spec.grid.name in KINDS
    grid = spec.grid if known else Codebook("fp4_bnb" if spec.grid == Codebook("e2m1") else "nf4")
    size = min(BLOCKS, key=lambda b: abs(b - spec.block[1])) if spec.block[1] != -1 else 64
    scale = spec.scale
    if scale is not None and (scale.grid.bits != 8 or scale.block != (1, NESTED)):
        inner = scale.grid if scale.grid.bits == 8 else Int(8, signed=False)
        scale = QSpec(inner, (1, NESTED), symmetric=scale.symmetric)
    near = Scheme(QSpec(grid, (1, size), scale=scale))
    return None if near == scheme else scheme_label(near)


def _kind(spec: QSpec) -> str:
    return KINDS[spec.grid.name] if isinstance(spec.grid, Codebook) else "int8"


def _write_table(layer: LinearWeights, kind: str) -> dict[str, Tensor]:
    q, spec = layer.weight, layer.weight.spec
    flat = q.codes.reshape(-1, 2)
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": spec.block[1],
        "dtype": str(layer.dtype).removeprefix("torch."),
        "shape": list(q.codes.shape),
    }
    found = {
        "weight": (flat[:, 0] << 4 | flat[:, 1]).unsqueeze(1),
        "weight.absmax": q.scale.flatten(),
        "weight.quant_map": torch.tensor(CODEBOOKS[TABLES[kind]], dtype=torch.float32),
    }
    if spec.scale is not None:
        codes, second = quantize_scale(q.scale, spec)
        found["weight.absmax"] = codes.view(torch.uint8).flatten()
        found["weight.nested_absmax"] = second.flatten()
        found["weight.nested_quant_map"] = _own_map(spec.scale.grid)
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": 0.0}
    found[STATE + kind] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return found


def _write_int8(q: QTensor) -> dict[str, Tensor]:
    row_major = torch.zeros((), dtype=torch.uint8)
    return {"weight": q.codes, "SCB": (q.scale * 127).flatten(), "weight_format": row_major}


def _own_map(grid: Grid) -> Tensor:
    """The values of the codes 0 to 255 of a grid for scales, float32; 0 for those that are no finite number."""
    values = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(grid.dtype).to(torch.float32)
    return values.where(values.isfinite(), 0)


def _in_8bit(config: Mapping[str, Any]) -> bool:
    """Whether a config is of LLM.int8 and not of tables; PackageError if qfx does not compute what it says."""
    if not config.get("load_in_8bit"):
        if not config.get("load_in_4bit"):
            raise PackageError("bitsandbytes: the config says neither load_in_4bit nor load_in_8bit; it is incomplete")
        return False
    if config.get("llm_int8_has_fp16_weight"):
        raise PackageError("bitsandbytes: llm_int8_has_fp16_weight keeps weights of 16 bits; load it as a float model")
    if threshold := config.get("llm_int8_threshold", 6.0):
        raise PackageError(
            f"bitsandbytes: llm_int8_threshold {threshold} keeps columns of inputs in float, which qfx has not; "
            "set it to 0.0 in config.json to compute all of them in int8"
        )
    return True


def _get(name: str, tensors: Mapping[str, Tensor], leaf: str) -> Tensor:
    if leaf not in tensors:
        raise PackageError(f"bitsandbytes: {name} lacks {leaf}; the checkpoint is incomplete, or keeps it in float")
    return tensors[leaf]


def _read_int8(name: str, tensors: Mapping[str, Tensor]) -> QTensor:
    codes, scb = _get(name, tensors, "weight"), _get(name, tensors, "SCB").to(torch.float32).flatten()
    if codes.dtype != torch.int8 or codes.dim() != 2 or len(scb) != len(codes):
        raise PackageError(f"bitsandbytes: {name}.weight is {codes.dtype} {list(codes.shape)} with {len(scb)} scales")
    if "weight_format" in tensors and int(tensors["weight_format"]) != 0:
        raise PackageError(f"bitsandbytes: {name} is stored for one kind of GPU (weight_format); save it row-major")
    by = torch.full_like(scb, 127)  # a true division on every device
    return QTensor(codes, (scb / by).unsqueeze(1), None, INT8.weight)


def _read_table(name: str, tensors: Mapping[str, Tensor]) -> QTensor:
    kind = next((kind for kind in TABLES if STATE + kind in tensors), None)
    if kind is None:
        raise PackageError(f"bitsandbytes: {name} lacks {STATE}nf4 or fp4; it is incomplete, or stays in float")
    try:
        state = json.loads(bytes(tensors[STATE + kind].tolist()))
        (out, columns), size = state["shape"], int(state["blocksize"])
    except (ValueError, TypeError, KeyError) as e:
        raise PackageError(f"bitsandbytes: {name} has a quant_state that is none ({e}); save it again") from None
    if size < 1 or columns % size:
        raise PackageError(f"bitsandbytes: {name} has blocks of {size} weights across rows of {columns}; use a divisor")
    packed = _get(name, tensors, "weight").contiguous().flatten().view(torch.uint8)  # bnb_4bit_quant_storage
    if len(packed) * 2 != out * columns:
        raise PackageError(f"bitsandbytes: {name}.weight has {len(packed)} bytes for {out} x {columns} weights")
    table = torch.tensor(CODEBOOKS[TABLES[kind]], dtype=torch.float32)
    if not torch.equal(_get(name, tensors, "weight.quant_map").cpu().float(), table):
        raise PackageError(f"bitsandbytes: {name} has another table than {kind}; qfx computes the usual one")
    codes = torch.stack((packed >> 4, packed & 15), 1).view(out, columns)
    scale, inner = _read_scale(name, tensors, state, (out, columns // size))
    return QTensor(codes, scale, None, QSpec(Codebook(TABLES[kind]), (1, size), scale=inner))


def _read_scale(
    name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[Tensor, QSpec | None]:
    """Scales `[out, groups]`, and how they are quantized if qfx would quantize them so."""
    absmax = _get(name, tensors, "weight.absmax")
    if absmax.numel() != shape[0] * shape[1]:
        raise PackageError(f"bitsandbytes: {name}.weight.absmax has {absmax.numel()} values, not {list(shape)}")
    if "weight.nested_absmax" not in tensors:
        return absmax.to(torch.float32).reshape(shape), None
    second, values = tensors["weight.nested_absmax"].float(), _get(name, tensors, "weight.nested_quant_map").float()
    try:
        block, offset = int(state["nested_blocksize"]), torch.tensor(float(state["nested_offset"]))
    except (ValueError, TypeError, KeyError) as e:
        raise PackageError(f"bitsandbytes: {name} has nested scales without {e} in its quant_state") from None
    if absmax.dtype != torch.uint8 or len(values) != 256 or block < 1 or len(second) != -(-absmax.numel() // block):
        raise PackageError(f"bitsandbytes: {name} has nested scales whose tensors do not fit each other")
    for grid in (Int(8, signed=False), E4M3, E5M2):
        if block == NESTED and offset == 0 and torch.equal(values.cpu(), _own_map(grid)):
            inner = QSpec(grid, (1, NESTED), symmetric=isinstance(grid, Float))
            scale = dequantize_scale(absmax.view(grid.dtype).reshape(shape), second, NESTED)
            if torch.equal(stored_scale(scale, QSpec(Codebook("nf4"), scale=inner)), scale):
                return scale, inner
    # two roundings, as bitsandbytes does it: the product, then the sum
    products = values[absmax.int()] * second.repeat_interleave(block)[: absmax.numel()]
    return (products + offset.to(products.device)).reshape(shape), None
