"""What must hold for ONNX Runtime's own products of quantized weights: attributes, types and shapes.

Source: the schemas in `onnxruntime.capi.onnxruntime_pybind11_state.get_all_operator_schema()`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qfx.export.onnx_graph.findings import Finding
from qfx.export.onnx_graph.reading import (
    MICROSOFT,
    constant,
    dtype_of,
    integer,
    label,
    nodes,
    numbers,
    operand,
    shape_of,
)

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FIX = "write it as the schema of its op says"


def _input(
    node: ir.Node, index: int, what: str, types: tuple[ir.DataType | None, ...], *shapes: tuple[int, ...]
) -> Iterator[Finding]:
    """An input has one of the types and one of the shapes; unknown types, shapes and absent inputs pass."""
    value = operand(node, index)
    if value is None:
        return
    dtype, shape = dtype_of(value), shape_of(value)
    if dtype is not None and None not in types and dtype not in types:
        names = " or ".join(str(t) for t in types)
        yield Finding(label(node), f"its {what} is {dtype}, not {names}", _FIX)
    if shape is not None and shape not in shapes:
        wanted = " or ".join(str(list(s)) for s in shapes)
        yield Finding(label(node), f"its {what} is {list(shape)}, not {wanted}", _FIX)


def _columns(node: ir.Node, wanted: int) -> Iterator[Finding]:
    """The last axis of the activation is what the weight reads."""
    shape = shape_of(operand(node, 0))
    if shape and shape[-1] not in (None, wanted):
        yield Finding(label(node), f"its input has {shape[-1]} columns, its weight reads {wanted}", _FIX)


def _sizes(node: ir.Node) -> tuple[int, int, int]:
    return tuple(integer(node, name, 0) or 0 for name in ("K", "N", "block_size"))  # type: ignore[return-value]


def _attributes(node: ir.Node) -> Iterator[Finding]:
    k, n, block = _sizes(node)
    if k < 1 or n < 1:
        yield Finding(label(node), f"K is {k} and N is {n}", "set them to the linear's input and output channels")
    if block < 16 or block & (block - 1):
        yield Finding(label(node), f"block_size is {block}", "use a power of two, 16 or more")


def nbits_attributes(model: ir.Model) -> Iterator[Finding]:
    """MatMulNBits: K and N are positive, bits is 2, 4 or 8, block_size a power of two from 16."""
    for node in nodes(model, "MatMulNBits", domain=MICROSOFT):
        yield from _attributes(node)
        if (bits := integer(node, "bits", 4)) not in (2, 4, 8):
            yield Finding(label(node), f"bits is {bits}", "use 2, 4 or 8")


def nbits_shapes(model: ir.Model) -> Iterator[Finding]:
    """MatMulNBits: codes [N, K/block, block·bits/8], scales [N, K/block], zero points packed likewise or as floats."""
    for node in nodes(model, "MatMulNBits", domain=MICROSOFT):
        (k, n, block), bits = _sizes(node), integer(node, "bits", 4) or 4
        if any(_attributes(node)) or bits not in (2, 4, 8):
            continue  # nothing to compute shapes from
        blocks, float_type = -(-k // block), dtype_of(operand(node, 0))
        yield from _columns(node, k)
        yield from _input(node, 1, "B", (ir.DataType.UINT8,), (n, blocks, block * bits // 8))
        yield from _input(node, 2, "scales", (float_type,), (n, blocks))
        packed = dtype_of(operand(node, 3)) == ir.DataType.UINT8
        zeros = (n, -(-blocks * bits // 8)) if packed else (n, blocks)
        yield from _input(node, 3, "zero_points", (ir.DataType.UINT8, float_type), zeros)
        yield from _input(node, 5, "bias", (float_type,), (n,))


def nbits_zero_range(model: ir.Model) -> Iterator[Finding]:
    """MatMulNBits: zero points that are stored as floats are codes, 0 to 2^bits - 1."""
    for node in nodes(model, "MatMulNBits", domain=MICROSOFT):
        tensor, bits = constant(operand(node, 3)), integer(node, "bits", 4) or 4
        if tensor is None or not tensor.dtype.is_floating_point():
            continue
        found, top = numbers(operand(node, 3)), 2**bits - 1
        if found is not None and found.size and not (found.min() >= 0 and found.max() <= top):
            wrong = f"its zero points lie in {found.min():g}..{found.max():g}"
            yield Finding(label(node), wrong, f"use zero points in 0..{top}")


def bnb4(model: ir.Model) -> Iterator[Finding]:
    """MatMulBnb4: flat codes of (N·K + 1)/2 bytes, one finite absmax, 0 or more, for each block of N·K values."""
    for node in nodes(model, "MatMulBnb4", domain=MICROSOFT):
        if any(wrong := list(_attributes(node))):
            yield from wrong
            continue
        k, n, block = _sizes(node)
        if (kind := integer(node, "quant_type")) not in (0, 1):
            yield Finding(label(node), f"quant_type is {kind}", "use 0 for FP4, 1 for NF4")
        yield from _columns(node, k if integer(node, "transB", 1) else n)
        yield from _input(node, 1, "B", (ir.DataType.UINT8,), ((n * k + 1) // 2,))
        yield from _input(node, 2, "absmax", (dtype_of(operand(node, 0)),), (-(-n * k // block),))
        found = numbers(operand(node, 2))
        if found is not None and not (np.isfinite(found).all() and (found >= 0).all()):
            yield Finding(label(node), "an absmax is negative or not finite", "quantize the weight again")


def fp8_weight(model: ir.Model) -> Iterator[Finding]:
    """MatMulBlockQuantizedFp8Weight: half precision input, E4M3 codes [N, K], float32 scales [N, K/block]."""
    for node in nodes(model, "MatMulBlockQuantizedFp8Weight", domain=MICROSOFT):
        block, shape = integer(node, "block_size", 128) or 0, shape_of(operand(node, 1))
        if shape is None or len(shape) != 2 or block < 1:
            yield Finding(label(node), f"its weight is {shape} in blocks of {block}", _FIX)
            continue
        n, k = (size or 0 for size in shape)
        yield from _half(node, k)
        yield from _input(node, 1, "B", (ir.DataType.FLOAT8E4M3FN,), (n, k))
        yield from _input(node, 2, "b_scale", (ir.DataType.FLOAT,), (n, -(-k // block)))
        yield from _input(node, 3, "a_scale", (ir.DataType.FLOAT,), (), (1,))
        yield from _input(node, 4, "bias", (dtype_of(operand(node, 0)),), (n,))


def fp4_weight(model: ir.Model) -> Iterator[Finding]:
    """MatMulBlockQuantizedFp4Weight: half precision input, bytes of two codes [N, K/2], E4M3 bytes [N, K/block]."""
    for node in nodes(model, "MatMulBlockQuantizedFp4Weight", domain=MICROSOFT):
        block, shape = integer(node, "block_size", 16) or 0, shape_of(operand(node, 1))
        if shape is None or len(shape) != 2 or block < 1:
            yield Finding(label(node), f"its weight is {shape} in blocks of {block}", _FIX)
            continue
        n, k = shape[0] or 0, 2 * (shape[1] or 0)
        yield from _half(node, k)
        yield from _input(node, 1, "B", (ir.DataType.UINT8,), (n, k // 2))
        yield from _input(node, 2, "weight_scale", (ir.DataType.UINT8,), (n, -(-k // block)))
        yield from _input(node, 3, "weight_scale_2", (ir.DataType.FLOAT,), (), (1,))
        yield from _input(node, 5, "bias", (dtype_of(operand(node, 0)),), (n,))


def _half(node: ir.Node, columns: int) -> Iterator[Finding]:
    yield from _columns(node, columns)
    dtype = dtype_of(operand(node, 0))
    if dtype is not None and dtype not in _HALF:
        yield Finding(label(node), f"its input is {dtype}", "export the model in float16 or bfloat16")
