"""Linears that read the same value, computed as one: its weight is theirs, one below the other.

The module tree stays as it is. The first linear computes the whole when it is called and keeps the others' shares of
the output until they ask for them, with the very tensor that it was called with. Whoever comes with another tensor
computes the whole anew: whatever a caller does, each linear gives what it gave alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.online import Online
from qfx.core.spec import Scheme
from qfx.kernels.pack import kernel_scale, plain_scale, store_scale
from qfx.modules.kernels import Stored
from qfx.modules.linear import QLinear
from qfx.modules.state import BUFFERS

WHOLE = "merged"
"""Name of the merged linear in the module of the first."""


class Whole(QLinear):
    """A merged linear. It has no name of its own in a `state_dict`: what it holds is its members'."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


class Group:
    """What the members of a merged linear share.

    Attributes:
        whole: the merged linear; a submodule of the first member.
        members: in the order in which they are called.
        sizes: output channels of each.
        held: the last input of the first member, its version, and the shares of the output; None once all are taken.
    """

    def __init__(self, whole: Whole, members: Sequence[QLinear]) -> None:
        self.whole, self.members = whole, tuple(members)
        self.sizes = [m.out_features for m in members]
        self.held: tuple[Tensor, int, Sequence[Tensor]] | None = None

    def take(self, index: int, x: Tensor) -> Tensor:
        """The output of one member."""
        held, last = self.held, index == len(self.sizes) - 1
        if index and held is not None and held[0] is x and held[1] == _version(x):
            if last:
                self.held = None
            return held[2][index]
        parts = self.whole(x).split(self.sizes, -1)
        if not index:
            self.held = (x, _version(x), parts)
        return parts[index]

    def __getstate__(self) -> dict[str, Any]:
        """For copies: no values of a call."""
        return {**self.__dict__, "held": None}


class Share:
    """One member's share; the `Part` of `QLinear`."""

    def __init__(self, group: Group, index: int) -> None:
        self.group, self.index = group, index

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.take(self.index, x)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.group.whole.device

    def _rows(self) -> slice:
        start = sum(self.group.sizes[: self.index])
        return slice(start, start + self.group.sizes[self.index])

    def stored(self) -> Stored:
        """The member's rows; views of the merged weight if that is in its stored layout."""
        weight, rows = self.group.whole.stored(), self._rows()
        scheme = self.group.members[self.index].scheme
        if _by_row(scheme):
            return {key: t if t is None or key == "g_idx" else t[rows] for key, t in weight.items()}
        one = slice(rows.start, rows.start + 1) if _per_tensor(scheme) else rows
        scale, zero = weight["scale"], weight["zero"]
        assert weight["codes"] is not None and scale is not None
        plain = {
            "codes": weight["codes"][rows],
            "scale": scale[one],
            "zero": None if zero is None else zero[one],
            "g_idx": weight["g_idx"],
        }
        return store_scale(plain, scheme.weight)

    def load(self, stored: Stored, error_msgs: list[str]) -> None:
        """Writes the member's rows, bias and input scale into the merged linear, in place."""
        group, rows = self.group, self._rows()
        whole, member = group.whole, group.members[self.index]
        weight = {key: None if t is None else t.clone() for key, t in whole.stored().items()}
        plain = stored if _by_row(member.scheme) else plain_scale(stored, member.scheme.weight)
        for key, value in plain.items():
            if (target := weight[key]) is not None and value is not None:
                (target if key == "g_idx" else target[rows]).copy_(value)
        kernel = whole.kernel
        whole.take_weight()
        whole.put_weight(weight)
        whole.use_kernel(kernel)
        _copy_inputs(whole, member, rows)
        if self.index == len(group.sizes) - 1 and (reason := unlike(group.members)):
            error_msgs.append(f"the state dict gives merged linears values that cannot be merged: {reason}")


def unlike(members: Sequence[QLinear]) -> str | None:
    """Why these linears, called with the same value, cannot be computed as one; None if they can."""
    first = members[0]
    for other in members[1:]:
        for what, of in _FORM.items():
            if of(first) != of(other):
                return f"another {what}"
        pairs = [
            ("input scale", first.input_scale, other.input_scale),
            ("zero point", first.input_zero, other.input_zero),
        ]
        pairs.append(("order of groups (g_idx)", first.stored()["g_idx"], other.stored()["g_idx"]))
        for what, a, b in pairs:
            if a is not None and b is not None and not torch.equal(a, b):
                return f"another {what}"
    for member in members if first.scheme.weight.scale else ():
        try:
            kernel_scale(member.stored(), member.scheme.weight)
        except KernelError:
            return "codes of scales that qfx would not give"
    return None


