"""OBQ: each row rounds its cheapest weight next; the weights still free make up for the error.

Frantar, Singh and Alistarh, 2022, https://arxiv.org/abs/2208.11580, section 5. For one row with the
weights F still free, rounding weight p costs `(w_p - Q(w_p))^2 / [H_F^-1]_pp`; the cheapest goes
first, then

    w -= (w_p - Q(w_p)) / [H_F^-1]_pp * H_F^-1[:, p]
    H_F^-1 -= H_F^-1[:, p] H_F^-1[p, :] / [H_F^-1]_pp

Each row has an order and an inverse of its own, so the work is O(out * in^3). GPTQ takes one order for
all rows, and OBQ is what it is measured against. Greedy is not optimal: where inputs differ much in
size, the weights of small inputs are cheap and go first, and none is left to make up for the large
ones; GPTQ's `act_order` does the opposite and is better there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.core.errors import SolverError
from qfx.core.grid import Int
from qfx.core.qtensor import QTensor, encode, fake_quantize
from qfx.core.spec import QSpec
from qfx.passes.solve._obs import exact_matmul, prepare
from qfx.passes.solve._ranges import weight_range


@torch.no_grad()
def obq(
    w: Tensor,
    spec: QSpec,
    hessian: Tensor,
    *,
    damp: float = 0.01,
    rows: int = 32,
    outlier_rule: bool = True,
) -> QTensor:
    """Rounds each row greedily, in float64, on the grid of its min-max range.

    Args:
        w: `[out, in]`, any float dtype.
        spec: the format; a scale for each row, or one for the tensor.
        hessian: `[in, in]`, 2/N X X^T of the layer's inputs, undamped.
        damp: the part of H's mean diagonal that is added; more if H has no factor with it.
        rows: rows that are solved together; memory is `rows * in^2` float64.
        outlier_rule: round a weight that updates have driven off its grid at once (the paper's
            section 5), before more error is pushed onto it.

    Returns:
        The weight. Inputs that were always zero have weight 0.

    Raises:
        SolverError: shapes that do not fit, values that are not finite, groups of columns, or a
            Hessian that has no factor.
    """
    if w.dim() != 2 or hessian.shape != (w.shape[1], w.shape[1]):
        raise SolverError(
            f"obq: a weight is [out, in] and its Hessian [in, in], not {list(w.shape)} and "
            f"{list(hessian.shape)}; solve experts one at a time"
        )
    if spec.block[1] not in (-1, w.shape[1]):
        raise SolverError(f"obq: no groups of {spec.block[1]} columns; use a scale for each row")
    factor = prepare(hessian, damp=damp, dtype=torch.float64)
    if factor.upper is None:
        raise SolverError(f"obq: {factor.why}; use rtn")
    w = w.double().masked_fill(factor.dead, 0)
    scale, zero = weight_range(w, spec)
    with exact_matmul():
        inverse = factor.upper.T @ factor.upper
        parts = []
        for start in range(0, len(w), rows):
            part = slice(start, start + rows)
            s = scale[part] if len(scale) > 1 else scale
            z = zero if zero is None or len(zero) == 1 else zero[part]
            parts.append(_solve_rows(w[part], inverse, s, z, spec, outlier_rule))
    return encode(torch.cat(parts), scale, zero, spec)


def _solve_rows(
    w: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor | None, spec: QSpec, outlier_rule: bool
) -> Tensor:
    """The values that are rounded, `[rows, in]`, each as it was when its turn came."""
    w, final = w.clone(), w.clone()
    inverse = inverse.repeat(len(w), 1, 1)
    each = torch.arange(len(w), device=w.device)
    free = torch.ones_like(w, dtype=torch.bool)
    for _ in range(w.shape[1]):
        error = w - fake_quantize(w, scale, zero, spec)
        diagonal = inverse.diagonal(dim1=-2, dim2=-1)
        score = torch.where(free, error.square() / diagonal, torch.inf)
        p = score.argmin(1)
        if outlier_rule:
            off = free & _off_grid(w, error, scale, spec)
            p = torch.where(off.any(1), torch.where(off, error.abs(), -1.0).argmax(1), p)
        step, pivot = inverse[each, :, p], diagonal[each, p]
        if not bool((pivot > 0).all()):
            raise SolverError("obq: round-off ate the inverse Hessian; use a larger damp")
        final[each, p] = w[each, p]
        w -= step * (error[each, p] / pivot).unsqueeze(1)
        inverse.baddbmm_((step / pivot.unsqueeze(1)).unsqueeze(2), step.unsqueeze(1), alpha=-1)
        # zero up to round-off already, and round-off would grow
        inverse[each, p, :] = 0
        inverse[each, :, p] = 0
        free[each, p] = False
    return final


def _off_grid(w: Tensor, error: Tensor, scale: Tensor, spec: QSpec) -> Tensor:
    """Weights beyond the last code; the tolerance keeps ties between two codes out (float32)."""
    if isinstance(spec.grid, Int):
        return error.abs() > (0.5 + 1e-4) * scale
    return w.abs() > (1 + 1e-4) * spec.grid.reach * scale
