"""`qfx::int8_outlier_linear`: int8 linear whose outlier channels are multiplied in half precision (LLM.int8()).

A few input channels hold values so large that they would coarsen every token's scale. They are left out of the
quantization, and a second product of their values and their weights is added. Which ones is known beforehand
(`outlier_columns`), or found in each call: those with a magnitude above `threshold` in any token. Neither form waits
for the GPU, so both can be captured in a CUDA graph; for that the second form has a fixed `capacity`. Where more
channels than that pass the threshold, the largest are taken; the rest stay in int8, at the cost of accuracy.

Dettmers et al. (2022), LLM.int8(): 8-bit matrix multiplication for transformers at scale, arXiv:2208.07339.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.grid import Int
from qfx.core.spec import Scheme
from qfx.kernels import int8_linear
from qfx.kernels._cuda import body, on_cuda
from qfx.kernels.quantize_rows import quantize_activation

CASES = [
    ((16,), 64, 32, 3, 0.0),
    ((1,), 33, 17, 16, 0.0),
    ((2, 3), 40, 24, 20, 0.0),
    ((0,), 24, 8, 1, 0.0),
    ((7,), 48, 9, 0, 0.0),
    ((16,), 64, 32, 0, 6.0),
    ((0,), 24, 8, 0, 6.0),
    ((2, 3), 33, 24, 0, 6.0),
]
"""(leading dims, in_features, out_features, static outliers, threshold)."""

GRID = "int8_narrow"
"""The grid of the other channels, with one scale for each token."""

STEP = 16
"""`outlier_weight` has a multiple of so many columns."""


@torch.library.custom_op("qfx::int8_outlier_linear", mutates_args=())
def int8_outlier_linear(
    x: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    threshold: float = 0.0,
    capacity: int = 64,
) -> Tensor:
    """`acc · x_scale · w_scale + x_outliers @ w_outliers.T + bias` in float32.

    Args:
        x: `[..., in]`, any float dtype.
        codes: int8 `[out, in]`; what outlier columns hold does not matter in the static form.
        w_scale: float32, one value or one for each output channel (any shape of that size).
        bias: `[out]` or None.
        outlier_columns: int32 `[n]`, distinct; of the static form.
        outlier_weight: bfloat16 or float16 `[out, n rounded up to STEP]`, finite; of the static form. Outliers of x
            are rounded to its dtype.
        threshold: of the dynamic form, above 0. Its weights are the dequantized codes in x's dtype (in bfloat16 for
            a float32 x).
        capacity: how many channels the dynamic form takes at most; a multiple of STEP.

    Returns:
        `[..., out]` of x's dtype.

    Raises:
        KernelError: shapes or dtypes do not fit, or neither or both of the forms are asked for.
    """
    _check(x, codes, outlier_columns, outlier_weight, threshold, capacity)
    flat = x.reshape(-1, x.shape[-1])
    columns, inlier, weight = outliers(flat, codes, w_scale, outlier_columns, outlier_weight, threshold, capacity)
    q, scale, _ = quantize_activation(torch.where(inlier, flat, 0), GRID, None, None, False)
    y = int8_linear.int_matmul(q, codes).to(torch.float32) * scale * w_scale.reshape(-1)
    picked = torch.where(inlier[columns.long()], 0, flat[:, columns.long()]).to(weight.dtype)
    y = y + picked.float() @ weight[:, : picked.shape[1]].float().t()
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])


@int8_outlier_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    threshold: float = 0.0,
    capacity: int = 64,
) -> Tensor:
    _check(x, codes, outlier_columns, outlier_weight, threshold, capacity)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@on_cuda(int8_outlier_linear)
def _(
    x: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    threshold: float = 0.0,
    capacity: int = 64,
) -> Tensor:
    from qfx.kernels.gpu.outliers import outlier_linear, refusal

    rest = (codes, w_scale, bias, outlier_columns, outlier_weight, threshold, capacity)
    if refusal(x, codes) is not None:
        return body(int8_outlier_linear)(x, *rest)
    _check(x, codes, outlier_columns, outlier_weight, threshold, capacity)
    return outlier_linear(x, *rest)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, w_scale, bias, columns, weight, *_ = inputs
    ctx.save_for_backward(codes, w_scale, columns, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, w_scale, columns, weight = ctx.saved_tensors
    flat = grad.float().reshape(-1, grad.shape[-1])
    x_grad = (flat * w_scale.reshape(-1)) @ codes.float()
    if columns is not None:
        x_grad = x_grad.index_copy(1, columns.long(), flat @ weight[:, : columns.shape[0]].float())
    bias_grad = None if ctx.bias_dtype is None else flat.sum(0).to(ctx.bias_dtype)
    return x_grad.to(grad.dtype).reshape(*grad.shape[:-1], codes.shape[1]), None, None, bias_grad, *[None] * 4


# rounding counts as the identity (straight through), so that adapters train on a quantized base
int8_outlier_linear.register_autograd(_backward, setup_context=_setup)


def outliers(
    flat: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    columns: Tensor | None,
    weight: Tensor | None,
    threshold: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outlier channels, a mask `[in]` that is True for all others, and the outliers' weight.

    In the dynamic form there are always as many channels; those that the mask does not name are no outliers.
    """
    if columns is not None and weight is not None:
        return columns, inliers(columns, flat.shape[1]), weight
    top, columns = largest(flat, min(capacity, flat.shape[1]))
    inlier = torch.ones(flat.shape[1], dtype=torch.bool, device=flat.device)
    inlier = inlier.scatter(0, columns, top <= threshold)
    dtype = torch.bfloat16 if flat.dtype == torch.float32 else flat.dtype
    weight = (codes.index_select(1, columns).to(torch.float32) * w_scale.reshape(-1, 1)).to(dtype)
    return columns.to(torch.int32), inlier, F.pad(weight, (0, -weight.shape[1] % STEP))


