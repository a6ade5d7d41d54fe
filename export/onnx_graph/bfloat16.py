"""Operations in bfloat16 as ONNX Runtime's CPU has them: in float32, with results rounded to bfloat16.

Models compute some tables in bfloat16 whatever their own dtype is. A single operation whose inputs are exact in float32
and whose result is rounded once gives what an operation in bfloat16 gives.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import convenience

_NARROW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT
_ANY = ("Cast", "CastLike", "Constant")


def widen(model: ir.Model) -> int:
    """Casts the inputs of nodes that read or give bfloat16 to float32, and their results back; in place.

    Returns:
        How many nodes were changed.
    """
    graph, changed = model.graph, 0
    for node in list(graph):
        narrow = [i for i, x in enumerate(node.inputs) if x is not None and x.dtype is _NARROW]
        results = [y for y in node.outputs if y.dtype is _NARROW]
        if node.op_type in _ANY or not (narrow or results):
            continue
        changed += 1
        for i in narrow:
            cast = ir.node("Cast", [node.inputs[i]], {"to": _WIDE.value})
            _describe(cast, node.inputs[i], _WIDE)
            graph.insert_before(node, cast)
            node.replace_input_with(i, cast.outputs[0])
        for y in results:
            y.type = ir.TensorType(_WIDE)
            cast = ir.node("Cast", [y], {"to": _NARROW.value})
            _describe(cast, y, _NARROW)
            convenience.replace_all_uses_with(y, cast.outputs[0], replace_graph_outputs=True)
            cast.replace_input_with(0, y)
            graph.insert_after(node, cast)
    return changed


def _describe(cast: ir.Node, like: ir.Value | None, kind: ir.DataType) -> None:
    assert like is not None
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(kind), like.shape
