"""Peers of the ops on rows: norms, quantization, Hadamard transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Rows, hadamard
from bench.peers import fp8_rows, int8_rows, library, quick_autotune

EPS = 1e-6
SHAPES = [(16, 4096), (8192, 8192)]
"""Tokens x channels where peers are measured: most of them compile for each shape."""


def _norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[1],), w, EPS)


def compiled(fn: Callable[[Tensor, Tensor], Any], written: float = 1) -> Callable[[], Rows]:
    def make() -> Rows:
        torch.compiler.reset()  # past some shapes, Dynamo would go back to eager without a word
        return Rows(torch.compile(fn, dynamic=False), written)

    return make


def factored_hadamard() -> Rows:
    """H of order `channels` as two products with smaller ones, then quantization, by torch.compile."""
    factors: dict[int, tuple[Tensor, ...]] = {}

    def fn(x: Tensor, left: Tensor, right: Tensor) -> Any:
        y = left @ (x.view(x.shape[0], left.shape[0], right.shape[0]) @ right)
        return int8_rows(y.reshape(x.shape))

    torch.compiler.reset()
    run = torch.compile(fn, dynamic=False)

    def call(x: Tensor, w: Tensor) -> Any:
        n = x.shape[1]
        if n not in factors:
            inner = 1 << (n.bit_length() // 2)
            factors[n] = tuple(hadamard(size, x.device, x.dtype) for size in (n // inner, inner))
        return run(x, *factors[n])

    return Rows(call)


def blocked_hadamard() -> Rows:
    """Blocks of 128, a product, then quantization, by torch.compile."""

    def fn(x: Tensor, h: Tensor) -> Any:
        return int8_rows((x.view(-1, h.shape[0]) @ h).view(x.shape))

    torch.compiler.reset()
    run = torch.compile(fn, dynamic=False)
    held: list[Tensor] = []

    def call(x: Tensor, w: Tensor) -> Any:
        if not held:
            held.append(hadamard(128, x.device, x.dtype))
        return run(x, held[0])

    return Rows(call)


def _gated(x: Tensor, w: Tensor) -> Any:
    gate, up = x.chunk(2, 1)
    return int8_rows((F.silu(gate.float()) * up).to(x.dtype))


def mslk_quantize() -> Rows:
    fn = library("mslk.quantize.triton.fp8_quantize").quantize_fp8_row
    return Rows(lambda x, w: fn(x))


def gemlite_quantize() -> Rows:
    fn = library("gemlite.quant_utils").scale_activations_per_token
    quick_autotune()
    return Rows(lambda x, w: fn(x, w_dtype=torch.int8))


def liger_norm() -> Rows:
    """Liger has no quantized output: the norm alone, 2 bytes an element."""
    fn = library("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return Rows(lambda x, w: fn.apply(x, w, EPS), 2)


ROW_PEERS: dict[str, tuple[str, Callable[[], Rows]]] = {
    "torch.compile quantize int8": ("quantize int8", compiled(lambda x, w: int8_rows(x))),
    "gemlite quantize int8": ("quantize int8", gemlite_quantize),
    "torch.compile quantize fp8": ("quantize fp8", compiled(lambda x, w: fp8_rows(x))),
    "MSLK quantize fp8": ("quantize fp8", mslk_quantize),
    "torch.compile norm+quantize int8": ("norm+quantize int8", compiled(lambda x, w: int8_rows(_norm(x, w)))),
    "torch.compile norm+quantize fp8": ("norm+quantize fp8", compiled(lambda x, w: fp8_rows(_norm(x, w)))),
    "Liger norm alone": ("norm+quantize int8", liger_norm),
    "torch.compile gated+quantize int8": (
        "gated+quantize int8",
        lambda: Rows(torch.compile(_gated, dynamic=False), 0.5),
    ),
    "torch.compile hadamard+quantize int8": ("hadamard+quantize int8", factored_hadamard),
    "torch.compile hadamard 128+quantize int8": ("hadamard 128+quantize int8", blocked_hadamard),
}
"""Name: (the family within which it is compared, the case)."""
