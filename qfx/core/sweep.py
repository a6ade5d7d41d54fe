"""Runs a calibration set through the graph block by block, keeping only the values at the block boundaries.

Memory is one block's activations for one batch, and for every batch the values that cross the boundary ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import observe
from .graph import Env, Graph, Segment
from .linear import Linear
from .statistic import Statistic


class Sweep:
    """A walk over the segments of a graph with all batches at once.

    Attributes:
        index: the segment that comes next.
        boundary: for each batch, the values that the rest of the graph needs.
    """

    def __init__(self, graph: Graph, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Starts before the first segment."""
        self.graph, self.batches = graph, batches
        self.index = 0
        self.boundary: list[Env] = [{} for _ in batches]

    @property
    def segments(self) -> list[Segment]:
        """The graph's segments as they are now (a pass may have inserted nodes)."""
        return self.graph.segments()

    def done(self) -> bool:
        """Whether all segments were run."""
        return self.index >= len(self.segments)

    @torch.no_grad()
    def observe(
        self,
        wanted: Mapping[fx.Node, Sequence[Statistic]],
        *,
        through: int | None = None,
        experts: Mapping[Linear, Sequence[Statistic]] | None = None,
    ) -> None:
        """Measures values in the next segment, or in those up to segment `through`; does not move on.

        Args:
            wanted: for a value, the statistics of its tokens.
            through: the last segment to run.
            experts: for a product over experts, a statistic of each expert's own tokens.
        """
        if not wanted and not experts:
            return
        added = observe.insert(self.graph, wanted, self._range(through)[0])
        added += [observe.insert_experts(self.graph, lin, found) for lin, found in (experts or {}).items()]
        try:
            nodes, drop = self._range(through)
            last = max((i for i, n in enumerate(nodes) if n in set(added)), default=-1)
            for batch, boundary in zip(self.batches, self.boundary, strict=True):
                observe.set_masks(added, batch)
                self.graph.execute(nodes[: last + 1], dict(boundary), feeds=batch, drop=drop)
        finally:
            observe.remove(self.graph)

    @torch.no_grad()
    def outputs(self, batches: Iterable[int], *, through: int | None = None) -> list[list[Any]]:
        """What leaves the next segments, for some batches, computed in float32 or better."""
        segments = self.segments[self.index : (self.index if through is None else through) + 1]
        nodes, drop = self._range(through)
        inside = {n for s in segments for n in s.nodes}
        leaves = [n for s in segments for n in s.leaves if any(u not in inside or u.op == "output" for u in n.users)]
        keep = set(leaves)
        drop = {n: [v for v in values if v not in keep] for n, values in drop.items()}
        results = []
        for i in batches:
            env = dict(self.boundary[i])
            self.graph.execute([n for n in nodes if n.op != "output"], env, feeds=self.batches[i], drop=drop)
            results.append([env[n] for n in leaves])
        return results

    @torch.no_grad()
    def values(self, batch: int, *, through: int | None = None) -> Env:
        """Every value of the next segments for one batch."""
        nodes, _ = self._range(through)
        env = dict(self.boundary[batch])
        self.graph.execute([n for n in nodes if n.op != "output"], env, feeds=self.batches[batch])
        return env

    @torch.no_grad()
    def advance(self, tap: Callable[[fx.Node, Any], Any] | None = None) -> None:
        """Runs the next segment on every batch and moves behind it; not the last one, whose values nothing reads."""
        segment = self.segments[self.index]
        if self.index == len(self.segments) - 1:
            self.boundary = [{} for _ in self.batches]
            self.index += 1
            return
        for batch, env in zip(self.batches, self.boundary, strict=True):
            self.graph.execute(segment.nodes, env, feeds=batch, tap=tap, drop=segment.drop)
        self.index += 1

    def _range(self, through: int | None) -> tuple[list[fx.Node], dict[fx.Node, list[fx.Node]]]:
        segments = self.segments[self.index : (self.index if through is None else through) + 1]
        drop: dict[fx.Node, list[fx.Node]] = {}
        for segment in segments:
            drop.update(segment.drop)
        return [n for s in segments for n in s.nodes], drop


def segment_of(graph: Graph) -> dict[fx.Node, int]:
    """The position of each node's segment."""
    return {n: i for i, s in enumerate(graph.segments()) for n in s.nodes}
