"""`qfx::int8_gemm`: int8 activations times int8 weights, where whoever made the activations quantized them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.grid import Int
from qfx.core.spec import Scheme
from qfx.kernels import int8_linear
from qfx.kernels._cuda import body, on_cuda

CASES = [
    ((16,), 64, 32, "", False),
    ((1,), 33, 17, "silu", True),
    ((0,), 24, 8, "relu", True),
    ((2, 3), 40, 24, "gelu", False),
    ((5,), 1100, 9, "gelu_tanh", True),
]
"""(leading dims, in_features, out_features, activation, with a residual)."""

ACTIVATIONS = {
    "": lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
"""What a product may be passed through, by name."""

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.library.custom_op("qfx::int8_gemm", mutates_args=())
def int8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "",
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`act(acc · x_scale · w_scale + bias) + residual` in float32, `acc` being the exact product of the codes.

    Args:
        x_codes: int8 `[..., in]`.
        x_scale: float32, one value for each token `[..., 1]`, or a single one.
        codes: int8 `[out, in]`.
        w_scale: float32, one value or one for each output channel (any shape of that size).
        bias: `[out]` or None.
        residual: `[..., out]` or None.
        activation: a key of `ACTIVATIONS`.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        `[..., out]` of out_dtype.

    Raises:
        KernelError: shapes, dtypes or the activation do not fit, or `in` is above `int8_linear.MAX_IN`.
    """
    _check(x_codes, x_scale, codes, residual, activation, out_dtype)
    acc = int8_linear.int_matmul(x_codes.reshape(-1, x_codes.shape[-1]), codes)
    return finish(acc, x_codes, x_scale, w_scale, bias, residual, activation, out_dtype)


@int8_gemm.register_fake
def _(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "",
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    _check(x_codes, x_scale, codes, residual, activation, out_dtype)
    return x_codes.new_empty((*x_codes.shape[:-1], codes.shape[0]), dtype=out_dtype)


@on_cuda(int8_gemm)
def _(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "",
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    from qfx.kernels.gpu.gemm8 import product, refusal

    if refusal(x_codes, codes) is not None:
        return body(int8_gemm)(x_codes, x_scale, codes, w_scale, bias, residual, activation, out_dtype)
    _check(x_codes, x_scale, codes, residual, activation, out_dtype)
    return product(x_codes, x_scale, codes, w_scale, bias, residual, activation, out_dtype)


def finish(
    acc: Tensor,
    x_codes: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """The epilogue, from products `[tokens, out]` to the op's output."""
    y = acc.to(torch.float32) * x_scale.reshape(-1, 1) * w_scale.reshape(-1)
    if bias is not None:
        y = y + bias
    y = ACTIVATIONS[activation](y).reshape(*x_codes.shape[:-1], acc.shape[1])
    if residual is not None:
        y = y + residual
    return y.to(out_dtype)


_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "": lambda grad, y: grad,
    "relu": lambda grad, y: torch.where(y > 0, grad, 0),
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, y: torch.ops.aten.gelu_backward(grad, y, approximate="tanh"),
}
"""The gradients of `ACTIVATIONS` from those of their outputs, and their inputs."""


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps what `backward` reads; of all families."""
    x_codes, x_scale, codes, w_scale, bias, residual, activation, _ = inputs
    ctx.save_for_backward(x_codes, x_scale, codes, w_scale, bias)
    ctx.activation, ctx.residual_dtype = activation, None if residual is None else residual.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Exact gradients of the tokens' scales, the bias and the residual; codes and the weight's scales are constants."""
    x_codes, x_scale, codes, w_scale, bias = ctx.saved_tensors
    residual_grad = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
    flat, scale_grad, bias_grad = grad.float().reshape(-1, grad.shape[-1]), None, None
    if ctx.needs_input_grad[1] or ctx.activation:
        product = (x_codes.reshape(-1, x_codes.shape[-1]).float() @ codes.float().t()) * w_scale.reshape(-1)
        y = product * x_scale.reshape(-1, 1)
        flat = _SLOPES[ctx.activation](flat, y if bias is None else y + bias)
        scale_grad = (flat * product).sum(1, keepdim=True)
        scale_grad = (scale_grad if x_scale.numel() == len(scale_grad) else scale_grad.sum()).reshape(x_scale.shape)
    if bias is not None:
        bias_grad = flat.sum(0).to(bias.dtype)
    return None, scale_grad, None, None, bias_grad, residual_grad, None, None


int8_gemm.register_autograd(backward, setup_context=setup)


def supports(scheme: Scheme, in_features: int, g_idx: bool = False) -> str | None:
    """None if the op computes a linear of this scheme from symmetric int8 codes, otherwise the reason why not."""
    reason = int8_linear.supports(scheme, in_features, g_idx)
    if reason is not None:
        return reason.replace("int8_linear", "int8_gemm")
    assert scheme.input is not None and isinstance(scheme.input.grid, Int)
    return None if scheme.input.grid.signed else "int8_gemm: the input has a zero point"


def check(
    name: str, x_codes: Tensor, x_scale: Tensor, codes: Tensor, residual: Tensor | None, activation: str,
    out_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raises KernelError unless shapes and names fit; of all families."""
    # a size may be a symbol of Dynamo's, which `torch.Size.numel` would make a constant
    tokens, rows = math.prod(x_codes.shape[:-1]), codes.shape[0]
    if codes.dim() != 2 or x_codes.shape[-1] != codes.shape[1]:
        raise KernelError(
            f"{name}: x_codes {tuple(x_codes.shape)} with codes {tuple(codes.shape)}; codes are [out, in], and "
            "x_codes end in `in`"
        )
    if x_scale.numel() not in (1, tokens):
        raise KernelError(f"{name}: {x_scale.numel()} scales for {tokens} tokens; give one for each, or one")
    if residual is not None and residual.shape != (*x_codes.shape[:-1], rows):
        raise KernelError(f"{name}: a residual {tuple(residual.shape)} for {tokens} tokens and {rows} channels")
    if activation not in ACTIVATIONS:
        raise KernelError(f"{name}: no activation {activation!r}; there are {', '.join(filter(None, ACTIVATIONS))}")
    if out_dtype not in OUT_DTYPES:
        raise KernelError(f"{name}: no output of {out_dtype}; use bfloat16, float16 or float32")


def _check(
    x_codes: Tensor, x_scale: Tensor, codes: Tensor, residual: Tensor | None, activation: str, out_dtype: torch.dtype
) -> None:
    if x_codes.dtype != torch.int8 or codes.dtype != torch.int8:
        raise KernelError(f"int8_gemm: codes of {x_codes.dtype} and {codes.dtype}; both are int8")
    if codes.shape[-1] > int8_linear.MAX_IN:
        raise KernelError(f"int8_gemm: {codes.shape[-1]} input channels; use at most {int8_linear.MAX_IN}")
    check("int8_gemm", x_codes, x_scale, codes, residual, activation, out_dtype)
