"""Every kernel compiles for the GPUs that it is for, in its default configurations, without one at hand.

A process of its own compiles for one compute capability (`python tests/kernels/gpu/test_compile.py 90` prints what it
finds), since this one has Triton's interpreter in the place of its compiler. Shared memory must fit in what a block may
have there. On sm_90 no register may be spilled: SASS has no local loads and stores.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

SHARED = {80: 163, 89: 99, 90: 227, 100: 227}
"""KB of shared memory that a block may have."""
BF16, F16, F32, INT8, E4M3, E5M2 = (
    *(torch.bfloat16, torch.float16, torch.float32, torch.int8),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
SIDE = 4096


def has_tma(capability: int) -> bool:
    return capability >= 90


def w4(tokens: int, group: int, x: torch.dtype, *, table: str = "", zero: bool = False, out: torch.dtype = BF16) -> None:
    from qfx.kernels import nf4_linear
    from qfx.kernels.gpu import decode4
    from qfx.kernels.gpu.w4 import w4

    tiles = torch.empty(SIDE // 128, SIDE // 128, 128, 64, dtype=torch.uint8)
    scale = torch.empty(1 if group < 0 else SIDE // group, SIDE)
    zeros = torch.empty(scale.shape, dtype=torch.uint8) if zero else None
    values = None
    if x.itemsize == 1:
        decoder = decode4.eight_bit_decoder(x, zero)
    elif table:
        decoder = decode4.table_decoder(nf4_linear.TABLES[table], x)
        values = torch.empty(16, dtype=x)
    else:
        decoder = decode4.INT4
    x_scale = torch.empty(tokens, 1) if x.itemsize == 1 else None
    bias = torch.empty(SIDE, dtype=out)
    weight = (tiles, scale, zeros, bias, SIDE, group, decoder)
    w4(torch.empty(tokens, SIDE, dtype=x), *weight, x_scale=x_scale, table=values, dtype=out)


def dequantize(group: int, zero: bool = False, table: str = "") -> None:
    from qfx.kernels import nf4_linear
    from qfx.kernels.gpu import decode4
    from qfx.kernels.gpu.dequantize4 import dequantize

    decoder = decode4.table_decoder(nf4_linear.TABLES[table], BF16) if table else decode4.INT4
    words = torch.empty(32, 32, 128, 32, dtype=torch.int16)
    scale = torch.empty(1 if group < 0 else SIDE // group, SIDE)
    zeros = torch.empty(scale.shape, dtype=torch.uint8) if zero else None
    values = torch.empty(16, dtype=BF16) if table else None
    dequantize(words, scale, zeros, values, torch.empty(2048, SIDE, dtype=BF16), group, decoder, 0)


def w4_large(group: int, x: torch.dtype = BF16, zero: bool = False) -> None:
    from qfx.kernels.gpu.w4_large import w4_large

    tiles = torch.empty(SIDE // 128, SIDE // 128, 128, 64, dtype=torch.uint8)
    scale = torch.empty(1 if group < 0 else SIDE // group, SIDE)
    zeros = torch.empty(scale.shape, dtype=torch.uint8) if zero else None
    w4_large(torch.empty(1024, SIDE, dtype=x), tiles, scale, zeros, torch.empty(SIDE, dtype=x), SIDE, group)


def gemm8(
    capability: int, tokens: int, dtype: torch.dtype, out: torch.dtype = BF16, *, residual: bool = False,
    activation: str = "", zero: bool = False, outliers: int = 0, form: str = "",
) -> None:  # fmt: skip
    from qfx.kernels.gpu.gemm8 import gemm8
    from qfx.kernels.gpu.gemm8_config import default, specialized_candidates
    from qfx.kernels.gpu.tune import bucket

    shape = bucket(tokens), SIDE, SIDE, dtype == INT8
    config = specialized_candidates(*shape)[0] if form else default(*shape, has_tma(capability))
    more = (torch.empty(tokens, outliers, dtype=BF16), torch.empty(SIDE, outliers, dtype=BF16)) if outliers else None
    codes = torch.empty(tokens, SIDE, dtype=dtype), torch.empty(SIDE, SIDE, dtype=dtype)
    scales = torch.empty(tokens, 1), torch.empty(SIDE)
    summand = torch.empty(tokens, SIDE, dtype=out) if residual else None
    point = torch.empty((), dtype=torch.int32) if zero else None
    sums = torch.empty(SIDE, dtype=torch.int32) if zero else None
    gemm8(*codes, *scales, torch.empty(SIDE, dtype=BF16), summand, activation, out, point, sums, more, config)


def gated(tokens: int, columns: int, act: str, grid: str, dtype: torch.dtype = BF16, static: bool = False) -> None:
    from qfx.kernels.gpu.gated_quantize import gated_quantize

    gate, up = torch.empty(tokens, 2 * columns, dtype=dtype).chunk(2, 1)
    gated_quantize(gate, None if act == "none" else up, act, grid, torch.empty(()) if static else None)


def norm(tokens: int, columns: int, grid: str, dtype: torch.dtype = BF16, layer: bool = False) -> None:
    from qfx.kernels.gpu.norm_quantize import norm_quantize

    x = torch.empty(tokens, columns, dtype=dtype)
    gain, bias = torch.empty(columns, dtype=dtype), torch.empty(columns, dtype=dtype) if layer else None
    norm_quantize(x, x, gain, bias, 1e-6, layer, not layer, grid, None, None, False)


def hadamard(tokens: int, columns: int, block: int, grid: str, dtype: torch.dtype = BF16) -> None:
    from qfx.kernels.gpu.hadamard import hadamard

    hadamard(torch.empty(tokens, columns, dtype=dtype), block, grid)


def split_outliers(tokens: int, columns: int = SIDE) -> None:
    from qfx.kernels.gpu.outliers import split

    x = torch.empty(tokens, columns, dtype=BF16)
    split(x, torch.ones(columns, dtype=torch.bool), torch.zeros(40, dtype=torch.int32), 48, BF16)


def cases(capability: int) -> dict[str, Callable[[], None]]:
    """What to compile, by name. Every decoder, form, op and dtype is in it, each for few tokens and for many."""
    found: dict[str, Callable[[], None]] = {
        "w4 int4 bf16 g128, 1": lambda: w4(1, 128, BF16),
        "w4 int4 bf16 g128, 32": lambda: w4(32, 128, BF16),
        "w4 int4 bf16 g128, 64": lambda: w4(64, 128, BF16),
        "w4 int4 bf16 g128, 256": lambda: w4(256, 128, BF16),
        "w4 int4 bf16 g64, 1": lambda: w4(1, 64, BF16),
        "w4 int4 bf16 g64, 256": lambda: w4(256, 64, BF16),
        "w4 int4 bf16 g32 zero, 1": lambda: w4(1, 32, BF16, zero=True),
        "w4 int4 bf16 channel, 256": lambda: w4(256, -1, BF16),
        "w4 int4 f16 g128 zero, 1": lambda: w4(1, 128, F16, zero=True, out=F16),
        "w4 int4_int8 g128, 1": lambda: w4(1, 128, INT8),
        "w4 int4_int8 g128, 2048": lambda: w4(2048, 128, INT8),
        "w4 int4_int8 channel zero, 16": lambda: w4(16, -1, INT8, zero=True),
        "w4 nf4 bf16 g64, 1": lambda: w4(1, 64, BF16, table="nf4"),
        "w4 nf4 bf16 g64, 256": lambda: w4(256, 64, BF16, table="nf4"),
        "w4 fp4 f16 g128, 16": lambda: w4(16, 128, F16, table="fp4", out=F16),
        "dequantize4 int4 g128": lambda: dequantize(128, zero=True),
        "dequantize4 nf4 g64": lambda: dequantize(64, table="nf4"),
        "gemm8 int8, 1": lambda: gemm8(capability, 1, INT8),
        "gemm8 int8, 64": lambda: gemm8(capability, 64, INT8, residual=True, activation="silu"),
        "gemm8 int8, 128": lambda: gemm8(capability, 128, INT8, F16),
        "gemm8 int8, 2048": lambda: gemm8(capability, 2048, INT8),
        "gemm8 int8 zero outliers, 2048": lambda: gemm8(capability, 2048, INT8, zero=True, outliers=48),
        "gemm8 int8 zero outliers, 16": lambda: gemm8(capability, 16, INT8, F32, zero=True, outliers=48),
        "gemm8 int8 residual gelu, 2048": lambda: gemm8(capability, 2048, INT8, residual=True, activation="gelu"),
        "gemm8 int8 f32 residual, 2048": lambda: gemm8(capability, 2048, INT8, F32, residual=True),
        "gemm8 e5m2, 2048": lambda: gemm8(capability, 2048, E5M2),
        "quantize_rows int8, 1": lambda: gated(1, 4096, "none", "int8_narrow"),
        "quantize_rows int8, 8192": lambda: gated(8192, 4096, "none", "int8_narrow", F16),
        "quantize_rows int8 static, 16": lambda: gated(16, 53248, "none", "int8", static=True),
        "quantize_rows e5m2, 16": lambda: gated(16, 4096, "none", "e5m2", F32),
        "gated_quantize silu int8, 1": lambda: gated(1, 14336, "silu", "int8_narrow"),
        "gated_quantize silu int8, 8192": lambda: gated(8192, 14336, "silu", "int8_narrow"),
        "gated_quantize gelu values, 64": lambda: gated(64, 4096, "gelu", "", F16),
        "norm_quantize rms int8, 1": lambda: norm(1, 4096, "int8_narrow"),
        "norm_quantize rms int8, 8192": lambda: norm(8192, 8192, "int8_narrow"),
        "norm_quantize layer int8, 8192": lambda: norm(8192, 4096, "int8_narrow", F32, layer=True),
        "norm_quantize layer values, 16": lambda: norm(16, 4096, "", F16, layer=True),
        "hadamard 4096 int8, 1": lambda: hadamard(1, 4096, 4096, "int8_narrow"),
        "hadamard 4096 int8, 8192": lambda: hadamard(8192, 4096, 4096, "int8_narrow"),
        "hadamard 14336 int8, 64": lambda: hadamard(64, 14336, 14336, "int8_narrow"),
        "hadamard 8192 in 128, 8192": lambda: hadamard(8192, 8192, 128, "int8_narrow", F16),
        "hadamard 4096 values f32, 64": lambda: hadamard(64, 4096, 4096, "", F32),
        "outliers, 1": lambda: split_outliers(1),
        "outliers, 8192": lambda: split_outliers(8192),
    }
    if capability >= 89:
        found |= {
            "w4 e4m3 g128, 1": lambda: w4(1, 128, E4M3),
            "w4 e4m3 g128, 2048": lambda: w4(2048, 128, E4M3),
            "gemm8 e4m3, 1": lambda: gemm8(capability, 1, E4M3),
            "gemm8 e4m3, 64": lambda: gemm8(capability, 64, E4M3, residual=True, activation="gelu_tanh"),
            "gemm8 e4m3, 2048": lambda: gemm8(capability, 2048, E4M3, activation="relu"),
            "quantize_rows e4m3, 1": lambda: gated(1, 4096, "none", "e4m3"),
            "gated_quantize gelu_tanh e4m3, 8192": lambda: gated(8192, 14336, "gelu_tanh", "e4m3"),
            "norm_quantize rms e4m3, 64": lambda: norm(64, 4096, "e4m3"),
            "hadamard 4096 e4m3, 64": lambda: hadamard(64, 4096, 4096, "e4m3"),
        }
    if capability == 90:
        found |= {
            "gemm8 specialized int8": lambda: gemm8(capability, 2048, INT8, form="specialized"),
            "gemm8 specialized e4m3": lambda: gemm8(capability, 2048, E4M3, form="specialized"),
            "w4_large bf16 g128": lambda: w4_large(128),
            "w4_large f16 channel zero": lambda: w4_large(-1, F16, zero=True),
        }
    return found


def spills(cubin: bytes) -> int | None:
    """Local loads and stores in a kernel, or None where the disassembler is missing."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        sass = subprocess.run([tool, "-c", f.name], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\b(?:LDL|STL)\b", sass))


