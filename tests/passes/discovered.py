"""What every step starts from, for many tests: discovery takes seconds, a copy of what it found milliseconds."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx.core.graph import Graph
from qfx.core.linear import Linear
from qfx.core.passes import State
from qfx.core.report import Report
from qfx.core.site import Site
from qfx.passes.discover.plan import make_plan
from qfx.quantize import discover
from qfx.recipes import Recipe
from tests.zoo import ZOO
from tests.zoo.decoders import token_ids

Batches = Sequence[dict[str, Tensor]]
TOKENS = [{"input_ids": token_ids(seed)} for seed in (0, 1)]


class Discovered:
    """A model with its graph, its linears and its sites.

    Attributes:
        model: the float model, which no test changes.
        batches: its calibration set.
    """

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self.model, self.batches = model.eval().requires_grad_(False), [dict(b) for b in batches]
        with torch.no_grad():
            self._state = discover(copy.deepcopy(model), Recipe({}), self.batches, lambda what, done, total: None)

    def fresh(self, schemes: Mapping[str, Any], ignore: Sequence[str] = (), **more: Any) -> State:
        """The state before the first step, for one test to change; `more` are its attributes.

        What is tied stays tied, so a tied head is to be ignored.
        """
        old, text = self._state, fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        text.output(text.graph_copy(old.graph.fx, copies))
        graph = Graph(copy.deepcopy(old.graph.module), text, old.graph.constants, old.graph.out_spec)
        known = {id(node): twin for node, twin in copies.items()}
        linears, sites, norms = copy.deepcopy((old.linears, old.sites, list(old.norms.items())), known)
        recipe = Recipe(schemes, ignore=ignore)
        plan = make_plan(graph, linears, recipe.schemes, recipe.ignore).schemes
        made = {"graph": graph, "linears": linears, "sites": sites, "norms": dict(norms), "plan": plan}
        empty = {"report": Report("test", {}, 1), "ranges": {}, "solved": {}}
        return dataclasses.replace(old, **made, **empty, **more)


@functools.cache
def zoo(name: str) -> Discovered:
    """A model of the zoo; a language model has two batches."""
    model, inputs = ZOO[name].load()
    return Discovered(model, TOKENS if set(inputs) == {"input_ids"} else [inputs])


def inputs_of(model: nn.Module, name: str, batches: Batches = TOKENS) -> Tensor:
    """All tokens `[n, channels]` that a module of a model is given, measured by a hook and not by the graph."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


def site_of(state: State, name: str) -> Site:
    """The site that a layer writes."""
    return next(s for s in state.sites if s.name == name)


def linear_of(state: State, name: str) -> Linear:
    """The first product of a layer."""
    return next(lin for lin in state.linears if lin.name == name)
