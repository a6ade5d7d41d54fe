"""`qfx::gated_quantize`: an activation function, times the other half of a gated pair, then codes."""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.kernels._cuda import on_cuda
from qfx.kernels.gated import ACTS, check
from qfx.kernels.quantize_rows import codes_of, empty_codes, gpu_reason

CASES = [
    ((1,), 64, "int8_narrow", "silu", True),
    ((7,), 33, "int8", "gelu", True),
    ((2, 5), 40, "e4m3", "gelu_tanh", True),
    ((3,), 17, "e5m2", "relu", False),
    ((0,), 24, "int8_narrow", "silu", True),
    ((4,), 48, "", "silu", True),
    ((4,), 48, "int4_narrow", "none", True),
]
"""(leading dims, channels, grid, function, gated)."""


@torch.library.custom_op("qfx::gated_quantize", mutates_args=())
def gated_quantize(
    gate: Tensor,
    up: Tensor | None = None,
    act: str = "silu",
    x_grid: str = "int8_narrow",
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes of `y = act(gate) · up`, which is computed in float32 and rounded once, to gate's dtype.

    Args:
        gate: `[..., channels]`, any float dtype; may be half of a wider tensor.
        up: of gate's shape and dtype, or None for `act(gate)` alone.
        act: silu, gelu (with erf), gelu_tanh, relu or none.
        x_grid: name of the grid of the codes, or empty for y itself.
        x_scale: float32 scalar of a static grid, or None for one scale for each token.
        x_zero: int32 scalar if the grid is static and unsigned.

    Returns:
        Codes `[..., channels]` and scales float32 `[..., 1]`; or y, and an empty tensor.

    Raises:
        KernelError: shapes or dtypes do not fit, the function or grid is unknown, or unsigned without a static scale.
    """
    check("gated_quantize", gate, up, act)
    return _reference(gate, up, act, x_grid, x_scale, x_zero)


def _reference(
    gate: Tensor, up: Tensor | None, act: str, x_grid: str, x_scale: Tensor | None, x_zero: Tensor | None
) -> tuple[Tensor, Tensor]:
    v = ACTS[act](gate.float())
    y = (v if up is None else v * up.float()).to(gate.dtype, copy=True).contiguous()
    return codes_of(y, x_grid, x_scale, x_zero) if x_grid else (y, y.new_empty(0, dtype=torch.float32))


@gated_quantize.register_fake
def _(
    gate: Tensor,
    up: Tensor | None = None,
    act: str = "silu",
    x_grid: str = "int8_narrow",
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check("gated_quantize", gate, up, act)
    if x_grid:
        return empty_codes(gate, x_grid)
    return gate.new_empty(gate.shape), gate.new_empty(0, dtype=torch.float32)


@on_cuda(gated_quantize)
def _(
    gate: Tensor,
    up: Tensor | None = None,
    act: str = "silu",
    x_grid: str = "int8_narrow",
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check("gated_quantize", gate, up, act)
    if gpu_reason(gate, x_grid, x_scale, x_zero):
        return _reference(gate, up, act, x_grid, x_scale, x_zero)
    from qfx.kernels.gpu.gated_quantize import gated_quantize as run
    from qfx.kernels.gpu.rowwise import as_rows

    y, scale = run(as_rows(gate), None if up is None else as_rows(up), act, x_grid, x_scale, x_zero)
    if gate.dim() == 2:
        return y, scale
    return y.view(gate.shape), scale.view(*gate.shape[:-1], 1) if x_grid else scale
