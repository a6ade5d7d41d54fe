"""Parameters as an op sees them: behind transposes and casts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qfx.core.graph import Graph

aten = torch.ops.aten
_MOVES = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.contiguous.default,
          aten.detach.default, aten.alias.default, aten.clone.default}  # fmt: skip
_TRANSPOSES = {aten.t.default, aten.transpose.int, aten.numpy_T.default, aten.permute.default, aten.mT.default}


@dataclass(frozen=True)
class Operand:
    """A parameter as an op sees it: dims[i] is the parameter's axis at position i."""

    name: str
    dims: tuple[int, ...]


def operand(graph: Graph, value: object) -> Operand | None:
    """Follows transposes and casts back to a parameter."""
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr":
        name = str(value.target)
        if not graph.is_parameter(name):
            return None
        return Operand(name, tuple(range(graph.attr(name).dim())))
    if value.target in _MOVES:
        return operand(graph, value.args[0])
    if value.target in _TRANSPOSES:
        source = operand(graph, value.args[0])
        if source is None:
            return None
        order = list(range(len(source.dims)))
        if value.target is aten.permute.default:
            order = [int(d) % len(order) for d in value.args[1]]  # type: ignore[union-attr,arg-type]
        else:
            a, b = value.args[1:3] if value.target is aten.transpose.int else (-2, -1)  # type: ignore[misc]
            if len(order) > 1:
                order[a], order[b] = order[b], order[a]  # type: ignore[index]
        return Operand(source.name, tuple(source.dims[d] for d in order))
    return None
