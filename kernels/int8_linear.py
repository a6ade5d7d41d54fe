"""`qfx::int8_linear`: int8 weights times integer activations, accumulated exactly in int32 (W8A8)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.grid import Int
from qfx.core.spec import Scheme
from qfx.kernels._cuda import body, on_cuda
from qfx.kernels.quantize_rows import named_grid, quantize_activation, supports_input

CASES = [
    ((16,), 64, 32, "W8A8"),
    ((1,), 33, 17, "W8A8"),
    ((0,), 24, 8, "W8A8"),
    ((2, 3), 40, 24, "W8A8_STATIC"),
    ((7,), 33, 17, "W8A8_STATIC_ASYM"),
    ((5,), 1100, 9, "W8A8_STATIC_ASYM"),  # sums above 2^24
    ((5,), 48, 16, "W8A8_TENSOR"),
    ((3, 1, 2), 31, 5, "W8A4"),
]
"""(leading dims, in_features, out_features, scheme)."""

MAX_IN = 65536
"""255 · 128 · in must fit in int32."""


@torch.library.custom_op("qfx::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    x_grid: str = "int8_narrow",
    per_tensor: bool = False,
) -> Tensor:
    """`(acc · x_scale · w_scale + bias)` in float32, `acc` being the exact product of the codes.

    Args:
        x: `[..., in]`, any float dtype.
        codes: int8 `[out, in]`.
        w_scale: float32, one value or one for each output channel (any shape of that size).
        bias: `[out]` or None.
        x_scale: float32 scalar of a static input, or None for a dynamic one.
        x_zero: int32 scalar if the static input is on an unsigned grid.
        x_grid: name of the input's integer grid.
        per_tensor: a dynamic input has one scale, not one for each token.

    Returns:
        `[..., out]` of x's dtype.

    Raises:
        KernelError: shapes or dtypes do not fit, or `in` is above `MAX_IN`.
    """
    _check(x, codes, x_grid)
    q, s, z = quantize_activation(x.reshape(-1, x.shape[-1]), x_grid, x_scale, x_zero, per_tensor)
    if q.dtype == torch.uint8:  # 0..255 as int8: shift codes and zero point alike
        q = (q ^ 128).view(torch.int8)
        z = None if z is None else z - 128
    acc = int_matmul(q, codes)
    if z is not None:
        acc = acc - z * codes.sum(1, dtype=torch.int32)
    y = acc.to(torch.float32) * s * w_scale.reshape(-1)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])


@int8_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    x_grid: str = "int8_narrow",
    per_tensor: bool = False,
) -> Tensor:
    _check(x, codes, x_grid)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@on_cuda(int8_linear)
def _(
    x: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    x_grid: str = "int8_narrow",
    per_tensor: bool = False,
) -> Tensor:
    from qfx.kernels.gpu.linear8 import linear8, refusal

    if refusal(x, codes) is not None:
        return body(int8_linear)(x, codes, w_scale, bias, x_scale, x_zero, x_grid, per_tensor)
    _check(x, codes, x_grid)
    return linear8(x, codes, w_scale, bias, x_scale, x_zero, x_grid, per_tensor)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, w_scale, bias, *_ = inputs
    ctx.save_for_backward(codes, w_scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, w_scale = ctx.saved_tensors
    flat = grad.float().reshape(-1, grad.shape[-1])
    x_grad = ((flat * w_scale.reshape(-1)) @ codes.float()).to(grad.dtype)
    bias_grad = None if ctx.bias_dtype is None else flat.sum(0).to(ctx.bias_dtype)
    return x_grad.reshape(*grad.shape[:-1], codes.shape[1]), None, None, bias_grad, *[None] * 4


# rounding counts as the identity (straight through), so that adapters train on a quantized base
int8_linear.register_autograd(_backward, setup_context=_setup)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of int8 `[m, k]` and `[n, k]` as int32 `[m, n]`, exactly, on any device."""
    (m, k), n = a.shape, b.shape[0]
    # of one column `b.t()` has the strides (1, 1), of which the CPU's `_int_mm` makes garbage (torch 2.13)
    if m == 0 or k < 2 or not _int_mm_is_exact(a.device) or (m > 2 and _int_mm_is_slow(a.device)):
        return _chunked_matmul(a, b)
    if a.device.type == "cuda":
        a, b = _pad(a, b)
    return torch._int_mm(a.contiguous(), b.contiguous().t())[:m, :n]


def _pad(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """With zeros to what cuBLAS takes: more than 16 rows, and multiples of 8."""
    (m, k), n = a.shape, b.shape[0]
    return F.pad(a, (0, -k % 8, 0, max(0, 32 - m))), F.pad(b, (0, -k % 8, 0, -n % 8))


def _chunked_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The same in float32, 1024 columns at a time: 1024 · 128 · 128 = 2^24 is the last exact integer."""
    acc = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for i in range(0, a.shape[1], 1024):
        acc += (a[:, i : i + 1024].float() @ b[:, i : i + 1024].float().t()).to(torch.int32)
    return acc


@functools.cache
def _int_mm_is_exact(device: torch.device) -> bool:
    """Whether `torch._int_mm` exists here and does not saturate, as int8 dots of some older CPUs do."""
    a = torch.full((32, 64), -128, dtype=torch.int8, device=device)
    b = torch.full((64, 32), 127, dtype=torch.int8, device=device)
    try:
        extremes = torch._int_mm(a, a.t()[:, :32]), torch._int_mm(a, b)
    except (RuntimeError, NotImplementedError):
        return False
    return bool((extremes[0] == 64 * 2**14).all() and (extremes[1] == -64 * 128 * 127).all())


def _int_mm_is_slow(device: torch.device) -> bool:
    """CPUs without AVX-512 have no fast int8 dots: there float32 is faster, but for the fewest rows."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def supports(scheme: Scheme, in_features: int, g_idx: bool = False) -> str | None:
    """None if the op computes a linear of this scheme, otherwise the reason why not."""
    w, x = scheme.weight, scheme.input
    if x is None or not isinstance(x.grid, Int):
        return "int8_linear: the input is not on an integer grid"
    if w.grid.dtype != torch.int8 or w.grid.bits != 8:
        return "int8_linear: the weight is not signed integers of 8 bits"
    if w.scale is not None:
        return "int8_linear: the weight's scales are quantized"
    if w.block not in ((1, -1), (-1, -1)) or g_idx:
        return f"int8_linear: the weight has blocks of {w.block}; it takes (1, -1) and (-1, -1)"
    if in_features > MAX_IN:
        return f"int8_linear: {in_features} input channels; at most {MAX_IN} are sure to fit in int32"
    reason = supports_input(x)
    return reason and f"int8_linear: {reason}"


def _check(x: Tensor, codes: Tensor, x_grid: str) -> None:
    if codes.dtype != torch.int8 or codes.dim() != 2 or x.shape[-1] != codes.shape[1]:
        raise KernelError(
            f"int8_linear: x {tuple(x.shape)} with {codes.dtype} codes {tuple(codes.shape)}; codes are "
            f"int8 [out, in], and x ends in `in`"
        )
    if codes.shape[1] > MAX_IN:
        raise KernelError(f"int8_linear: {codes.shape[1]} input channels; use at most {MAX_IN}")
    if not isinstance(named_grid(x_grid), Int):
        raise KernelError(f"int8_linear: the input grid is {x_grid}; use fp8_linear")
