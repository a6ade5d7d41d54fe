"""A captured model that many tests share: capture costs a second, so each takes a fresh copy of the weights instead."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qfx.core.linear import Linear
from qfx.core.passes import State
from qfx.core.report import Report
from qfx.core.simulate import FakeQuantize
from qfx.core.site import Site
from qfx.passes.discover.plan import make_plan
from qfx.quantize import discover
from qfx.recipes import Recipe

Batches = Sequence[dict[str, Tensor]]


class Captured:
    """A model, captured once.

    It serves steps that leave the graph's nodes alone, and solvers; a step that adds a bias or a shift to the model needs
    a capture of its own (`state_of`).
    """

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self.state = state_of(model, {}, batches)
        self.float = copy.deepcopy(model)

    def fresh(self, schemes: Mapping[str, Any], ignore: Sequence[str] = (), **settings: Any) -> State:
        """The state before the first step, with the float weights; forgets what came of the last one."""
        old = self.state
        old.graph.module = copy.deepcopy(self.float)
        for node in old.graph.nodes:
            if isinstance(node.target, FakeQuantize):
                node.replace_all_uses_with(node.args[0])
                old.graph.fx.erase_node(node)
        old.graph.touch()
        recipe = Recipe(schemes, ignore=ignore)
        plan = make_plan(old.graph, old.linears, recipe.schemes, recipe.ignore).schemes
        report = Report("test", {}, 1)
        self.state = State(old.graph, old.linears, old.sites, plan, old.batches, report, **settings)
        return self.state


def state_of(model: nn.Module, schemes: Mapping[str, Any], batches: Batches, ignore: Sequence[str] = ()) -> State:
    """What the first step of a recipe is given; the model itself will be changed."""
    with torch.no_grad():
        recipe = Recipe(schemes, ignore=ignore)
        return discover(model.eval(), recipe, [dict(b) for b in batches], lambda what, done, total: None)


def inputs_of(model: nn.Module, name: str, batches: Batches) -> Tensor:
    """All tokens `[n, channels]` that a module of a model is given, measured by a hook and not by the graph."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat(seen)


def site_of(state: State, name: str) -> Site:
    """The site that a layer writes."""
    return next(s for s in state.sites if s.name == name)


def linear_of(state: State, name: str) -> Linear:
    """The first product of a layer."""
    return next(lin for lin in state.linears if lin.name == name)
