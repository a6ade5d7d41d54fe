"""Quantized inputs as nodes of the graph: what the quantized model will compute, on the float graph."""

from __future__ import annotations

from torch import Tensor, fx

from .graph import Graph
from .linear import Linear
from .qtensor import dynamic_scale, fake_quantize
from .spec import QSpec


class FakeQuantize:
    """The target of a node that quantizes and dequantizes its input."""

    __name__ = "fake_quantize"
    __module__ = "qfx"

    def __init__(self, spec: QSpec, scale: Tensor | None = None, zero: Tensor | None = None) -> None:
        """A scale for static specs; none for dynamic ones."""
        self.spec, self.scale, self.zero = spec, scale, zero

    def __call__(self, x: Tensor) -> Tensor:
        """Values of x's dtype on the grid."""
        if self.scale is None:
            return fake_quantize(x, *dynamic_scale(x, self.spec), self.spec)
        return fake_quantize(x, self.scale.to(x.device), self.zero, self.spec)


def quantize_input(graph: Graph, linear: Linear, target: FakeQuantize) -> fx.Node:
    """Puts a quantizer between a linear and its input; other readers of the value are left alone."""
    with graph.fx.inserting_before(linear.node):
        node = graph.fx.create_node("call_function", target, (linear.x,))
    node.meta = {k: v for k, v in linear.node.meta.items() if k == "nn_module_stack"} | {
        "val": linear.x.meta.get("val")
    }
    linear.node.replace_input_with(linear.x, node)
    graph.touch()
    return node


def float_input(graph: Graph, linear: Linear, node: fx.Node) -> None:
    """Undoes `quantize_input`."""
    linear.node.replace_input_with(node, linear.x)
    graph.fx.erase_node(node)
    graph.touch()
