"""`qfx::norm_quantize`: RMSNorm or LayerNorm, an optional residual sum in front, codes behind."""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.kernels._cuda import on_cuda
from qfx.kernels.norm import check, normalize
from qfx.kernels.quantize_rows import codes_of, empty_codes, gpu_reason

CASES = [
    ((1,), 64, "int8_narrow", False, True),
    ((7,), 33, "int8", True, False),
    ((2, 5), 40, "e4m3", False, False),
    ((3,), 17, "e5m2", True, True),
    ((0,), 24, "int8_narrow", False, True),
    ((4,), 48, "", False, True),
]
"""(leading dims, channels, grid, center, cast_first)."""


@torch.library.custom_op("qfx::norm_quantize", mutates_args=())
def norm_quantize(
    x: Tensor,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = False,
    cast_first: bool = True,
    x_grid: str = "int8_narrow",
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    keep_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`y = norm(x + residual) · gain + bias`, and the codes of y.

    The sum is rounded to x's dtype, and so is y; all between is float32.

    Args:
        x: `[..., channels]`, any float dtype.
        residual: of x's shape and dtype, or None.
        gain: `[channels]` of any float dtype, or None.
        bias: `[channels]` of any float dtype, or None.
        eps: added to the mean square, or to the variance.
        center: subtract the mean first (LayerNorm, not RMSNorm).
        cast_first: round the normalized value to x's dtype before the gain; models differ in this.
        x_grid: name of the grid of the codes, or empty for y alone.
        x_scale: float32 scalar of a static grid, or None for one scale for each token.
        x_zero: int32 scalar if the grid is static and unsigned.
        keep_y: return y beside its codes.

    Returns:
        Codes `[..., channels]` and scales float32 `[..., 1]` (both empty without a grid), y of x's shape and dtype
        (empty unless asked for), the sum of x and the residual (empty without a residual).

    Raises:
        KernelError: shapes or dtypes do not fit, the grid is unknown, or unsigned without a static scale.
    """
    check("norm_quantize", x, residual, gain, bias)
    return _reference(x, residual, gain, bias, eps, center, cast_first, x_grid, x_scale, x_zero, keep_y)


def _reference(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    cast_first: bool,
    x_grid: str,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    keep_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, total = normalize(x, residual, gain, bias, eps, center, cast_first)
    codes, scale = codes_of(y, x_grid, x_scale, x_zero) if x_grid else (x.new_empty(0), x.new_empty(0).float())
    return codes, scale, y if keep_y or not x_grid else x.new_empty(0), total


@norm_quantize.register_fake
def _(
    x: Tensor,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = False,
    cast_first: bool = True,
    x_grid: str = "int8_narrow",
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    keep_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check("norm_quantize", x, residual, gain, bias)
    codes, scale = empty_codes(x, x_grid) if x_grid else (x.new_empty(0), x.new_empty(0, dtype=torch.float32))
    y = x.new_empty(x.shape if keep_y or not x_grid else (0,))
    return codes, scale, y, x.new_empty((0,) if residual is None else x.shape)


@on_cuda(norm_quantize)
def _(
    x: Tensor,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = False,
    cast_first: bool = True,
    x_grid: str = "int8_narrow",
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    keep_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check("norm_quantize", x, residual, gain, bias)
    if gpu_reason(x, x_grid, x_scale, x_zero, whole_row=True):
        return _reference(x, residual, gain, bias, eps, center, cast_first, x_grid, x_scale, x_zero, keep_y)
    from qfx.kernels.gpu.norm_quantize import norm_quantize as run
    from qfx.kernels.gpu.rowwise import as_rows

    r = None if residual is None else as_rows(residual)
    out = run(as_rows(x), r, gain, bias, eps, center, cast_first, x_grid, x_scale, x_zero, keep_y)
    if x.dim() == 2:
        return out
    codes, scale, y, total = out
    lead = x.shape[:-1]
    if x_grid:
        codes, scale = codes.view(x.shape), scale.view(*lead, 1)
    y = y.view(x.shape) if keep_y or not x_grid else y
    return codes, scale, y, total if residual is None else total.view(x.shape)
