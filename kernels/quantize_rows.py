"""`qfx::quantize_rows`: codes of an activation with one dynamic scale for each token, or a static one.

Also the vocabulary by which ops name the grid of an activation (an op takes no dataclass): `int8_narrow` (-127..127),
`int8` (-128..127), `uint8` (with a zero point), other widths alike, `e4m3`, `e5m2`.
"""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.grid import E4M3, E5M2, Codebook, Float, Grid, Int
from qfx.core.qtensor import dynamic_scale
from qfx.core.spec import QSpec
from qfx.kernels._cuda import on_cuda

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
    if isinstance(grid, Codebook):
        return grid.name
    return f"{'' if grid.signed else 'u'}int{grid.bits}{'_narrow' if grid.narrow else ''}"


@functools.cache
def named_grid(name: str) -> Int | Float:
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


def codes_of(y: Tensor, x_grid: str, x_scale: Tensor | None, x_zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """What ops that quantize their own result return: codes of y, and float32 scales `[..., 1]`.

    A static scale is repeated, so that an op's scales have one shape. Raises KernelError as `quantize_rows`.
    """
    _check(x_grid, x_scale)
    codes, scale, _ = quantize_activation(y, x_grid, x_scale, x_zero, False)
    if x_scale is not None:  # a copy: for a single token, `contiguous` would return the argument itself
        scale = scale.reshape(()).expand(*y.shape[:-1], 1).clone(memory_format=torch.contiguous_format)
    return codes, scale


def empty_codes(x: Tensor, x_grid: str) -> tuple[Tensor, Tensor]:
    """Uninitialized codes and scales as `codes_of` returns them."""
    codes = x.new_empty(x.shape, dtype=named_grid(x_grid).dtype)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def gpu_reason(
    x: Tensor, x_grid: str, x_scale: Tensor | None, x_zero: Tensor | None, whole_row: bool = False
) -> str | None:
    """None if the row-wise GPU kernels take this, otherwise the reason why not.

    Args:
        x: `[..., channels]`.
        x_grid: name of a grid, or empty.
        x_scale: of a static grid.
        x_zero: of a static grid.
        whole_row: the kernel holds a row in registers.
    """
    if x_grid:
        _check(x_grid, x_scale)
    from qfx.kernels.gpu import rowwise

    if x.shape[-1] == 0 or (whole_row and x.shape[-1] > rowwise.MAX_BLOCK):
        return f"rows of {x.shape[-1]} channels"
    return rowwise.takes(x, x_grid, x_scale, x_zero)


@torch.library.custom_op("qfx::quantize_rows", mutates_args=())
def quantize_rows(
    x: Tensor, x_grid: str, x_scale: Tensor | None = None, x_zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of x: symmetric with one scale for each token, or of a static scale.

    Args:
        x: `[..., channels]`, any float dtype.
        x_grid: name of a signed or float grid; with a static scale also of an unsigned one.
        x_scale: float32 scalar, or None for a scale of each token's own.
        x_zero: int32 scalar if the grid is static and unsigned.

    Returns:
        Codes `[..., channels]` of the grid's dtype, and scales float32 `[..., 1]`.

    Raises:
        KernelError: the grid is unknown, or unsigned without a static scale.
    """
    return codes_of(x.contiguous(), x_grid, x_scale, x_zero)


@quantize_rows.register_fake
def _(x: Tensor, x_grid: str, x_scale: Tensor | None = None, x_zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check(x_grid, x_scale)
    return empty_codes(x, x_grid)


@on_cuda(quantize_rows)
def _(x: Tensor, x_grid: str, x_scale: Tensor | None = None, x_zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if gpu_reason(x, x_grid, x_scale, x_zero):
        return codes_of(x.contiguous(), x_grid, x_scale, x_zero)
    from qfx.kernels.gpu.gated_quantize import quantize_rows as run
    from qfx.kernels.gpu.rowwise import as_rows

    codes, scale = run(as_rows(x), x_grid, x_scale, x_zero)
    return (codes, scale) if x.dim() == 2 else (codes.view(x.shape), scale.view(*x.shape[:-1], 1))


def supports(spec: QSpec) -> str | None:
    """None if the op computes codes of this activation spec, otherwise the reason why not."""
    if not spec.dynamic or spec.block != (1, -1):
        return "quantize_rows: the scale is not dynamic per token"
    return None if spec.symmetric else "quantize_rows: the spec has zero points"


def supports_input(spec: QSpec) -> str | None:
    """None if the linear ops quantize their input by this spec, otherwise the reason why not."""
    if isinstance(spec.grid, Codebook):
        return f"an activation on the codebook {spec.grid.name}; use an integer or a float8 grid"
    if spec.block == (-1, -1) or (spec.dynamic and spec.block == (1, -1)):
        return None
    if spec.dynamic:
        return f"an activation in blocks of {spec.block}; use (1, -1) or (-1, -1)"
    return f"a static activation scale for blocks of {spec.block}; use (-1, -1)"


def _check(x_grid: str, x_scale: Tensor | None) -> None:
    grid = named_grid(x_grid)
    if x_scale is None and isinstance(grid, Int) and not grid.signed:
        raise KernelError(
            f"quantize_rows: {x_grid} needs a zero point; use a signed or float grid, or give x_scale and x_zero"
        )
