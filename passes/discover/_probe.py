"""Proves by running that a map commutes with the ops between a writer and its readers.

Gaussian values `v` are put at the writer, once as they are and once as the map makes them, and the ops up to the
readers are run in float64. With a scale of its own for every channel, the ratio of the two runs at a reader also tells
*which* writer channel each reader channel holds: repeated heads, head layouts, slices, and gathers need no rule per op.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qfx.core.graph import Env, Graph, cast
from qfx.core.linear import Linear

TOLERANCE = 1e-7
"""Relative error that float64 leaves on a commuting path, by a wide margin; scales differ by more than 1e-5."""
MAX_PATH = 400
"""Ops between a writer and its readers; a longer path means that the value has left its block."""


class Blocked(Exception):
    """The map does not commute: `why`, at which node."""

    def __init__(self, node: fx.Node, why: str) -> None:
        """Keeps the node and the reason."""
        super().__init__(why)
        self.node, self.why = node, why


@dataclass
class Trace:
    """What a pair of runs gave: at each reader the plain and the mapped input, and the nodes on the way."""

    readers: list[tuple[Linear, Tensor, Tensor]] = field(default_factory=list)
    path: list[fx.Node] = field(default_factory=list)


class Prober:
    """Runs parts of a graph in float64 on values from one example run."""

    def __init__(self, graph: Graph, env: Env, linears: list[Linear], seed: int = 0) -> None:
        """`env` holds every node's value for one small example; `linears` all readers there can be."""
        self.graph, self.env = graph, env
        self.position = {n: i for i, n in enumerate(graph.nodes)}
        self.nodes = graph.nodes
        self.by_node = {lin.node: lin for lin in linears}
        self.generator = torch.Generator().manual_seed(seed)
        self.device = next((v.device for v in env.values() if isinstance(v, Tensor)), torch.device("cpu"))
        self._doubled: dict[fx.Node, Any] = {}

    def gaussian(self, node: fx.Node) -> Tensor:
        """Random values of the shape that the node had in the example."""
        return self.normal(self.env[node].shape)

    def normal(self, *shape: Any) -> Tensor:
        """Normal values in float64, the same on every device."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def distinct_scales(self, n: int) -> Tensor:
        """N positive factors between 1/2 and 2 that differ from each other and from 1, in random order."""
        steps = torch.arange(n, dtype=torch.float64)[torch.randperm(n, generator=self.generator)]
        return (2.0 ** (-1 + 2 * (steps + 0.382) / n)).to(self.device)

    def trace(self, start: fx.Node, plain: Tensor, mapped: Tensor, allowed: Tensor | None = None) -> Trace:
        """Runs from `start` to the readers with both values.

        Args:
            start: the writer's value.
            plain: its values.
            mapped: the values that the map makes of them.
            allowed: if given, the sorted ratios that an element may have; the walk stops at the first op that breaks
                it.

        Raises:
            Blocked: the value reaches the output, leaves its block, or an op mixes channels.
        """
        env: dict[fx.Node, tuple[Any, Any]] = {start: (plain, mapped)}
        result = Trace()
        for node in self.nodes[self.position[start] + 1 :]:
            if not any(n in env for n in node.all_input_nodes):
                continue
            if node.op == "output":
                last = next(n for n in node.all_input_nodes if n in env)
                raise Blocked(last, "its value is an output of the model")
            linear = self.by_node.get(node)
            if linear is not None and linear.x in env:
                others = [n for n in node.all_input_nodes if n in env and n is not linear.x]
                if others:
                    raise Blocked(node, f"{_op(node)} takes it twice")
                result.readers.append((linear, *env[linear.x]))
                continue
            result.path.append(node)
            if len(result.path) > MAX_PATH:
                raise Blocked(node, f"more than {MAX_PATH} ops follow before a linear reads it")
            first, second = self._both(node, env)
            if _same(first, second):
                continue
            if allowed is not None:
                self._check(node, first, second, allowed)
            env[node] = (first, second)
        if not result.readers:
            raise Blocked(start, "no linear reads it")
        return result

    def _both(self, node: fx.Node, env: Mapping[fx.Node, tuple[Any, Any]]) -> tuple[Any, Any]:
        def argument(which: int) -> Any:
            def get(n: fx.Node) -> Any:
                return env[n][which] if n in env else self._double(n)

            args = cast(fx.map_arg(node.args, get), torch.float64)
            kwargs = cast(fx.map_arg(node.kwargs, get), torch.float64)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        try:
            return argument(0), argument(1)
        except Exception as e:
            raise Blocked(node, f"{_op(node)} does not run alone ({type(e).__name__})") from e

    def _double(self, node: fx.Node) -> Any:
        if node not in self._doubled:
            value = self.graph.attr(str(node.target)) if node.op == "get_attr" else self.env[node]
            self._doubled[node] = cast(value, torch.float64)
        return self._doubled[node]

    def _check(self, node: fx.Node, first: Any, second: Any, allowed: Tensor) -> None:
        pairs = zip(first, second, strict=True) if isinstance(first, tuple | list) else [(first, second)]
        for a, b in pairs:
            if not isinstance(a, Tensor) or not a.is_floating_point():
                raise Blocked(node, f"{_op(node)} makes {getattr(a, 'dtype', type(a).__name__)} of it")
            finite = a.isfinite()
            if not torch.equal(a[~finite].nan_to_num(0), b[~finite].nan_to_num(0)):
                raise Blocked(node, f"{_op(node)} is not finite")
            sizes = a[finite].abs()
            if sizes.numel() == 0:
                continue
            known = finite & (a.abs() > 1e-6 * sizes.max())
            ratio = b[known] / a[known]
            if (nearest(ratio, allowed)[1] > TOLERANCE).any():
                raise Blocked(node, f"{_op(node)} does not commute with a scale per channel")
            if (a.abs() <= 0).logical_and(b.abs() > 1e-6 * sizes.max()).any():
                raise Blocked(node, f"{_op(node)} makes something of nothing")


def nearest(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Position of the nearest entry of a sorted table, and the relative distance to it."""
    right = torch.searchsorted(table, values).clamp(1, len(table) - 1) if len(table) > 1 else None
    if right is None:
        at = torch.zeros_like(values, dtype=torch.long)
    else:
        closer_left = (values - table[right - 1]).abs() <= (values - table[right]).abs()
        at = torch.where(closer_left, right - 1, right)
    return at, ((values - table[at]) / table[at].abs().clamp_min(1e-300)).abs()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _op(node: fx.Node) -> str:
    name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
    return f"'{name}' at {node.name}"