def inliers(columns: Tensor, channels: int) -> Tensor:
    """A mask `[channels]` that is False for the given ones."""
    mask = torch.ones(channels, dtype=torch.bool, device=columns.device)
    return mask.index_fill(0, columns.long(), False)


def largest(flat: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest magnitudes of channels over all tokens, and which channels these are."""
    if flat.shape[0] == 0:
        zeros = torch.zeros(count, dtype=flat.dtype, device=flat.device)
        return zeros, torch.arange(count, device=flat.device)
    top, columns = flat.abs().amax(0).topk(count)
    return top, columns


def supports(scheme: Scheme, in_features: int, g_idx: bool = False) -> str | None:
    """None if the op computes a linear of this scheme, otherwise the reason why not."""
    reason = int8_linear.supports(scheme, in_features, g_idx)
    if reason is not None:
        return reason.replace("int8_linear", "int8_outlier_linear")
    x = scheme.input
    assert x is not None and isinstance(x.grid, Int)
    if not x.dynamic or x.block != (1, -1) or x.grid != Int(8, narrow=True):
        return "int8_outlier_linear: the input is not dynamic per token on the narrow grid of 8 bits"
    return None


def _check(
    x: Tensor,
    codes: Tensor,
    columns: Tensor | None,
    weight: Tensor | None,
    threshold: float,
    capacity: int,
) -> None:
    if codes.dtype != torch.int8 or codes.dim() != 2 or x.shape[-1] != codes.shape[1]:
        raise KernelError(
            f"int8_outlier_linear: x {tuple(x.shape)} with {codes.dtype} codes {tuple(codes.shape)}; codes are int8 "
            f"[out, in], and x ends in `in`"
        )
    if codes.shape[1] > int8_linear.MAX_IN:
        raise KernelError(f"int8_outlier_linear: {codes.shape[1]} channels; use at most {int8_linear.MAX_IN}")
    if (columns is None) != (weight is None) or (columns is None) != (threshold > 0):
        raise KernelError("int8_outlier_linear: give outlier_columns and outlier_weight, or a threshold above 0")
    if columns is None and (capacity < STEP or capacity % STEP):
        raise KernelError(f"int8_outlier_linear: capacity {capacity}; use a multiple of {STEP}")
    if columns is not None and weight is not None:
        wanted = codes.shape[0], -(-columns.shape[0] // STEP) * STEP
        if weight.shape != wanted or weight.dtype not in (torch.bfloat16, torch.float16):
            raise KernelError(
                f"int8_outlier_linear: an outlier_weight of {weight.dtype} {tuple(weight.shape)} for "
                f"{columns.shape[0]} columns; it is bfloat16 or float16 {wanted}"
            )
