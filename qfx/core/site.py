"""Sites: one channel axis of the graph, and every parameter that meets it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from .linear import Linear


@dataclass(frozen=True, eq=False)
class Gain:
    """A 1-D parameter that multiplies the axis as `slope * parameter + offset` (offset 1 is a `1 + w` norm)."""

    param: str
    slope: float = 1.0
    offset: float = 0.0


@dataclass(eq=False)
class Writer:
    """What writes a site's channels.

    Attributes:
        gain: a norm's gain, if a norm writes.
        norm_bias: the bias parameter that the norm adds, if any.
        linear: the linear, if one writes; `rows` are then the rows of its weight that hold the site's channels, in
            order.
        rows: int64 `[channels]`; None means all.
    """

    gain: Gain | None = None
    norm_bias: str | None = None
    linear: Linear | None = None
    rows: Tensor | None = None

    @property
    def bias(self) -> str | None:
        """The bias parameter that is added to the axis, if any."""
        return self.linear.bias if self.linear is not None else self.norm_bias

    @property
    def name(self) -> str:
        """The layer's name."""
        if self.linear is not None:
            return self.linear.name
        assert self.gain is not None
        return self.gain.param.removesuffix(".weight")


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear that reads a site; `index[j]` is the site's channel that its input channel j holds, or -1 for none."""

    linear: Linear
    index: Tensor


@dataclass(eq=False)
class Site:
    """One channel axis.

    Attributes:
        name: the writer's layer name (with its rows, if they are a part).
        kind: `norm` (a norm's gain writes), `value` (a linear, through attention), or `inner` (a linear, through an
            MLP).
        value: the node that holds the channels after the writer.
        channels: how many.
        writer: the parameter(s) that write it.
        readers: every linear that reads it.
        folds: names of the maps that fold here without any cost at run time ("Diagonal", "SignedDiagonal", "Shift").
        why_not: for a map that does not fold, the reason.
        path: the nodes between the writer and its readers.
    """

    name: str
    kind: str
    value: fx.Node
    channels: int
    writer: Writer
    readers: tuple[Reader, ...]
    folds: set[str] = field(default_factory=set)
    why_not: dict[str, str] = field(default_factory=dict)
    path: tuple[fx.Node, ...] = ()
