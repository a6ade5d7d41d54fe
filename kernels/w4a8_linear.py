"""`qfx::w4a8_linear`: weights of up to 4 bits times activations of 8 bits, for the GPU (W4A8, W4AFP8).

`qfx::wnaq_linear` computes the same from codes as they are stored. `qfx::w4a8_gemm` takes an input that is already
quantized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.grid import Int
from qfx.core.spec import Scheme
from qfx.kernels import nibbles
from qfx.kernels._cuda import body, has_float8, on_cuda
from qfx.kernels.quantize_rows import grid_name, quantize_activation

CASES = [
    ((16,), 128, 32, "W4A8"),
    ((1,), 256, 64, "W4A8_G64"),
    ((3,), 160, 33, "W4A8_G32"),
    ((2, 3), 136, 24, "W4A8_CHANNEL"),
    ((7,), 256, 17, "W4A8_ASYM_G128"),
    ((5,), 512, 9, "W3A8_G256"),
    ((7,), 128, 9, "W4AFP8"),
    ((4,), 256, 136, "W4AFP8"),
    ((5,), 256, 17, "W4A8_DQ"),
    ((3,), 256, 24, "W4A8_DQ_G64"),
    ((2, 3), 640, 136, "W4A8_DQ"),
    ((4,), 512, 9, "W3A8_DQ_G256"),
    ((0,), 128, 8, "W4A8"),
]
"""(leading dims, in_features, out_features, scheme)."""

X_GRIDS = ("int8_narrow", "int8", "e4m3")


@torch.library.custom_op("qfx::w4a8_gemm", mutates_args=())
def w4a8_gemm(
    x: Tensor,
    x_scale: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    second: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """`x · x_scale @ w.T + bias`.

    Args:
        x: codes `[tokens, in]`: int8, or float8_e4m3fn.
        x_scale: float32 `[tokens, 1]`.
        tiles: codes as `prepare` lays them out for that dtype, uint8 `[row tiles, column tiles, 128, 64]`.
        scale: float32 `[groups, 128 · row tiles]`.
        zero: uint8 of that shape, or None.
        second: float32 `[128 · row tiles]`, or None. Of it the scales are whole multiples, 1 to 15: a kernel may sum
            codes times multiples as integers over a whole row. `scale` holds the products.
        bias: `[out]` or None.
        out_features: `out`.
        group: columns of a group, or -1 for one group.
        dtype: of the output.

    Returns:
        `[tokens, out]`.

    Raises:
        KernelError: the tiles do not have as many columns as x, or x is of another dtype.
    """
    return _reference(x, x_scale, tiles, scale, zero, bias, out_features, group, dtype)


def _reference(
    x: Tensor,
    x_scale: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    _check(x, tiles)
    w = _weight(tiles, scale, zero, out_features, x.shape[-1], group, _layout(x.dtype))
    y = (x.float() @ w.t()) * x_scale
    return (y if bias is None else y + bias).to(dtype)


def _weight(
    tiles: Tensor, scale: Tensor, zero: Tensor | None, out_features: int, in_features: int, group: int, layout: str
) -> Tensor:
    """float32 `[out, in]`, its columns in the order of the tiles."""
    values = nibbles.untile(tiles, layout, out_features, in_features).float()
    if zero is None:
        values = torch.where(values > 7, values - 16, values)
    return nibbles.dequantize_tiles(values, scale, zero, group)


@w4a8_gemm.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    second: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    _check(x, tiles)
    return x.new_empty((x.shape[0], out_features), dtype=dtype)


@on_cuda(w4a8_gemm)
def _(
    x: Tensor,
    x_scale: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    second: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    float8 = x.dtype == torch.float8_e4m3fn
    if float8 and not has_float8(x.device):
        return _reference(x, x_scale, tiles, scale, zero, bias, out_features, group, dtype)
    from qfx.kernels.gpu.decode4 import eight_bit_decoder
    from qfx.kernels.gpu.w4 import w4

    decoder = eight_bit_decoder(x.dtype, zero is not None)
    return w4(x, tiles, scale, zero, bias, out_features, group, decoder, x_scale=x_scale, second=second, dtype=dtype)


def _gemm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, x_scale, tiles, scale, zero, _, bias, out_features, group, _ = inputs
    ctx.save_for_backward(x, x_scale, tiles, scale, zero)
    ctx.sizes = out_features, x.shape[-1], group, _layout(x.dtype)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gemm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, x_scale, tiles, scale, zero = ctx.saved_tensors
    grad = grad.float()
    scale_grad = None
    if ctx.needs_input_grad[1]:
        w = _weight(tiles, scale, zero, *ctx.sizes)
        scale_grad = ((grad @ w) * x.float()).sum(1, keepdim=True).reshape(x_scale.shape)
    bias_grad = None if ctx.bias_dtype is None else grad.sum(0).to(ctx.bias_dtype)
    return None, scale_grad, None, None, None, None, bias_grad, None, None, None


# codes are constants; what reaches their scales and the bias is exact
w4a8_gemm.register_autograd(_gemm_backward, setup_context=_gemm_setup)


@torch.library.custom_op("qfx::w4a8_linear", mutates_args=())
def w4a8_linear(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    second: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group: int,
    x_grid: str,
) -> Tensor:
    """`fake_quantize(x) @ w.T + bias`, x quantized for each token.

    Args:
        x: `[..., in]`, any float dtype.
        tiles: codes as `prepare` lays them out, uint8 `[row tiles, column tiles, 128, 64]`.
        scale: float32 `[groups, 128 · row tiles]`.
        zero: uint8 of that shape, or None.
        order: int32 `[in]`, the column of x for each column of the tiles, or None.
        second: float32 `[128 · row tiles]` or None, as `w4a8_gemm` takes it.
        bias: `[out]` or None.
        out_features: `out`.
        group: columns of a group, or -1 for one group.
        x_grid: one of `X_GRIDS`.

    Returns:
        `[..., out]` of x's dtype.

    Raises:
        KernelError: the tiles do not have as many columns as x.
    """
    flat = x.reshape(-1, x.shape[-1])
    codes, x_scale, _ = quantize_activation(_ordered(flat, order), x_grid, None, None, False)
    y = _reference(codes, x_scale, tiles, scale, zero, bias, out_features, group, x.dtype)
    return y.reshape(*x.shape[:-1], out_features)


@w4a8_linear.register_fake
def _(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    second: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group: int,
    x_grid: str,
) -> Tensor:
    nibbles.check("w4a8_linear", x, tiles)
    return x.new_empty((*x.shape[:-1], out_features))


@on_cuda(w4a8_linear)
def _(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    second: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group: int,
    x_grid: str,
) -> Tensor:
    float8, wide = x_grid == "e4m3", x.dtype not in (torch.bfloat16, torch.float16, torch.float32)
    if wide or (float8 and not has_float8(x.device)):
        return body(w4a8_linear)(x, tiles, scale, zero, order, second, bias, out_features, group, x_grid)
    from qfx.kernels.gpu.decode4 import eight_bit_decoder
    from qfx.kernels.gpu.gated_quantize import quantize_rows
    from qfx.kernels.gpu.w4 import w4

    codes, x_scale = quantize_rows(_ordered(x.reshape(-1, x.shape[-1]), order), x_grid)
    decoder = eight_bit_decoder(codes.dtype, zero is not None)
    weight = tiles, scale, zero, bias, out_features, group, decoder
    y = w4(codes, *weight, x_scale=x_scale, second=second, dtype=x.dtype)
    return y.view(*x.shape[:-1], out_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tiles, scale, zero, order, _, bias, out_features, group, x_grid = inputs
    ctx.save_for_backward(tiles, scale, zero, order)
    ctx.sizes = out_features, x.shape[-1], group, _layout_for(x_grid)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tiles, scale, zero, order = ctx.saved_tensors
    w = _weight(tiles, scale, zero, *ctx.sizes)
    flat = grad.float().reshape(-1, grad.shape[-1])
    x_grad = nibbles.unordered(flat @ w, order).to(grad.dtype).reshape(*grad.shape[:-1], w.shape[1])
    bias_grad = None if ctx.bias_dtype is None else flat.sum(0).to(ctx.bias_dtype)
    return x_grad, None, None, None, None, None, bias_grad, None, None, None


# rounding counts as the identity (straight through), so that adapters train on a quantized base
w4a8_linear.register_autograd(_backward, setup_context=_setup)


def supports(scheme: Scheme, in_features: int, g_idx: bool = False) -> str | None:
    """None if the op computes a linear of this scheme, otherwise the reason why not."""
    w, x = scheme.weight, scheme.input
    if x is None or not x.dynamic or x.block != (1, -1) or grid_name(x.grid) not in X_GRIDS:
        return f"w4a8_linear: the input is not quantized for each token on one of {', '.join(X_GRIDS)}"
    if not isinstance(w.grid, Int) or w.grid.bits > 4:
        return "w4a8_linear: the weight is not integers of at most 4 bits"
    if not w.symmetric and not isinstance(x.grid, Int):
        return "w4a8_linear: float8 activations with zero points; use symmetric weights"
    if not w.symmetric and 0 < w.block[1] < nibbles.TILE:
        return "w4a8_linear: zero points in groups below 128"
    if w.grid.bits == 4 and not w.grid.signed and w.symmetric:
        return "w4a8_linear: unsigned codes without zero points"
    return nibbles.supports_group("w4a8_linear", scheme, in_features)


def prepare(
    stored: dict[str, Tensor | None], *, bits: int, in_features: int, signed: bool, x_grid: str
) -> dict[str, Tensor | None]:
    """A stored weight in the kernel layout for activations of that grid: `tiles`, `scale`, `zero`, `order`, `second`.

    `stored` may have `second` float32 `[out]` as well, of which its scales are whole multiples, 1 to 15.
    """
    layout, second = _layout_for(x_grid), stored.get("second")
    prepared = nibbles.prepare(stored, layout, bits=bits, in_features=in_features, signed=signed, offset=0)
    return {**prepared, "second": None if second is None else nibbles.pad_scale(second[:, None], len(second))[0]}


def restore(
    prepared: dict[str, Tensor | None], *, bits: int, in_features: int, out_features: int, signed: bool, x_grid: str
) -> dict[str, Tensor | None]:
    """The inverse of `prepare`."""
    size = {"in_features": in_features, "out_features": out_features}
    return nibbles.restore(prepared, _layout_for(x_grid), bits=bits, signed=signed, offset=0, **size)


def _layout_for(x_grid: str) -> str:
    return "fours" if x_grid == "e4m3" else "halves"


def _layout(dtype: torch.dtype) -> str:
    return "halves" if dtype == torch.int8 else "fours"


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(-1, order)


def _check(x: Tensor, tiles: Tensor) -> None:
    nibbles.check("w4a8_gemm", x, tiles)
    if x.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise KernelError(f"w4a8_gemm: codes of {x.dtype}; use int8 or float8_e4m3fn")
