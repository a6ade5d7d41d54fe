"""`qfx::fp8_linear`: E4M3 or E5M2 weights times E4M3 or E5M2 activations (FP8, FP8_DYNAMIC)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.grid import Float
from qfx.core.spec import Scheme
from qfx.kernels._cuda import body, on_cuda
from qfx.kernels.quantize_rows import named_grid, quantize_activation, supports_input

CASES = [
    ((16,), 64, 32, "FP8"),
    ((1,), 33, 17, "FP8_DYNAMIC"),
    ((0,), 24, 8, "FP8_DYNAMIC"),
    ((2, 3), 40, 24, "FP8_E5M2"),
    ((7,), 31, 5, "FP8_E5M2_DYNAMIC"),
]
"""(leading dims, in_features, out_features, scheme)."""

_CODES = (torch.float8_e4m3fn, torch.float8_e5m2)


@torch.library.custom_op("qfx::fp8_linear", mutates_args=())
def fp8_linear(
    x: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_grid: str = "e4m3",
    per_tensor: bool = False,
) -> Tensor:
    """`(x_codes @ codes.T · x_scale · w_scale + bias)` in float32.

    On a GPU the sum is that of its float8 tensor cores, which keep about 14 bits of it: all along for more than some
    hundred tokens, and for 128 products at a time for fewer.

    Args:
        x: `[..., in]`, any float dtype.
        codes: float8_e4m3fn or float8_e5m2 `[out, in]`.
        w_scale: float32, one value or one for each output channel (any shape of that size).
        bias: `[out]` or None.
        x_scale: float32 scalar of a static input, or None for a dynamic one.
        x_grid: `e4m3` or `e5m2`, the input's grid.
        per_tensor: a dynamic input has one scale, not one for each token.

    Returns:
        `[..., out]` of x's dtype.

    Raises:
        KernelError: shapes or dtypes do not fit.
    """
    _check(x, codes, x_grid)
    q, s, _ = quantize_activation(x.reshape(-1, x.shape[-1]), x_grid, x_scale, None, per_tensor)
    y = (q.float() @ codes.float().t()) * s * w_scale.reshape(-1)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])


@fp8_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_grid: str = "e4m3",
    per_tensor: bool = False,
) -> Tensor:
    _check(x, codes, x_grid)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@on_cuda(fp8_linear)
def _(
    x: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_grid: str = "e4m3",
    per_tensor: bool = False,
) -> Tensor:
    from qfx.kernels.gpu.linear8 import linear8, refusal

    if refusal(x, codes) is not None:
        return body(fp8_linear)(x, codes, w_scale, bias, x_scale, x_grid, per_tensor)
    _check(x, codes, x_grid)
    return linear8(x, codes, w_scale, bias, x_scale, None, x_grid, per_tensor)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, w_scale, bias, *_ = inputs
    ctx.save_for_backward(codes, w_scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, w_scale = ctx.saved_tensors
    flat = grad.float().reshape(-1, grad.shape[-1])
    x_grad = ((flat * w_scale.reshape(-1)) @ codes.float()).to(grad.dtype)
    bias_grad = None if ctx.bias_dtype is None else flat.sum(0).to(ctx.bias_dtype)
    return x_grad.reshape(*grad.shape[:-1], codes.shape[1]), None, None, bias_grad, *[None] * 3


# rounding counts as the identity (straight through), so that adapters train on a quantized base
fp8_linear.register_autograd(_backward, setup_context=_setup)


def supports(scheme: Scheme, in_features: int, g_idx: bool = False) -> str | None:
    """None if the op computes a linear of this scheme, otherwise the reason why not."""
    w, x = scheme.weight, scheme.input
    if x is None or not isinstance(x.grid, Float):
        return "fp8_linear: the input is not on a float grid"
    if not isinstance(w.grid, Float):
        return "fp8_linear: the weight is not on a float grid"
    if w.scale is not None:
        return "fp8_linear: the weight's scales are quantized"
    if w.block not in ((1, -1), (-1, -1)) or g_idx:
        return f"fp8_linear: the weight has blocks of {w.block}; it takes (1, -1) and (-1, -1)"
    reason = supports_input(x)
    return reason and f"fp8_linear: {reason}"


def _check(x: Tensor, codes: Tensor, x_grid: str) -> None:
    if codes.dtype not in _CODES or codes.dim() != 2 or x.shape[-1] != codes.shape[1]:
        raise KernelError(
            f"fp8_linear: x {tuple(x.shape)} with {codes.dtype} codes {tuple(codes.shape)}; codes are "
            f"float8_e4m3fn or float8_e5m2 [out, in], and x ends in `in`"
        )
    if not isinstance(named_grid(x_grid), Float):
        raise KernelError(f"fp8_linear: the input grid is {x_grid}; use e4m3 or e5m2")
