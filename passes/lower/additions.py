"""Puts into a float graph what transforms add to modules: shifts of norms, biases of linears, maps of inputs.

The values are read below names that the caller chooses. The ops are those of `qfx.core.shifted` and `qfx.core.online`,
in their order, so that the graph computes what the modules compute.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qfx.core.errors import CaptureError
from qfx.core.graph import Graph, module_paths
from qfx.core.linear import Linear

aten = torch.ops.aten


def put_shift(graph: Graph, linears: list[Linear], path: str, name: str, shift: Tensor) -> None:
    """Adds `shift` to what the module at `path` returns.

    Args:
        graph: it is changed.
        linears: of the graph; those that read the value read the shifted one.
        path: the norm's.
        name: below which the graph reads the shift.
        shift: `[channels]`.

    Raises:
        CaptureError: the module does not give one value in the graph.
    """
    inside = [n for n in graph.nodes if n.op == "call_function" and path in module_paths(n)]
    leaves = [n for n in inside if any(path not in module_paths(user) for user in n.users)]
    if len(leaves) != 1:
        raise CaptureError(f"backend: {path} gives {len(leaves)} values in Dynamo's graph, and a shift is added to one")
    value = leaves[0]
    readers = [user for user in value.users if path not in module_paths(user)]
    with graph.fx.inserting_after(value):
        added = graph.fx.call_function(aten.add.Tensor)
    constant = read_value(graph, name, shift, added)
    added.args = (value, constant)
    added.meta = dict(value.meta)
    for reader in readers:
        reader.replace_input_with(value, added)
    for linear in linears:
        if linear.x is value and linear.node in readers:
            linear.x = added
    graph.touch()


def put_bias(graph: Graph, linear: Linear, name: str, bias: Tensor) -> None:
    """Gives a product that has none a bias, `[out]`, read below `name`.

    Raises:
        CaptureError: the product is not of an op that takes one.
    """
    node = linear.node
    if node.target is not aten.linear.default or len(node.args) > 2:
        raise CaptureError(f"backend: {linear.name} was given a bias, which {node.target} of Dynamo's graph has not")
    node.args = (*node.args, read_value(graph, name, bias, node))


def put_map(graph: Graph, linear: Linear, names: tuple[str, str], values: tuple[Tensor, Tensor]) -> None:
    """Lets a linear compute on `x * gain + offset`; both are `[in]`, read below two names."""
    x, node = linear.x, linear.node
    gain, offset = (read_value(graph, name, value, node) for name, value in zip(names, values, strict=True))
    with graph.fx.inserting_before(node):
        scaled = graph.fx.call_function(aten.mul.Tensor, (x, gain))
        mapped = graph.fx.call_function(aten.add.Tensor, (scaled, offset))
    for made in (scaled, mapped):
        made.meta = dict(x.meta)
    node.replace_input_with(x, mapped)
    linear.x = mapped
    graph.touch()


def read_value(graph: Graph, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    """A node that reads a value below a name; the caller sees that the graph's module has it."""
    with graph.fx.inserting_before(before):
        node = graph.fx.create_node("get_attr", name)
    node.meta["val"] = value
    return node
