"""What the backend of `torch.compile` hands on: the rewritten graph, with quantized weights among its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

from qfx.passes.discover.dynamo import Traced
from qfx.passes.lower._rewrite import Rewritten
from qfx.passes.lower.fuse import rewrite

LEFT = ("fuse other norms",)
"""Rewrites of what no quantized linear reads: the next backend fuses it with more than a norm."""


def codes_of(modules: Iterable[nn.Module]) -> dict[str, Tensor]:
    """The buffers of modules that a graph reads as `qfx_0`, `qfx_1` ..., by the names below which it reads them."""
    return {f"qfx_{i}.{leaf}": t for i, module in enumerate(modules) for leaf, t in module.named_buffers()}


def fuse(traced: Traced) -> list[Rewritten]:
    """Runs the rewrites of `passes/lower` on a graph whose linears are quantized; what each did, and left."""
    graph = traced.graph
    values = [node.meta.get("val") for node in traced.placeholders]
    mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    for node in graph.fx.find_nodes(op="get_attr"):
        if isinstance(value := node.meta.get("val"), Tensor) and not isinstance(value, FakeTensor):
            node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    done = rewrite(graph.fx, LEFT)
    graph.touch()
    return done


def calls_quantized(graph: fx.Graph) -> bool:
    """Whether a graph calls an op of qfx."""
    return any(isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "qfx" for n in graph.nodes)


def finish(traced: Traced, gm: fx.GraphModule, extra: Mapping[str, Tensor]) -> tuple[fx.GraphModule, list[int]]:
    """The rewritten graph, and which of Dynamo's inputs it still has: none that nothing reads any more.

    The quantized weights are inputs behind those: Dynamo calls one graph with the parameters of several layers.

    Args:
        traced: the graph, rewritten.
        gm: Dynamo's.
        extra: what it reads beside its own inputs, in the order in which they become inputs.
    """
    graph, positions = traced.graph.fx, traced.positions
    graph.eliminate_dead_code()
    inputs = {name: traced.placeholders[at] for name, at in positions.items()}
    with graph.inserting_after(traced.placeholders[-1]):
        for name in reversed(list(extra)):
            node = inputs[name] = graph.placeholder(name.replace(".", "_"))
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            node._dynamo_source = None  # type: ignore[attr-defined]
    for node in list(graph.find_nodes(op="get_attr")):
        if (value := inputs.get(str(node.target))) is not None:
            value.meta.setdefault("val", node.meta["val"])
            node.replace_all_uses_with(value)
            graph.erase_node(node)
    theirs = list(gm.graph.find_nodes(op="placeholder"))
    kept = []
    for at, node in enumerate(traced.placeholders):
        if at in positions.values() and not node.users:
            graph.erase_node(node)
            continue
        kept.append(at)
        # what tells the next backend which inputs keep their addresses
        node.meta |= {k: theirs[at].meta[k] for k in ("tensor_dict", "example_value") if k in theirs[at].meta}
        node._dynamo_source = getattr(theirs[at], "_dynamo_source", None)  # type: ignore[attr-defined]
    rewritten = fx.GraphModule(traced.graph.module, graph, "Quantized")
    if not list(rewritten.parameters()) and not list(rewritten.buffers()):
        rewritten.meta |= {k: v for k, v in gm.meta.items() if k == "dynamo_compile_id"}
        rewritten._param_name_to_source = {}  # type: ignore[assignment]
    return rewritten, kept


def fake(value: Tensor) -> Any:
    """An input of fixed sizes for the next backend, which would let those of a real tensor vary."""
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return value
    return context.fake_mode.from_tensor(value, static_shapes=True)
