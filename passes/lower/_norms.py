"""Finds normalizations over the last axis in a graph, as one op or spelled out."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qfx.passes.lower._rewrite import (
    WRITTEN,
    Report,
    alike,
    arguments,
    is_call,
    is_cast,
    is_constant,
    is_written,
    op_name,
    sole_user,
    value,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """`y = norm(x) · gain + bias`.

    Attributes:
        x: what is normalized.
        y: the result.
        first: the earliest of the nodes that compute it, after x.
        gain: a value of one axis that depends on parameters only, or None.
        bias: likewise.
        eps: added to the mean square: a number, or a node of one that the graph has as an input.
        center: whether the mean is subtracted first.
        cast_first: whether the normalized value is rounded to x's dtype before the gain.
        spelled: whether several ops compute it.
    """

    x: fx.Node
    y: fx.Node
    first: fx.Node
    gain: fx.Node | None
    bias: fx.Node | None
    eps: float | fx.Node
    center: bool
    cast_first: bool
    spelled: bool


def find_norms(graph: fx.Graph) -> list[Norm]:
    """Every normalization whose result has the dtype of its input, in order."""
    found = []
    for node in graph.nodes:
        if is_call(node, aten.layer_norm.default, aten.rms_norm.default):
            norm = _one_op(node)
        else:
            norm = _spelled(node) if is_call(node, aten.rsqrt.default) else None
        if norm is not None:
            a, b = value(norm.x), value(norm.y)
            if a is not None and b is not None and a.dtype == b.dtype:
                found.append(norm)
    return found


def summands(norm: Norm, miss: Report) -> tuple[fx.Node, fx.Node] | None:
    """The two summands of a norm's input, if the norm can compute the sum."""
    x = norm.x
    if not is_call(x, aten.add.Tensor) or x.kwargs or len(x.all_input_nodes) != 2:
        return None
    a, b = x.all_input_nodes
    if is_written(a) or is_written(b):
        miss(x, WRITTEN)
        return None
    if not (alike(a, b) and alike(a, x)):
        miss(x, "the summands in front of the norm differ in shape or dtype")
        return None
    if early := next((u for u in x.users if u < norm.first), None):
        miss(x, f"the sum in front of the norm is read before it, by {op_name(early)!r}")
        return None
    return a, b


def _one_op(node: fx.Node) -> Norm | None:
    args = arguments(node)
    if len(args["normalized_shape"]) != 1 or args["eps"] is None:
        return None
    center = node.target == aten.layer_norm.default
    return Norm(
        args["input"],
        node,
        node,
        args["weight"],
        args.get("bias"),
        args["eps"],
        center,
        cast_first=False,
        spelled=False,
    )


def _spelled(root: fx.Node) -> Norm | None:
    """From `rsqrt(mean(f²) + eps)`: backwards to f, which may be centered, forwards to the last gain, bias or cast."""
    added = root.args[0]
    if not is_call(added, aten.add.Tensor, aten.add.Scalar) or not _is_number(added.args[1]):  # type: ignore[union-attr]
        return None
    mean, eps = added.args  # type: ignore[union-attr]
    scaled, both = sole_user(root), _of_both(mean)
    if both is not None:
        square, f = both, next((n for n in scaled.all_input_nodes if n is not root), None) if scaled else None
        if f is None or not is_call(f, aten.sub.Tensor) or _of_both(f.args[1], 1) is not both:
            return None
    elif is_call(mean, aten.mean.dim) and _over_last_axis(mean):  # type: ignore[arg-type]
        square = mean.args[0]  # type: ignore[union-attr,assignment]
        f = _squared(square)
    else:
        return None
    if f is None or not is_call(scaled, aten.mul.Tensor) or set(scaled.all_input_nodes) != {f, root}:  # type: ignore[union-attr]
        return None
    assert scaled is not None
    first, source = square, f
    if center := both is not None or _centered(f):
        first, source = both or f.args[1], f.args[0]  # type: ignore[assignment]
    x = source.args[0] if is_cast(source) and _dtype(source) == torch.float32 else source
    assert isinstance(x, fx.Node) and isinstance(first, fx.Node)
    first = first if source is x else source
    y, gain, bias, cast_first, casts = scaled, None, None, False, _dtype(scaled) != _dtype(x)
    while (user := sole_user(y)) is not None:
        other = next((a for a in user.args if a is not y), None)
        if (is_cast(user) or is_call(user, aten.type_as.default)) and user.args[0] is y and _dtype(user) == _dtype(x):
            cast_first, casts = cast_first or (casts and gain is None), False
        elif gain is None and is_call(user, aten.mul.Tensor) and _per_channel(other, x):
            gain = other
        elif gain is not None and bias is None and is_call(user, aten.add.Tensor) and _per_channel(other, x):
            bias = other
        else:
            break
        y = user
    return Norm(x, y, first, gain, bias, eps, center, cast_first, spelled=True)  # type: ignore[arg-type]


def _of_both(node: Any, index: int = 0) -> fx.Node | None:
    """The op of which a value is the variance, or the mean, over the last axis."""
    if not is_call(node, operator.getitem) or node.args[1] != index:
        return None
    both = node.args[0]
    if not is_call(both, aten.var_mean.correction):
        return None
    args = arguments(both)
    return both if args["correction"] == 0 and _over_last_axis(both) else None


def _is_number(node: Any) -> bool:
    return isinstance(node.meta.get("val") if isinstance(node, fx.Node) else node, float | torch.SymFloat)


def _squared(node: Any) -> fx.Node | None:
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return node.args[0]
    if is_call(node, aten.square.default) or (is_call(node, aten.mul.Tensor) and node.args[0] is node.args[1]):
        return node.args[0]
    return None


def _centered(f: fx.Node) -> bool:
    """Whether a value is another one without its mean."""
    mean = f.args[1] if is_call(f, aten.sub.Tensor) and not f.kwargs else None
    return is_call(mean, aten.mean.dim) and mean.args[0] is f.args[0] and _over_last_axis(mean)  # type: ignore


def _over_last_axis(mean: fx.Node) -> bool:
    args, source = arguments(mean), value(mean.args[0])
    if source is None or source.dim() < 2:
        return False
    return bool(args["keepdim"]) and list(args["dim"]) in ([-1], [source.dim() - 1])


def _per_channel(node: Any, x: fx.Node) -> bool:
    v, like = value(node), value(x)
    return is_constant(node) and v is not None and like is not None and v.shape == like.shape[-1:]


def _dtype(node: fx.Node) -> torch.dtype | None:
    v = value(node)
    return None if v is None else v.dtype
