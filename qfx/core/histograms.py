"""Histograms of a whole activation, and the clipping ranges that they yield.

The edges of the bins depend on the data's extremes at most, not on its order, so shards merge
exactly. The linear histogram has bins of a power-of-two width at multiples of that width, and joins
neighbours when the range outgrows it; the logarithmic one has the floats of few mantissa bits.
Counts are int64 on the CPU: they are small, and reading them costs one transfer anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

from qfx.core.qtensor import fake_quantize, scale_from_range
from qfx.core.spec import QSpec
from qfx.core.statistic import Range, Statistic

CHUNK = 8192
"""Tokens that are cast to float64 at a time."""
POINTS = 4
"""Points of a bin at which the search takes the error: a bin may be wider than a step."""
FACTORS = 2.0 ** torch.linspace(-10, 0, 128, device="cpu")
"""Shares of the full range that the search tries first; it refines between the best's neighbours.
Outliers of 100 times the rest make the best share small, hence the geometric steps."""
FINER = torch.linspace(0, 1, 17, device="cpu")
MANTISSA = 6
"""Mantissa bits of a percentile's bins: a bin is at most 1/64 of its value wide."""
BINS, SHIFT = 2 ** (9 + MANTISSA), 23 - MANTISSA


class Bins(NamedTuple):
    """Counts int64 `[n]`, and edges float64 `[n + 1]`."""

    counts: Tensor
    edges: Tensor


@dataclass(eq=False, repr=False)
class Histogram(Statistic):
    """Counts of all values in at most `bins` bins, of the finest power-of-two width that fits.

    Args:
        bins: at least 2; the values spread over more than half of them.
    """

    bins: int = 2048
    _counts: Tensor = field(init=False)
    _exp: int = field(init=False)
    _lo: float = field(init=False)
    _hi: float = field(init=False)

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"Histogram: {self.bins} bins; use at least 2")

    def _add(self, rows: Tensor) -> None:
        lo, hi = (float(end) for end in rows.aminmax())
        exp = self._fit(lo, hi)
        first = math.floor(lo / 2.0**exp)
        counts = torch.zeros(self.bins, dtype=torch.int64, device=rows.device)
        for chunk in rows.split(CHUNK):
            bins = (chunk.flatten().double() / 2.0**exp).floor().long() - first
            counts += bins.bincount(minlength=self.bins)
        self._join(counts.cpu(), exp, lo, hi)

    def _merge(self, other: Self) -> None:
        self._join(other._counts, other._exp, other._lo, other._hi)

    def _fit(self, lo: float, hi: float) -> int:
        """The least exponent of a width at which lo to hi is at most `bins` bins.

        A wider range never has a lesser one, so that of the union suits every shard.
        """
        # 30 bits below the largest magnitude is finer than float32, and indices stay exact
        exp = max(math.frexp(max(-lo, hi))[1] - 30, -126)
        while math.floor(hi / 2.0**exp) - math.floor(lo / 2.0**exp) >= self.bins:
            exp += 1
        return exp

    def _join(self, counts: Tensor, exp: int, lo: float, hi: float) -> None:
        """Adds counts of bins of width `2**exp`, the first of which holds lo."""
        shards = [(counts, exp, lo)]
        if self.count:
            shards.append((self._counts, self._exp, self._lo))
            lo, hi = min(lo, self._lo), max(hi, self._hi)
        self._counts, self._exp = torch.zeros_like(counts), self._fit(lo, hi)
        for shard, fine, start in shards:
            used = shard.nonzero().flatten()
            bins = (used + math.floor(start / 2.0**fine)) >> min(self._exp - fine, 63)
            self._counts.index_add_(0, bins - math.floor(lo / 2.0**self._exp), shard[used])
        self._lo, self._hi = lo, hi

    def value(self) -> Bins:
        """The bins from the lowest to the highest value, on the CPU."""
        self._check_seen()
        first, last = (math.floor(end / 2.0**self._exp) for end in (self._lo, self._hi))
        edges = torch.arange(first, last + 2, dtype=torch.float64, device="cpu") * 2.0**self._exp
        return Bins(self._counts[: last - first + 1], edges)

    def range(self, spec: QSpec) -> Range:
        """The clipping range with the least mean squared error under a spec; CPU, float32 0-dim.

        It lies inside the extremes, by about half a step even on uniform data, whose last code can
        be rounded to from outside. Symmetric specs get a symmetric range.
        """
        counts, edges = self.value()
        used = counts.nonzero()
        inside = (torch.arange(POINTS, device="cpu") + 0.5) / POINTS
        points = (edges[used] + inside * 2.0**self._exp).clamp(self._lo, self._hi).float()
        weights = counts[used].double().expand_as(points)
        lo, hi = min(self._lo, 0.0), max(self._hi, 0.0)
        if spec.symmetric:
            lo, hi = min(lo, -hi), max(-lo, hi)
        return clip(points.flatten(), weights.flatten(), lo, hi, spec)


