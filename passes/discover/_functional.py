"""Replaces ops that write in place, so that a value is the same whoever reads it, and whenever.

An op on a value that nobody reads under another name becomes the op that returns its result. One on a slice becomes
that op and a new whole, as in a `torch.cat` by parts. Anything else is left to the caller.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_SCATTERS = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
_KEEP_DTYPE = {"copy", "fill", "index_put", "scatter", "masked_fill", "detach", "zero"}
_MAKE_BOOL = {"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logical_not"}


def writes_in_place(graph: fx.Graph) -> bool:
    """Whether any op changes one of its inputs."""
    return any(_schema(n) is not None and _schema(n).is_mutable for n in graph.nodes)


def functionalize(graph: fx.Graph) -> bool:
    """Replaces all such ops if it can; False if some are left (those before it are replaced, the graph is right)."""
    for node in list(graph.nodes):
        schema = _schema(node)
        if schema is not None and schema.is_mutable and not _replace(graph, node):
            return False
    return True


def _replace(graph: fx.Graph, node: fx.Node) -> bool:
    twin, written = _twin(node), node.args[0] if node.args else None
    if twin is None or not isinstance(written, fx.Node):
        return False
    order = list(graph.nodes)
    later = set(order[order.index(node) + 1 :])
    base, views = _base(written)
    stale = {a for a in _aliases(base) - later - {node, written} if not later.isdisjoint(a.users)}
    behind = [view.args[0] for view in views if view.target in _SCATTERS]
    if base.op != "call_function" or (stale and not (stale <= set(behind) and len(behind) == len(views))):
        return False
    with graph.inserting_before(node):
        part = graph.call_function(twin, node.args, node.kwargs)
        now = {node: part, written: part}
        for view in views if stale else ():
            source, *rest = view.args
            assert isinstance(source, fx.Node)
            scatter: Any = _SCATTERS[view.target]  # type: ignore[index]
            now[source] = part = graph.call_function(scatter, (source, part, *rest), view.kwargs)
    where = {k: v for k, v in node.meta.items() if k != "val"}  # of the write, not of the value
    for old, new in now.items():
        new.meta = dict(old.meta) | where
        old.replace_all_uses_with(new, delete_user_cb=later.__contains__)
    graph.erase_node(node)
    return True


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def _twin(node: fx.Node) -> Any:
    """The op that returns what this one writes, if it surely has the same dtype."""
    schema = _schema(node)
    namespace, _, name = schema.name.partition("::")
    first, *rest = schema.arguments
    alone = first.is_write and not any(a.is_write for a in rest) and len(schema.returns) == 1
    if namespace != "aten" or not name.endswith("_") or not alone or name[:-1] in _MAKE_BOOL:
        return None
    twin = getattr(getattr(aten, name[:-1], None), schema.overload_name or "default", None)
    dtypes = {n.meta["val"].dtype for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)}
    return twin if name[:-1] in _KEEP_DTYPE or len(dtypes) == 1 else None


def _viewed(node: fx.Node) -> fx.Node | None:
    """The value that a node's result may share memory with."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, fx.Node):
        return None
    # a part of a tuple shares what the op that made the tuple shares
    schema = _schema(source if node.target is operator.getitem else node)
    return source if schema is not None and any(r.alias_info is not None for r in schema.returns) else None


def _base(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The value whose memory a node shares, and the views on the way."""
    path: list[fx.Node] = []
    while (source := _viewed(node)) is not None:
        path.append(node)
        node = source
    return node, path


def _aliases(node: fx.Node) -> set[fx.Node]:
    """A value and all views of it."""
    found, queue = {node}, [node]
    while queue:
        for user in queue.pop().users:
            if user not in found and _viewed(user) in found:
                found.add(user)
                queue.append(user)
    return found
