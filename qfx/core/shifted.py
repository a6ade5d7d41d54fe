"""Norms without a bias that are given one, so that a shift can fold into them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .graph import Graph
from .linear import Linear
from .site import Site

NAME = "shift"
"""The added parameter's name in the norm's module."""


class Shifted:
    """Mixed into a norm's class: adds the parameter `shift` to what the norm returns."""

    shift: nn.Parameter

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The norm's output plus the shift."""
        return super().forward(*args, **kwargs) + self.shift  # type: ignore[misc]


@functools.cache  # one class for all modules of a kind: torch.compile guards on the type
def _shifted_class(cls: type) -> type:
    return type(cls.__name__, (Shifted, cls), {"__module__": cls.__module__})


def make_shifted(module: nn.Module, shift: torch.Tensor) -> None:
    """Gives a norm module an additive parameter; its other parameters keep their names, its class keeps its name."""
    if not isinstance(module, Shifted):
        module.__class__ = _shifted_class(type(module))  # type: ignore[arg-type]
    module.register_parameter(NAME, nn.Parameter(shift, requires_grad=False))


def add_shift(graph: Graph, site: Site, linears: Sequence[Linear]) -> Callable[[], None]:
    """Gives a site's norm a shift of zeros, in its module and in the graph; returns how to take it away again.

    The norm's module must return the site's value; the check of the fold and of the whole model would notice if it did
    not.
    """
    gain = site.writer.gain
    assert gain is not None
    path = gain.param.rpartition(".")[0]
    module = graph.module.get_submodule(path)
    cls = type(module)
    zeros = torch.zeros_like(graph.module.get_parameter(gain.param))
    make_shifted(module, zeros)
    name, value = f"{path}.{NAME}", site.value
    with graph.fx.inserting_after(value):
        added = graph.fx.create_node("call_function", torch.ops.aten.add.Tensor)
    with graph.fx.inserting_before(added):
        constant = graph.fx.create_node("get_attr", name)
    value.replace_all_uses_with(added)
    added.args = (value, constant)
    added.meta = dict(value.meta)
    if graph.working_dtype is not None:
        graph.overrides[name] = zeros.float()
    readers = [lin for lin in linears if lin.x is value]
    for linear in readers:
        linear.x = added
    site.value, site.writer.norm_bias = added, name
    site.folds.add("Shift")
    graph.touch()

    def remove() -> None:
        for linear in readers:
            linear.x = value
        site.value, site.writer.norm_bias = value, None
        site.folds.discard("Shift")
        added.replace_all_uses_with(value)
        graph.fx.erase_node(added)
        graph.fx.erase_node(constant)
        graph.touch()
        graph.overrides.pop(name, None)
        del module._parameters[NAME]
        module.__class__ = cls

    return remove
