"""Statistics that keep some tokens: chosen by position, so that shards merge and streams pair.

Each position has a pseudo-random rank that depends on the seed alone, and the tokens of least rank
are kept. So the sample does not depend on how the tokens were cut into batches, and two samples
with one seed of two values hold the same tokens (the float and the quantized input of a layer).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from qfx.core.spec import QSpec
from qfx.core.statistic import Range, Statistic


@dataclass(eq=False, repr=False)
class _Sample(Statistic):
    """Rows of a bounded, deterministic sample of tokens.

    A shard that begins in the middle is given its `start`; merged shards then equal one pass
    exactly. Shards that all start at 0 also merge into a fair sample, but not into that one.
    """

    max_tokens: int = 512
    seed: int = 0
    start: int = field(default=0, kw_only=True, compare=False)
    _rows: Tensor = field(init=False)
    _at: Tensor = field(init=False)
    _rank: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"{type(self).__name__}: max_tokens {self.max_tokens}; use at least 1")

    @property
    def positions(self) -> Tensor:
        """The positions of the kept tokens, ascending, int64 `[n]` on the CPU."""
        self._check_seen()
        return self._at

    def _choose(self, rows: Tensor) -> None:
        """Takes what belongs to the sample from the next tokens `[n, ...]`."""
        at = torch.arange(len(rows), device="cpu") + self.start + self.count
        rank = _ranks(at, self.seed)
        chosen = rank.sort().indices[: self.max_tokens]
        if self.count >= self.max_tokens:
            chosen = chosen[rank[chosen] < self._rank.max()]
        self._keep(rows[chosen.to(rows.device)].float(), at[chosen], rank[chosen])

    def _keep(self, rows: Tensor, at: Tensor, rank: Tensor) -> None:
        if self.count:
            self._check_channels(self._rows[0], rows.shape[1])
            rows = torch.cat([self._rows, rows.to(self._rows.device)])
            at, rank = torch.cat([self._at, at]), torch.cat([self._rank, rank])
        chosen = rank.sort(stable=True).indices[: self.max_tokens]
        chosen = chosen[at[chosen].sort(stable=True).indices]
        self._rows, self._at, self._rank = rows[chosen.to(rows.device)], at[chosen], rank[chosen]

    def _merge(self, other: Self) -> None:
        self._keep(other._rows, other._at, other._rank)


@dataclass(eq=False, repr=False)
class Inputs(_Sample):
    """A sample of tokens.

    Args:
        max_tokens: tokens kept at most; all are kept while there are no more.
        seed: chooses which.
        start: tokens that came before this shard.
    """

    def _add(self, rows: Tensor) -> None:
        self._choose(rows)

    def value(self) -> Tensor:
        """The kept tokens in the order of their positions, float32 `[n, channels]`."""
        self._check_seen()
        return self._rows


@dataclass(eq=False, repr=False)
class TokenExtremes(_Sample):
    """The extremes of each token, for token-wise clipping (Outlier Suppression, arXiv 2209.13325).

    Args:
        max_tokens: tokens kept at most; the extremes of the whole tensor are exact nevertheless.
        seed: chooses which.
        start: tokens that came before this shard.
    """

    max_tokens: int = 65536
    _lo: Tensor = field(init=False)
    _hi: Tensor = field(init=False)

    def _add(self, rows: Tensor) -> None:
        ends = torch.stack(rows.aminmax(dim=1), dim=1).float()
        self._choose(ends)
        self._extend(ends[:, 0].amin(), ends[:, 1].amax())

    def _merge(self, other: Self) -> None:
        super()._merge(other)
        self._extend(other._lo.to(self._lo.device), other._hi.to(self._lo.device))

    def _extend(self, lo: Tensor, hi: Tensor) -> None:
        if self.count:
            lo, hi = torch.minimum(self._lo, lo), torch.maximum(self._hi, hi)
        self._lo, self._hi = lo, hi

    def value(self) -> Range:
        """The least and the greatest value of each kept token, float32 `[n]`."""
        self._check_seen()
        return Range(self._rows[:, 0], self._rows[:, 1])

    def range(self, spec: QSpec | None = None) -> Range:
        """The extremes of the tensor, 0-dim."""
        self._check_seen()
        return Range(self._lo, self._hi)

    def clip(self, rho: float) -> Range:
        """The coarse clipping range that keeps a share of the tokens whole, 0-dim.

        `hi = max{u : u ≤ quantile(|u|, rho)}` over the tokens' maxima u, and lo likewise; rho = 1
        is the range of the tensor.

        Raises:
            ValueError: rho is not in (0, 1].
            CalibrationError: nothing was seen.
        """
        if not 0 < rho <= 1:
            raise ValueError(f"TokenExtremes: rho {rho}; use a share of tokens in (0, 1]")
        if rho == 1:
            return self.range()
        lo, hi = self.value()
        return Range(lo[lo >= -lo.abs().quantile(rho)].amin(), hi[hi <= hi.abs().quantile(rho)].amax())


def _ranks(at: Tensor, seed: int) -> Tensor:
    """SplitMix64 (Steele et al., 2014) of positions: a bijection of int64, so ranks do not tie."""
    z = at * _signed(0x9E3779B97F4A7C15) + _signed((seed + 1) * 0xD1342543DE82EF95)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _signed(value: int) -> int:
    """The int64 of the same low 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def _shift(z: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros; torch's brings in the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
