"""Range selection: the scale and zero point of every block of a weight.

Three ways to choose the range that the codes cover:

- `minmax`: the block's own extremes.
- `mse`: the extremes shrunk by one factor p for each block, p = 1, 0.99, ... above 1 - maxshrink,
  with the least `sum |Q - w|^norm` (Frantar et al., 2022, https://arxiv.org/abs/2210.17323: their
  code's norm 2.4, 100 steps and maxshrink 0.8 are the defaults).
- `output`: as `mse`, with the least `sum_j H_jj (Q - w)_j^2`: the error of the layer's output if its
  inputs were uncorrelated (H = 2/N X X^T).

p = 1 is in both searches, so neither is worse than `minmax` under the norm that it minimises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.core.errors import SolverError
from qfx.core.qtensor import blocked, fake_quantize, scale_from_range, stored_scale
from qfx.core.spec import QSpec

CLIPS = ("minmax", "mse", "output")

_CHUNK = 1 << 18  # values in one search: each step rereads them, so they should stay in a cache


def weight_range(
    w: Tensor,
    spec: QSpec,
    importance: Tensor | None = None,
    *,
    clip: str = "minmax",
    norm: float = 2.4,
    grid: int = 100,
    maxshrink: float = 0.8,
) -> tuple[Tensor, Tensor | None]:
    """Chooses scale and zero point for every block of a weight; computed in float32.

    Args:
        w: `[..., out, in]`, any float dtype.
        spec: the format; its block is what shares a scale.
        importance: `[in]` or `[..., in]`, the Hessian's diagonal; needed by `output` alone.
        clip: `minmax`, `mse` or `output`.
        norm: the exponent of `mse`.
        grid: steps of the search from a range of 1 to a range of 0.
        maxshrink: the part of those steps that is searched.

    Returns:
        Scale, float32 `[..., rows, groups]`, and the zero point, int32 of that shape, or None if the
        spec is symmetric.

    Raises:
        SolverError: values that are not finite, an unknown clip, `output` without importance, or a
            block that does not divide the weight.
    """
    if clip not in CLIPS:
        raise SolverError(f"ranges: unknown clip {clip!r}; use one of {', '.join(CLIPS)}")
    if clip == "output" and importance is None:
        raise SolverError("ranges: clip 'output' weighs errors by a Hessian and there is none; pass one or use 'mse'")
    check_finite(weight=w)
    values = _blocks(w.float(), spec)
    lo, hi = values.amin(-1), values.amax(-1)
    if clip == "minmax":
        return _rounded(*scale_from_range(lo, hi, spec), spec)
    power, weights = norm, None
    if clip == "output" and importance is not None:
        check_finite(hessian=importance)
        power, weights = 2.0, _blocks(importance.float().unsqueeze(-2).expand_as(w), spec)
    shrinks = [1 - i / grid for i in range(max(1, round(maxshrink * grid)))]
    best = _best_shrink(values, lo, hi, weights, spec, power, shrinks)
    return _rounded(*scale_from_range(lo * best, hi * best, spec), spec)


def _rounded(scale: Tensor, zero: Tensor | None, spec: QSpec) -> tuple[Tensor, Tensor | None]:
    """Scales that are quantized themselves as they will be."""
    return stored_scale(scale, spec), zero


def check_finite(**tensors: Tensor) -> None:
    """Raises SolverError naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise SolverError(
                f"solve: the {name} {list(tensor.shape)} has {bad} values that are not finite; "
                f"look for an overflow in the float model or in its calibration"
            )


def _blocks(w: Tensor, spec: QSpec) -> Tensor:
    """`[..., rows, groups, values]`; a block that does not fit is a SolverError."""
    try:
        return blocked(w, spec)
    except ValueError as e:
        raise SolverError(f"solve: {e}; choose another block for {list(w.shape)}") from None


def _best_shrink(
    values: Tensor,
    lo: Tensor,
    hi: Tensor,
    weights: Tensor | None,
    spec: QSpec,
    power: float,
    shrinks: list[float],
) -> Tensor:
    """The factor of least error for each block, of lo's shape; the first of equals."""
    flat = values.flatten(0, -2)
    flat_weights = None if weights is None else weights.flatten(0, -2)
    flat_lo, flat_hi = lo.flatten(), hi.flatten()
    best = torch.ones_like(flat_lo)
    step = max(1, _CHUNK // max(flat.shape[1], 1))
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        v = flat[part]
        least = torch.full_like(best[part], torch.inf, dtype=torch.float64)
        for p in shrinks:
            scale, zero = scale_from_range(flat_lo[part] * p, flat_hi[part] * p, spec)
            zero = None if zero is None else zero.unsqueeze(-1)
            miss = (fake_quantize(v, scale.unsqueeze(-1), zero, spec) - v).abs_().pow_(power)
            if flat_weights is not None:
                miss *= flat_weights[part]
            error = miss.sum(-1, dtype=torch.float64)
            better = error < least
            least = torch.where(better, error, least)
            best[part] = torch.where(better, torch.full_like(best[part], p), best[part])
    return best.view_as(lo)
