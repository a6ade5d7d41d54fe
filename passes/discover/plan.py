"""Resolves a recipe's patterns on a model's layers: which linear gets which scheme, and why others stay in float."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from qfx.core.errors import RecipeError
from qfx.core.graph import Graph, layer_path
from qfx.core.linear import Linear
from qfx.core.spec import Scheme
from qfx.passes.discover._operand import operand

HEAD, ROUTER = "@head", "@router"
"""Patterns for roles: the linear that makes the model's output outside all blocks; linears that choose experts."""
aten = torch.ops.aten


@dataclass
class Plan:
    """What becomes of each layer.

    Attributes:
        schemes: by parameter name, what is quantized.
        floats: by parameter name, why a layer stays in float.
        notes: remarks for the report.
    """

    schemes: dict[str, Scheme] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def make_plan(
    graph: Graph,
    linears: Sequence[Linear],
    patterns: Mapping[str, Scheme | None],
    ignore: Sequence[str] = (),
    *,
    whole: bool = True,
) -> Plan:
    """Matches every layer against the patterns; the last match wins, `ignore` wins over all.

    A pattern is a layer's name, a glob on it or on its last parts, `re:` and a regular expression for the whole name,
    or a role (`@head`, `@router`). If the graph is not the `whole` model, patterns may match nothing in it.

    Raises:
        RecipeError: a pattern matches no layer, or a group size does not divide a layer's inputs.
    """
    plan = Plan()
    roles = {HEAD: find_heads(graph, linears), ROUTER: find_routers(graph, linears)}
    hits = dict.fromkeys([*patterns, *ignore], 0)
    for weight, linear in {lin.weight: lin for lin in linears}.items():
        matched = [p for p in patterns if _matches(p, linear, roles)]
        ignored = [p for p in ignore if _matches(p, linear, roles)]
        for p in matched + ignored:
            hits[p] += 1
        scheme = patterns[matched[-1]] if matched else None
        if ignored:
            plan.floats[weight] = f"ignored by {ignored[-1]!r}"
        elif scheme is None:
            plan.floats[weight] = f"kept in float by {matched[-1]!r}" if matched else "no pattern matches it"
        else:
            _check_groups(graph, linear, scheme)
            plan.schemes[weight] = scheme
    names = sorted(lin.name for lin in linears)
    for pattern, count in hits.items():
        if whole and not count and pattern not in roles:
            known = f"its {len(names)} layers are {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
            raise RecipeError(
                f"recipe: pattern {pattern!r} matches no layer of {type(graph.module).__name__}; "
                f"{known if names else 'it has no linear layer'}"
            )
    return plan


def untie(graph: Graph, linears: Sequence[Linear], plan: Plan) -> None:
    """Gives a layer that will be quantized its own copy of a weight that something else than a linear also reads.

    The capture reads a tied weight under one of its names, whoever uses it; afterwards the layer reads its own copy
    under its own name, and the others read the float weight under theirs.
    """
    products = {lin.node for lin in linears}
    wanted = dict(plan.schemes)  # of each weight; several layers may share one
    for linear in linears:
        if linear.weight not in wanted:
            continue
        tied = [u for u in graph.uses(linear.weight) if not _ends_in(graph, u, products)]
        if not tied:
            continue
        home = layer_path(linear.node)
        module = graph.module.get_submodule(home)
        name = f"{home}.weight"
        aliases = [n for n in _names_of(graph, linear.weight) if n != name]
        scheme = wanted[linear.weight]
        plan.schemes.pop(linear.weight, None)
        if not isinstance(module, nn.Linear) or not aliases:
            plan.floats[linear.weight] = (
                f"its weight is also used by {', '.join(layer_path(u) or u.name for u in tied)}"
            )
            continue
        copied = graph.attr(linear.weight).detach().clone()
        for user in tied:
            old = next(n for n in user.all_input_nodes if n.op == "get_attr" and str(n.target) in {name, *aliases})
            with graph.fx.inserting_before(user):
                user.replace_input_with(old, graph.fx.create_node("get_attr", aliases[0]))
        old = next(n for n in linear.node.all_input_nodes if n.op == "get_attr" and str(n.target) == linear.weight)
        linear.node.replace_input_with(old, graph.add_parameter(name, copied, before=linear.node))
        linear.name, linear.weight = home, name
        plan.schemes[name] = scheme
        plan.notes.append(f"{home}: untied from {aliases[0]}, which keeps the float weight")


def _ends_in(graph: Graph, user: fx.Node, products: set[fx.Node]) -> bool:
    """Whether a reader of a weight is a product, or a transpose or cast that only products read."""
    if operand(graph, user) is None:
        return user in products
    return all(_ends_in(graph, u, products) for u in user.users)


def _names_of(graph: Graph, name: str) -> list[str]:
    """Every name of a parameter in the user's module."""
    value = graph.attr(name)
    return [n for n, p in graph.module.named_parameters(remove_duplicate=False) if p is value]


def find_heads(graph: Graph, linears: Sequence[Linear]) -> set[str]:
    """Weights of linears outside all blocks whose value reaches the output through no other linear."""
    outside = {n for s in graph.segments() if s.name == "outside" for n in s.nodes}
    return {
        lin.weight
        for lin in linears
        if lin.node in outside and _reaches(graph, linears, lin, lambda n: n.op == "output")
    }


def find_routers(graph: Graph, linears: Sequence[Linear]) -> set[str]:
    """Weights of linears whose value chooses experts: it reaches a top-k through no other linear."""
    return {lin.weight for lin in linears if _reaches(graph, linears, lin, lambda n: n.target is aten.topk.default)}


def _reaches(graph: Graph, linears: Sequence[Linear], start: Linear, goal) -> bool:  # type: ignore[no-untyped-def]
    products = {lin.node for lin in linears}
    queue, seen = [start.y], {start.y}
    while queue:
        for user in queue.pop().users:
            if goal(user):
                return True
            if user not in seen and user not in products:
                seen.add(user)
                queue.append(user)
    return False


def _matches(pattern: str, linear: Linear, roles: Mapping[str, set[str]]) -> bool:
    if pattern in roles:
        return linear.weight in roles[pattern]
    if pattern.startswith("@"):
        raise RecipeError(f"recipe: unknown role {pattern!r}; use {', '.join(roles)}")
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], linear.name) is not None
        except re.error as e:
            raise RecipeError(f"recipe: {pattern!r} is not a regular expression: {e}") from None
    return fnmatch.fnmatchcase(linear.name, pattern) or fnmatch.fnmatchcase(linear.name, f"*.{pattern}")


def _check_groups(graph: Graph, linear: Linear, scheme: Scheme) -> None:
    columns = linear.shape(graph)[-1]
    try:
        scheme.weight.groups(columns)
    except ValueError:
        size = scheme.weight.block[1]
        fits = [g for g in (128, 64, 32, 16) if columns % g == 0]
        advice = f"use group_size {fits[0]}" if fits else "use one scale per channel (W4A16_CHANNEL)"
        raise RecipeError(
            f"recipe: {linear.name} has {columns} inputs, which group_size {size} does not divide; {advice}, or "
            "ignore it"
        ) from None
