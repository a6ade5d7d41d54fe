"""Mistakes of quantized ONNX graphs that make them fail, or run and be wrong, on every runtime.

`onnx.checker` with full_check passes most of them: it looks at types, and hardly at the shapes and values of scales.
"""

from __future__ import annotations

import onnx_ir as ir

from qfx.export.onnx_graph import rules_contrib as contrib
from qfx.export.onnx_graph import rules_graph as graph
from qfx.export.onnx_graph import rules_qdq as qdq
from qfx.export.onnx_graph.findings import Finding, Rule, findings

__all__ = ["RULES", "Finding", "validate"]

RULES: list[Rule] = [
    graph.leftovers,
    graph.opset_imports,
    graph.opset_version,
    graph.ir_version,
    graph.unique_names,
    graph.defined_values,
    graph.graph_outputs,
    graph.stored_tensors,
    qdq.block_divides,
    qdq.scale_shape,
    qdq.scale_axis,
    qdq.scale_values,
    qdq.scale_type,
    qdq.zero_point_type,
    qdq.zero_point_range,
    qdq.half_accumulator,
    qdq.weight_transpose,
    contrib.nbits_attributes,
    contrib.nbits_shapes,
    contrib.nbits_zero_range,
    contrib.bnb4,
    contrib.fp8_weight,
    contrib.fp4_weight,
]


def validate(model: ir.Model) -> list[Finding]:
    """What is wrong with a model, whatever target it is for.

    Args:
        model: weights in a file of their own are not read, only scales and zero points.

    Returns:
        Findings in the order of `RULES`; none for a model that is right. Types and shapes that nothing tells pass.
    """
    return findings(model, RULES)
