"""`qfx::hadamard`: the orthonormal Hadamard transform along channels, alone or with codes behind."""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.kernels._cuda import on_cuda
from qfx.kernels.hadamard_matrix import core_matrix, core_order
from qfx.kernels.quantize_rows import codes_of, empty_codes, gpu_reason

CASES = [
    ((1,), 64, 64, ""),
    ((5,), 128, 32, "int8_narrow"),
    ((2, 3), 192, 192, "e4m3"),
    ((3,), 36, 12, "int8"),
    ((0,), 32, 32, "int8_narrow"),
    ((2,), 1024, 1024, "int8_narrow"),
    ((7,), 6, 2, ""),
]
"""(leading dims, channels, block, grid)."""


@torch.library.custom_op("qfx::hadamard", mutates_args=())
def hadamard(
    x: Tensor, block: int, x_grid: str = "", x_scale: Tensor | None = None, x_zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`y = x (I ⊗ H) / √block`, H being `hadamard_matrix(block)`; computed in float32 and rounded to x's dtype.

    Args:
        x: `[..., channels]`, any float dtype.
        block: size of the transform; divides `channels`.
        x_grid: name of the grid of the codes, or empty for y itself.
        x_scale: float32 scalar of a static grid, or None for one scale for each token.
        x_zero: int32 scalar if the grid is static and unsigned.

    Returns:
        Codes `[..., channels]` and scales float32 `[..., 1]`; or y, and an empty tensor.

    Raises:
        KernelError: there is no matrix of this size, it does not divide the channels, the grid is unknown, or
            unsigned without a static scale.
    """
    _check(x, block)
    return _reference(x, block, x_grid, x_scale, x_zero)


def _reference(
    x: Tensor, block: int, x_grid: str, x_scale: Tensor | None, x_zero: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = transform(x.float(), block).to(x.dtype).contiguous()
    return codes_of(y, x_grid, x_scale, x_zero) if x_grid else (y, y.new_empty(0, dtype=torch.float32))


def transform(x: Tensor, block: int) -> Tensor:
    """The fast transform in x's dtype: log2 steps of sums and differences, then one small product."""
    m = core_order(block)
    assert m is not None
    y = x.reshape(*x.shape[:-1], x.shape[-1] // block, m, block // m)
    width = block // m
    step = 1
    while step < width:
        pairs = y.reshape(*y.shape[:-1], width // (2 * step), 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), -2).reshape(y.shape)
        step *= 2
    if m > 1:
        y = (y.transpose(-1, -2) @ core_matrix(m).to(y)).transpose(-1, -2)
    return y.reshape(x.shape) * block**-0.5


@hadamard.register_fake
def _(
    x: Tensor, block: int, x_grid: str = "", x_scale: Tensor | None = None, x_zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check(x, block)
    return empty_codes(x, x_grid) if x_grid else (x.new_empty(x.shape), x.new_empty(0, dtype=torch.float32))


@on_cuda(hadamard)
def _(
    x: Tensor, block: int, x_grid: str = "", x_scale: Tensor | None = None, x_zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check(x, block)
    from qfx.kernels.gpu import hadamard as gpu
    from qfx.kernels.gpu.rowwise import as_rows

    if gpu_reason(x, x_grid, x_scale, x_zero) or gpu.takes(x.shape[-1], block, x.dtype):
        return _reference(x, block, x_grid, x_scale, x_zero)
    y, scale = gpu.hadamard(as_rows(x), block, x_grid, x_scale, x_zero)
    if x.dim() == 2:
        return y, scale
    return y.view(x.shape), scale.view(*x.shape[:-1], 1) if x_grid else scale


def supports(channels: int, block: int) -> str | None:
    """None if the op transforms so many channels in blocks of this size, otherwise the reason why not."""
    if block < 1 or channels % block:
        return f"hadamard: blocks of {block} do not divide {channels} channels"
    return (
        None if core_order(block) else f"hadamard: no matrix of order {block}; use m · 2^k, m in 1, 12, 20, 28, 36..."
    )


def _check(x: Tensor, block: int) -> None:
    if reason := supports(x.shape[-1], block):
        raise KernelError(reason)
