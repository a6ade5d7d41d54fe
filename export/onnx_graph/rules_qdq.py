"""What must hold for QuantizeLinear, DequantizeLinear and MatMulInteger, whatever runs them.

Sources: the standard's operator pages, opsets 10 to 25. The standard lets the last block of an axis be shorter; no
runtime's matrix product takes that, and a group of a qfx weight is never cut.
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
    dequantized_weight,
    dtype_of,
    integer,
    label,
    linears,
    nodes,
    numbers,
    operand,
    readers,
    scales,
    shape_of,
)

# the smallest numbers that are not subnormal: below, GPUs may read zero
_TINY = {ir.DataType.FLOAT16: 2.0**-14, ir.DataType.FLOAT: 2.0**-126, ir.DataType.BFLOAT16: 2.0**-126}
_ALWAYS_ZERO = frozenset({"INT32", "FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ", "FLOAT4E2M1"})


def _axis(node: ir.Node, rank: int) -> int:
    axis = integer(node, "axis", 1) or 0
    return axis + rank if axis < 0 else axis


def _text(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def scale_shape(model: ir.Model) -> Iterator[Finding]:
    """A scale is one number, or one per index of the axis, or (with block_size) one per block along the axis."""
    for node in nodes(model, Q, DQ):
        data, scale, block = shape_of(operand(node, 0)), shape_of(operand(node, 1)), integer(node, "block_size", 0)
        if scale is None or (not block and scale in ((), (1,))):
            continue
        if block and len(scale) < 2 and (data is None or len(data) > 1):
            wrong = f"its scale {_text(scale)} has no blocks, and block_size is {block}"
            yield Finding(label(node), wrong, "give the scale the input's rank, or leave block_size out")
            continue
        if data is None:
            continue
        axis = _axis(node, len(data))
        if axis not in range(len(data)):
            yield Finding(label(node), f"axis {axis} is none of its input {_text(data)}", "name an axis of the input")
            continue
        size = data[axis]
        if block:
            blocks = None if size is None else -(-size // block)
            wanted: tuple[int | None, ...] = (*data[:axis], blocks, *data[axis + 1 :])
        else:
            wanted = (size,)
        if len(scale) != len(wanted) or any(a != b for a, b in zip(scale, wanted, strict=True) if b is not None):
            how = f"in blocks of {block} along axis {axis}" if block else f"along axis {axis}"
            wrong = f"its scale is {_text(scale)}, and an input {_text(data)} {how} has {_text(wanted)}"
            yield Finding(label(node), wrong, "correct the scale, or axis and block_size")


def scale_axis(model: ir.Model) -> Iterator[Finding]:
    """A linear's scales vary with the output channel, and blocks run along the summed axis."""
    for linear, node in linears(model):
        data, scale = shape_of(operand(node, 0)), shape_of(operand(node, 1))
        if data is None or len(data) != 2 or scale in (None, (), (1,)):
            continue
        summed = 1 if linear.op_type == "Gemm" and integer(linear, "transB", 0) else 0
        block = integer(node, "block_size", 0)
        wanted = summed if block else 1 - summed
        if _axis(node, 2) != wanted:
            what = "its blocks do not run along" if block else "its scales vary along"
            yield Finding(
                label(node), f"{what} the axis that {label(linear)} sums over", f"set axis to {wanted} and store so"
            )


def block_divides(model: ir.Model) -> Iterator[Finding]:
    """The blocks of an axis are all whole."""
    for node in nodes(model, Q, DQ):
        data, block = shape_of(operand(node, 0)), integer(node, "block_size", 0) or 0
        axis = _axis(node, len(data)) if data else 0
        if block < 0:
            yield Finding(label(node), f"block_size is {block}", "use a positive size, or leave it out")
        elif block and data and axis < len(data) and (size := data[axis]) is not None and size % block:
            fix = "choose a group size that divides the input channels"
            yield Finding(label(node), f"block_size {block} does not divide the {size} of axis {axis}", fix)


