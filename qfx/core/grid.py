"""Grids: the values that a code can mean.

A grid turns scaled real numbers into codes and codes back into numbers. Scales and zero points live in
`QTensor`; a grid knows nothing of them.
"""

from __future__ import annotations

import functools
import itertools
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
    def least(self) -> float:
        """The smallest positive value."""
        return 1.0

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

    @property
    def least(self) -> float:
        """The smallest positive value, a subnormal number (2^-9 for E4M3, 2^-16 for E5M2)."""
        return 2.0 ** (2 - 2 ** (self.exp - 1) - self.man)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of scaled values, saturating at the largest finite value."""
        return x.clamp(-self.reach, self.reach).to(self.dtype)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that codes mean."""
        return codes.to(dtype)


CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4_bnb": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
    "e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
}  # fmt: skip
"""The values of the codes 0 to 15, each a float32.

- `nf4`: NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314), appendix E.
- `fp4_bnb`: the 4-bit float of bitsandbytes.
- `e2m1`: the 4-bit float of the OCP microscaling formats (sign, two bits of exponent, one of mantissa).
"""


@dataclass(frozen=True)
class Codebook:
    """A table of 16 values, by its name in `CODEBOOKS`; a code is a place in the table."""

    name: str

    def __post_init__(self) -> None:
        """Refuses names without a table."""
        if self.name not in CODEBOOKS:
            raise ValueError(f"grid: no codebook {self.name!r}; use {', '.join(CODEBOOKS)}")

    @property
    def values(self) -> tuple[float, ...]:
        """What each code means."""
        return CODEBOOKS[self.name]

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 4

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds one code."""
        return torch.uint8

    @property
    def reach(self) -> float:
        """The largest value (1, and 6 for `e2m1`)."""
        return max(self.values)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest values in float32, half way to the even code; what is beyond the ends saturates.

        A value that the table has twice (0 and -0) gets the lower code. The codebook has no NaN: it takes finite x.
        """
        codes, bounds = _SEARCH[self.name]
        place = torch.bucketize(x.float().contiguous(), _constant(bounds, torch.float32, x), out_int32=True)
        return _look_up(_constant(codes, torch.uint8, x), place)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that codes mean."""
        return _look_up(_constant(self.values, torch.float32, codes), codes.int()).to(dtype)


def _search(values: tuple[float, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The codes by their values, and between neighbours the largest float32 that goes to the lower one."""
    first = {v: code for code, v in reversed(list(enumerate(values)))}
    ordered = sorted(first)
    codes = tuple(first[v] for v in ordered)
    exact = [(a + b) / 2 for a, b in itertools.pairwise(ordered)]
    halves = torch.tensor(exact, dtype=torch.float64, device="cpu")
    lower = torch.tensor([code % 2 == 0 for code in codes[:-1]], device="cpu")  # the one that gets the half
    near = halves.float()
    taken = (near.double() < halves) | (near.double() == halves) & lower
    below = torch.nextafter(near, torch.full_like(near, -torch.inf))
    return codes, tuple(torch.where(taken, near, below).tolist())


_SEARCH = {name: _search(values) for name, values in CODEBOOKS.items()}


@functools.cache
def _cached(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _constant(values: tuple[float, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A small tensor on the device of another one."""
    if torch.compiler.is_compiling() or type(like) is not Tensor:  # a tracer's tensors must not outlive it
        return torch.tensor(values, dtype=dtype, device=like.device)
    return _cached(values, dtype, like.device)


def _look_up(table: Tensor, places: Tensor) -> Tensor:
    return table.index_select(0, places.flatten()).view(places.shape)


Grid = Int | Float | Codebook
E4M3 = Float(4, 3)
E5M2 = Float(5, 2)


def grid_to_dict(grid: Grid) -> dict[str, object]:
    """A JSON-ready description of a grid."""
    if isinstance(grid, Int):
        return {"type": "int", "bits": grid.bits, "signed": grid.signed, "narrow": grid.narrow}
    if isinstance(grid, Codebook):
        return {"type": "codebook", "name": grid.name}
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
        if kind == "codebook":
            return Codebook(**fields)  # type: ignore[arg-type]
    except TypeError as e:
        raise ValueError(f"grid: {e}") from None
    raise ValueError(f"grid: unknown type {kind!r}; use 'int', 'float' or 'codebook'")
