"""The canonical form: what carries no meaning for a pass is taken out of a graph of aten ops."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from qfx.passes.discover._functional import functionalize, writes_in_place

aten = torch.ops.aten
_ASSERTS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
# What is allocated is overwritten later, but a value that differs from run to run looks to a probe like a computed one.
_EMPTIES = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}


def canonicalize(gm: fx.GraphModule) -> bool:
    """Strips what carries no meaning for a pass; inlines regions that only change grad mode or autocast.

    Returns:
        Whether the graph is functional: no op writes in place, also in no region that was kept whole.
    """
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and "wrap_with_" in str(node.target):
            _inline(gm, node)
    for node in list(gm.graph.nodes):
        if node.op == "call_module" or node.target in _ASSERTS:
            gm.graph.erase_node(node)
        elif node.target in DROPOUTS or (node.target in _CASTS and _same_type(node)):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        elif node.target in _EMPTIES:
            node.target = _EMPTIES[node.target]
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
    functional = functionalize(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    modules = dict(gm.named_modules())
    kept = [modules[str(n.target)] for n in gm.graph.nodes if n.op == "get_attr" and str(n.target) in modules]
    return functional and not any(writes_in_place(m.graph) for m in kept if isinstance(m, fx.GraphModule))


def _same_type(node: fx.Node) -> bool:
    source, result = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    if not isinstance(source, Tensor) or not isinstance(result, Tensor):
        return False
    return source.dtype == result.dtype and source.device == result.device and source.layout == result.layout


def _inline(gm: fx.GraphModule, call: fx.Node) -> None:
    """Replaces `wrap_with_…(settings, submodule, *args)` by the submodule's nodes."""
    at = next(i for i, a in enumerate(call.args) if isinstance(a, fx.Node) and a.op == "get_attr")
    body_node = call.args[at]
    assert isinstance(body_node, fx.Node)
    body = getattr(gm, str(body_node.target))
    if "autocast" in str(call.target) and call.args[1] not in (None, False) and call.args[2] is not False:
        return  # an enabled autocast changes dtypes: keep the region whole
    env = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), call.args[at + 1 :], strict=True))
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "output":
                results = fx.map_arg(node.args[0], lambda n: env[n])
            elif node.op != "placeholder":
                env[node] = gm.graph.node_copy(node, lambda n: env[n])
                if node.op == "get_attr":
                    setattr(gm, str(node.target), getattr(body, str(node.target)))
    if not isinstance(results, tuple | list):
        call.replace_all_uses_with(results)
    else:
        for user in list(call.users):
            assert user.target is operator.getitem, f"unexpected user {user} of {call}"
            user.replace_all_uses_with(results[int(user.args[1])])  # type: ignore[arg-type]
            gm.graph.erase_node(user)
    gm.graph.erase_node(call)
