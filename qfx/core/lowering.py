"""What lowering did for speed: which kernel computes each layer, which layers were merged, and why. Plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .report import Miss


@dataclass
class LoweredLayer:
    """One quantized linear.

    Attributes:
        name: path of the module.
        scheme: name of its scheme.
        kernel: what computes it.
        reason: why that one.
        merged: names of the linears that are computed together with it; empty if it is computed alone.
    """

    name: str
    scheme: str
    kernel: str
    reason: str
    merged: list[str] = field(default_factory=list)


@dataclass
class LoweringReport:
    """The whole of it.

    Attributes:
        device: the kind of device that the kernels were chosen for.
        layers: every quantized linear, in the order of the module tree.
        misses: linears that read what others read, and were not merged with them, and why.
        notes: what concerns the model as a whole.
        error: relative difference of the model's output before and after; None if it was not run.
        layer_error: the largest relative difference (of norms) of a linear's output to what it gives, for the same
            input, by itself and from its weight as it is stored; None if none of them was compared.
    """

    device: str
    layers: list[LoweredLayer] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: float | None = None
    layer_error: float | None = None

    @property
    def groups(self) -> list[list[str]]:
        """The names of each merged linear's members, the first of them first."""
        return [layer.merged for layer in self.layers if layer.merged and layer.merged[0] == layer.name]

    def kernels(self) -> dict[str, int]:
        """How many layers each kernel computes, in order of first appearance."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.kernel] = counts.get(layer.kernel, 0) + 1
        return counts

    def headline(self) -> str:
        """The result in one line."""
        counts = ", ".join(f"{count} × {kernel}" for kernel, count in self.kernels().items())
        members = sum(map(len, self.groups))
        return (
            f"lowered {len(self.layers)} linears for {self.device} ({counts or 'none'}); "
            f"{members} of them merged into {len(self.groups)}"
        )

    def __str__(self) -> str:
        misses = [f"  not merged: {miss.where}: {miss.why}" for miss in self.misses]
        return "\n".join([self.headline(), *misses, *(f"  note: {text}" for text in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return asdict(self)
