"""Maps that no parameter can absorb: applied at run time, in front of the linears that read a value.

Every linear that takes part gets two small parameters, shared with the others, and computes on `x * online_gain +
online_offset`. To the graph this is one more writer of the axis, so that folding, checking and undoing work as
anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .graph import Graph
from .linear import Linear
from .site import Gain, Reader, Site, Writer

GAIN, OFFSET = "online_gain", "online_offset"
"""The added parameters' names in the linears' modules."""
ONLINE = "online"
"""Key of a mapped node's meta: the names of its two parameters."""
aten = torch.ops.aten


class Online:
    """Mixed into a linear's class: maps its input first."""

    online_gain: nn.Parameter
    online_offset: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """The linear on the mapped input; `[..., in]` to `[..., out]`."""
        return super().forward(x * self.online_gain + self.online_offset)  # type: ignore[misc]


@functools.cache  # one class for all modules of a kind: torch.compile guards on the type
def _online_class(cls: type) -> type:
    return type(cls.__name__, (Online, cls), {"__module__": cls.__module__})


def make_online(module: nn.Module, gain: nn.Parameter, offset: nn.Parameter) -> None:
    """Makes a linear's module map its input; its class keeps its name and its parameters theirs."""
    if not isinstance(module, Online):
        module.__class__ = _online_class(type(module))  # type: ignore[arg-type]
    module.register_parameter(GAIN, gain)
    module.register_parameter(OFFSET, offset)


def online_site(value: fx.Node, linears: Sequence[Linear], shiftable: bool, gain: Gain | None = None) -> Site:
    """A site between a value and some of the linears that read it; nothing is added before `add_online`.

    Args:
        value: what the linears read.
        linears: those that will map it; each a module of its own.
        shiftable: whether each has a bias, or can take one.
        gain: of the norm that writes the value, for methods that look at it.
    """
    index = torch.arange(linears[0].x.meta["val"].shape[-1])
    readers = tuple(Reader(lin, index) for lin in linears)
    folds = {"Diagonal", "SignedDiagonal"} | ({"Shift"} if shiftable else set())
    name = f"{linears[0].name} (online)"
    writer = Writer(gain=gain)
    if known := value.meta.get(ONLINE):  # an earlier step put a map here: this one goes on with it
        writer = Writer(gain=Gain(known[0]), norm_bias=known[1])
    site = Site(name, "online", value, len(index), writer, readers, folds)
    if not shiftable:
        site.why_not["Shift"] = "a linear that reads it has no bias and cannot take one"
    return site


def add_online(graph: Graph, site: Site) -> Callable[[], None]:
    """Puts the identity map in front of an online site's linears, in modules and graph; returns the undo."""
    if ONLINE in site.value.meta:
        return lambda: None
    linears = [r.linear for r in site.readers]
    modules = [graph.module.get_submodule(lin.name) for lin in linears]
    classes = [type(m) for m in modules]
    like = graph.module.get_parameter(linears[0].weight)
    gain = nn.Parameter(like.new_ones(site.channels), requires_grad=False)
    offset = nn.Parameter(like.new_zeros(site.channels), requires_grad=False)
    for module in modules:
        make_online(module, gain, offset)
    order = {n: i for i, n in enumerate(graph.nodes)}
    value, first = site.value, min((lin.node for lin in linears), key=order.__getitem__)
    names = [f"{linears[0].name}.{leaf}" for leaf in (GAIN, OFFSET)]
    with graph.fx.inserting_before(first):
        constants = [graph.fx.create_node("get_attr", name) for name in names]
        scaled = graph.fx.call_function(aten.mul.Tensor, (value, constants[0]))
        mapped = graph.fx.call_function(aten.add.Tensor, (scaled, constants[1]))
    around = dict(list((first.meta.get("nn_module_stack") or {}).items())[:-1])  # not the linear's own module
    for node in (scaled, mapped):
        node.meta = {"nn_module_stack": around, "val": value.meta["val"]}
    mapped.meta[ONLINE] = names
    for linear in linears:
        linear.node.replace_input_with(value, mapped)
        linear.x = mapped
    if graph.working_dtype is not None:
        graph.overrides |= {names[0]: gain.float(), names[1]: offset.float()}
    graph.touch()
    norm, site.writer = site.writer, Writer(gain=Gain(names[0]), norm_bias=names[1])

    def remove() -> None:
        site.writer = norm
        for linear in linears:
            linear.node.replace_input_with(mapped, value)
            linear.x = value
        for node in (mapped, scaled, *constants):
            graph.fx.erase_node(node)
        graph.touch()
        for name in names:
            graph.overrides.pop(name, None)
        for module, cls in zip(modules, classes, strict=True):
            del module._parameters[GAIN], module._parameters[OFFSET]
            module.__class__ = cls

    return remove


def carry_online(old: Any, new: nn.Module) -> None:
    """Gives the module that replaces a linear the map that the linear had."""
    if isinstance(old, Online):
        make_online(new, old.online_gain, old.online_offset)
