"""`qfx::fp8_gemm`: float8 activations times float8 weights, where whoever made the activations quantized them."""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.spec import Scheme
from qfx.kernels import fp8_linear
from qfx.kernels._cuda import body, on_cuda
from qfx.kernels.int8_gemm import backward, check, finish, setup

CASES = [
    ((16,), 64, 32, "", False),
    ((1,), 33, 17, "silu", True),
    ((0,), 24, 8, "relu", True),
    ((2, 3), 40, 24, "gelu", False),
    ((5,), 300, 9, "gelu_tanh", True),
]
"""(leading dims, in_features, out_features, activation, with a residual)."""

_CODES = (torch.float8_e4m3fn, torch.float8_e5m2)


@torch.library.custom_op("qfx::fp8_gemm", mutates_args=())
def fp8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "",
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """`act(x_codes @ codes.T · x_scale · w_scale + bias) + residual` in float32.

    On a GPU the sum is that of its float8 tensor cores, which keep about 14 bits of it: all along for more than some
    hundred tokens, and for 128 products at a time for fewer.

    Args:
        x_codes: float8_e4m3fn or float8_e5m2 `[..., in]`.
        x_scale: float32, one value for each token `[..., 1]`, or a single one.
        codes: float8_e4m3fn or float8_e5m2 `[out, in]`.
        w_scale: float32, one value or one for each output channel (any shape of that size).
        bias: `[out]` or None.
        residual: `[..., out]` or None.
        activation: a key of `int8_gemm.ACTIVATIONS`.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        `[..., out]` of out_dtype.

    Raises:
        KernelError: shapes, dtypes or the activation do not fit.
    """
    _check(x_codes, x_scale, codes, residual, activation, out_dtype)
    acc = x_codes.reshape(-1, x_codes.shape[-1]).float() @ codes.float().t()
    return finish(acc, x_codes, x_scale, w_scale, bias, residual, activation, out_dtype)


@fp8_gemm.register_fake
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


@on_cuda(fp8_gemm)
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
        return body(fp8_gemm)(x_codes, x_scale, codes, w_scale, bias, residual, activation, out_dtype)
    _check(x_codes, x_scale, codes, residual, activation, out_dtype)
    return product(x_codes, x_scale, codes, w_scale, bias, residual, activation, out_dtype)


fp8_gemm.register_autograd(backward, setup_context=setup)


def supports(scheme: Scheme, in_features: int, g_idx: bool = False) -> str | None:
    """None if the op computes a linear of this scheme from codes, otherwise the reason why not."""
    reason = fp8_linear.supports(scheme, in_features, g_idx)
    return reason and reason.replace("fp8_linear", "fp8_gemm")


def _check(
    x_codes: Tensor, x_scale: Tensor, codes: Tensor, residual: Tensor | None, activation: str, out_dtype: torch.dtype
) -> None:
    if x_codes.dtype not in _CODES or codes.dtype not in _CODES:
        raise KernelError(f"fp8_gemm: codes of {x_codes.dtype} and {codes.dtype}; both are float8_e4m3fn or _e5m2")
    check("fp8_gemm", x_codes, x_scale, codes, residual, activation, out_dtype)