def scale_values(model: ir.Model) -> Iterator[Finding]:
    """Scales are finite, positive, and not subnormal."""
    for node, value in scales(model):
        tensor = constant(value)
        if tensor is None or tensor.dtype not in _TINY:
            continue  # computed; or scales of scales, which have ranges of their own
        found = numbers(value)
        tiny = _TINY[tensor.dtype]
        if found is None or not found.size:
            continue
        if not np.isfinite(found).all():
            yield Finding(label(node), f"its scale {value.name} is not finite", "calibrate again, without inf and nan")
        elif found.min() <= 0:
            wrong = f"its scale {value.name} has {found.min():g}, which is not positive"
            yield Finding(label(node), wrong, "clamp scales up to the smallest normal number")
        elif float(found.min()) < tiny:
            wrong = f"its scale {value.name} has {found.min():g}, subnormal in {tensor.dtype.name.lower()}"
            yield Finding(label(node), wrong, f"clamp scales up to {tiny:g}, or store them as float32")


def scale_type(model: ir.Model) -> Iterator[Finding]:
    """QuantizeLinear's scale has its input's type: opset 23 allows a mix, and kernels do not."""
    for node in nodes(model, Q):
        data, scale = dtype_of(operand(node, 0)), dtype_of(operand(node, 1))
        if None not in (data, scale) and data != scale and scale != ir.DataType.FLOAT8E8M0:
            yield Finding(label(node), f"its scale is {scale}, its input {data}", f"store the scale as {data}")


def zero_point_type(model: ir.Model) -> Iterator[Finding]:
    """A zero point has the type of the codes, and one value for each scale."""
    for node in nodes(model, Q, DQ):
        zero = operand(node, 2)
        if zero is None:
            continue
        codes = dtype_of(node.outputs[0] if node.op_type == Q else operand(node, 0))
        if None not in (codes, dtype_of(zero)) and codes != dtype_of(zero):
            yield Finding(label(node), f"its zero point is {dtype_of(zero)}, its codes {codes}", f"store it as {codes}")
        shape, scale = shape_of(zero), shape_of(operand(node, 1))
        if None not in (shape, scale) and shape != scale and not {shape, scale} <= {(), (1,)}:
            wrong = f"its zero point is {_text(shape or ())}, its scale {_text(scale or ())}"
            yield Finding(label(node), wrong, "give both one shape")


def zero_point_range(model: ir.Model) -> Iterator[Finding]:
    """Float codes and int32 biases have no zero point but zero."""
    for node in nodes(model, Q, DQ):
        tensor, found = constant(operand(node, 2)), numbers(operand(node, 2))
        if tensor is not None and found is not None and tensor.dtype.name in _ALWAYS_ZERO and np.any(found != 0):
            yield Finding(label(node), f"a zero point of {tensor.dtype} is not zero", "leave it out or store zero")


def half_accumulator(model: ir.Model) -> Iterator[Finding]:
    """The int32 sums of MatMulInteger are cast to float32: 127 · 127 · 5 is already above float16's 65504."""
    for node in nodes(model, "MatMulInteger", "ConvInteger"):
        ahead = list(node.outputs)
        while ahead:
            for reader, _ in readers(ahead.pop()):
                if reader.op_type in ("Add", "Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze"):
                    ahead.extend(reader.outputs)
                elif reader.op_type == "Cast" and integer(reader, "to") == ir.DataType.FLOAT16:
                    wrong = f"it casts the int32 sums of {label(node)} to float16, which overflows"
                    yield Finding(label(reader), wrong, "cast to float32, multiply by the scales, then cast")


def weight_transpose(model: ir.Model) -> Iterator[Finding]:
    """A dequantized weight is not transposed: 4-bit products fuse only with the DequantizeLinear right before them."""
    for node in nodes(model, "Transpose"):
        weight = dequantized_weight(operand(node, 0))
        if weight is not None:
            wrong = f"it stands between {label(weight)} and the product, which do not fuse then"
            yield Finding(label(node), wrong, "store the codes transposed, [in, out]")
