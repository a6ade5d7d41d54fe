"""The factor of the inverse Hessian that GPTQ and OBQ share.

Fixing weight q of a row at a value that differs from it by e costs `e^2 / [H^-1]_qq`, and the weights
still free move by `-e / [H^-1]_qq * H^-1_{:,q}` (Hassibi and Stork, 1992, eq. 5). With
`H^-1 = U^T U`, U upper triangular, row j of U holds that step for the j-th weight after all before it
are fixed (Frantar et al., 2022, https://arxiv.org/abs/2210.17323, "Step 3: Cholesky Reformulation").

U comes from `H = R R^T`, R upper triangular (a Cholesky factor with both axes reversed), as
`U = R^-1`. The paper inverts H and factors the inverse, which squares H's condition on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.core.errors import SolverError
from qfx.passes.solve._ranges import check_finite


@dataclass(frozen=True)
class Factor:
    """What `prepare` made of a Hessian; layers that read the same input may share it.

    Attributes:
        upper: U `[in, in]` with `(H + damp * mean * I)^-1 = U^T U`, float32 or float64, rows and
            columns in `order`; None if there is no such factor, and `why` says so.
        dead: bool `[in]`, inputs that were always zero: they weigh nothing, and are apart from the
            others in U.
        order: int64 `[in]`, the columns by falling diagonal of H, or None for their own order.
        damp: the part of the mean diagonal that was added, 0 if there is no factor.
        why: None, or what went wrong: no factor, or one in float64 alone.
    """

    upper: Tensor | None
    dead: Tensor
    order: Tensor | None
    damp: float
    why: str | None = None

    def loss(self, error: Tensor) -> float:
        """`tr(E H E^T)` with the damped H, for E = W - Q `[out, in]`; dead inputs count nothing."""
        if self.upper is None:
            raise SolverError(f"solve: no factor to weigh errors by: {self.why}")
        error = error.to(self.upper.dtype).masked_fill(self.dead, 0)
        if self.order is not None:
            error = error[:, self.order]
        with exact_matmul():  # E H E^T = |E R|^2 and R = U^-1
            whole = torch.linalg.solve_triangular(self.upper, error, upper=True, left=False)
        return float(whole.square().sum(dtype=torch.float64))


def prepare(
    hessian: Tensor,
    *,
    damp: float = 0.01,
    act_order: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Factor:
    """Factors a damped Hessian, with more damping and then more precision if that fails.

    The damping is `damp` times the mean diagonal of the live inputs, doubled while the factor fails
    and stays below 1 (0 goes on to 0.01); then the same in float64.

    Args:
        hessian: `[in, in]`, 2/N X X^T, undamped.
        damp: where damping starts.
        act_order: order the columns by falling diagonal, equal ones as they stand.
        dtype: of the first attempts, float32 or float64.

    Returns:
        The factor; its `upper` is None if no input is live or no attempt succeeded.

    Raises:
        SolverError: H is not square or not finite, damp is not in [0, 1), or another dtype.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise SolverError(f"solve: a Hessian is square, not {list(hessian.shape)}; pass X X^T")
    if dtype not in (torch.float32, torch.float64):
        raise SolverError(f"solve: no Hessian is factored in {dtype}; use float32 or float64")
    if not 0 <= damp < 1:
        raise SolverError(f"solve: damp {damp} is a part of the mean diagonal; use 0 to below 1")
    check_finite(hessian=hessian)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    # dead inputs are 0 on the diagonal, so they come last
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    if bool(dead.all()):
        return Factor(None, dead, order, 0.0, "no input was ever active")
    for precision in dict.fromkeys((dtype, torch.float64)):
        h = _permuted(hessian.to(precision), order)
        live = ~dead if order is None else ~dead[order]
        mean = h.diagonal()[live].mean()
        step = damp
        while step < 1:
            upper = _inverse_factor(h, torch.where(live, step * mean, mean))
            if upper is not None:
                why = None if precision == dtype else f"factored in {precision}, not in {dtype}"
                return Factor(upper, dead, order, step, why)
            step = 2 * step or 0.01
    return Factor(None, dead, order, 0.0, "the Hessian has no Cholesky factor: is it X X^T?")


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Turns reduced-precision float32 products (TF32, bf16) off, and restores what was set."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _permuted(h: Tensor, order: Tensor | None) -> Tensor:
    """H symmetrised, rows and columns in `order`."""
    h = (h + h.T) / 2
    return h if order is None else h[order][:, order]


def _inverse_factor(h: Tensor, added: Tensor) -> Tensor | None:
    """U with `(H + diag(added))^-1 = U^T U`, or None."""
    damped = h.flip(0, 1)
    damped.diagonal().add_(added.flip(0))
    with exact_matmul():
        lower, info = torch.linalg.cholesky_ex(damped)
        # CUDA may report success and return NaN
        if int(info) or not bool(torch.isfinite(lower).all()):
            return None
        eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.flip(0, 1) if bool(torch.isfinite(inverse).all()) else None
