"""Round to nearest: `q = clamp(round(w / s) + z)`, every weight by itself.

The only choice is the range that each block covers (`clip`); the error is that of `_ranges.py`.
Nothing here needs data, except `clip="output"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qfx.core.passes import Result, State
from qfx.core.qtensor import QTensor, encode
from qfx.core.spec import QSpec, Scheme
from qfx.passes.solve._driver import Walk, solve_layers
from qfx.passes.solve._ranges import weight_range


@torch.no_grad()
def rtn(
    w: Tensor,
    spec: QSpec,
    hessian: Tensor | None = None,
    *,
    clip: str = "minmax",
    norm: float = 2.4,
    grid: int = 100,
    maxshrink: float = 0.8,
) -> QTensor:
    """Rounds each weight to the nearest code, half to even; computed in float32.

    Args:
        w: `[out, in]`, or `[experts, out, in]`, any float dtype.
        spec: the format.
        hessian: `[in, in]`, or `[experts, in, in]`: 2/N X X^T of the layer's inputs. Only its
            diagonal is read, and only by `clip="output"`.
        clip: how the range of a block is chosen: `minmax` (its extremes), `mse` (the shrunk range of
            least `sum |Q - w|^norm`) or `output` (of least `sum_j H_jj (Q - w)_j^2`).
        norm: the exponent of `mse`.
        grid: steps of the search over shrunk ranges.
        maxshrink: how far a range is shrunk at most.

    Returns:
        Codes of w's shape, scale and zero point `[..., rows, groups]`.

    Raises:
        SolverError: values that are not finite, an unknown clip, a missing Hessian, or a block that
            does not divide the weight.
    """
    importance = None if hessian is None else hessian.diagonal(dim1=-2, dim2=-1)
    scale, zero = weight_range(w, spec, importance, clip=clip, norm=norm, grid=grid, maxshrink=maxshrink)
    return encode(w, scale, zero, spec)


@dataclass(frozen=True)
class Rtn:
    """The step `rtn`.

    Args:
        clip: how the range of a block is chosen: `minmax`, `mse`, or `output` (which needs data).
        group_size: overrides the group size of the layers' schemes; -1 is one scale for each channel.
    """

    clip: Literal["minmax", "mse", "output"] = "minmax"
    group_size: int | None = None
    name = "rtn"

    @property
    def needs_data(self) -> bool:
        """Output clipping weighs errors by the inputs."""
        return self.clip == "output"

    def __call__(self, state: State) -> Result:
        """Rounds every layer of the plan."""

        def round_(w: Tensor, scheme: Scheme, hessian: Tensor | None) -> tuple[QTensor, str]:
            return rtn(w, scheme.weight, hessian, clip=self.clip), ""

        return solve_layers(state, Walk("rtn", self.needs_data, group_size=self.group_size), round_)
