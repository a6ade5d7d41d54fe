"""GPTQ: rounds one column after another; the columns still free make up for each error.

Frantar et al., 2022, https://arxiv.org/abs/2210.17323, algorithm 1. With `H^-1 = U^T U`, U upper
triangular, column j of the error and what it does to the columns after it are

    e_j = (w_j - Q(w_j)) / U_jj        w_k -= e_j U_jk  for k > j

and `sum e^2 = tr((W - Q) H (W - Q)^T)`, with the damped H, is the layer's squared output error.

The updates of a block of columns are gathered into one matrix product for the columns after it; within
a block a column takes all its updates at once, just before it is rounded. A weight is read once for
each column that way, where updating all later columns would read and write the rest of the block.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qfx.core.errors import RecipeError, SolverError
from qfx.core.passes import Result, State
from qfx.core.qtensor import QTensor, encode, fake_quantize
from qfx.core.spec import QSpec, Scheme
from qfx.passes.solve._driver import Walk, solve_layers
from qfx.passes.solve._obs import Factor, exact_matmul, prepare
from qfx.passes.solve._ranges import check_finite, weight_range


@dataclass(frozen=True)
class GptqReport:
    """What happened to one layer.

    Attributes:
        damp: the damping used, as a part of H's mean diagonal; 0 if there was no factor.
        loss: `tr((W - Q) H (W - Q)^T)` of GPTQ's own Q, with the damped H, dead inputs left out; of
            RTN with H as given if there was no factor.
        loss_rtn: the same for rounding to nearest.
        dead: inputs that were always zero; their weights are stored as 0.
        guard: RTN was better, `keep_better` was set, and RTN was kept.
        fallback: what went wrong with H, or None: a factor in float64 alone, or none and RTN kept.
        seconds: wall time.
    """

    damp: float
    loss: float
    loss_rtn: float
    dead: int
    guard: bool
    fallback: str | None
    seconds: float


@torch.no_grad()
def gptq(
    w: Tensor,
    spec: QSpec,
    hessian: Tensor,
    *,
    factor: Factor | None = None,
    block_size: int = 128,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = True,
    clip: str = "minmax",
    keep_better: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[QTensor, GptqReport]:
    """Rounds a weight so that the layer's output on the calibration data changes little.

    Args:
        w: `[out, in]`, any float dtype.
        spec: the format; groups of columns must divide `in`.
        hessian: `[in, in]`, 2/N X X^T of the layer's inputs, undamped.
        factor: `prepare(hessian, ...)`, for layers that read the same input; it decides damping,
            order and precision, and `act_order` must agree with it.
        block_size: columns whose updates are gathered; changes the time, not the result.
        damp: the damping that `prepare` starts with.
        act_order: round the columns of the largest inputs first.
        static_groups: ranges from the weight as it is. Otherwise a group's range is that of its
            updated columns when the first of them is due, and with `act_order` the groups are made
            of columns in that order, so that the result has a `g_idx`.
        clip: how ranges are chosen, as in `rtn`.
        keep_better: return RTN's result where its loss is lower; on a finite grid that happens.
        dtype: what the updates are computed in, float32 or float64.

    Returns:
        The weight and a report. Every value is the one whose error was handed on.

    Raises:
        SolverError: shapes that do not fit, values that are not finite, a group size that does not
            divide the columns, or scales that are to be quantized but are not known beforehand.
    """
    start = time.perf_counter()
    if w.dim() != 2 or hessian.shape != (w.shape[1], w.shape[1]):
        raise SolverError(
            f"gptq: a weight is [out, in] and its Hessian [in, in], not {list(w.shape)} and "
            f"{list(hessian.shape)}; solve experts one at a time"
        )
    if block_size < 1:
        raise SolverError(f"gptq: block_size {block_size} columns; use 1 or more")
    if spec.scale is not None and not static_groups and spec.groups(w.shape[1]) > 1:
        raise SolverError("gptq: quantized scales share scales across groups; use static_groups=True")
    check_finite(weight=w, hessian=hessian)
    if factor is None:
        factor = prepare(hessian, damp=damp, act_order=act_order, dtype=dtype)
    elif factor.dead.shape != w.shape[1:] or act_order != (factor.order is not None):
        raise SolverError("gptq: the factor is for another width or order; prepare it for this call")
    importance = hessian.diagonal()
    dead = int(factor.dead.sum())
    if factor.upper is None:
        scale, zero = weight_range(w, spec, importance, clip=clip)
        nearest = encode(w, scale, zero, spec)
        loss = _plain_loss(w - nearest.dequantize(), hessian)
        seconds = time.perf_counter() - start
        return nearest, GptqReport(0.0, loss, loss, dead, False, factor.why, seconds)

    w = w.to(factor.upper.dtype).masked_fill(factor.dead, 0)  # a weight that meets only zeros is free
    scale, zero = weight_range(w, spec, importance, clip=clip)
    nearest = encode(w, scale, zero, spec)
    if static_groups or spec.groups(w.shape[1]) == 1:
        solved, loss = _sweep(w, spec, factor, block_size, scale, zero)
    else:
        solved, loss = _sweep(w, spec, factor, block_size, scale, zero, (importance, clip))
    loss_rtn = factor.loss(w - nearest.dequantize(w.dtype))
    guard = keep_better and loss_rtn < loss
    seconds = time.perf_counter() - start
    report = GptqReport(factor.damp, loss, loss_rtn, dead, guard, factor.why, seconds)
    return (nearest if guard else solved), report


@exact_matmul()
def _sweep(
    w: Tensor,
    spec: QSpec,
    factor: Factor,
    block_size: int,
    scale: Tensor,
    zero: Tensor | None,
    fresh: tuple[Tensor, str] | None = None,
) -> tuple[QTensor, float]:
    """Rounds all columns; the weight and `sum e^2`.

    `fresh` holds the Hessian's diagonal and the clip with which each group's range is found anew; the
    given scale and zero point then only lend their shape.
    """
    upper, order = factor.upper, factor.order
    assert upper is not None
    columns = w.shape[1]
    size = columns // scale.shape[1]
    position = torch.arange(columns, device=w.device)
    place = position if order is None else order  # the column that is rounded at each position
    group = (place if fresh is None else position) // size
    group_list = group.tolist()
    # [in, out]: columns of w are contiguous. They become the values that are rounded.
    target = w.T.index_select(0, place)
    # clones, because the transpose of one row is contiguous and RTN keeps the given ranges
    scales = scale.T.clone(memory_format=torch.contiguous_format)
    zeros = None if zero is None else zero.T.clone(memory_format=torch.contiguous_format)
    own = replace(spec, block=(spec.block[0], -1))
    pivots = upper.diagonal().unbind()
    loss = torch.zeros((), dtype=torch.float64, device=w.device)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = target.new_empty(end - start, target.shape[1])
        inner = upper[start:end, start:end].T.contiguous()
        for k, j in enumerate(range(start, end)):
            g, column, done = group_list[j], target[j], errors[:k]
            if fresh is not None and j % size == 0:
                # the errors of this block have not reached target yet: a range read from it is stale
                due = target[j : j + size] - upper[start:j, j : j + size].T @ done
                importance = fresh[0][place[j : j + size]]
                s, z = weight_range(due.T, own, importance, clip=fresh[1])
                scales[g] = s[:, 0]
                if zeros is not None and z is not None:
                    zeros[g] = z[:, 0]
            if k:
                column.addmv_(done.T, inner[k, :k], alpha=-1)
            q = fake_quantize(column, scales[g], None if zeros is None else zeros[g], spec)
            torch.sub(column, q, out=errors[k]).div_(pivots[j])
        loss += errors.square().sum(dtype=torch.float64)
        target[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    if order is not None:
        target = target[torch.argsort(order)]
    scattered = None
    if fresh is not None and order is not None:
        scattered = torch.empty_like(group).scatter_(0, order, group)
    final_zero = None if zeros is None else zeros.T.contiguous()
    # the arithmetic of fake_quantize, so that the codes mean the q of the loop bit for bit
    solved = encode(target.T.contiguous(), scales.T.contiguous(), final_zero, spec, scattered)
    return solved, float(loss)


def _plain_loss(error: Tensor, hessian: Tensor) -> float:
    """`tr(E H E^T)` in float64."""
    error, hessian = error.double(), hessian.double()
    return float(((error @ hessian) * error).sum())


@dataclass(frozen=True)
class Gptq:
    """The step `gptq`.

    Args:
        group_size: overrides the group size of the layers' schemes; -1 is one scale for each channel.
        act_order: round the columns of the largest inputs first.
        static_groups: fix the groups' ranges beforehand; false with act_order stores a `g_idx`.
        damp: what is added to H's diagonal, as a part of its mean; doubled until the factor exists, and reported.
        block_size: columns whose updates are gathered; changes the time, not the result.
        clip: how ranges are chosen, as in `rtn`.
        keep_better: keep round-to-nearest for a layer where its loss is lower.
        sequential: measure each block behind the quantized ones before it.
        true_sequential: also within a block, layer after layer.
    """

    group_size: int | None = None
    act_order: bool = False
    static_groups: bool = True
    damp: float = 0.01
    block_size: int = 128
    clip: Literal["minmax", "mse", "output"] = "minmax"
    keep_better: bool = False
    sequential: bool = True
    true_sequential: bool = True
    name = "gptq"
    needs_data = True

    def __post_init__(self) -> None:
        """Checks the settings."""
        if not 0 < self.damp < 1:
            raise RecipeError(
                f"gptq: damp is {self.damp}; use a part of the mean diagonal between 0 and 1, such as 0.01"
            )
        if self.block_size < 1:
            raise RecipeError(f"gptq: block_size is {self.block_size}; use 1 or more")

    def __call__(self, state: State) -> Result:
        """Rounds every layer of the plan; layers that read one input share its factor."""
        shared: list[tuple[Tensor, Factor]] = []

        def round_(w: Tensor, scheme: Scheme, hessian: Tensor | None) -> tuple[QTensor, str]:
            assert hessian is not None
            if not shared or shared[0][0] is not hessian:
                shared[:] = [(hessian, prepare(hessian, damp=self.damp, act_order=self.act_order))]
            qtensor, report = gptq(
                w,
                scheme.weight,
                hessian,
                factor=shared[0][1],
                block_size=self.block_size,
                act_order=self.act_order,
                static_groups=self.static_groups,
                clip=self.clip,
                keep_better=self.keep_better,
            )
            return qtensor, _remark(report, self.damp)

        walk = Walk("gptq", True, self.sequential, self.true_sequential, self.group_size)
        return solve_layers(state, walk, round_)


def _remark(report: GptqReport, damp: float) -> str:
    notes = [report.fallback] if report.fallback else []
    if report.damp > damp:
        notes.append(f"damping raised to {report.damp:g}")
    if report.guard:
        notes.append("kept round-to-nearest, whose loss was lower")
    if report.dead:
        notes.append(f"{report.dead} inputs were never active")
    return "; ".join(notes)
