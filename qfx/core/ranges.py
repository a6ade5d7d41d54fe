"""One range for a whole activation, as a static per-tensor scale needs; averages over batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, Self, runtime_checkable

from torch import Tensor

from qfx.core.spec import QSpec
from qfx.core.statistic import Range, Statistic


@runtime_checkable
class Ranged(Protocol):
    """A statistic that yields a range for the whole tensor."""

    def range(self, spec: QSpec) -> Range: ...


def activation_range(stat: Statistic, spec: QSpec) -> Range:
    """The range that a static per-tensor spec covers, in the way of the statistic.

    Returns:
        lo and hi, float32 0-dim, ready for `scale_from_range`; lo is at most hi.

    Raises:
        ValueError: the spec is dynamic or not per tensor.
        TypeError: the statistic has no range for the whole tensor (Mean, Hessian, Inputs).
        CalibrationError: the statistic has seen no token.
    """
    if spec.dynamic or spec.block != (-1, -1):
        raise ValueError(f"range: {spec} is not static per tensor; it has no calibrated range")
    if not isinstance(stat, Ranged):
        raise TypeError(f"range: {stat!r} has none; use MinMax, Histogram, Percentile, ...")
    return stat.range(spec)


@dataclass(eq=False, repr=False)
class _BatchRange(Statistic):
    """Extremes of whole batches, float64 0-dim; a batch is what one `update` gets."""

    _batches: int = field(default=0, init=False)
    _lo: Tensor = field(init=False)
    _hi: Tensor = field(init=False)

    def range(self, spec: QSpec | None = None) -> Range:
        return self.value()

    def value(self) -> Range:
        self._check_seen()
        return Range(self._lo.float(), self._hi.float())


@dataclass(eq=False, repr=False)
class MovingAverage(_BatchRange):
    """The exponential moving average of the extremes of batches, `r ← (1 - m) r + m r_batch`.

    It depends on the order: merge shards in the order of their batches. Then it equals one pass.

    Args:
        momentum: m, the weight of a new batch, in (0, 1].
    """

    momentum: float = 0.01
    _first: Range = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise ValueError(f"MovingAverage: momentum {self.momentum}; use one in (0, 1]")

    def _add(self, rows: Tensor) -> None:
        lo, hi = rows.amin().double(), rows.amax().double()
        if not self.count:
            self._first = Range(lo, hi)
            self._lo, self._hi = lo, hi
        self._lo, self._hi = self._lo.lerp(lo, self.momentum), self._hi.lerp(hi, self.momentum)
        self._batches += 1

    def _merge(self, other: Self) -> None:
        # The other average began at its first batch; in one pass it begins at ours.
        left = (1 - self.momentum) ** other._batches
        to = self._lo.device
        self._lo = other._lo.to(to) + left * (self._lo - other._first.lo.to(to))
        self._hi = other._hi.to(to) + left * (self._hi - other._first.hi.to(to))
        self._batches += other._batches


@dataclass(eq=False, repr=False)
class AverageRange(_BatchRange):
    """The mean of the extremes of batches, each batch with the same weight."""

    def _add(self, rows: Tensor) -> None:
        self._join(rows.amin().double(), rows.amax().double(), 1)

    def _merge(self, other: Self) -> None:
        self._join(other._lo, other._hi, other._batches)

    def _join(self, lo: Tensor, hi: Tensor, batches: int) -> None:
        self._batches += batches
        if self.count:
            share = batches / self._batches
            lo = self._lo.lerp(lo.to(self._lo.device), share)
            hi = self._hi.lerp(hi.to(self._hi.device), share)
        self._lo, self._hi = lo, hi