def compile_all(capability: int) -> dict[str, list[dict[str, object]]]:
    """Of every case: the kernels that it launches, each with its shared memory and spills; or what went wrong."""
    from qfx.kernels.gpu.launch import compiling

    found: dict[str, list[dict[str, object]]] = {}
    for name, launch in cases(capability).items():
        try:
            with compiling(capability) as compiled:
                launch()
        except Exception as e:
            found[name] = [{"error": f"{type(e).__name__}: {e}"}]
            continue
        found[name] = [
            {"shared": k.metadata.shared, "spills": spills(k.asm["cubin"]) if capability == 90 else 0}
            for _, k in compiled
        ]
    return found


@pytest.mark.parametrize("capability", SHARED)
def test_compiles(capability: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(cases(capability))
    assert all(kernels for kernels in found.values())
    failed = {name: k["error"] for name, kernels in found.items() for k in kernels if "error" in k}
    assert not failed, failed
    large = {name: k["shared"] for name, kernels in found.items() for k in kernels if k["shared"] > SHARED[capability] * 1024}
    assert not large, large
    counted = {name: k["spills"] for name, kernels in found.items() for k in kernels}
    assert not {name: count for name, count in counted.items() if count}
    if None in counted.values():
        pytest.skip("everything compiles; this Triton has no nvdisasm, so spills were not counted")


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
