"""qfx's ops as benchmark cases. An op that does not exist raises `Missing`, and is skipped with a line."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Linear, MakeLinear, Missing, Rows, Tensors, hadamard
from qfx.core.qtensor import QTensor, encode_minmax, quantize_scale
from qfx.core.spec import parse_scheme
from qfx.kernels.pack import plain_scale, store
from qfx.kernels.quantize_rows import quantize_activation

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
        return Linear((q.codes, q.scale), lambda x, v: call(*x, *v), quantizer(x_grid), values, x_grid)

    return make


def quantizer(x_grid: str | None) -> Callable[[Tensor], Tensors]:
    """Codes and scales of an activation, of which the time does not count."""
    return lambda x: tuple(torch.ops.qfx.quantize_rows(x, x_grid))


def nibbles(name: str, scheme: str, x_grid: str | None, quantized: bool = False) -> MakeLinear:
    """Weights of 4 bits in the GPU kernels' layout; with `quantized`, of an input that is quantized already."""

    def make(w: Tensor) -> Linear:
        call, (q, values) = op(name), rounded(w, scheme)
        out, columns = w.shape
        module = importlib.import_module(f"qfx.kernels.{'w4a8_linear' if x_grid else name}")
        settings = {"x_grid": x_grid} if x_grid else {}
        given = plain_scale(store(q), q.spec)
        if q.spec.scale is not None:
            given["second"] = quantize_scale(q.scale, q.spec)[1]
        laid = module.prepare(given, bits=4, in_features=columns, signed=True, **settings)
        weights = tuple(t for key in ("tiles", "scale", "second") if (t := laid.get(key)) is not None)
        group = columns // q.scale.shape[1]

        def run(x: Tensors, v: Tensors) -> Tensor:
            (tiles, scale), second = v[:2], v[2] if len(v) > 2 else None
            if quantized:
                return call(*x, tiles, scale, None, second, None, out, group, w.dtype)
            if x_grid:
                return call(*x, tiles, scale, None, None, second, None, out, group, x_grid)
            return call(*x, tiles, scale, None, None, None, out, group)

        return Linear(weights, run, quantizer(x_grid) if quantized else Linear.prepare, values, x_grid)

    return make


def nf4(w: Tensor) -> Linear:
    """Blocks of 64."""
    call, module = op("nf4_linear"), importlib.import_module("qfx.kernels.nf4_linear")
    codes, absmax = module.quantize(w)
    table = module.table("nf4", w.device)
    values = (table[codes.long()].unflatten(1, (-1, 64)) * absmax.unsqueeze(-1)).flatten(1)
    out = w.shape[0]
    return Linear(module.prepare(codes, absmax), lambda x, v: call(*x, *v, None, out), values=values)


def int8_outliers(static: bool) -> MakeLinear:
    """1 % of the input channels are 30 times as large, and multiplied in bf16: given, or found in each call."""

    def make(w: Tensor) -> Linear:
        call, (q, values) = op("int8_outlier_linear"), rounded(w, "W8A8")
        columns = torch.arange(0, w.shape[1], round(1 / OUTLIERS), device=w.device, dtype=torch.int32)
        padding = -len(columns) % 16
        if not static:
            tail = (None, None, None, 6.0, len(columns) + padding)
            enlarge = lambda x: (_enlarged(x, columns),)  # noqa: E731
            exact = lambda x: _enlarged(x, columns).double() @ w.double().t()  # noqa: E731
            return Linear((q.codes, q.scale), lambda x, v: call(*x, *v, *tail), enlarge, expected=exact)
        kept = w[:, columns.long()]
        weights = (q.codes, q.scale, F.pad(kept, (0, padding)).contiguous())

        def expected(x: Tensor) -> Tensor:
            x, rest = _enlarged(x, columns), _enlarged(x, columns, 0.0)
            codes, scale, _ = quantize_activation(rest, "int8_narrow", None, None, False)
            large = x[:, columns.long()].double() @ kept.double().t()
            return (codes.double() * scale.double()) @ values.double().t() + large

        def run(x: Tensors, v: Tensors) -> Tensor:
            return call(x[0], v[0], v[1], None, columns, v[2])

        return Linear(weights, run, lambda x: (_enlarged(x, columns),), values, expected=expected)

    return make


def _enlarged(x: Tensor, columns: Tensor, by: float = 30.0) -> Tensor:
    return x.index_copy(1, columns.long(), x[:, columns.long()] * by)


