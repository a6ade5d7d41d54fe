"""What a benchmark runs: a linear of one format, or an op on rows; and how its result is checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.kernels.quantize_rows import quantize_activation

Tensors = tuple[Tensor, ...]


class Missing(Exception):
    """What is to be measured is not there: a library that is not installed, an op that does not exist."""


@dataclass
class Linear:
    """One weight in one format.

    Attributes:
        weights: all that a call reads of the weight; copies of it take turns.
        call: output `[tokens, out]` from what `prepare` gave, and the weights.
        prepare: of an activation `[tokens, in]`, what a call takes. Its time does not count.
        values: float `[out, in]`, the weight that the codes stand for; None if only the bf16 weight is known.
        x_grid: the grid on which the op rounds its input, None for no rounding.
        largest: tokens above which it is not measured.
        captured: whether a CUDA graph can hold it.
        expected: the output in float64 for rows of x, where it is not what `values` and `x_grid` say.
    """

    weights: Tensors
    call: Callable[[Tensors, Tensors], Tensor]
    prepare: Callable[[Tensor], Tensors] = lambda x: (x,)
    values: Tensor | None = None
    x_grid: str | None = None
    largest: int = 1 << 30
    captured: bool = True
    expected: Callable[[Tensor], Tensor] | None = None

    def traffic(self, inputs: Tensors, tokens: int, out: int) -> int:
        """Bytes that must move: weights and inputs in, a 2-byte result out."""
        return sum(t.numel() * t.element_size() for t in (*self.weights, *inputs)) + tokens * out * 2


@dataclass
class Rows:
    """An op on rows `[tokens, channels]`, such as a norm.

    Attributes:
        call: of x and the norm's weight `[channels]`.
        written: bytes of the result for each element.
        expected: the dequantized result in float64, of the same arguments; None if nothing compares.
        dequantize: the values that the op's result stands for.
    """

    call: Callable[[Tensor, Tensor], object]
    written: float = 1
    expected: Callable[[Tensor, Tensor], Tensor] | None = None
    dequantize: Callable[[object], Tensor] | None = None


MakeLinear = Callable[[Tensor], Linear]
"""From a bf16 weight `[out, in]`."""

LIMIT = 2.0**-7
"""Of the relative error against float64 on the same codes: the weight, a scaled weight and the output are rounded to
bf16, 3 · 2^-9 at most, and a code may fall to the other side of a tie."""
CHECKED = 64
"""Tokens of a larger call that are compared."""


def hadamard(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The orthonormal Hadamard matrix of a power of two, in Sylvester's order."""
    h = torch.ones(1, 1, device=device, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (h / math.sqrt(n)).to(dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; infinite if anything is not finite."""
    got, want = got.double(), want.double()
    error = ((got - want).norm() / want.norm().clamp_min(1e-300)).item()
    return error if error == error else float("inf")


def linear_error(linear: Linear, x: Tensor, w: Tensor) -> float:
    """Relative error of a linear on `x`: against float64 on its own codes, or on the bf16 weight."""
    # rows in the middle and the last ones: tiles that are full, and one that may not be
    rows = torch.linspace(0, x.shape[0] - 1, min(CHECKED, x.shape[0]), device=x.device).long()
    got = linear.call(linear.prepare(x), linear.weights)[: x.shape[0]][rows]
    taken = x[rows]
    if linear.expected is not None:
        return relative_error(got, linear.expected(taken))
    if linear.x_grid is None:
        inputs = taken.double()
    else:
        codes, scale, _ = quantize_activation(taken, linear.x_grid, None, None, False)
        inputs = codes.double() * scale.double()
    values = w if linear.values is None else linear.values
    return relative_error(got, inputs @ values.double().t())
