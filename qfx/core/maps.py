"""Maps: invertible changes of basis of one channel axis.

A map acts on values with the channels last, `x' = map(x)`. It reaches parameters in three ways: a parameter that
*writes* the axis takes the map on its rows (`W <- A W`), one that *reads* it takes the inverse on its columns (`W <- W
A^-1`), one that is *dual* to it takes the inverse transpose on its rows (`W <- A^-T W`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Diagonal:
    """`x' = x * scale`; scale is `[channels]`, never zero."""

    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Maps values `[..., channels]`."""
        return x * self.scale.to(x)

    def inverse(self) -> Diagonal:
        """The map that undoes this one."""
        return Diagonal(1 / self.scale)

    def then(self, other: Diagonal) -> Diagonal:
        """This map followed by another of its kind."""
        return Diagonal(self.scale * other.scale)

    def write(self, w: Tensor) -> Tensor:
        """`A W` for a writer `[channels, in]`."""
        return w * self.scale.to(w)[:, None]

    def read(self, w: Tensor) -> Tensor:
        """`W A^-1` for a reader `[..., channels]`."""
        return w / self.scale.to(w)

    def dual(self, w: Tensor) -> Tensor:
        """`A^-T W` for a dual `[channels, in]`."""
        return w / self.scale.to(w)[:, None]


@dataclass(frozen=True)
class Shift:
    """`x' = x - offset`; offset is `[channels]`. Its readers gain the bias `W offset`."""

    offset: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Maps values `[..., channels]`."""
        return x - self.offset.to(x)

    def inverse(self) -> Shift:
        """The map that undoes this one."""
        return Shift(-self.offset)

    def then(self, other: Shift) -> Shift:
        """This map followed by another of its kind."""
        return Shift(self.offset + other.offset)


@dataclass(frozen=True)
class Permute:
    """`x' = x[..., order]`; order is int64 `[channels]`."""

    order: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Maps values `[..., channels]`."""
        return x.index_select(-1, self.order)

    def inverse(self) -> Permute:
        """The map that undoes this one."""
        return Permute(torch.argsort(self.order))

    def then(self, other: Permute) -> Permute:
        """This map followed by another of its kind."""
        return Permute(self.order[other.order])

    def write(self, w: Tensor) -> Tensor:
        """`A W` for a writer `[channels, in]`."""
        return w.index_select(0, self.order)

    def read(self, w: Tensor) -> Tensor:
        """`W A^-1` for a reader `[..., channels]`."""
        return w.index_select(-1, self.order)

    dual = write


@dataclass(frozen=True)
class Rotate:
    """`x' = x Q`; Q is orthogonal `[channels, channels]`."""

    matrix: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Maps values `[..., channels]`."""
        return x @ self.matrix.to(x)

    def inverse(self) -> Rotate:
        """The map that undoes this one."""
        return Rotate(self.matrix.mT)

    def then(self, other: Rotate) -> Rotate:
        """This map followed by another of its kind."""
        return Rotate(self.matrix @ other.matrix)

    def write(self, w: Tensor) -> Tensor:
        """`A W` with A = Qᵀ for a writer `[channels, in]`."""
        return self.matrix.to(w).mT @ w

    def read(self, w: Tensor) -> Tensor:
        """`W A^-1` = `W Q` for a reader `[..., channels]`."""
        return w @ self.matrix.to(w)

    dual = write


Map = Diagonal | Shift | Permute | Rotate


def random_rotation(n: int, generator: torch.Generator) -> Rotate:
    """A Haar-random rotation of n channels in float64."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Rotate(q * r.diagonal().sign())
