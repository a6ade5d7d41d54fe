"""`qfx::int8_linear` and `qfx::fp8_linear` on a GPU: one launch that quantizes x, one for the product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qfx.kernels.gpu import gemm8
from qfx.kernels.gpu.gated_quantize import quantize_rows
from qfx.kernels.gpu.rowwise import as_rows, takes
from qfx.kernels.quantize_rows import quantize_activation


def linear8(
    x: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    x_grid: str,
    per_tensor: bool,
) -> Tensor:
    """Either op; arguments as theirs, checked. `refusal` says what it does not take."""
    q, scale, zero = quantized(as_rows(x), x_grid, x_scale, x_zero, per_tensor)
    sums = None if zero is None else gemm8.row_sums(codes)
    y = gemm8.product(q, scale, codes, w_scale, bias, None, "", x.dtype, zero, sums)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def refusal(x: Tensor, codes: Tensor) -> str | None:
    """None if `linear8` takes these, otherwise the reason why not."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"linear8: {x.dtype} is not bfloat16, float16 or float32"
    return gemm8.refusal(codes, codes)


def quantized(
    x: Tensor, x_grid: str, x_scale: Tensor | None, x_zero: Tensor | None, per_tensor: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes `[tokens, in]`, int8 or float8, their scales, and the zero point of int8 codes."""
    if x_grid == "uint8" and x_zero is not None:  # the same codes less 128: signed, as the product takes them
        x_grid, x_zero = "int8", _less_128(x_zero)
    if (per_tensor and x_scale is None) or takes(x, x_grid, x_scale, x_zero) is not None:
        q, scale, zero = quantize_activation(x, x_grid, x_scale, x_zero, per_tensor)
        if q.dtype == torch.uint8:
            q = (q ^ 128).view(torch.int8)
            zero = None if zero is None else zero - 128
        return q, scale, zero
    q, scale = quantize_rows(x, x_grid, x_scale, x_zero)
    # other unsigned grids are below 128
    return (q.view(torch.int8) if q.dtype == torch.uint8 else q), scale, x_zero


_shifted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _less_128(zero: Tensor) -> Tensor:
    """`zero - 128`, kept as long as nobody writes to the zero point."""
    return gemm8.kept(_shifted, zero, lambda z: z - 128)
