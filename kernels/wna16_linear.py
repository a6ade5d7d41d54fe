"""`qfx::wna16_linear`: weights of 1 to 8 bits (or float8) times float activations (W4A16, W4A16_ASYM, W8A16, NF4)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.core.errors import KernelError
from qfx.core.spec import Scheme
from qfx.kernels.pack import dequantize, packed_columns

CASES = [
    ((16,), 64, 32, "W4A16_G32"),
    ((1,), 33, 17, "W4A16_CHANNEL"),
    ((0,), 24, 8, "W4A16_CHANNEL"),
    ((2, 3), 40, 24, "W4A16_ASYM_G8"),
    ((7,), 33, 17, "W3A16_ASYM_G11"),
    ((5,), 48, 16, "W2A16_G16"),
    ((5,), 31, 9, "W5A16_TENSOR"),
    ((3,), 26, 9, "W6A16_ASYM_G13"),
    ((3,), 28, 5, "W7A16_G4"),
    ((3, 1, 2), 24, 5, "W1A16_ASYM_G8"),
    ((4,), 33, 17, "W8A16"),
    ((4,), 36, 17, "W8A16_ASYM_G12"),
    ((5,), 36, 17, "NF4_G12"),
    ((5,), 36, 211, "NF4_DQ_G12"),
    ((3,), 33, 9, "FP4_DQ_CHANNEL"),
    ((2,), 64, 9, "FP4_BNB"),
]
"""(leading dims, in_features, out_features, scheme)."""

_EIGHT_BITS = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


@torch.library.custom_op("qfx::wna16_linear", mutates_args=())
def wna16_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 4,
    in_features: int = 0,
    signed: bool = True,
    table: str = "",
    scale_scale: Tensor | None = None,
    scale_block: int = 0,
) -> Tensor:
    """`F.linear(x, w, bias)` with the weight dequantized in float32, then cast to x's dtype.

    Args:
        x: `[..., in]`, any float dtype.
        codes: uint8 `[out, ceil(in / 8) * bits]` as `pack` writes it if `bits` < 8, otherwise int8,
            uint8 or float8 `[out, in]`.
        scale: `[out or 1, groups]`, any float dtype, or the codes of quantized scales.
        zero: integers of the scale's shape, or None if symmetric.
        g_idx: int32 or int64 `[in]`, the group of each column, or None if groups are consecutive.
        bias: `[out]` or None.
        bits: bits of a code, 1 to 8.
        in_features: `in`, which a packed row does not tell.
        signed: whether packed codes are two's complement.
        table: the name of the codebook, or "": a code is its own value.
        scale_scale: float32 `[blocks]` of quantized scales, or None.
        scale_block: how many scales share one of those, or -1 for those of a row, or all.

    Returns:
        `[..., out]` of x's dtype.

    Raises:
        KernelError: shapes or dtypes do not fit.
    """
    check("wna16_linear", x, codes, scale, g_idx, bits, in_features)
    layout: dict[str, Any] = {"bits": bits, "columns": in_features, "signed": signed, "table": table}
    w = dequantize(codes, scale, zero, g_idx, **layout, scale_scale=scale_scale, scale_block=scale_block).to(x.dtype)
    y = F.linear(x.reshape(-1, in_features), w, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], codes.shape[0])


@wna16_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 4,
    in_features: int = 0,
    signed: bool = True,
    table: str = "",
    scale_scale: Tensor | None = None,
    scale_block: int = 0,
) -> Tensor:
    check("wna16_linear", x, codes, scale, g_idx, bits, in_features)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scale, zero, g_idx, bias, bits, in_features, signed, table, scale_scale, scale_block = inputs
    ctx.save_for_backward(codes, scale, zero, g_idx, scale_scale)
    ctx.layout = {"bits": bits, "columns": in_features, "signed": signed, "table": table, "scale_block": scale_block}
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *weight, scale_scale = ctx.saved_tensors
    w = dequantize(*weight, scale_scale=scale_scale, **ctx.layout).to(grad.dtype)
    flat = grad.reshape(-1, grad.shape[-1])
    bias_grad = None if ctx.bias_dtype is None else flat.sum(0).to(ctx.bias_dtype)
    x_grad = (flat @ w).reshape(*grad.shape[:-1], w.shape[1])
    return x_grad, None, None, None, None, bias_grad, *[None] * 6


wna16_linear.register_autograd(_backward, setup_context=_setup)


def supports(scheme: Scheme, in_features: int, g_idx: bool = False) -> str | None:
    """None if the op computes a linear of this scheme, otherwise the reason why not."""
    if scheme.input is not None:
        return "wna16_linear: the input is quantized"
    return supports_weight("wna16_linear", scheme, in_features)


def supports_weight(op: str, scheme: Scheme, in_features: int) -> str | None:
    """None if `dequantize` reads weights of this scheme, otherwise the reason why not."""
    try:
        scheme.weight.groups(in_features)
    except ValueError as e:
        return f"{op}: {e}"
    return None if scheme.weight.block[0] in (1, -1) else f"{op}: blocks of {scheme.weight.block}"


def check(op: str, x: Tensor, codes: Tensor, scale: Tensor, g_idx: Tensor | None, bits: int, in_features: int) -> None:
    """Raises KernelError unless the shapes and dtypes of a linear over stored codes fit together."""
    packed = bits < 8
    width = packed_columns(in_features, bits) if packed else in_features
    dtypes = (torch.uint8,) if packed else _EIGHT_BITS
    if not 1 <= bits <= 8 or codes.dtype not in dtypes or codes.dim() != 2 or codes.shape[1] != width:
        raise KernelError(
            f"{op}: {codes.dtype} codes {tuple(codes.shape)} for {in_features} input channels of {bits} bits; "
            f"use rows of {width} and one of {', '.join(str(d) for d in dtypes)}"
        )
    if x.shape[-1] != in_features:
        raise KernelError(f"{op}: x has {x.shape[-1]} channels; the weight takes {in_features}")
    if scale.dim() != 2 or scale.shape[0] not in (1, codes.shape[0]):
        raise KernelError(f"{op}: scale {tuple(scale.shape)}; use [{codes.shape[0]} or 1, groups]")
    if g_idx is None and in_features % scale.shape[1]:
        raise KernelError(f"{op}: {scale.shape[1]} groups do not divide {in_features} channels; give g_idx")
