"""Graphs of the zoo's models, exported once a process: an export takes seconds, a copy of it milliseconds."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from qfx.core.graph import Env, Graph
from qfx.core.linear import Linear
from qfx.core.site import Site
from qfx.passes.discover.capture import capture
from qfx.passes.discover.linears import find_linears
from qfx.passes.discover.sites import find_sites
from tests.zoo import ZOO

Feeds = dict[str, Tensor]


@dataclass
class Captured:
    """A model's graph with its linears, for one test to change.

    Attributes:
        graph: Its module is a copy of its own.
        feeds: The model's inputs by name.
        linears: All of the graph's.
        dtype: Of the parameters.
    """

    graph: Graph
    feeds: Feeds
    linears: list[Linear]
    dtype: torch.dtype

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
        with self._widest():
            self.graph.execute(self.graph.nodes, env, feeds=self.feeds)
        return env

    @torch.no_grad()
    def run(self, feeds: Feeds | None = None) -> list[Tensor]:
        """Return the floating outputs of the graph; of a float64 model, all is computed in float64."""
        with self._widest():
            return floats(self.graph.run(feeds or self.feeds))

    @torch.no_grad()
    def call(self, feeds: Feeds | None = None) -> list[Tensor]:
        """Return the floating outputs of the module's own forward; of a float64 model, all is computed in float64."""
        if self.dtype is not torch.float64:
            return floats(self.module(**(feeds or self.feeds)))
        if hasattr(self.module, "set_experts_implementation"):
            self.module.set_experts_implementation("eager")  # the others take no float64
        with _Widest():
            return floats(self.module(**(feeds or self.feeds)))

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the model's parameters and buffers, by name."""
        return {k: v.clone() for k, v in self.module.state_dict().items()}

    def snapshot(self) -> tuple[object, ...]:
        """Return all that must be equal after something was done and undone, bit for bit."""
        values = {
            k: (v.dtype, v.shape, v.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            for k, v in self.state().items()
        }
        classes = {path: type(module) for path, module in self.module.named_modules()}
        return list(values.items()), str(self.graph.fx), [(lin.x, lin.bias) for lin in self.linears], classes

    @contextmanager
    def _widest(self) -> Iterator[None]:
        before = self.graph.working_dtype
        self.graph.working_dtype = torch.float64 if self.dtype is torch.float64 else before
        try:
            yield
        finally:
            self.graph.working_dtype = before


class _Widest(TorchFunctionMode):
    """Computes in float64 what a module's code asks to compute in float32, as norms and softmax do."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(lambda a: torch.float64 if a is torch.float32 else a, (args, kwargs or {}))
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def captured(name: str, dtype: torch.dtype = torch.float32) -> Captured:
    """Return the zoo's model `name`, as if it had just been captured in `dtype`."""
    # The graph of a float32 model serves for float64 too: `run` and `call` cast whatever they compute.
    graph, feeds = _capture(name, torch.float32 if dtype is torch.float64 else dtype)
    text = fx.Graph()
    text.output(text.graph_copy(graph.fx, {}))
    graph = Graph(copy.deepcopy(graph.module).to(dtype), text, graph.constants, graph.out_spec)
    feeds = {k: v.to(dtype) if v.is_floating_point() else v for k, v in feeds.items()}
    return Captured(graph, feeds, find_linears(graph)[0], dtype)


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
def _capture(name: str, dtype: torch.dtype) -> tuple[Graph, Feeds]:
    model, feeds = ZOO[name].load()
    feeds = {k: v.to(dtype) if v.is_floating_point() else v for k, v in feeds.items()}
    return capture(model.to(dtype), feeds), feeds
