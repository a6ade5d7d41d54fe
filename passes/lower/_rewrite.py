"""What rewrites of a graph share: reading an op's arguments by name, putting in an op, counting what computes."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from qfx.core.graph import layer_path
from qfx.core.report import Miss

aten = torch.ops.aten
_VIEWS = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default),
    *(aten.t.default, aten.slice.Tensor, aten.select.int, aten.expand.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.unbind.int),
    *(aten.alias.default, aten.detach.default, aten.flatten.using_ints, aten.unflatten.int, aten.sym_size.int),
}
_WRITTEN = "qfx_written"
SHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
"""Ops that give a value another shape, and nothing else."""

WRITTEN = "the model writes into its input, in place"
"""Why a place is left whose input `is_written`."""
Report = Callable[[fx.Node, str], None]
"""Takes a place that a rewrite left, and why."""


@dataclass
class Rewritten:
    """What one rewrite did.

    Attributes:
        name: of the rewrite.
        changed: places that it rewrote.
        before: ops that compute, before it.
        after: and behind it.
        misses: places that it left, and why.
    """

    name: str
    changed: int = 0
    before: int = 0
    after: int = 0
    misses: list[Miss] = field(default_factory=list)


def count_ops(graph: fx.Graph) -> int:
    """Ops that compute something: calls, but for views and numbers."""
    calls = (n for n in graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload))
    return sum(n.target not in _VIEWS for n in calls)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of these functions."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op by name, with its defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


def value(node: Any) -> Tensor | None:
    """The tensor that a node had at capture, without values."""
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def alike(a: Any, b: Any) -> bool:
    """Whether two nodes are tensors of one shape and dtype."""
    x, y = value(a), value(b)
    return x is not None and y is not None and x.dtype == y.dtype and list(map(str, x.shape)) == list(map(str, y.shape))


def emit(
    graph: fx.Graph, target: Any, args: Sequence[Any], like: fx.Node, kwargs: Mapping[str, Any] | None = None
) -> fx.Node:
    """Puts in a call at the graph's insertion point; it belongs to the module in which `like` was computed."""
    node = graph.call_function(target, tuple(args), dict(kwargs or {}))
    node.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")}
    vals, named = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    mode = next((v.fake_mode for v in pytree.tree_leaves((vals, named)) if isinstance(v, FakeTensor)), None)
    with mode or contextlib.nullcontext():  # some ops make tensors of their own
        node.meta["val"] = target(*vals, **named)
    return node


def part(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    """One of the results of a call."""
    return emit(graph, operator.getitem, (node, index), node)


def find_writes(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each value whose memory some op writes to, such as a cache: these ops, in the graph's order."""
    memory: dict[fx.Node, fx.Node] = {}
    attributes: dict[Any, fx.Node] = {}
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        views = is_call(node, operator.getitem, aten._unsafe_view.default)  # their schemas do not say so
        views |= bool(schema and any(r.alias_info for r in schema.returns))
        source = node.args[0] if views and node.args else None
        own = attributes.setdefault(node.target, node) if node.op == "get_attr" else node
        memory[node] = memory[source] if isinstance(source, fx.Node) else own
        given = arguments(node) if schema else {}
        for argument in schema.arguments if schema else ():
            for target in pytree.tree_leaves(given[argument.name]) if argument.is_write else ():
                if isinstance(target, fx.Node):
                    writers.setdefault(memory[target], []).append(node)
    return {node: writers[owner] for node, owner in memory.items() if owner in writers}


def mark_writes(graph: fx.Graph) -> None:
    """Marks values whose memory some op writes to: what reads them may not move."""
    for node in find_writes(graph):
        node.meta[_WRITTEN] = True


def is_written(node: Any) -> bool:
    """Whether `mark_writes` found an op that writes to a value's memory."""
    return isinstance(node, fx.Node) and _WRITTEN in node.meta


def sole_user(node: fx.Node) -> fx.Node | None:
    """The only node that reads a value."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_cast(node: Any) -> bool:
    """Whether a node changes its input's dtype, and nothing else."""
    return is_call(node, aten.to.dtype, aten._to_copy.default, torch.ops.prims.convert_element_type.default)


def is_constant(node: Any) -> bool:
    """Whether a value depends on parameters, buffers and inputs of one axis only."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "placeholder":
        return (found := value(node)) is not None and found.dim() == 1
    return node.op == "get_attr" or (bool(node.all_input_nodes) and all(map(is_constant, node.all_input_nodes)))


def drop(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erases those of the nodes that nothing reads, and what only they have read. Effects stay.

    Looking for dead code in all of the graph takes its length, for each rewrite.
    """
    waiting, gone = list(nodes), set()
    while waiting:
        node = waiting.pop()
        if node in gone or node.users or node.op in ("placeholder", "output") or node.is_impure():
            continue
        waiting += node.all_input_nodes
        graph.erase_node(node)
        gone.add(node)


def replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """What reads one node reads another that computes the same, and what writes to it writes there."""
    if is_written(old):
        new.meta[_WRITTEN] = True
    old.replace_all_uses_with(new)
    sources = old.all_input_nodes
    graph.erase_node(old)  # also one that counts as an effect, since it may draw random numbers
    drop(graph, sources)


def hoist(node: Any, before: fx.Node) -> None:
    """Moves a constant, and what it is computed from, in front of a node."""
    if isinstance(node, fx.Node) and not node < before:
        for source in node.all_input_nodes:
            hoist(source, before)
        before.prepend(node)


def where(node: fx.Node) -> str:
    """The layer in which a node was computed, or the node's own name."""
    return layer_path(node) or node.name


def op_name(node: Any) -> str:
    """A short name of what a node calls."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return "output" if isinstance(node, fx.Node) and node.op == "output" else "an input"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).rpartition("::")[2]
    return getattr(node.target, "__name__", str(node.target))
