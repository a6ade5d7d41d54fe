"""Graphs of the zoo's models, exported once a process: an export takes seconds, a copy of it milliseconds."""

import copy
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from qfx.core.graph import Env, Graph
from qfx.core.linear import Linear
from qfx.core.site import Site
from qfx.passes.discover.capture import capture
from qfx.passes.discover.linears import find_linears
from qfx.passes.discover.sites import find_sites
from tests.zoo import ZOO


@dataclass
class Captured:
    """A model's graph with its linears, for one test to change.

    Attributes:
        graph: Its module is a copy of its own.
        feeds: The model's inputs by name.
        linears: All of the graph's.
    """

    graph: Graph
    feeds: dict[str, Tensor]
    linears: list[Linear]

    @property
    def module(self) -> nn.Module:
        """Return the model."""
        return self.graph.module

    def sites(self) -> list[Site]:
        """Return the proved sites."""
        return find_sites(self.graph, self.linears, self.env())[0]

    @torch.no_grad()
    def env(self) -> Env:
        """Return every value of a run."""
        env: Env = {}
        self.graph.execute(self.graph.nodes, env, feeds=self.feeds)
        return env

    @torch.no_grad()
    def run(self, feeds: dict[str, Tensor] | None = None) -> list[Tensor]:
        """Return the floating outputs of the graph."""
        return floats(self.graph.run(feeds or self.feeds))

    @torch.no_grad()
    def call(self, feeds: dict[str, Tensor] | None = None) -> list[Tensor]:
        """Return the floating outputs of the module's own forward."""
        return floats(self.module(**(feeds or self.feeds)))


def captured(name: str, dtype: torch.dtype = torch.float32) -> Captured:
    """Return the zoo's model `name`, as if it had just been captured.

    In float64 the parameters are, and the graph computes all of it, also where the model asks for float32.
    """
    graph, feeds = _capture(name, torch.float32 if dtype is torch.float64 else dtype)
    nodes: dict[fx.Node, fx.Node] = {}
    text = fx.Graph()
    text.output(text.graph_copy(graph.fx, nodes))
    graph = Graph(copy.deepcopy(graph.module), text, graph.constants, graph.out_spec)
    if dtype is torch.float64:
        graph.module.double()
        graph.working_dtype = dtype
    return Captured(graph, dict(feeds), find_linears(graph)[0])


def floats(output: object) -> list[Tensor]:
    """Return the floating tensors of a model's output."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference of two outputs, relative to the largest value of its tensor."""
    pairs = list(zip(a, b, strict=True))
    assert pairs
    assert all(x.shape == y.shape for x, y in pairs)
    return max(((x.double() - y.double()).abs().max() / x.double().abs().max()).item() for x, y in pairs)


@cache
def _capture(name: str, dtype: torch.dtype) -> tuple[Graph, dict[str, Tensor]]:
    model, feeds = ZOO[name].load()
    feeds = {k: v.to(dtype) if v.is_floating_point() else v for k, v in feeds.items()}
    return capture(model.to(dtype), feeds), feeds
