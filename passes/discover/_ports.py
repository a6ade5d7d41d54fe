"""The parameters that can take a map: norm gains found in the graph, and whether a linear can take a bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qfx.core.graph import Env, Graph, layer_path
from qfx.core.linear import Linear
from qfx.core.site import Gain, Writer
from qfx.passes.discover._operand import operand

aten = torch.ops.aten
_NORMS = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2, None)}


@dataclass(frozen=True)
class Proposal:
    """A value and the norm that writes it."""

    value: fx.Node
    writer: Writer


def norm_writers(graph: Graph) -> Iterator[Proposal]:
    """Every multiplication of the last axis by a gain, with the bias that may follow."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _NORMS:
            at, bias_at = _NORMS[node.target]
            gain = find_gain(graph, node.args[at]) if len(node.args) > at else None
            bias = operand(graph, node.args[bias_at]) if bias_at and len(node.args) > bias_at else None
            if gain is not None:
                yield Proposal(node, Writer(gain=gain, norm_bias=bias.name if bias else None))
        elif node.target is aten.mul.Tensor:
            for gain_arg, other in (node.args, node.args[::-1]):
                val = node.meta.get("val")
                if not isinstance(val, Tensor) or val.dim() < 2:
                    continue
                gain = find_gain(graph, gain_arg)
                if gain is not None and graph.attr(gain.param).shape == val.shape[-1:] and not _constant(graph, other):
                    value, added = _following_bias(graph, node)
                    yield Proposal(value, Writer(gain=gain, norm_bias=added))
                    break


def find_gain(graph: Graph, value: object) -> Gain | None:
    """The parameter behind a gain, if that is an affine function of one 1-D parameter (`w`, `1 + w`, a cast of it)."""
    chain = _chain(graph, value)
    if chain is None:
        return None
    leaf, nodes = chain
    name = str(leaf.target)
    parameter = graph.attr(name)
    if parameter.dim() != 1 or not graph.is_parameter(name):
        return None
    if parameter.device.type == "meta":
        return Gain(name) if not nodes else None

    def gain(w: Tensor) -> Tensor:
        env: Env = {leaf: w}
        for n in nodes:
            env[n] = graph.value(n, env)
        return env[nodes[-1]] if nodes else w

    zero = torch.zeros_like(parameter)
    offset, at_one, at_three = gain(zero), gain(zero + 1), gain(zero + 3)
    slope = at_one - offset
    if at_one.shape != parameter.shape or not torch.allclose(at_three, offset + 3 * slope):
        return None
    a, c = slope.double().mean().item(), offset.double().mean().item()
    uniform = torch.allclose(slope.double(), torch.full_like(slope, a, dtype=torch.float64)) and torch.allclose(
        offset.double(), torch.full_like(offset, c, dtype=torch.float64)
    )
    return Gain(name, a, c) if uniform and a != 0 else None


def other_uses(graph: Graph, name: str, mine: fx.Node | None = None) -> list[str]:
    """The ops that read a parameter besides one, also under another name or through a transpose.

    Args:
        graph: the graph.
        name: the parameter.
        mine: the one to leave out; None leaves out the first.
    """
    users: list[fx.Node] = []
    queue = graph.uses(name)
    while queue:
        user = queue.pop(0)
        if operand(graph, user) is not None:  # a transpose or cast: whoever reads that
            queue = list(user.users) + queue
        else:
            users.append(user)
    if mine is None and users:
        mine = users[0]
    return [layer_path(u) or u.name for u in users if u is not mine]


def missing_bias(graph: Graph, linear: Linear) -> str | None:
    """Why a linear has no bias and cannot be given one; None if it has or can."""
    if linear.foreign_bias:
        return f"the bias of {linear.name} is not a parameter of one axis"
    if linear.bias is not None:
        uses = other_uses(graph, linear.bias)
        return f"{linear.bias} is also used by {', '.join(uses)}" if uses else None
    try:
        module = graph.module.get_submodule(linear.name)
    except AttributeError:
        return f"{linear.name} is a parameter of its module's own forward, which adds no bias"
    if layer_path(linear.node) != linear.name or not _would_add_bias(module):
        return f"{linear.name} has no bias, and its module's forward adds none"
    return None


def _would_add_bias(module: nn.Module) -> bool:
    """Whether a module without a bias adds one as soon as it has it, found out by giving it one for a moment."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or module.bias is not None or not isinstance(weight, Tensor):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    x = torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device)
    bias = torch.linspace(1, 2, module.out_features, dtype=weight.dtype, device=weight.device)
    try:
        module.bias = nn.Parameter(bias, requires_grad=False)
        y = module(x)
        return isinstance(y, Tensor) and y.shape[-1:] == bias.shape and torch.equal(y.reshape(-1), bias)
    except Exception:  # whatever its forward makes of it: then it cannot take one
        return False
    finally:
        module.bias = None  # type: ignore[assignment]


def _chain(graph: Graph, value: object) -> tuple[fx.Node, list[fx.Node]] | None:
    """The get_attr that a value is computed from alone, and the ops on the way; each must have one reader."""
    nodes: list[fx.Node] = []
    while isinstance(value, fx.Node) and value.op == "call_function":
        inputs = value.all_input_nodes
        if len(inputs) != 1 or len(value.users) != 1 or len(nodes) > 5:
            return None
        nodes.append(value)
        value = inputs[0]
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    if not isinstance(graph.attr(str(value.target)), Tensor):
        return None
    return value, nodes[::-1]


def _constant(graph: Graph, value: object) -> bool:
    return not isinstance(value, fx.Node) or _chain(graph, value) is not None


def _following_bias(graph: Graph, node: fx.Node) -> tuple[fx.Node, str | None]:
    if len(node.users) != 1:
        return node, None
    (user,) = node.users
    if user.target is not aten.add.Tensor:
        return node, None
    other = operand(graph, user.args[1] if user.args[0] is node else user.args[0])
    if other is None or len(other.dims) != 1 or graph.attr(other.name).shape != node.meta["val"].shape[-1:]:
        return node, None
    return user, other.name
