"""Statistics of channels: extremes, means, and the Hessian of the linears that read the value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from qfx.core.spec import QSpec
from qfx.core.statistic import Means, Range, Statistic

CHUNK = 8192
"""Tokens that the Hessian casts at a time: a batch of a wide layer in float32 may not fit twice."""


@dataclass(eq=False, repr=False)
class MinMax(Statistic):
    """The least and the greatest value of each channel."""

    _lo: Tensor = field(init=False)
    _hi: Tensor = field(init=False)

    def _add(self, rows: Tensor) -> None:
        self._extend(rows.amin(0).float(), rows.amax(0).float())

    def _merge(self, other: Self) -> None:
        self._extend(other._lo, other._hi)

    def _extend(self, lo: Tensor, hi: Tensor) -> None:
        if self.count:
            self._check_channels(self._lo, len(lo))
            lo = torch.minimum(self._lo, lo.to(self._lo.device))
            hi = torch.maximum(self._hi, hi.to(self._hi.device))
        self._lo, self._hi = lo, hi

    def value(self) -> Range:
        """The extremes of each channel, float32 `[channels]`."""
        self._check_seen()
        return Range(self._lo, self._hi)

    def range(self, spec: QSpec | None = None) -> Range:
        """The extremes of the tensor, 0-dim; they suit every spec."""
        lo, hi = self.value()
        return Range(lo.amin(), hi.amax())


@dataclass(eq=False, repr=False)
class AbsMax(Statistic):
    """The greatest magnitude of each channel (SmoothQuant, arXiv 2211.10438)."""

    _top: Tensor = field(init=False)

    def _add(self, rows: Tensor) -> None:
        self._extend(torch.maximum(rows.amax(0), -rows.amin(0)).float())

    def _merge(self, other: Self) -> None:
        self._extend(other._top)

    def _extend(self, top: Tensor) -> None:
        if self.count:
            self._check_channels(self._top, len(top))
            top = torch.maximum(self._top, top.to(self._top.device))
        self._top = top

    def value(self) -> Tensor:
        """`max |x|` of each channel, float32 `[channels]`."""
        self._check_seen()
        return self._top

    def range(self, spec: QSpec | None = None) -> Range:
        """Plus and minus the greatest magnitude of the tensor, 0-dim."""
        top = self.value().amax()
        return Range(-top, top)


@dataclass(eq=False, repr=False)
class Mean(Statistic):
    """The mean of x and of |x| in each channel (bias correction; AWQ, arXiv 2306.00978)."""

    _sum: Tensor = field(init=False)
    _abs: Tensor = field(init=False)

    def _add(self, rows: Tensor) -> None:
        self._extend(rows.sum(0, dtype=torch.float64), rows.abs().sum(0, dtype=torch.float64))

    def _merge(self, other: Self) -> None:
        self._extend(other._sum, other._abs)

    def _extend(self, total: Tensor, absolute: Tensor) -> None:
        if self.count:
            self._check_channels(self._sum, len(total))
            total = self._sum + total.to(self._sum.device)
            absolute = self._abs + absolute.to(self._abs.device)
        self._sum, self._abs = total, absolute

    def value(self) -> Means:
        self._check_seen()
        return Means((self._sum / self.count).float(), (self._abs / self.count).float())


@dataclass(eq=False, repr=False)
class Hessian(Statistic):
    """The Hessian of a linear's squared output error, `H = 2/N Σ x xᵀ` (GPTQ, arXiv 2210.17323).

    Args:
        precise: accumulate in float64 (half as fast on a CPU; slower still on most GPUs).
    """

    precise: bool = False
    _h: Tensor = field(init=False)
    _mu: Tensor = field(init=False)

    def _add(self, rows: Tensor) -> None:
        dtype = torch.float64 if self.precise else torch.float32
        if not self.count:
            self._h = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=dtype)
            self._mu = rows.new_zeros(rows.shape[1], dtype=dtype)
        self._check_channels(self._mu, rows.shape[1])
        total = self.count + len(rows)
        self._h.mul_(self.count / total)
        self._mu.mul_(self.count / total)
        with full_precision():
            for chunk in rows.split(CHUNK):
                x = chunk.to(dtype)
                self._h.addmm_(x.T, x, alpha=2 / total)
                self._mu.add_(x.sum(0), alpha=1 / total)

    def _merge(self, other: Self) -> None:
        self._check_channels(self._mu, len(other._mu))
        share = other.count / (self.count + other.count)
        self._h.lerp_(other._h.to(self._h.device), share)
        self._mu.lerp_(other._mu.to(self._mu.device), share)

    def value(self) -> Tensor:
        """H, `[channels, channels]`: the accumulator itself, so clone it before changing it."""
        self._check_seen()
        return self._h

    @property
    def mu(self) -> Tensor:
        """The mean of x, `[channels]`; the accumulator itself."""
        self._check_seen()
        return self._mu


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products as such: no TF32 on GPUs, no bfloat16 on CPUs, whatever the user chose."""
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    backends = (torch.backends.cuda.matmul, cpu)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