OPS: dict[str, tuple[str, MakeLinear]] = {
    "int8_gemm": ("int8 gemm", gemm8("int8_gemm", "W8A8", "int8_narrow")),
    "int8_linear": ("int8 linear", linear8("int8_linear", "W8A8", "int8_narrow", None, None)),
    "fp8_gemm": ("fp8 gemm", gemm8("fp8_gemm", "FP8_DYNAMIC", "e4m3")),
    "fp8_linear": ("fp8 linear", linear8("fp8_linear", "FP8_DYNAMIC", "e4m3", None)),
    "w4a16_linear": ("w4a16", nibbles("w4a16_linear", "W4A16", None)),
    "w4a8_linear": ("w4a8", nibbles("w4a8_linear", "W4A8", "int8_narrow")),
    "w4a8_dq_linear": ("w4a8", nibbles("w4a8_linear", "W4A8_DQ", "int8_narrow")),
    "w4afp8_linear": ("w4a8", nibbles("w4a8_linear", "W4AFP8", "e4m3")),
    "w4a8_gemm": ("w4a8 gemm", nibbles("w4a8_gemm", "W4A8", "int8_narrow", True)),
    "w4a8_dq_gemm": ("w4a8 gemm", nibbles("w4a8_gemm", "W4A8_DQ", "int8_narrow", True)),
    "w4afp8_gemm": ("w4a8 gemm", nibbles("w4a8_gemm", "W4AFP8", "e4m3", True)),
    "nf4_linear": ("nf4", nf4),
    "int8_outlier_linear static": ("llm.int8", int8_outliers(True)),
    "int8_outlier_linear dynamic": ("llm.int8", int8_outliers(False)),
}
"""Name: (the family within which ops and peers are compared, the case)."""


def _dequantized(codes_and_scale: Any) -> Tensor:
    codes, scale = codes_and_scale[:2]
    return codes.double() * scale.double().reshape(*codes.shape[:-1], 1)


def _norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x.double(), (x.shape[-1],), w.double(), 1e-6)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def _gated(x: Tensor, w: Tensor) -> Tensor:
    gate, up = _halves(x.double())
    return F.silu(gate) * up


def _rotated(block: int) -> Callable[[Tensor, Tensor], Tensor]:
    def expected(x: Tensor, w: Tensor) -> Tensor:
        size = block or x.shape[1]
        h = hadamard(size, x.device, torch.float64)
        return (x.double().unflatten(1, (-1, size)) @ h).flatten(1)

    return expected


def quantize_rows(x_grid: str) -> Callable[[], Rows]:
    def make() -> Rows:
        call = op("quantize_rows")
        return Rows(lambda x, w: call(x, x_grid), 1, lambda x, w: x.double(), _dequantized)

    return make


def norm_quantize(x_grid: str) -> Callable[[], Rows]:
    """RMSNorm without a residual."""

    def make() -> Rows:
        call = op("norm_quantize")
        return Rows(lambda x, w: call(x, None, w, None, 1e-6, False, True, x_grid), 1, _norm, _dequantized)

    return make


def gated_quantize(x_grid: str) -> Callable[[], Rows]:
    """silu(gate) · up, the two being halves of one row."""

    def make() -> Rows:
        call = op("gated_quantize")
        return Rows(lambda x, w: call(*_halves(x), "silu", x_grid), 0.5, _gated, _dequantized)

    return make


def hadamard_quantize(block: int, x_grid: str) -> Callable[[], Rows]:
    """Blocks of that size, 0 for all channels."""

    def make() -> Rows:
        call = op("hadamard")
        return Rows(lambda x, w: call(x, block or x.shape[1], x_grid), 1, _rotated(block), _dequantized)

    return make


ROW_OPS: dict[str, tuple[str, Callable[[], Rows]]] = {
    "quantize_rows int8": ("quantize int8", quantize_rows("int8_narrow")),
    "quantize_rows fp8": ("quantize fp8", quantize_rows("e4m3")),
    "norm_quantize int8": ("norm+quantize int8", norm_quantize("int8_narrow")),
    "norm_quantize fp8": ("norm+quantize fp8", norm_quantize("e4m3")),
    "gated_quantize int8": ("gated+quantize int8", gated_quantize("int8_narrow")),
    "hadamard int8": ("hadamard+quantize int8", hadamard_quantize(0, "int8_narrow")),
    "hadamard 128 int8": ("hadamard 128+quantize int8", hadamard_quantize(128, "int8_narrow")),
}
"""Name: (the family within which ops and peers are compared, the case)."""
