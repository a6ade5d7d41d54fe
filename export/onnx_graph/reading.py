"""Questions about nodes and values that rules ask: constants, types, shapes, and where a weight comes from.

All answers come from metadata. Numbers are read of scales and zero points alone, so weights that lie in a file of
their own stay there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own ops."""
Q, DQ = "QuantizeLinear", "DequantizeLinear"
_OWN = frozenset({"", "ai.onnx"})
# the first output has the type of the first input
_SAME_TYPE = (
    *("Add", "Sub", "Mul", "Div", "MatMul", "Gemm", "Relu", "Gelu", "Sigmoid", "Tanh", "Softmax", "Clip"),
    *("Transpose", "Reshape", "Identity", "Expand", "Slice", "Squeeze", "Unsqueeze", "Concat", "Gather"),
    *("LayerNormalization", "RMSNormalization", "MatMulNBits", "MatMulBnb4", "MatMulBlockQuantizedFp8Weight"),
)
# the first output has the shape of the first input
_SAME_SHAPE = (Q, DQ, "Cast", "Relu", "Gelu", "Sigmoid", "Tanh", "Softmax", "Identity", "Clip")


def nodes(model: ir.Model, *op_types: str, domain: str = "") -> Iterator[ir.Node]:
    """The nodes of the graph, of its subgraphs and of its functions; only those op types of that domain, if any."""
    tops: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for top in tops:
        for node in ir.traversal.RecursiveGraphIterator(top):
            if not op_types or (node.op_type in op_types and own(node.domain, domain)):
                yield node


def own(found: str, wanted: str) -> bool:
    """Whether a node's domain is the wanted one; the standard's has two names."""
    return found == wanted or (found in _OWN and wanted in _OWN)


def label(node: ir.Node) -> str:
    """The node's name, or its op type and output."""
    return node.name or f"{node.op_type} of {node.outputs[0].name if node.outputs else 'nothing'}"


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input; None if it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def integer(node: ir.Node, name: str, default: int | None = None) -> int | None:
    """An integer attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node, not read yet; None for anything that is computed."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity":
        value = operand(node, 0)
    return None if value is None else ir.convenience.get_const_tensor(value)


def numbers(value: ir.Value | None) -> np.ndarray | None:
    """A small constant's numbers, bfloat16 and float8 as float32."""
    tensor = constant(value)
    if tensor is None:
        return None
    array = tensor.numpy()
    return array if array.dtype.kind in "iufb" and array.dtype.isbuiltin == 1 else array.astype(np.float32)


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """The type of a value, from its annotation or from what computes it; None if unknown."""
    while value is not None:
        if value.dtype is not None:
            return value.dtype
        if (tensor := constant(value)) is not None:
            return tensor.dtype
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Cast" or (node.op_type in (Q, DQ) and integer(node, "output_dtype", 0)):
            return ir.DataType(integer(node, "to") or integer(node, "output_dtype") or 0)
        if node.op_type == Q:
            value = operand(node, 2)
            if value is None:
                return ir.DataType.UINT8  # the standard's default
        elif node.op_type == DQ:
            value = operand(node, 1)
        elif node.op_type == "MatMulInteger":
            return ir.DataType.INT32
        elif node.op_type == "DynamicQuantizeLinear":
            return ir.DataType.FLOAT if value.index() == 1 else ir.DataType.UINT8
        else:
            value = operand(node, 0) if node.op_type in _SAME_TYPE and value.index() == 0 else None
    return None


def shape_of(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The sizes of a value, None for those that vary; None if not even their count is known."""
    while value is not None:
        if (tensor := constant(value)) is not None:
            return tuple(int(size) for size in tensor.shape)  # type: ignore[arg-type, union-attr]
        if value.shape is not None:
            return tuple(size if isinstance(size, int) else None for size in value.shape)
        node = value.producer()
        value = operand(node, 0) if node is not None and node.op_type in _SAME_SHAPE else None
    return None


def dequantized_by(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value is the output of, with nothing in between."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == DQ and own(node.domain, "") else None


def dequantized_weight(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of stored codes that a value is the output of, with nothing in between."""
    node = dequantized_by(value)
    return node if node is not None and constant(operand(node, 0)) is not None else None


def linears(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Each MatMul or Gemm whose second operand is a dequantized weight, and the node that dequantizes it."""
    for node in nodes(model, "MatMul", "Gemm"):
        weight = dequantized_weight(operand(node, 1))
        if weight is not None:
            yield node, weight


def scales(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Every scale: node and value."""
    at = {Q: (1,), DQ: (1,), "MatMulNBits": (2,), "MatMulBlockQuantizedFp8Weight": (2, 3)}
    for node in nodes(model):
        for index in at.get(node.op_type, ()):
            value = operand(node, index)
            if value is not None:
                yield node, value


def readers(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """The nodes that read a value, and as which of their inputs."""
    return [(use.node, use.idx) for use in value.uses()]
