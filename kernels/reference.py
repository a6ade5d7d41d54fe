"""The ops' PyTorch bodies on a GPU, where their kernels would run: for comparing the two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch._library.custom_ops import CustomOpDef

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
    quantize_rows,
    w4a8_linear,
    w4a16_linear,
    wxa16_linear,
)
from qfx.kernels._cuda import TRITON

OPS: tuple[CustomOpDef, ...] = (
    fp8_gemm.fp8_gemm,
    fp8_linear.fp8_linear,
    gated.gated,
    gated_quantize.gated_quantize,
    hadamard.hadamard,
    int8_gemm.int8_gemm,
    int8_linear.int8_linear,
    int8_outlier_linear.int8_outlier_linear,
    nf4_linear.nf4_linear,
    norm.norm,
    norm_quantize.norm_quantize,
    quantize_rows.quantize_rows,
    w4a8_linear.w4a8_gemm,
    w4a8_linear.w4a8_linear,
    w4a16_linear.w4a16_linear,
    wxa16_linear.wxa16_linear,
)
"""All ops that have a kernel on a GPU."""


@contextmanager
def reference_bodies() -> Iterator[None]:
    """Within it, every op computes by its PyTorch body, on a GPU too; a CUDA graph keeps what it has captured."""
    with ExitStack() as stack:
        for op in OPS if TRITON else ():  # without Triton the PyTorch bodies are all there is
            stack.enter_context(op.set_kernel_enabled("cuda", False))
        yield
