"""Grids: the values that a code can mean.

A grid turns scaled real numbers into codes and codes back into numbers. Scales and zero points live in
`QTensor`; a grid knows nothing of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FLOATS = {(4, 3): torch.float8_e4m3fn, (5, 2): torch.float8_e5m2}


@dataclass(frozen=True)
class Int:
    """Consecutive integers.

    Args:
        bits: 1 to 8.
        signed: two's complement if true, otherwise from zero (used with a zero point).
        narrow: leave out the lowest code, so that the range is symmetric (-127..127 for eight bits).
    """

    bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        """Refuses widths that no code tensor holds."""
        if not 1 <= self.bits <= 8:
            raise ValueError(f"grid: {self.bits} bits; an integer grid has 1 to 8")
        if self.narrow and not (self.signed and self.bits > 1):
            raise ValueError("grid: only a signed grid of at least 2 bits can be narrow")

    @property
    def lo(self) -> int:
        """The lowest code."""
        return -(2 ** (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def hi(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds one code."""
        return torch.int8 if self.signed else torch.uint8

    @property
    def reach(self) -> float:
        """What the largest magnitude is divided by to get a symmetric scale: half the span of codes."""
        return (self.hi - self.lo) / 2

    def encode(self, x: Tensor) -> Tensor:
        """Codes of scaled values, rounding half to even and clamping; same shape, dtype `self.dtype`."""
        return x.round().clamp(self.lo, self.hi).to(self.dtype)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that codes mean."""
        return codes.to(dtype)


@dataclass(frozen=True)
class Float:
    """Floating-point numbers of eight bits: (4, 3) is E4M3 without infinities, (5, 2) is E5M2."""

    exp: int
    man: int

    def __post_init__(self) -> None:
        """Refuses formats that torch has no dtype for."""
        if (self.exp, self.man) not in _FLOATS:
            raise ValueError(f"grid: no 8-bit float E{self.exp}M{self.man}; use E4M3 or E5M2")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 1 + self.exp + self.man

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds one code."""
        return _FLOATS[self.exp, self.man]

    @property
    def reach(self) -> float:
        """The largest finite value (448 for E4M3, 57344 for E5M2)."""
        return torch.finfo(self.dtype).max

    def encode(self, x: Tensor) -> Tensor:
        """Codes of scaled values, saturating at the largest finite value."""
        return x.clamp(-self.reach, self.reach).to(self.dtype)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that codes mean."""
        return codes.to(dtype)


Grid = Int | Float
E4M3 = Float(4, 3)
E5M2 = Float(5, 2)


def grid_to_dict(grid: Grid) -> dict[str, object]:
    """A JSON-ready description of a grid."""
    if isinstance(grid, Int):
        return {"type": "int", "bits": grid.bits, "signed": grid.signed, "narrow": grid.narrow}
    return {"type": "float", "exp": grid.exp, "man": grid.man}


def grid_from_dict(data: dict[str, object]) -> Grid:
    """The inverse of `grid_to_dict`; an unknown type or key raises ValueError."""
    fields = dict(data)
    kind = fields.pop("type", None)
    try:
        if kind == "int":
            return Int(**fields)  # type: ignore[arg-type]
        if kind == "float":
            return Float(**fields)  # type: ignore[arg-type]
    except TypeError as e:
        raise ValueError(f"grid: {e}") from None
    raise ValueError(f"grid: unknown type {kind!r}; use 'int' or 'float'")