_FORM: dict[str, Callable[[QLinear], Any]] = {
    "scheme": lambda m: m.scheme,
    "number of input channels": lambda m: m.in_features,
    "dtype": lambda m: m.dtype,
    "device": lambda m: m.device,
    "form: only one has a bias": lambda m: m.bias is not None,
    "form: only one has an order of groups": lambda m: m.has_g_idx,
}


def merge(members: Sequence[QLinear]) -> Group:
    """Makes one linear of those that are called with the same value, in this order.

    The members keep their biases and input scales, of which the merged one has a copy; their weights move there.

    Raises:
        KernelError: they are not alike.
    """
    first = members[0]
    if any(m.part is not None for m in members) or len({id(m) for m in members}) < max(2, len(members)):
        raise KernelError("lower: merge takes two or more different linears that are not merged")
    if any(isinstance(m, Online) for m in members):
        raise KernelError("lower: a linear that maps its input at run time cannot be merged")
    if reason := unlike(members):
        raise KernelError(f"lower: linears cannot be merged: {reason}")
    form = {"bias": first.bias is not None, "g_idx": first.has_g_idx, "dtype": first.dtype}
    scheme = _whole_scheme(first.scheme)
    out = sum(m.out_features for m in members)
    whole = Whole(first.in_features, out, scheme, device="meta", **form)  # type: ignore[arg-type]
    weights = [_spread(m) for m in members]
    joined = {key: _join([w.get(key) for w in weights]) for key in BUFFERS}
    joined["g_idx"] = weights[0]["g_idx"]
    del weights
    for member in members:
        member.take_weight()
    whole.take_weight()
    whole.put_weight(joined)
    for name in ("bias", "input_scale", "input_zero"):
        if name in whole._buffers:
            value = first.get_buffer(name)
            whole._buffers[name] = _join([m.get_buffer(name) for m in members]) if name == "bias" else value.clone()
    whole.train(first.training)
    group = Group(whole, members)
    for index, member in enumerate(members):
        member.part = Share(group, index)
    first.add_module(WHOLE, whole)
    return group


def unmerge(group: Group) -> None:
    """Takes a merge back: every member has a weight of its own again, as it is stored."""
    weights = [m.stored() for m in group.members]
    for member, weight in zip(group.members, weights, strict=True):
        member.part = None
        member.put_weight({key: None if t is None else t.clone() for key, t in weight.items()})
    del group.members[0]._modules[WHOLE]
    group.held = None


def _copy_inputs(whole: QLinear, member: QLinear, rows: slice) -> None:
    if whole.bias is not None and member.bias is not None:
        whole.bias[rows].copy_(member.bias)
    for a, b in ((whole.input_scale, member.input_scale), (whole.input_zero, member.input_zero)):
        if a is not None and b is not None:
            a.copy_(b)


def _whole_scheme(scheme: Scheme) -> Scheme:
    """One scale per tensor of each member is one per row of the whole.

    Quantized scales are float32 there, unless a row has them quantized on its own.
    """
    rows = 1 if scheme.weight.block[0] == -1 else scheme.weight.block[0]
    inner = scheme.weight.scale if _by_row(scheme) else None
    weight = dataclasses.replace(scheme.weight, block=(rows, scheme.weight.block[1]), scale=inner)
    return dataclasses.replace(scheme, weight=weight)


def _by_row(scheme: Scheme) -> bool:
    """Whether the scales are quantized, those of each row on their own: all that is stored has the weight's rows."""
    inner = scheme.weight.scale
    return inner is not None and inner.block == (1, -1) and scheme.weight.block[0] == 1


def _per_tensor(scheme: Scheme) -> bool:
    return scheme.weight.block[0] == -1


def _spread(member: QLinear) -> dict[str, Tensor | None]:
    weight = kernel_scale(member.stored(), member.scheme.weight)
    if _by_row(member.scheme):
        return dict(member.stored())
    if _per_tensor(member.scheme):
        for key in ("scale", "zero"):
            if (value := weight[key]) is not None:
                weight[key] = value.expand(member.out_features, -1)
    return weight


def _join(values: Sequence[Tensor | None]) -> Tensor | None:
    given = [v for v in values if v is not None]
    return torch.cat(given) if given else None


def _version(x: Tensor) -> int:
    """Counts writes into a tensor; 0 where that is not to be had (under a tracer, no write is hidden anyway)."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
