"""One small call for each GPU kernel and form of it, on odd shapes; operands are made on the CPU and moved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import qfx.kernels  # noqa: F401
from qfx.kernels import nf4_linear, nibbles
from qfx.kernels.hadamard_matrix import hadamard_matrix

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
ops = torch.ops.qfx


def moved(x: Tensor) -> Tensor:
    """On the GPU."""
    return x.to("cuda")


def codes(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random codes of 8 bits."""
    if dtype == INT8:
        return moved(torch.randint(-128, 128, (rows, columns), dtype=dtype))
    return moved(torch.randn(rows, columns).to(dtype))


def floats(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Random values."""
    return moved(torch.randn(*shape).to(dtype))


def gemm8(m: int, n: int, k: int, dtype: torch.dtype, out: torch.dtype, residual: bool, **config: object) -> None:
    """One configuration of the 8-bit GEMM."""
    from qfx.kernels.gpu.gemm8 import gemm8 as run
    from qfx.kernels.gpu.gemm8_config import Config

    extra = floats(m, n) if residual else None
    a, b, scale = codes(m, k, dtype), codes(n, k, dtype), moved(torch.rand(m, 1))
    made = Config(**config)  # type: ignore[arg-type]
    run(a, b, scale, moved(torch.rand(n)), floats(n), extra, "silu" if residual else "", out, config=made)


def linear8(m: int, n: int, k: int, grid: str, static: bool) -> None:
    """Quantizes, then multiplies; with a zero point if it is static."""
    x, scale = floats(m, k + 3)[:, :k], moved(torch.rand(n))
    x_scale = moved(torch.tensor(0.02)) if static else None
    if grid == "e4m3":
        ops.fp8_linear(x, codes(n, k, E4M3), scale, None, x_scale, grid)
        return
    zero = moved(torch.tensor(77, dtype=torch.int32)) if static else None
    ops.int8_linear(x, codes(n, k, INT8), scale, floats(n), x_scale, zero, grid)


def outliers(m: int, n: int, k: int, threshold: float) -> None:
    """int8 with outlier channels, given or found."""
    scale = moved(torch.rand(n, 1))
    if threshold:
        ops.int8_outlier_linear(floats(m, k) * 4, codes(n, k, INT8), scale, None, None, None, threshold, 16)
        return
    columns, weight = moved(torch.tensor([3, 11, k - 1], dtype=torch.int32)), floats(n, 16)
    ops.int8_outlier_linear(floats(m, k), codes(n, k, INT8), scale, floats(n), columns, weight)


def values(m: int, columns: int) -> None:
    """Norms and gated products that give values."""
    x, gain = floats(m, columns), floats(columns)
    ops.norm(x, floats(m, columns), gain, floats(columns), 1e-6, True, True)
    ops.norm(x, None, gain, None, 1e-6, False, False)
    ops.gated(x, floats(m, columns), "silu")
    ops.gated(x, None, "relu")


def four(
    m: int, n: int, k: int, group: int, form: str, large: bool = False, dequantized: bool = False,
    multiples: bool = False, **config: int,
) -> None:  # fmt: skip
    """One configuration of a 4-bit kernel."""
    from qfx.kernels.gpu import decode4, dequantize4, w4

    layout = {"int4": "quarters", "table": "pairs", "int8": "halves", "e4m3": "fours"}[form]
    groups = 1 if group < 0 else k // group
    tiles = moved(nibbles.tile(torch.randint(0, 16, (n, k), dtype=torch.uint8), layout))
    scale = moved(nibbles.pad_scale(torch.rand(n, groups), n))
    zero = moved(nibbles.pad_scale(torch.randint(0, 16, (n, groups), dtype=torch.uint8), n)) if form == "int4" else None
    values = nf4_linear.table("nf4", torch.device("cpu"), BF16) if form == "table" else None
    bias = floats(n)
    decoder = decode4.table_decoder(nf4_linear.TABLES["nf4"], BF16) if form == "table" else decode4.INT4
    if large and form in ("int8", "e4m3"):
        from qfx.kernels.gpu.w4a8_large import Config, w4a8_large

        second = moved(torch.rand(scale.shape[1])) if multiples else None
        x = codes(m, k, INT8 if form == "int8" else E4M3), moved(torch.rand(m, 1))
        w4a8_large(*x, tiles, scale, bias, n, group, config=Config(**config), second=second)  # type: ignore[arg-type]
        return
    if large:
        from qfx.kernels.gpu.w4_large import w4_large

        w4_large(floats(m, k), tiles, scale, zero, bias, n, group, table=decoder.table)
        return
    if form in ("int8", "e4m3"):
        decoder = decode4.eight_bit_decoder(INT8 if form == "int8" else E4M3, False)
    if dequantized:
        out = torch.empty(n, k, dtype=BF16, device="cuda")
        table = None if values is None else moved(values)
        dequantize4.dequantize(tiles.view(torch.int16), scale, zero, table, out, group, decoder, 0)
        return
    x = floats(m, k) if form in ("int4", "table") else codes(m, k, INT8 if form == "int8" else E4M3)
    x_scale = moved(torch.rand(m, 1)) if form in ("int8", "e4m3") else None
    before = w4.pick
    w4.pick = lambda *_: w4.Config(**config)  # type: ignore[assignment]
    try:
        table = None if values is None else moved(values)
        w4.w4(x, tiles, scale, zero, bias, n, group, decoder, x_scale=x_scale, table=table, dtype=BF16)
    finally:
        w4.pick = before


def rows(op: str, m: int, columns: int, dtype: torch.dtype, grid: str) -> None:
    """A row-wise kernel on strided rows."""
    wide = floats(m, 2 * columns + 5, dtype=dtype)
    x, other = wide[:, :columns], wide[:, columns : 2 * columns]
    if op == "quantize":
        ops.quantize_rows(x, grid)
    elif op == "gated":
        ops.gated_quantize(x, other, "gelu", grid)
    elif op == "norm":
        ops.norm_quantize(x, other, floats(columns), None, 1e-5, m % 2 == 0, True, grid, None, None, True)
    else:
        assert hadamard_matrix(columns) is not None
        ops.hadamard(x, columns, grid)


def hadamard(columns: int, block: int, form: str, warps: int, stages: int, grid: str) -> None:
    """One plan of the transforms that stay in registers."""
    from qfx.kernels.gpu import hadamard as module

    side = 16 if form == "twice" else 32
    plan = module.Plan(1, columns // side, side, form, warps, 1, stages)
    module.hadamard(floats(200, columns), block, grid, plan=plan)


def _control() -> None:
    from bench.dispatch import two_kinds

    two_kinds()


def _cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    skinny = {"form": "skinny", "tokens": 16, "channels": 64, "depth": 128, "stages": 4, "warps": 4}
    large = {"form": "large", "tokens": 128, "channels": 128, "depth": 128, "stages": 3, "warps": 8, "promote": 0}
    wide = {**large, "channels": 256, "persistent": True}
    own = {**wide, "form": "specialized"}
    for name, dtype in (("int8", INT8), ("e4m3", E4M3)):
        found |= {
            f"gemm8 {name} skinny": partial(gemm8, 5, 70, 272, dtype, BF16, True, **skinny),
            f"gemm8 {name} skinny split": partial(gemm8, 5, 130, 1040, dtype, F32, False, **skinny, split=3),
            f"gemm8 {name} skinny pointers": partial(gemm8, 17, 33, 77, dtype, F16, True, **skinny, tma=False),
            f"gemm8 {name} large": partial(gemm8, 150, 264, 272, dtype, BF16, True, **large),
            f"gemm8 {name} large pointers": partial(gemm8, 133, 133, 77, dtype, F32, False, **large, tma=False),
            f"gemm8 {name} persistent": partial(gemm8, 150, 520, 272, dtype, BF16, False, **wide),
            f"gemm8 {name} specialized": partial(gemm8, 150, 520, 272, dtype, BF16, False, **own),
        }
    found |= {
        "gemm8 e5m2 skinny": partial(gemm8, 3, 33, 144, E5M2, BF16, False, **skinny),
        "int8_linear": partial(linear8, 7, 33, 77, "int8_narrow", False),
        "int8_linear zero point": partial(linear8, 7, 33, 80, "uint8", True),
        "fp8_linear": partial(linear8, 7, 33, 77, "e4m3", False),
        "outliers given": partial(outliers, 7, 33, 77, 0.0),
        "outliers found": partial(outliers, 33, 70, 80, 6.0),
    }
    found["control: warps of two kinds"] = _control
    one = {"bn": 64, "bt": 16, "split": 1, "warps": 4, "stages": 4}
    for form in ("int4", "table", "int8", "e4m3"):
        for group, n in ((128, 70), (64, 33), (32, 130), (-1, 70)):
            found[f"w4 {form} groups {group}"] = partial(four, 5, n, 384, group, form, **one)
        found[f"w4 {form} split"] = partial(four, 5, 70, 1152, 128, form, **{**one, "split": 3})
        middle = {**one, "bn": 128, "bt": 64, "warps": 8, "stages": 3, "tokens": 8}
        found[f"w4 {form} middle"] = partial(four, 133, 200, 384, 128, form, **middle)
        direct = {"bn": 16, "bt": 8, "split": 1, "warps": 4, "stages": 2, "unroll": 2, "direct": True}
        for group, n in ((128, 70), (-1, 33), (64 if form in ("int4", "table") else 256, 130)):
            columns = 768 if group == 256 else 1152
            found[f"w4 {form} direct, groups {group}"] = partial(four, 5, n, columns, group, form, **direct)
        found[f"w4 {form} direct, odd"] = partial(four, 1, 33, 200, -1, form, **{**direct, "bn": 32, "stages": 1})
    found |= {
        "w4 int4 wide": partial(four, 133, 70, 384, 128, "int4", **{**one, "bn": 256, "warps": 8, "stages": 2}),
        "w4 int4 odd depth": partial(four, 5, 33, 200, -1, "int4", **one, unroll=2),
        "dequantize int4": partial(four, 1, 200, 384, 64, "int4", dequantized=True),
        "dequantize table": partial(four, 1, 200, 384, 128, "table", dequantized=True),
        "w4 table direct, 16 tokens": partial(four, 16, 70, 1152, 128, "table", **direct),
        "w4_large": partial(four, 150, 264, 384, 128, "int4", large=True),
        "w4_large table": partial(four, 150, 264, 384, 128, "table", large=True),
        "w4a8_large int8": partial(four, 150, 264, 384, 128, "int8", large=True),
        "w4a8_large e4m3": partial(four, 150, 264, 384, 128, "e4m3", large=True),
        "w4a8_whole": partial(four, 150, 264, 384, 128, "int8", large=True, multiples=True, bt=256, bn=128),
        "w4a8_whole of 256 rows": partial(four, 150, 264, 384, 128, "int8", large=True, multiples=True),
        "w4a8_whole channel": partial(four, 150, 264, 384, -1, "int8", large=True, bt=64, bn=128, stages=8),
    }
    for op, grid in (("quantize", "int8_narrow"), ("gated", "e4m3"), ("norm", "int8_narrow")):
        for m, columns, dtype in ((5, 77, BF16), (600, 128, F32), (2, 4101, F16)):
            found[f"{op} {m} x {columns}"] = partial(rows, op, m, columns, dtype, grid)
    for m, columns in ((3, 4100), (600, 96)):
        found[f"norm and gated {m} x {columns}"] = partial(values, m, columns)
    found["quantize 2 x 33001"] = partial(rows, "quantize", 2, 33001, BF16, "e5m2")
    for m, columns, dtype in ((5, 64, BF16), (3, 192, F32), (2, 4096, BF16), (2, 14336, F16)):
        found[f"hadamard {m} x {columns}"] = partial(rows, "hadamard", m, columns, dtype, "int8_narrow")
    for columns, block, form, warps, stages in (
        (4096, 4096, "twice", 4, 2), (8192, 1024, "twice", 8, 1), (16384, 16384, "twice", 8, 2),
        (4096, 32, "short", 2, 1), (8192, 128, "short", 8, 2),
    ):  # fmt: skip
        for grid in ("", "int8_narrow"):
            name = f"hadamard {form} {columns} in {block} {grid}".strip()
            found[name] = partial(hadamard, columns, block, form, warps, stages, grid)
    return found


CASES = _cases()
"""Calls by name. Each makes its operands, and launches once or twice."""
