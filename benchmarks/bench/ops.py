"""qfx's ops as benchmark cases. An op that does not exist raises `Missing`, and is skipped with a line."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Linear, MakeLinear, Missing, Rows, Tensors
from qfx.core.qtensor import QTensor, encode_minmax
from qfx.core.spec import parse_scheme
from qfx.kernels.pack import store

OUTLIERS = 0.01
"""Share of the input channels that `int8_outlier_linear` keeps in bf16."""


def op(name: str) -> Any:
    """`torch.ops.qfx.<name>`."""
    with contextlib.suppress(ModuleNotFoundError):  # several ops may live in one file
        importlib.import_module(f"qfx.kernels.{name}")
    try:
        return getattr(torch.ops.qfx, name)
    except AttributeError:
        raise Missing(f"qfx::{name} does not exist") from None


def rounded(w: Tensor, scheme: str) -> tuple[QTensor, Tensor]:
    """The weight rounded to nearest, and the values of its codes."""
    q = encode_minmax(w, parse_scheme(scheme).weight)
    return q, q.dequantize()


def linear8(name: str, scheme: str, x_grid: str, *between: None) -> MakeLinear:
    """`int8_linear` and `fp8_linear`: quantizes its input for each token, then multiplies."""

    def make(w: Tensor) -> Linear:
        call, (q, values) = op(name), rounded(w, scheme)
        tail = (None, *between, x_grid, False)
        return Linear((q.codes, q.scale), lambda x, v: call(*x, *v, *tail), values=values, x_grid=x_grid)

    return make


def gemm8(name: str, scheme: str, x_grid: str) -> MakeLinear:
    """`int8_gemm` and `fp8_gemm`: the product alone, of an input that is quantized already."""

    def make(w: Tensor) -> Linear:
        call, (q, values) = op(name), rounded(w, scheme)

        def prepare(x: Tensor) -> Tensors:
            codes, scale = torch.ops.qfx.quantize_rows(x, x_grid)
            return codes, scale

        return Linear((q.codes, q.scale), lambda x, v: call(*x, *v, None), prepare, values, x_grid)

    return make


def nibbles(name: str, scheme: str, x_grid: str | None, *tail: Any) -> MakeLinear:
    """Weights of 4 bits in the layout of the GPU kernels, as `qfx.kernels.<name>.prepare` makes it."""

    def make(w: Tensor) -> Linear:
        call, (q, values) = op(name), rounded(w, scheme)
        out, columns = w.shape
        module = importlib.import_module(f"qfx.kernels.{name}")
        laid = module.prepare(store(q), bits=4, in_features=columns, signed=True)
        rest = (laid["zero"], laid["order"], None, out, columns // q.scale.shape[1], *tail)
        weights = (laid["words"], laid["scale"])
        return Linear(weights, lambda x, v: call(*x, *v, *rest), values=values, x_grid=x_grid)

    return make


def nf4(w: Tensor) -> Linear:
    call = op("nf4_linear")
    module = importlib.import_module("qfx.kernels.nf4_linear")
    weights = tuple(module.prepare(w))
    return Linear(weights, lambda x, v: call(*x, *v))


def int8_outliers(w: Tensor) -> Linear:
    """Static outliers: 1 % of the input channels stay in bf16."""
    call = op("int8_outlier_linear")
    module = importlib.import_module("qfx.kernels.int8_outlier_linear")
    count = max(1, int(OUTLIERS * w.shape[1]))
    columns = torch.randperm(w.shape[1], device=w.device)[:count].sort().values
    weights = tuple(module.prepare(w, columns))
    return Linear(weights, lambda x, v: call(*x, *v))


OPS: dict[str, tuple[str, MakeLinear]] = {
    "int8_gemm": ("int8 gemm", gemm8("int8_gemm", "W8A8", "int8_narrow")),
    "int8_linear": ("int8 linear", linear8("int8_linear", "W8A8", "int8_narrow", None, None)),
    "fp8_gemm": ("fp8 gemm", gemm8("fp8_gemm", "FP8_DYNAMIC", "e4m3")),
    "fp8_linear": ("fp8 linear", linear8("fp8_linear", "FP8_DYNAMIC", "e4m3", None)),
    "w4a16_linear": ("w4a16", nibbles("w4a16_linear", "W4A16", None)),
    "w4a8_linear": ("w4a8", nibbles("w4a8_linear", "W4A8", "int8_narrow")),
    "w4afp8_linear": ("w4a8", nibbles("w4a8_linear", "W4AFP8", "e4m3")),
    "nf4_linear": ("nf4", nf4),
    "int8_outlier_linear": ("llm.int8", int8_outliers),
}
"""Name: (the family within which ops and peers are compared, the case)."""


def _int8(codes_and_scale: Any) -> Tensor:
    codes, scale = codes_and_scale[:2]
    return codes.double() * scale.double().reshape(*codes.shape[:-1], 1)


def _norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x.double(), (x.shape[-1],), w.double(), 1e-6)


def quantize_rows(x_grid: str) -> Callable[[], Rows]:
    def make() -> Rows:
        call = op("quantize_rows")
        return Rows(lambda x, w: call(x, x_grid), 1, lambda x, w: x.double(), _int8)

    return make


def rms_norm_quantize(x_grid: str) -> Callable[[], Rows]:
    def make() -> Rows:
        call = op("rms_norm_quantize")
        return Rows(lambda x, w: call(x, w, 1e-6, x_grid), 1, _norm, _int8)

    return make


def hadamard_quantize(x_grid: str) -> Callable[[], Rows]:
    def make() -> Rows:
        call = op("hadamard_quantize")
        return Rows(lambda x, w: call(x, x_grid), 1, None, _int8)

    return make


ROW_OPS: dict[str, tuple[str, Callable[[], Rows]]] = {
    "quantize_rows int8": ("quantize int8", quantize_rows("int8_narrow")),
    "quantize_rows fp8": ("quantize fp8", quantize_rows("e4m3")),
    "rms_norm_quantize int8": ("norm+quantize int8", rms_norm_quantize("int8_narrow")),
    "rms_norm_quantize fp8": ("norm+quantize fp8", rms_norm_quantize("e4m3")),
    "hadamard_quantize int8": ("hadamard+quantize", hadamard_quantize("int8_narrow")),
}