def clip(points: Tensor, weights: Tensor, lo: float, hi: float, spec: QSpec) -> Range:
    """The range within `[lo, hi]` with the least weighted squared error at some points.

    A symmetric spec shrinks both ends by one factor; otherwise each end is then moved in turn. The
    result is never worse than the full range at these points.

    Args:
        points: float32 `[n]`.
        weights: float64 `[n]`.
        lo: at most 0.
        hi: at least 0.
        spec: what is tried, per tensor.
    """

    def errors(los: Tensor, his: Tensor) -> Tensor:
        scale, zero = scale_from_range(lo * los, hi * his, spec)
        zero = None if zero is None else zero[:, None]
        values = points.expand(len(los), -1)
        return (fake_quantize(values, scale[:, None], zero, spec) - values).double() ** 2 @ weights

    a = b = FACTORS[-1]
    turns = [(True, True)] if spec.symmetric else [(True, True), *[(True, False), (False, True)] * 2]
    for move_lo, move_hi in turns:
        tries = torch.stack([*FACTORS, a if move_lo else b]).sort().values
        for _ in range(2):
            los = tries if move_lo else a.expand_as(tries)
            his = tries if move_hi else b.expand_as(tries)
            i = int(errors(los, his).argmin())
            below, above = tries[max(i - 1, 0)], tries[min(i + 1, len(tries) - 1)]
            tries = torch.cat([below.lerp(tries[i], FINER), tries[i].lerp(above, FINER)])
        a, b = los[i], his[i]
    return Range(lo * a, hi * b)


@dataclass(eq=False, repr=False)
class Percentile(Statistic):
    """The range between the quantiles `1 - p/100` and `p/100` of all values.

    The bins are the floats with six mantissa bits, so an outlier costs no resolution: a quantile is
    right to 1/64 of itself, and the extremes are exact. 256 KiB.

    Args:
        p: percent of the values that the top of the range covers, in (50, 100].
    """

    p: float = 99.99
    _counts: Tensor = field(init=False)
    _lo: Tensor = field(init=False)
    _hi: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if not 50 < self.p <= 100:
            raise ValueError(f"Percentile: p = {self.p}; use a percentage in (50, 100]")

    def _add(self, rows: Tensor) -> None:
        bins = _ordered(rows.flatten().float().view(torch.int32)) >> SHIFT
        counts = (bins + BINS // 2).bincount(minlength=BINS).cpu()
        self._join(counts, rows.amin().float().cpu(), rows.amax().float().cpu())

    def _merge(self, other: Self) -> None:
        self._join(other._counts, other._lo, other._hi)

    def _join(self, counts: Tensor, lo: Tensor, hi: Tensor) -> None:
        if self.count:
            counts = self._counts + counts
            lo, hi = torch.minimum(self._lo, lo), torch.maximum(self._hi, hi)
        self._counts, self._lo, self._hi = counts, lo, hi

    def value(self) -> Range:
        """The two quantiles, float32 0-dim on the CPU."""
        self._check_seen()
        return Range(self.quantile(1 - self.p / 100), self.quantile(self.p / 100))

    def range(self, spec: QSpec | None = None) -> Range:
        return self.value()

    def quantile(self, q: float) -> Tensor:
        """The value of rank `q (n - 1)`, linear between ranks as in `torch.quantile`."""
        self._check_seen()
        rank = q * (int(self._counts.sum()) - 1)
        below, above = self._ranked(math.floor(rank)), self._ranked(math.ceil(rank))
        return below.lerp(above, rank % 1)

    def _ranked(self, rank: int) -> Tensor:
        """The value of one rank, taking those of a bin as evenly spread; exact at both ends."""
        ends = self._counts.cumsum(0)
        if rank in (0, int(ends[-1]) - 1):
            return self._hi if rank else self._lo
        i = int(torch.searchsorted(ends, rank, right=True))
        first = (i - BINS // 2) << SHIFT
        keys = torch.tensor([first, first + (1 << SHIFT) - 1], dtype=torch.int32, device="cpu")
        lo, hi = _ordered(keys).view(torch.float32)
        share = (rank - int(ends[i] - self._counts[i]) + 0.5) / int(self._counts[i])
        return lo.lerp(hi, share).clamp(self._lo, self._hi)


def _ordered(bits: Tensor) -> Tensor:
    """Maps the bits of float32 values to integers in the values' order; its own inverse.

    Non-negative floats are in the order of their bits, negative ones in the reverse.
    """
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
