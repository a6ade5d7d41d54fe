"""`qfx::quantize_rows`: symmetric codes of an activation with one dynamic scale for each token.

Also the vocabulary by which ops name the grid of an activation (an op takes no dataclass): `int8_narrow` (-127..127),
`int8` (-128..127), `uint8` (with a zero point), other widths alike, `e4m3`, `e5m2`.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.grid import E4M3, E5M2, Float, Grid, Int
from qfx.core.qtensor import dynamic_scale
from qfx.core.spec import QSpec

CASES = [
    ((1,), 64, "int8_narrow"),
    ((7,), 33, "int8_narrow"),
    ((2, 5), 40, "int8"),
    ((16,), 96, "int4_narrow"),
    ((3,), 17, "int2_narrow"),
    ((0,), 24, "int8_narrow"),
    ((7,), 33, "e4m3"),
    ((2, 1, 3), 8, "e5m2"),
]
"""(leading dims, channels, grid)."""

_INT = re.compile(r"(u?)int([1-8])(_narrow)?")
_FLOATS = {"e4m3": E4M3, "e5m2": E5M2}


def grid_name(grid: Grid) -> str:
    """The name of a grid, as ops take it."""
    if isinstance(grid, Float):
        return f"e{grid.exp}m{grid.man}"
    return f"{'' if grid.signed else 'u'}int{grid.bits}{'_narrow' if grid.narrow else ''}"


def named_grid(name: str) -> Grid:
    """The inverse of `grid_name`; an unknown name raises KernelError."""
    if name in _FLOATS:
        return _FLOATS[name]
    match = _INT.fullmatch(name)
    if match is None:
        raise KernelError(f"kernels: no grid {name!r}; use int<bits>, int<bits>_narrow, uint<bits>, e4m3 or e5m2")
    return Int(int(match[2]), signed=not match[1], narrow=bool(match[3]))


def quantize_activation(
    x: Tensor, x_grid: str, x_scale: Tensor | None, x_zero: Tensor | None, per_tensor: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point of an activation: `dynamic_scale` and `encode` of `qfx.core.qtensor`.

    Args:
        x: `[..., channels]`.
        x_grid: the grid's name. Unsigned grids have a zero point.
        x_scale: float32 scalar, or None for a scale of x itself.
        x_zero: int32 scalar beside a static scale on an unsigned grid, or None.
        per_tensor: one dynamic scale for all of x, not one for each token.

    Returns:
        Codes of x's shape, float32 scale and int32 zero point (or None) that broadcast against x.
    """
    grid = named_grid(x_grid)
    unsigned = isinstance(grid, Int) and not grid.signed
    if x_scale is None:
        spec = QSpec(grid, (-1, -1) if per_tensor else (1, -1), symmetric=not unsigned, dynamic=True)
        empty = per_tensor and x.numel() == 0  # no maximum: the scale is that of zeros
        x_scale, x_zero = dynamic_scale(x.new_zeros((1,) * x.dim()) if empty else x, spec)
    elif unsigned and x_zero is None:
        raise KernelError(f"kernels: a static scale on {x_grid} needs a zero point; give x_zero")
    y = x.float() / x_scale
    return grid.encode(y if x_zero is None else y.round() + x_zero), x_scale, x_zero


@torch.library.custom_op("qfx::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, x_grid: str) -> tuple[Tensor, Tensor]:
    """Symmetric codes of x, one scale for each token.

    Args:
        x: `[..., channels]`, any float dtype.
        x_grid: name of a signed or float grid.

    Returns:
        Codes `[..., channels]` of the grid's dtype, and scales float32 `[..., 1]`.

    Raises:
        KernelError: the grid is unknown or unsigned.
    """
    _symmetric(x_grid)
    codes, scale, _ = quantize_activation(x.contiguous(), x_grid, None, None, False)
    return codes, scale


@quantize_rows.register_fake
def _(x: Tensor, x_grid: str) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=_symmetric(x_grid).dtype)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def supports(spec: QSpec) -> str | None:
    """None if the op computes codes of this activation spec, otherwise the reason why not."""
    if not spec.dynamic or spec.block != (1, -1):
        return "quantize_rows: the scale is not dynamic per token"
    return None if spec.symmetric else "quantize_rows: the spec has zero points"


def supports_input(spec: QSpec) -> str | None:
    """None if the linear ops quantize their input by this spec, otherwise the reason why not."""
    if spec.block == (-1, -1) or (spec.dynamic and spec.block == (1, -1)):
        return None
    if spec.dynamic:
        return f"an activation in blocks of {spec.block}; use (1, -1) or (-1, -1)"
    return f"a static activation scale for blocks of {spec.block}; use (-1, -1)"


def _symmetric(x_grid: str) -> Grid:
    grid = named_grid(x_grid)
    if isinstance(grid, Int) and not grid.signed:
        raise KernelError(f"quantize_rows: {x_grid} needs a zero point; use a signed or float grid")
    return grid
