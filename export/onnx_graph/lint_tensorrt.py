"""What TensorRT does not import, or imports and does not fuse.

Sources: TensorRT's pages on quantized types, on explicit quantization and on the opsets that its parser takes, and
onnx-tensorrt's operator list.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qfx.export.onnx_graph.findings import Finding
from qfx.export.onnx_graph.reading import (
    DQ,
    Q,
    constant,
    dequantized_by,
    dequantized_weight,
    dtype_of,
    integer,
    label,
    nodes,
    numbers,
    operand,
    own,
    readers,
    shape_of,
)

_CODES = ("INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1")
_NOT_IMPORTED = (
    *("DynamicQuantizeLinear", "DynamicQuantizeLSTM", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"),
)
_LAST_OPSET = 25
_INT4_BLOCKS = (64, 128)


def standard_ops(model: ir.Model) -> Iterator[Finding]:
    """All nodes are of the standard, or plugins of TensorRT (domain trt): others split the graph or fail."""
    for node in nodes(model):
        if not own(node.domain, "") and node.domain != "trt":
            yield Finding(label(node), f"{node.domain}::{node.op_type} is no op of TensorRT", "use DequantizeLinear")


def imported_ops(model: ir.Model) -> Iterator[Finding]:
    """No integer products and no scales from run time: the parser has none."""
    for node in nodes(model, *_NOT_IMPORTED):
        fix = "quantize statically, with QuantizeLinear and DequantizeLinear"
        yield Finding(label(node), f"TensorRT does not import {node.op_type}", fix)


def opset(model: ir.Model) -> Iterator[Finding]:
    """TensorRT 11 reads opsets 9 to 25."""
    for domain, version in model.opset_imports.items():
        if own(domain, "") and version > _LAST_OPSET:
            yield Finding(f"opset {version}", f"TensorRT reads opsets up to {_LAST_OPSET}", "export with opset 21")


def code_types(model: ir.Model) -> Iterator[Finding]:
    """Codes are signed: int8, int4, float8 E4M3 or float4 E2M1."""
    for node in nodes(model, Q, DQ):
        dtype = dtype_of(node.outputs[0] if node.op_type == Q else operand(node, 0))
        if dtype is not None and dtype.name not in _CODES:
            yield Finding(label(node), f"its codes are {dtype}", "use symmetric int8, int4 or float8 E4M3")


def symmetric(model: ir.Model) -> Iterator[Finding]:
    """Zero points are absent or zero."""
    for node in nodes(model, Q, DQ):
        zero = operand(node, 2)
        if zero is None:
            continue
        found = numbers(zero)
        if found is None or np.any(found != 0):
            yield Finding(label(node), "its zero point is not the constant zero", "quantize symmetrically")


def build_time_scales(model: ir.Model) -> Iterator[Finding]:
    """Scales are positive numbers when the engine is built; a scale may itself be dequantized."""
    for node in nodes(model, Q, DQ):
        scale = operand(node, 1)
        if dequantized_weight(scale) is not None:
            continue
        found = numbers(scale)
        if found is None:
            yield Finding(label(node), "its scale is computed at run time", "quantize statically")
        elif np.any(~(found > 0)):
            yield Finding(label(node), "a scale is not positive", "clamp scales up to the smallest normal number")


def activation_scale(model: ir.Model) -> Iterator[Finding]:
    """An activation has one scale."""
    for node in nodes(model, Q):
        shape = shape_of(operand(node, 1))
        if constant(operand(node, 0)) is None and shape is not None and (shape not in ((), (1,))):
            wrong = f"it quantizes an activation with scales {list(shape)}"
            yield Finding(label(node), wrong, "use one scale for the whole tensor")


def int4_weights(model: ir.Model) -> Iterator[Finding]:
    """int4 is for stored matrices alone, in blocks of 64 or 128 of a divisible axis, with an even last axis."""
    for node in nodes(model, Q, DQ):
        codes = node.outputs[0] if node.op_type == Q else operand(node, 0)
        if dtype_of(codes) != ir.DataType.INT4:
            continue
        if node.op_type == Q or constant(codes) is None:
            yield Finding(label(node), "it holds an activation in int4", "use int8 or float8 for activations")
            continue
        block, shape = integer(node, "block_size", 0) or 0, shape_of(codes) or ()
        axis = (integer(node, "axis", 1) or 0) % max(len(shape), 1)
        if block not in _INT4_BLOCKS:
            wrong = f"int4 in blocks of {block}" if block else "int4 without blocks"
            yield Finding(label(node), wrong, "use a group size of 64 or 128")
        elif shape and (shape[axis] or 0) % block:
            wrong = f"blocks of {block} do not divide its {shape[axis]} channels"
            yield Finding(label(node), wrong, "use a group size that does, or leave the linear in float")
        if shape and (shape[-1] or 0) % 2:
            yield Finding(label(node), f"its last axis has {shape[-1]} codes", "leave a linear of odd size in float")


def adjacent(model: ir.Model) -> Iterator[Finding]:
    """What is dequantized goes into MatMul or Gemm, right away, and not as a bias."""
    for node in nodes(model, DQ):
        out = node.outputs[0]
        for reader, index in readers(out):
            scale_of_scale = reader.op_type == DQ and index == 1
            if not (reader.op_type in ("MatMul", "Gemm") and index < 2) and not scale_of_scale:
                wrong = f"its output goes into {reader.op_type} {label(reader)}"
                yield Finding(label(node), wrong, "let nothing but MatMul or Gemm read it, as an operand")
        if out.is_graph_output():
            yield Finding(label(node), "its output leaves the graph", "let nothing but MatMul or Gemm read it")


def both_operands(model: ir.Model) -> Iterator[Finding]:
    """A product of a quantized activation has two quantized operands."""
    for node in nodes(model, "MatMul", "Gemm"):
        for index in (0, 1):
            this, other = dequantized_by(operand(node, index)), operand(node, 1 - index)
            if this is not None and constant(operand(this, 0)) is None and dequantized_by(other) is None:
                wrong = f"one operand comes from {label(this)}, the other is float"
                yield Finding(label(node), wrong, "quantize both, or none")


def float_islands(model: ir.Model) -> Iterator[Finding]:
    """All products have one type: strongly typed engines run float32 islands as float32.

    Products over one element are no products of a model's weights, but outer products, such as the angles of rotary
    positions, which models compute in float32 on purpose.
    """
    products = list(nodes(model, "MatMul", "Gemm"))
    types = {dtype_of(node.outputs[0]) for node in products}
    half = types & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    for node in products if half else ():
        if dtype_of(node.outputs[0]) == ir.DataType.FLOAT and (shape_of(operand(node, 0)) or (0,))[-1] != 1:
            wrong = f"it is float32 in a graph of {' and '.join(sorted(str(t) for t in half))}"
            yield Finding(label(node), wrong, "store its weights and scales in the graph's type")


RULES = [
    standard_ops,
    imported_ops,
    opset,
    code_types,
    symmetric,
    build_time_scales,
    activation_scale,
    int4_weights,
    adjacent,
    both_operands,
    float_islands,
]
