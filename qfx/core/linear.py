"""One view over every product of an activation with a parameter, whichever op computes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .graph import Graph


@dataclass(eq=False)
class Linear:
    """A product of an activation and a parameter.

    Attributes:
        name: the layer's name: the parameter's, without a trailing `.weight`.
        node: the product.
        x: its input value, whose last axis is the contracted one.
        weight: the parameter's name.
        axes: which axes of the parameter are the (experts, out, in) axes; experts may be empty.
        bias: the name of the bias that the op or the add after it applies, if it is a plain parameter.
        y: the output value, after that add.
        offsets: int32 `[experts]`, the end of each expert's rows of x, for a grouped product.
        foreign_bias: the op adds a bias that is not a 1-D parameter, so that the rows cannot be mapped alone.
    """

    name: str
    node: fx.Node
    x: fx.Node
    weight: str
    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    bias: str | None
    y: fx.Node
    foreign_bias: bool = False
    offsets: fx.Node | None = None

    @property
    def experts(self) -> bool:
        """Whether the parameter stacks the weights of several experts."""
        return bool(self.axes[0])

    def read(self, graph: Graph) -> Tensor:
        """The weight as `[out, in]` or `[experts, out, in]` (a view where the layout allows it)."""
        return canonical(graph.attr(self.weight), self.axes)

    @torch.no_grad()
    def write(self, graph: Graph, value: Tensor) -> None:
        """Stores a canonical weight into the parameter, in place."""
        parameter = graph.attr(self.weight)
        order = [a for group in self.axes for a in group]
        sizes = [parameter.shape[a] for a in order]
        inverse = [order.index(i) for i in range(len(order))]
        parameter.data.copy_(value.reshape(sizes).permute(inverse))

    def shape(self, graph: Graph) -> list[int]:
        """Canonical sizes, [out, in] or [experts, out, in]."""
        return list(self.read(graph).shape)


def canonical(parameter: Tensor, axes: tuple[tuple[int, ...], ...]) -> Tensor:
    """Permutes and flattens a parameter to (experts,) out, in."""
    order = [a for group in axes for a in group]
    moved = parameter.detach().permute(order)
    sizes = [_prod([parameter.shape[a] for a in group]) for group in axes if group]
    return moved.reshape(sizes)


def _prod(values: list[int]) -> int:
    n = 1
    for v in values:
        n *= v
    return n
