"""Finds the whole-residual site: everything that writes, carries, and reads the residual stream, for rotations.

The stream begins at the embeddings and is closed over whatever a rotation passes through (adds, casts, views, scalar
factors, the normalization of RMSNorm). Each op on it is run in float64 with the stream as it is and rotated: its result
must be rotated too (it stays on the stream) or unchanged (a norm's variance). A linear whose result is added to the
stream is a writer; one whose input is the stream is a reader; a norm's gain must be folded into the readers behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from qfx.core.graph import Env, Graph
from qfx.core.linear import Linear
from qfx.core.maps import Rotate, random_rotation
from qfx.core.report import Miss
from qfx.core.site import Gain
from qfx.passes.discover._operand import operand
from qfx.passes.discover._ports import norm_writers, other_uses
from qfx.passes.discover._probe import Blocked, Prober

aten = torch.ops.aten
CLOSE = 1e-9
PATIENCE = 4
"""Ops after which a value inside a norm must be rotated or unchanged again."""


@dataclass(eq=False)
class Residual:
    """The whole-residual site.

    Attributes:
        channels: the stream's width.
        tables: parameters `[n, channels]` whose rows are put on the stream (embeddings).
        writers: linears whose result is added to it.
        readers: linears that read it, each with the gain of the norm in front of it, or None.
        carried: the nodes whose values are on the stream.
    """

    channels: int
    tables: list[str] = field(default_factory=list)
    writers: list[Linear] = field(default_factory=list)
    readers: list[tuple[Linear, Gain | None]] = field(default_factory=list)
    carried: set[fx.Node] = field(default_factory=set)


class _Walk:
    """One pass over the graph with a given set of writers."""

    def __init__(self, prober: Prober, linears: list[Linear], channels: int, writers: set[fx.Node]) -> None:
        self.prober, self.channels, self.writers = prober, channels, writers
        self.graph = prober.graph
        self.by_product = {lin.node: lin for lin in linears}
        self.by_y = {lin.y: lin for lin in linears}
        self.gains = {p.value: p.writer.gain for p in norm_writers(self.graph)}
        self.rotation = random_rotation(channels, prober.generator).matrix.to(prober.device)
        self.values: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self.loose: dict[fx.Node, tuple[Tensor, Tensor, fx.Node, int]] = {}
        self.gained: dict[fx.Node, Gain] = {}
        self.norms: list[str] = []
        self.site = Residual(channels)
        self.found: set[fx.Node] = set()

    def run(self) -> Residual:
        for node in self.prober.nodes:
            if node.op == "output":
                # hidden states may be returned only if nothing on the stream is
                if any(n in self.values or n in self.loose for n in node.all_input_nodes):
                    raise Blocked(node, "the stream itself is an output of the model")
            elif node.op == "call_function":
                self._visit(node)
        self.site.carried = set(self.values) - set(self.gained)
        return self.site

    def _visit(self, node: fx.Node) -> None:
        if node.target is aten.embedding.default and self._is_stream(node):
            table = operand(self.graph, node.args[0])
            if table is not None and not any(n in self.values for n in node.all_input_nodes):
                self._begin(node)
                if table.name not in self.site.tables:
                    self.site.tables.append(table.name)
                return
        linear = self.by_product.get(node)
        on_stream = [n for n in node.all_input_nodes if n in self.values or n in self.loose]
        if linear is not None and linear.x in self.loose:
            raise Blocked(node, f"{self.loose[linear.x][2].name} does not commute with a rotation")
        if linear is not None and linear.x in self.values:
            if uses := other_uses(self.graph, linear.weight, node):
                raise Blocked(node, f"{linear.weight} is also used by {', '.join(uses)}")
            self.site.readers.append((linear, self.gained.get(linear.x)))
            on_stream = []
        if node in self.writers:
            writer = self.by_y[node]
            if writer.foreign_bias:
                raise Blocked(node, f"the bias of {writer.name} is not a parameter of one axis")
            for name, mine in ((writer.weight, writer.node), (writer.bias, writer.y)):
                if name and (uses := other_uses(self.graph, name, mine)):
                    raise Blocked(node, f"{name} is also used by {', '.join(uses)}")
            self.site.writers.append(writer)
            self._begin(node)
            return
        if on_stream:
            self._carry(node, on_stream)

    def _begin(self, node: fx.Node) -> None:
        plain = self.prober.gaussian(node)
        self.values[node] = (plain, plain @ self.rotation)

    def _is_stream(self, node: fx.Node) -> bool:
        value = self.prober.env[node]
        return isinstance(value, Tensor) and value.shape[-1] == self.channels

    def _carry(self, node: fx.Node, on_stream: list[fx.Node]) -> None:
        gain = self.gains.get(node)
        if gain is not None and node.target is aten.mul.Tensor:
            # a gain that can be folded away: continue as if it were one
            (source,) = on_stream
            if source in self.loose:
                raise Blocked(node, f"{self.loose[source][2].name} does not commute with a rotation")
            self.values[node] = self.values[source]
            self.gained[node] = gain
            self.norms.append(gain.param)
            return
        if node.target is aten.layer_norm.default:
            raise Blocked(
                node, "LayerNorm subtracts the mean, which a rotation does not keep; the stream must be centred first"
            )
        gained = [n for n in on_stream if n in self.gained]
        pairs = {n: self.values[n] if n in self.values else self.loose[n][:2] for n in on_stream}
        first, second = self.prober._both(node, pairs)
        if not isinstance(first, Tensor) or not first.is_floating_point():
            if torch.equal(first, second) if isinstance(first, Tensor) else first == second:
                return
            raise Blocked(node, f"{node.name} makes something else of the stream")
        size = first.abs().max().clamp_min(1e-30)
        if (first - second).abs().max() <= CLOSE * size:
            return  # an invariant, such as a norm's mean square
        if first.shape[-1] == self.channels and (first @ self.rotation - second).abs().max() <= 10 * CLOSE * size:
            self.values[node] = (first, second)
            if gained:
                self.gained[node] = self.gained[gained[0]]
                if len(on_stream) > 1 and not torch.equal(first, self.values[gained[0]][0]):
                    why = f"the gain {self.gained[node].param} cannot be folded: {node.name} adds it to the stream"
                    raise Blocked(node, why)
            return
        if node.target is aten.add.Tensor and not any(n in self.loose for n in on_stream):
            sources = self._sources(node, on_stream)
            if not sources or sources <= self.writers:
                raise Blocked(node, f"{node.name} adds something to the stream that no linear wrote")
            self.found |= sources
            self._begin(node)
            return
        # inside a norm: neither rotated nor unchanged yet; it must become one of them within a few ops
        origin, depth = next(((self.loose[n][2], self.loose[n][3]) for n in on_stream if n in self.loose), (node, 0))
        if depth >= PATIENCE:
            raise Blocked(origin, f"{origin.name} does not commute with a rotation")
        self.loose[node] = (first, second, origin, depth + 1)

    def _sources(self, add: fx.Node, on_stream: list[fx.Node]) -> set[fx.Node]:
        """The linears whose results an add puts on the stream, through ops that keep the width."""
        queue = [n for n in add.all_input_nodes if n not in on_stream]
        found: set[fx.Node] = set()
        seen = set(queue)
        while queue:
            node = queue.pop()
            if node in self.by_y:
                found.add(node)
                continue
            for source in node.all_input_nodes:
                value = self.prober.env.get(source)
                if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
                    continue
                if value.shape[-1] == self.channels and source not in seen:
                    seen.add(source)
                    queue.append(source)
        return found


def find_residual(graph: Graph, linears: list[Linear], env: Env, *, seed: int = 0) -> Residual | Miss:
    """The whole-residual site, or why there is none."""
    prober = Prober(graph, env, linears, seed)
    widths = [
        env[n].shape[-1] for n in graph.nodes if n.target is aten.embedding.default and isinstance(env.get(n), Tensor)
    ]
    if not widths:
        return Miss("residual", "no embedding begins the stream")
    writers: set[fx.Node] = set()
    try:
        for _ in range(len(linears) + 1):
            walk = _Walk(prober, linears, widths[0], writers)
            site = walk.run()
            if not walk.found:
                for name in site.tables:
                    if uses := _table_uses(graph, name):
                        return Miss("residual", f"{name} is also used by {', '.join(uses)}")
                for name in walk.norms:
                    if len(graph.uses(name)) != walk.norms.count(name):
                        return Miss("residual", f"the gain {name} cannot be folded: it is also used off the stream")
                return site
            writers |= walk.found
    except Blocked as e:
        return Miss("residual", e.why)
    return Miss("residual", "its writers could not be settled")


def _table_uses(graph: Graph, name: str) -> list[str]:
    return [u.name for u in graph.uses(name) if u.target is not aten.embedding.default]


@torch.no_grad()
def rotate(graph: Graph, site: Residual, change: Rotate) -> Callable[[], None]:
    """Folds every gain into its readers, then rotates all writers and readers; returns how to undo it bit for bit.

    Args:
        graph: the graph whose module holds the parameters.
        site: the whole-residual site.
        change: the rotation `[channels, channels]`.
    """
    saved: dict[str, Tensor] = {}

    def edit(name: str, new: Tensor) -> None:
        value = graph.attr(name)
        saved.setdefault(name, value.detach().clone())
        value.data.copy_(new)

    for linear, gain in site.readers:
        w = linear.read(graph).double()
        if gain is not None:
            w = w * (gain.slope * saved.get(gain.param, graph.attr(gain.param)).double() + gain.offset)
            edit(gain.param, torch.full_like(graph.attr(gain.param), (1 - gain.offset) / gain.slope))
        saved.setdefault(linear.weight, graph.attr(linear.weight).detach().clone())
        linear.write(graph, change.read(w))
    for name in site.tables:
        edit(name, change(graph.attr(name).double()))
    for linear in site.writers:
        saved.setdefault(linear.weight, graph.attr(linear.weight).detach().clone())
        linear.write(graph, change.write(linear.read(graph).double()))
        if linear.bias is not None:
            edit(linear.bias, change(graph.attr(linear.bias).double()))

    def undo() -> None:
        for name, value in saved.items():
            graph.attr(name).data.copy_(value)

    return undo
