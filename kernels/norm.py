"""`qfx::norm`: RMSNorm or LayerNorm with an optional residual sum in front; `qfx::norm_quantize` without codes."""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.kernels._cuda import on_cuda
from qfx.kernels.quantize_rows import gpu_reason

CASES = [
    ((1,), 64, False, True),
    ((7,), 33, True, False),
    ((2, 5), 40, False, False),
    ((0,), 24, False, True),
    ((3,), 1, True, True),
]
"""(leading dims, channels, center, cast_first)."""


@torch.library.custom_op("qfx::norm", mutates_args=())
def norm(
    x: Tensor,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = False,
    cast_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """Sums, normalizes, and scales: `y = normalized(x + residual) · gain + bias`.

    The sum is rounded to x's dtype, and so is y; all between is float32. For inference: it has no gradient.

    Args:
        x: `[..., channels]`, any float dtype.
        residual: of x's shape and dtype, or None.
        gain: `[channels]` of any float dtype, or None.
        bias: `[channels]` of any float dtype, or None.
        eps: added to the mean square, or to the variance.
        center: subtract the mean first (LayerNorm, not RMSNorm).
        cast_first: round the normalized value to x's dtype before the gain; models differ in this.

    Returns:
        y of x's shape and dtype, and the sum of x and the residual (empty without a residual).

    Raises:
        KernelError: shapes or dtypes do not fit.
    """
    check("norm", x, residual, gain, bias)
    return normalize(x, residual, gain, bias, eps, center, cast_first)


def normalize(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    cast_first: bool,
) -> tuple[Tensor, Tensor]:
    """What the op returns, in PyTorch."""
    total = x.new_empty(0) if residual is None else (x.float() + residual.float()).to(x.dtype).contiguous()
    v = (x if residual is None else total).float()
    if center:
        v = v - v.mean(-1, keepdim=True)
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    if cast_first:
        v = v.to(x.dtype).float()
    if gain is not None:
        v = v * gain.float()
    if bias is not None:
        v = v + bias.float()
    return v.to(x.dtype).contiguous(), total


@norm.register_fake
def _(
    x: Tensor,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = False,
    cast_first: bool = True,
) -> tuple[Tensor, Tensor]:
    check("norm", x, residual, gain, bias)
    return x.new_empty(x.shape), x.new_empty((0,) if residual is None else x.shape)


@on_cuda(norm)
def _(
    x: Tensor,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = False,
    cast_first: bool = True,
) -> tuple[Tensor, Tensor]:
    check("norm", x, residual, gain, bias)
    if gpu_reason(x, "", None, None, whole_row=True):
        return normalize(x, residual, gain, bias, eps, center, cast_first)
    from qfx.kernels.gpu.norm_quantize import norm_quantize as run
    from qfx.kernels.gpu.rowwise import as_rows

    r = None if residual is None else as_rows(residual)
    _, _, y, total = run(as_rows(x), r, gain, bias, eps, center, cast_first, "", None, None, True)
    return y.view(x.shape), total if residual is None else total.view(x.shape)


def check(op: str, x: Tensor, residual: Tensor | None, gain: Tensor | None, bias: Tensor | None) -> None:
    """Raises a KernelError that names the op, if the arguments of a norm do not fit."""
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise KernelError(f"{op}: x {tuple(x.shape)} and a residual {tuple(residual.shape)}; give equal ones")
    for t, name in ((gain, "gain"), (bias, "bias")):
        if t is not None and t.shape != x.shape[-1:]:
            raise KernelError(f"{op}: {name} {tuple(t.shape)} for {x.shape[-1]} channels; give one for each")
