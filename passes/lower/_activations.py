"""Recognizes an activation function by what it computes: ops between two values are run on numbers, and compared."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from qfx.kernels.int8_gemm import ACTIVATIONS
from qfx.passes.lower._rewrite import WRITTEN, alike, is_call, is_cast, is_written

aten = torch.ops.aten
_POINTWISE = {
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar, aten.pow.Tensor_Scalar),
    *(aten.neg.default, aten.square.default, aten.tanh.default, aten.sigmoid.default, aten.erf.default),
    *(aten.exp.default, aten.relu.default, aten.silu.default, aten.gelu.default, aten.clamp.default),
    *(aten.clamp_min.default, aten.reciprocal.default, aten.abs.default, aten.hardtanh.default),
}
_MOST = 12
"""Ops that a function may be spelled out in."""
_TOLERANCE = 1e-6
"""The two common forms of gelu are 5e-4 apart."""


class Activation(NamedTuple):
    """`y = f(x)`: x, the name of f, and the nodes that compute it, y among them."""

    x: fx.Node
    name: str
    nodes: set[fx.Node]


def find_activation(y: Any) -> Activation | None:
    """The activation function of which a value is the result, whichever ops spell it out."""
    inside: set[fx.Node] = set()
    ends = {y} if isinstance(y, fx.Node) else set()
    while ends and len(inside) < _MOST:
        node = max(ends)
        if not is_call(node, *_POINTWISE) and not is_cast(node):
            return None
        ends.remove(node)
        inside.add(node)
        ends |= set(node.all_input_nodes)
        if len(ends) == 1:
            (x,) = ends
            if (name := _name(sorted(inside), x)) is not None:
                if is_cast(x) and alike(x.args[0], y):  # computed in a wider dtype
                    return Activation(x.args[0], name, inside | {x})  # type: ignore[arg-type]
                return Activation(x, name, inside)
    return None


class Gated(NamedTuple):
    """`y = f(gate) · up`, or `y = f(gate)`: gate, up or None, and the name of f."""

    gate: fx.Node
    up: fx.Node | None
    name: str


def find_gated(y: fx.Node) -> Gated | str:
    """The gated product, or activation function, of which a value is the result; or why not ("" if nothing like it)."""
    found, up = find_activation(y), None
    if found is None and is_call(y, aten.mul.Tensor) and len(y.all_input_nodes) == 2:
        for left, right in (y.all_input_nodes, y.all_input_nodes[::-1]):
            act = find_activation(left)
            if found is None and act is not None and alike(act.x, right) and alike(y, right):
                found, up = act, right
    if found is None:
        return ""
    return WRITTEN if is_written(found.x) or is_written(up) else Gated(found.x, up, found.name)


def activation_of(x: fx.Node) -> tuple[fx.Node, str] | None:
    """The result, and the name, of an activation function of x, if nothing else reads x."""
    behind = [x]
    for y in behind:  # grows
        if y is not x and (found := find_activation(y)) is not None and found.x is x:
            within = all(set(n.users) <= found.nodes for n in (found.nodes | {x}) - {y})
            return (y, found.name) if within else None
        behind += [u for u in sorted(y.users) if u not in behind and (is_cast(u) or is_call(u, *_POINTWISE))]
        if len(behind) > _MOST + 1:
            break
    return None


def _name(nodes: list[fx.Node], x: fx.Node) -> str | None:
    points = torch.linspace(-8, 8, 321, dtype=torch.float64)
    env: dict[fx.Node, Tensor] = {x: points}
    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = args[0] if is_cast(node) else node.target(*args, **kwargs)  # type: ignore[assignment,operator]
    known = ((name, f(points)) for name, f in ACTIVATIONS.items() if name)
    return next((name for name, want in known if (env[nodes[-1]] - want).abs().max() < _TOLERANCE), None)
