"""`qfx::wnaq_linear`: any stored weight times any quantized activation (W4A8, W4AFP8, W8A8 with asymmetric weights)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qfx.core.spec import Scheme
from qfx.kernels.pack import dequantize
from qfx.kernels.quantize_rows import named_grid, quantize_activation, supports_input
from qfx.kernels.wna16_linear import check, supports_weight

CASES = [
    ((16,), 128, 32, "W4A8"),
    ((1,), 33, 17, "W4A8_CHANNEL"),
    ((0,), 24, 8, "W4A8_CHANNEL"),
    ((7,), 128, 9, "W4AFP8"),
    ((2, 3), 40, 24, "W4A8_ASYM_G8"),
    ((5,), 33, 17, "W3A8_CHANNEL_STATIC_ASYM"),
    ((5,), 48, 16, "W8A8_ASYM"),
    ((4,), 48, 16, "W8A8_G16_STATIC"),
    ((3, 1, 2), 24, 5, "W2A4_ASYM_G8"),
    ((3,), 28, 5, "W6A6_TENSOR"),
]
"""(leading dims, in_features, out_features, scheme)."""


@torch.library.custom_op("qfx::wnaq_linear", mutates_args=())
def wnaq_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    bits: int = 4,
    in_features: int = 0,
    signed: bool = True,
    x_grid: str = "int8_narrow",
    per_tensor: bool = False,
    table: str = "",
    scale_scale: Tensor | None = None,
    scale_block: int = 0,
) -> Tensor:
    """`fake_quantize(x) @ dequantize(w).T + bias`, all in float32.

    Args:
        x: `[..., in]`, any float dtype.
        codes: uint8 `[out, ceil(in / 8) * bits]` as `pack` writes it if `bits` < 8, otherwise int8,
            uint8 or float8 `[out, in]`.
        scale: `[out or 1, groups]`, any float dtype, or the codes of quantized scales.
        zero: integers of the scale's shape, or None if symmetric.
        g_idx: int32 or int64 `[in]`, the group of each column, or None if groups are consecutive.
        bias: `[out]` or None.
        x_scale: float32 scalar of a static input, or None for a dynamic one.
        x_zero: int32 scalar if the static input is on an unsigned grid.
        bits: bits of a code, 1 to 8.
        in_features: `in`, which a packed row does not tell.
        signed: whether packed codes are two's complement.
        x_grid: name of the input's grid.
        per_tensor: a dynamic input has one scale, not one for each token.
        table: the name of the weight's codebook, or "": a code is its own value.
        scale_scale: float32 `[blocks]` of quantized scales of the weight, or None.
        scale_block: how many scales share one of those, or -1 for those of a row, or all.

    Returns:
        `[..., out]` of x's dtype.

    Raises:
        KernelError: shapes or dtypes do not fit.
    """
    check("wnaq_linear", x, codes, scale, g_idx, bits, in_features)
    q, s, z = quantize_activation(x.reshape(-1, in_features), x_grid, x_scale, x_zero, per_tensor)
    layout: dict[str, Any] = {"bits": bits, "columns": in_features, "signed": signed, "table": table}
    w = dequantize(codes, scale, zero, g_idx, **layout, scale_scale=scale_scale, scale_block=scale_block)
    values = q.float() if z is None else q.float() - z
    y = (values @ w.t()) * s  # one factor for each token: exact enough behind the sum, and cheaper
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])


@wnaq_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    bits: int = 4,
    in_features: int = 0,
    signed: bool = True,
    x_grid: str = "int8_narrow",
    per_tensor: bool = False,
    table: str = "",
    scale_scale: Tensor | None = None,
    scale_block: int = 0,
) -> Tensor:
    check("wnaq_linear", x, codes, scale, g_idx, bits, in_features)
    named_grid(x_grid)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, zero, g_idx, bias, _, _, bits, in_features, signed, _, _, table, scale_scale, scale_block = inputs
    ctx.save_for_backward(codes, scale, zero, g_idx, scale_scale)
    ctx.layout = {"bits": bits, "columns": in_features, "signed": signed, "table": table, "scale_block": scale_block}
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *weight, scale_scale = ctx.saved_tensors
    w = dequantize(*weight, scale_scale=scale_scale, **ctx.layout)
    flat = grad.float().reshape(-1, grad.shape[-1])
    bias_grad = None if ctx.bias_dtype is None else flat.sum(0).to(ctx.bias_dtype)
    x_grad = (flat @ w).to(grad.dtype).reshape(*grad.shape[:-1], w.shape[1])
    return x_grad, None, None, None, None, bias_grad, *[None] * 10


# rounding counts as the identity (straight through), so that adapters train on a quantized base
wnaq_linear.register_autograd(_backward, setup_context=_setup)


def supports(scheme: Scheme, in_features: int, g_idx: bool = False) -> str | None:
    """None if the op computes a linear of this scheme, otherwise the reason why not."""
    if scheme.input is None:
        return "wnaq_linear: the input is not quantized"
    if reason := supports_input(scheme.input):
        return f"wnaq_linear: {reason}"
    return supports_weight("wnaq_linear", scheme, in_features)
