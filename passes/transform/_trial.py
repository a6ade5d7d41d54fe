"""Tries a map under the target quantizers: how far the values ahead move if the readers of a site are quantized.

The loss is taken at the inputs of the next linears (attention's output for q, k, v; act(gate)·up for an MLP), or at the
readers' own outputs if no linear follows in the block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qfx.core.graph import Env
from qfx.core.linear import Linear
from qfx.core.maps import Diagonal, Map, Shift
from qfx.core.passes import State
from qfx.core.qtensor import dynamic_scale, encode_minmax, fake_quantize, scale_from_range
from qfx.core.site import Reader, Site
from qfx.core.spec import QSpec, Scheme, parse_scheme
from qfx.core.sweep import Sweep

DEFAULT = "W8A8_TENSOR_STATIC"
"""The target where the recipe gives the readers no scheme: the paper's INT8*, per-tensor weights and activations."""


class Trial:
    """The next block on one calibration batch, ready to be run with quantized readers."""

    def __init__(self, state: State, sweep: Sweep, through: int) -> None:
        """Nothing is run until a loss is asked for."""
        self.state, self.sweep, self.through = state, sweep, through
        self._env: Env | None = None
        self._steps: dict[int, tuple[list[fx.Node], list[fx.Node]]] = {}

    def forget(self) -> None:
        """To be called after a fold: the block's values have changed."""
        self._env = None
        self._steps = {}

    @property
    def env(self) -> Env:
        """Every value of the block for the first batch, unquantized."""
        if self._env is None:
            self._env = self.sweep.values(0, through=self.through)
        return self._env

    def scheme(self, linear: Linear) -> Scheme | None:
        """What the reader will be quantized to; the default target if the recipe quantizes nothing at all."""
        return self.state.plan.get(linear.weight) if self.state.plan else parse_scheme(DEFAULT)

    @torch.no_grad()
    def loss(self, site: Site, maps: Sequence[Map], clip: float | None = None) -> float:
        """Mean squared error (relative to the values' own mean square) that quantizing the readers makes ahead.

        Args:
            site: its readers are quantized; other linears stay as they are.
            maps: applied to the site, in order; the parameters are not changed.
            clip: half-range of a static symmetric input quantizer; None takes the range of the values.
        """
        graph = self.state.graph
        nodes, frontier = self._plan(site)
        env: Env = dict(self.env)
        saved = dict(graph.overrides)
        extra: dict[fx.Node, Tensor] = {}
        inputs: dict[fx.Node, Tensor] = {}
        try:
            for reader in site.readers:
                linear, scheme = reader.linear, self.scheme(reader.linear)
                if scheme is None:
                    continue
                x, w, bias = _mapped(self.env[linear.x].float(), linear.read(graph).float(), reader, maps)
                x = _quantize_input(x, scheme.input, clip) if scheme.input else x
                w = encode_minmax(w, scheme.weight).dequantize()
                parameter = graph.attr(linear.weight)
                stand_in = torch.empty_like(parameter)
                graph.overrides[linear.weight] = stand_in
                linear.write(graph, w)
                inputs[linear.node] = x.to(self.env[linear.x].dtype)
                if bias is not None:
                    extra[linear.node] = bias
            for node in nodes:
                if node in inputs:
                    source = next(r.linear.x for r in site.readers if r.linear.node is node)
                    value = graph.value(node, {**env, source: inputs[node]})
                    env[node] = value + extra[node].to(value.dtype) if node in extra else value
                else:
                    env[node] = graph.value(node, env)
        finally:
            graph.overrides = saved
        total = 0.0
        for node in frontier:
            want, got = self.env[node].float(), env[node].float()
            if want.shape == got.shape:
                total += ((want - got).square().mean() / want.square().mean().clamp_min(1e-20)).item()
        return total

    def _plan(self, site: Site) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes from the readers to the next linears, and the values there."""
        if id(site) in self._steps:
            return self._steps[id(site)]
        segments = self.sweep.segments[self.sweep.index : self.through + 1]
        others = {lin.node: lin for lin in self.state.linears}
        readers = [r.linear.node for r in site.readers if self.scheme(r.linear) is not None]
        reached, nodes, frontier = set(readers), list(readers), []
        for node in (n for s in segments for n in s.nodes):
            if node in reached or reached.isdisjoint(node.all_input_nodes) or node.op == "output":
                continue
            if node in others and others[node].x in reached:
                if others[node].x not in frontier and others[node].x not in readers:
                    frontier.append(others[node].x)
                continue
            reached.add(node)
            nodes.append(node)
        if not frontier:
            nodes, frontier = readers, readers
        order = {n: i for i, n in enumerate(self.state.graph.nodes)}
        plan = (sorted(nodes, key=order.__getitem__), frontier)
        self._steps[id(site)] = plan
        return plan


def _mapped(x: Tensor, w: Tensor, reader: Reader, maps: Sequence[Map]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight, and added bias of a reader as the fold will leave them."""
    bias: Tensor | None = None
    for m in maps:
        if isinstance(m, Diagonal):
            scale = torch.cat([m.scale.to(x), x.new_ones(1)])[reader.index]
            x, w = x * scale, w / scale
        elif isinstance(m, Shift):
            offset = torch.cat([m.offset.to(x), x.new_zeros(1)])[reader.index]
            x, bias = x - offset, w @ offset
    return x, w, bias


def _quantize_input(x: Tensor, spec: QSpec, clip: float | None) -> Tensor:
    if spec.dynamic:
        return fake_quantize(x, *dynamic_scale(x, spec), spec)
    lo, hi = (x.min(), x.max()) if clip is None else (x.new_tensor(-clip), x.new_tensor(clip))
    return fake_quantize(x, *scale_from_range(lo, hi, spec), spec)
