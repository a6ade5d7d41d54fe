"""Observers as nodes of the graph: `insert` puts statistics behind values, `remove` is its exact inverse."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from .graph import Graph
from .linear import Linear
from .statistic import Statistic


class Observe:
    """The target of an observer node: updates its statistics and passes the value on.

    Attributes:
        statistics: what to update.
        mask: bool `[batch, sequence]` of the tokens that count in the present batch, or None for all.
    """

    __name__ = "observe"
    __module__ = "qfx"

    def __init__(self, statistics: Sequence[Statistic]) -> None:
        """Keeps the statistics."""
        self.statistics = list(statistics)
        self.mask: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Updates the statistics with the tokens of x `[..., channels]` that count."""
        seen = x.detach()
        if self.mask is not None and x.shape[: self.mask.dim()] == self.mask.shape:
            seen = x[self.mask.to(x.device)]
        for statistic in self.statistics:
            statistic.update(seen)
        return x


class ObserveExperts(Observe):
    """Like `Observe`, with a statistic for each expert: of its rows of `[tokens, channels]`, or its part of a 3-D x."""

    def __call__(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Updates each expert's statistic with its own tokens; `offsets` are the ends of the experts' rows."""
        if offsets is None:
            parts: Sequence[Tensor] = list(x.detach())
        else:
            ends = [0, *offsets.tolist()]
            parts = [x.detach()[a:b] for a, b in itertools.pairwise(ends)]
        for statistic, part in zip(self.statistics, parts, strict=True):
            statistic.update(part)
        return x


def insert_experts(graph: Graph, linear: Linear, statistics: Sequence[Statistic]) -> fx.Node:
    """Puts an observer with a statistic for each expert in front of one product; `remove` removes it."""
    inputs = (linear.x,) if linear.offsets is None else (linear.x, linear.offsets)
    with graph.fx.inserting_before(linear.node):
        node = graph.fx.create_node("call_function", ObserveExperts(statistics), inputs)
    node.meta = {k: v for k, v in linear.node.meta.items() if k == "nn_module_stack"}
    linear.node.replace_input_with(linear.x, node)
    graph.touch()
    return node


def insert(
    graph: Graph, wanted: Mapping[fx.Node, Sequence[Statistic]], inside: Sequence[fx.Node] | None = None
) -> list[fx.Node]:
    """Puts an observer behind each value; its readers then read the observer. Returns the observer nodes.

    Args:
        graph: changed; `remove` is the inverse.
        wanted: the statistics of each value.
        inside: the nodes that will be run. A value from before them is observed in front of its first reader among
            them.
    """
    order = {n: i for i, n in enumerate(inside or ())}
    added = []
    for value, statistics in wanted.items():
        users = list(value.users)
        if inside is not None and value not in order:
            users = [u for u in users if u in order]
            if not users:
                continue
            place = graph.fx.inserting_before(min(users, key=order.__getitem__))
        else:
            place = graph.fx.inserting_after(value)
        near = value if inside is None or value in order else min(users, key=order.__getitem__)
        with place:
            node = graph.fx.create_node("call_function", Observe(statistics), (value,), name=f"observe_{value.name}")
        node.meta = {"val": value.meta.get("val")}
        if "nn_module_stack" in near.meta:
            node.meta["nn_module_stack"] = near.meta["nn_module_stack"]
        for user in users:
            user.replace_input_with(value, node)
        added.append(node)
    graph.touch()
    return added


def remove(graph: Graph) -> None:
    """Removes every observer; the graph's text is then what it was before they were inserted."""
    for node in list(graph.fx.nodes):
        if isinstance(node.target, Observe):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.fx.erase_node(node)
    graph.touch()


def set_masks(nodes: Sequence[fx.Node], batch: Mapping[str, Any]) -> None:
    """Tells observers which tokens of the next batch are padding (its `attention_mask`, if it has one)."""
    mask = batch.get("attention_mask")
    counts = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
    for node in nodes:
        if isinstance(node.target, Observe):
            node.target.mask = None if counts is None or bool(counts.all()) else counts
