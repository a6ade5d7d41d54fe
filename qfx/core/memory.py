"""What a calibration sweep will hold in memory, computed from the graph's shapes before anything is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from .graph import Graph


class Memory(NamedTuple):
    """Bytes: of the values kept between blocks for all batches, and of one block's activations for one batch."""

    boundary: int
    block: int


def estimate(graph: Graph, batches: Sequence[Mapping[str, Tensor]]) -> Memory:
    """The largest amounts over all blocks; weights, and what a method itself measures, come on top."""
    if not batches:
        return Memory(0, 0)
    largest = max(batches, key=lambda b: sum(v.numel() for v in b.values()))
    one = _sizes(graph, largest)
    scale = sum(sum(v.numel() for v in b.values()) for b in batches) / max(sum(v.numel() for v in largest.values()), 1)
    live: set[Node] = set()
    boundary = block = 0
    for segment in graph.segments():
        alive = peak = sum(one.get(n, 0) for n in live)
        for node in segment.nodes:
            if node.op == "output":
                continue
            live.add(node)
            alive += one.get(node, 0)
            peak = max(peak, alive)
            for dead in segment.drop.get(node, ()):
                if dead in live:
                    live.discard(dead)
                    alive -= one.get(dead, 0)
        block = max(block, peak)
        if segment is graph.segments()[-1]:  # its values, such as all logits, are not kept
            break
        boundary = max(boundary, int(scale * sum(one.get(n, 0) for n in live)))
    return Memory(boundary, block)


def _sizes(graph: Graph, batch: Mapping[str, Tensor]) -> dict[Node, int]:
    """Bytes of every value for one batch; sizes that depend on data count as nothing."""
    known: dict[Any, int] = {}
    for node in graph.inputs:
        for size, real in zip(node.meta["val"].shape, batch[str(node.target)].shape, strict=True):
            if isinstance(size, torch.SymInt):
                known[size.node.expr] = real
    return {n: _bytes(n.meta.get("val"), known) for n in graph.nodes if n.op not in ("get_attr", "output")}


def _bytes(value: Any, known: Mapping[Any, int]) -> int:
    if isinstance(value, tuple | list):
        return sum(_bytes(v, known) for v in value)
    if not isinstance(value, Tensor):
        return 0
    total = value.element_size()
    for size in value.shape:
        if isinstance(size, torch.SymInt):
            number = size.node.expr.subs(known)
            total *= int(number) if number.is_number else 0
        else:
            total *= int(size)
    return total
