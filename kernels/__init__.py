"""Quantized ops, one a file: a PyTorch reference that is right on any device, its fake, and its cases.

Importing the package registers the ops as `torch.ops.qfx.*`; it does nothing else.
"""

from qfx.kernels import (
    fp8_gemm,
    fp8_linear,
    gated,
    gated_quantize,
    hadamard,
    int8_gemm,
    int8_linear,
    int8_outlier_linear,
    nf4_linear,
    norm,
    norm_quantize,
    pack,
    quantize_rows,
    w4a8_linear,
    w4a16_linear,
    wna16_linear,
    wnaq_linear,
    wxa16_linear,
)

__all__ = [
    "fp8_gemm",
    "fp8_linear",
    "gated",
    "gated_quantize",
    "hadamard",
    "int8_gemm",
    "int8_linear",
    "int8_outlier_linear",
    "nf4_linear",
    "norm",
    "norm_quantize",
    "pack",
    "quantize_rows",
    "w4a8_linear",
    "w4a16_linear",
    "wna16_linear",
    "wnaq_linear",
    "wxa16_linear",
]
