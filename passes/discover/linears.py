"""Finds the linears of a graph: products of an activation with a parameter, whichever op computes them."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from qfx.core.graph import Graph
from qfx.core.linear import Linear
from qfx.core.report import Miss
from qfx.passes.discover._operand import Operand, operand

aten = torch.ops.aten
_GROUPED = ("grouped_mm",)
_TWO = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default)
_THREE = (aten.addmm.default, aten.baddbmm.default)
_MAKES_ACTIVATIONS = {*_TWO, *_THREE, aten.einsum.default, aten.embedding.default}


def find_linears(graph: Graph) -> tuple[list[Linear], list[Miss]]:
    """All linears in execution order, and the weights that none of them covers, with the reason."""
    found: list[Linear] = []
    misses = [Miss(name, "the captured call does not run it") for name in graph.unread() if _is_matrix(graph, name)]
    for node in graph.nodes:
        match = _match(graph, node)
        if isinstance(match, Linear):
            found.append(match)
        elif isinstance(match, Miss):
            misses.append(match)
        misses += [Miss(name, f"it is read inside {_short(node.target)}") for name in _inside(graph, node)]
    return found, misses


def _inside(graph: Graph, node: fx.Node) -> list[str]:
    """The matrices that are handed to a region which was kept whole: its products are not in the graph."""
    names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    if not any(isinstance(graph.attr(name), nn.Module) for name in names):
        return []
    return [name for name in names if graph.is_parameter(name) and _is_matrix(graph, name)]


def _is_matrix(graph: Graph, name: str) -> bool:
    """Whether a parameter may be a linear's weight: no table, no filter, no single row."""
    owner = graph.module.get_submodule(name.rpartition(".")[0])
    value = graph.attr(name)
    if value.dim() < 2 or isinstance(owner, nn.Embedding | nn.modules.conv._ConvNd):
        return False
    return isinstance(owner, nn.Linear) or min(value.shape) > 1


def _match(graph: Graph, node: fx.Node) -> Linear | Miss | None:
    if node.op != "call_function":
        return None
    target, args = node.target, node.args
    x: object = None
    weight: Operand | None = None
    bias: object = None
    offsets: object = None
    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
    if target is aten.linear.default:
        x, weight, bias = args[0], operand(graph, args[1]), args[2] if len(args) > 2 else None
        axes = ((), (0,), (1,))
    elif target in _TWO:
        x, weight = args[0], operand(graph, args[1])
        axes = _matmul_axes(weight)
    elif target in _THREE:
        bias, x, weight = args[0], args[1], operand(graph, args[2])
        axes = _matmul_axes(weight)
    elif target is aten.einsum.default:
        return _match_einsum(graph, node)
    elif any(g in str(target) for g in _GROUPED) and len(args) >= 2:
        x, weight = args[0], operand(graph, args[1])
        axes = ((0,), (2,), (1,)) if weight and len(weight.dims) == 3 else None
        offsets = args[2] if len(args) > 2 else node.kwargs.get("offs")
    if weight is None:
        name = _only_parameters(graph, _weight_argument(node))
        return Miss(name, f"{_short(target)} takes a computed part of it, which no view covers") if name else None
    if not isinstance(x, fx.Node) or operand(graph, x) is not None:
        return None
    if axes is None or len(weight.dims) not in (2, 3):
        return Miss(weight.name, f"{_short(target)} takes the parameter in {len(weight.dims)} dimensions", weights=0)
    linear = _linear(graph, node, x, weight, axes, bias)
    linear.offsets = offsets if isinstance(offsets, fx.Node) else None
    return linear


def _weight_argument(node: fx.Node) -> object:
    target = node.target
    if target in _TWO or any(g in str(target) for g in _GROUPED):
        return node.args[1]
    return node.args[2] if target in _THREE else None


def _only_parameters(graph: Graph, value: object) -> str | None:
    """The name of a matrix of weights that a value is computed from, if from nothing else but indices into it."""
    names: list[str] = []
    queue = [value]
    while queue:
        node = queue.pop()
        if not isinstance(node, fx.Node) or len(names) > 4 or node.target in _MAKES_ACTIVATIONS:
            return None
        val = node.meta.get("val")
        if node is not value and isinstance(val, Tensor) and not val.is_floating_point():
            continue
        if node.op not in ("get_attr", "call_function"):
            return None
        if node.op == "get_attr":
            names.append(str(node.target))
        queue += node.all_input_nodes
    found = [n for n in names if graph.is_parameter(n) and graph.attr(n).dim() > 1]
    return found[0] if found else None


def _short(target: object) -> str:
    return str(getattr(target, "__name__", target)).split(".")[0]


def _matmul_axes(weight: Operand | None) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    if weight is None or len(weight.dims) not in (2, 3):
        return None
    return ((), (1,), (0,)) if len(weight.dims) == 2 else ((0,), (2,), (1,))


def _match_einsum(graph: Graph, node: fx.Node) -> Linear | Miss | None:
    """`...i, oi -> ...o`: what is in both inputs and not in the result is `in`; in all three, experts; else out."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, list | tuple)
    known = [operand(graph, o) for o in operands]
    if len(operands) != 2 or sum(k is not None for k in known) != 1 or "->" not in equation:
        computed = [_only_parameters(graph, o) for o in operands]
        name = next((c for c in computed if c), None) if None in computed else None
        return Miss(name, f"einsum {equation!r} takes a computed part of it, which no view covers") if name else None
    terms, result = equation.replace(" ", "").split("->")
    at = 0 if known[0] is not None else 1
    w_term, x_term = terms.split(",")[at], terms.split(",")[1 - at]
    weight, x = known[at], operands[1 - at]
    assert weight is not None
    inner = [c for c in w_term if c in x_term and c not in result]
    experts = [c for c in w_term if c in x_term and c in result]
    outer = [c for c in w_term if c not in x_term]
    if "." in w_term or len(inner) != 1 or x_term[-1] != inner[0] or not outer:
        return Miss(weight.name, f"einsum {equation!r} does not contract the last axis of its input with one axis")
    axes = tuple(tuple(w_term.index(c) for c in group) for group in (experts, outer, inner))
    return _linear(graph, node, x, weight, axes, None)  # type: ignore[arg-type]


def _linear(graph: Graph, node: fx.Node, x: fx.Node, weight: Operand, axes: tuple, bias: object) -> Linear:  # type: ignore[type-arg]
    bias_operand = operand(graph, bias)
    y = node
    if bias is None and len(node.users) == 1:
        # a bias that the module adds by itself right after the product
        (user,) = node.users
        if user.target is aten.add.Tensor and user.kwargs.get("alpha", 1) == 1:
            other = user.args[1] if user.args[0] is node else user.args[0]
            added = operand(graph, other)
            val = node.meta["val"]
            if added and isinstance(val, Tensor) and graph.attr(added.name).shape == val.shape[-1:]:
                bias_operand, y = added, user
    named = bias_operand.name if bias_operand and len(bias_operand.dims) == 1 else None
    name = weight.name.removesuffix(".weight")
    mapped = tuple(tuple(weight.dims[a] for a in group) for group in axes)
    foreign = bias is not None and named is None
    return Linear(name, node, x, weight.name, mapped, named, y, foreign)  # type: ignore[arg-type]
