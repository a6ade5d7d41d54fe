"""Peers of the ops on rows: norms, quantization, Hadamard transforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Rows
from bench.peers import fp8_rows, int8_rows, library, quick_autotune

EPS = 1e-6


def _norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[1],), w, EPS)


def compiled(fn: Callable[[Tensor, Tensor], Any]) -> Callable[[], Rows]:
    return lambda: Rows(torch.compile(fn, dynamic=False))


def hadamard(n: int, device: Any) -> Tensor:
    """The orthonormal Hadamard matrix of a power of two, in bf16."""
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (h / math.sqrt(n)).bfloat16()


def factored_hadamard() -> Rows:
    """H of order `channels` as two products with smaller ones, then quantization, by torch.compile."""
    factors: dict[int, tuple[Tensor, Tensor]] = {}

    def fn(x: Tensor, left: Tensor, right: Tensor) -> Any:
        y = left @ (x.view(x.shape[0], left.shape[0], right.shape[0]) @ right)
        return int8_rows(y.reshape(x.shape))

    run = torch.compile(fn, dynamic=False)

    def call(x: Tensor, w: Tensor) -> Any:
        n = x.shape[1]
        if n not in factors:
            inner = 1 << (n.bit_length() // 2)
            factors[n] = hadamard(n // inner, x.device), hadamard(inner, x.device)
        return run(x, *factors[n])

    return Rows(call)


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
    "torch.compile hadamard+quantize int8": ("hadamard+quantize", factored_hadamard),
}
"""Name: (the family within which it is compared, the case)."""
