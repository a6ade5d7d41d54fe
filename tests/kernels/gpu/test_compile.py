"""Every kernel compiles for the GPUs that it is for, in its default configurations, without one at hand.

A process of its own compiles for one compute capability (`python tests/kernels/gpu/test_compile.py 90` prints what it
finds), since this one has Triton's interpreter in the place of its compiler. Shared memory must fit in what a block may
have there. On sm_90 no register may be spilled in a loop that has no other in it, or in the smallest one around a
product of the tensor cores; elsewhere at most eight local loads and stores: SASS has them for spilled registers only.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

import triton
import triton.language as tl

from qfx.kernels import nf4_linear
from qfx.kernels.gpu import (
    decode4,
    dequantize4,
    gated_quantize,
    gemm8_config,
    linear8,
    norm_quantize,
    outliers,
    rowwise,
    tune,
)
from qfx.kernels.gpu import gated as gated_module
from qfx.kernels.gpu import gemm8 as gemm8_module
from qfx.kernels.gpu import w4 as w4_module
from qfx.kernels.gpu import w4_large as w4_large_module
from qfx.kernels.gpu import w4a8_large as w4a8_large_module
from qfx.kernels.gpu.hadamard import Plan as HadamardPlan
from qfx.kernels.gpu.hadamard import hadamard as hadamard_kernel
from qfx.kernels.gpu.launch import Launcher, compiling

SHARED = {80: 163, 89: 99, 90: 227, 100: 227}
"""KB of shared memory that a block may have."""
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INT8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
SIDE = 4096
SHARING = w4_module.Config(16, 8, 1, 8, 3, shared=True)
DIRECT = w4_module.Config(16, 8, 1, 4, 2, unroll=2, direct=True)
DIRECT_16 = w4_module.Config(16, 8, 1, 4, 2, direct=True)
MANY_WARPS = w4_module.Config(32, 8, 1, 16, 1, direct=True)
DIRECT_32 = w4_module.Config(32, 8, 1, 4, 1, registers=80, direct=True)


def w4(
    tokens: int, group: int, x: torch.dtype, *, table: str = "", zero: bool = False, out: torch.dtype = BF16,
    config: w4_module.Config | None = None, bits: int = 4,
) -> None:  # fmt: skip
    tiles = torch.empty(SIDE // 128, SIDE // 128, 128, 16 * bits, dtype=torch.uint8)
    scale = torch.empty(1 if group < 0 else SIDE // group, SIDE)
    zeros = torch.empty(scale.shape, dtype=torch.uint8) if zero else None
    decoder, values, x_scale = decode4.int_decoder(bits, x), None, None
    if x.itemsize == 1:
        decoder, x_scale = decode4.eight_bit_decoder(x, zero), torch.empty(tokens, 1)
    elif table:
        decoder, values = decode4.table_decoder(nf4_linear.TABLES[table], x), torch.empty(16, dtype=x)
    weight = (tiles, scale, zeros, torch.empty(SIDE, dtype=out), SIDE, group, decoder)
    choose = w4_module.pick if config is None else lambda *_: config
    with mock.patch.object(w4_module, "pick", choose):
        w4_module.w4(torch.empty(tokens, SIDE, dtype=x), *weight, x_scale=x_scale, table=values, dtype=out)


def dequantize(group: int, zero: bool = False, table: str = "") -> None:
    decoder = decode4.table_decoder(nf4_linear.TABLES[table], BF16) if table else decode4.INT4
    words = torch.empty(32, 32, 128, 32, dtype=torch.int16)
    scale = torch.empty(1 if group < 0 else SIDE // group, SIDE)
    zeros = torch.empty(scale.shape, dtype=torch.uint8) if zero else None
    values = torch.empty(16, dtype=BF16) if table else None
    dequantize4.dequantize(words, scale, zeros, values, torch.empty(2048, SIDE, dtype=BF16), group, decoder, 0)


def w4_large(group: int, x: torch.dtype = BF16, zero: bool = False, table: str = "", **config: int) -> None:
    tiles = torch.empty(SIDE // 128, SIDE // 128, 128, 64, dtype=torch.uint8)
    scale = torch.empty(1 if group < 0 else SIDE // group, SIDE)
    zeros = torch.empty(scale.shape, dtype=torch.uint8) if zero else None
    cut = w4_large_module.Config(**config)  # type: ignore[arg-type]
    text = decode4.table_decoder(nf4_linear.TABLES[table], x).table if table else ()
    rest = zeros, None, SIDE, group, cut, None, text
    w4_large_module.w4_large(torch.empty(1024, SIDE, dtype=x), tiles, scale, *rest)


def w4a8_large(
    group: int, out: torch.dtype = BF16, codes: torch.dtype = INT8, second: bool = False, **config: int
) -> None:
    tiles = torch.empty(SIDE // 128, SIDE // 128, 128, 64, dtype=torch.uint8)
    scale, bias = torch.empty(1 if group < 0 else SIDE // group, SIDE), torch.empty(SIDE, dtype=out)
    chosen = w4a8_large_module.Config(**config)
    x, x_scale = torch.empty(1024, SIDE, dtype=codes), torch.empty(1024, 1)
    multiples = torch.empty(SIDE) if second else None
    w4a8_large_module.w4a8_large(x, x_scale, tiles, scale, bias, SIDE, group, out, chosen, second=multiples)


def gemm8(
    capability: int, tokens: int, dtype: torch.dtype, out: torch.dtype = BF16, *, residual: bool = False,
    activation: str = "", zero: bool = False, n_outliers: int = 0, form: str = "",
) -> None:  # fmt: skip
    shape = tune.bucket(tokens), SIDE, SIDE, dtype == INT8
    config = gemm8_config.specialized_candidates(*shape)[0] if form else gemm8_config.default(*shape, capability >= 90)
    xo, wo = torch.empty(tokens, n_outliers, dtype=BF16), torch.empty(SIDE, n_outliers, dtype=BF16)
    more = (xo, wo) if n_outliers else None
    codes = torch.empty(tokens, SIDE, dtype=dtype), torch.empty(SIDE, SIDE, dtype=dtype)
    scales = torch.empty(tokens, 1), torch.empty(SIDE)
    summand = torch.empty(tokens, SIDE, dtype=out) if residual else None
    point = torch.empty((), dtype=torch.int32) if zero else None
    sums = torch.empty(SIDE, dtype=torch.int32) if zero else None
    gemm8_module.gemm8(
        *codes, *scales, torch.empty(SIDE, dtype=BF16), summand, activation, out, point, sums, more, config
    )


def gated(tokens: int, columns: int, act: str, grid: str, dtype: torch.dtype = BF16, static: bool = False) -> None:
    gate, up = torch.empty(tokens, 2 * columns, dtype=dtype).chunk(2, 1)
    gated_quantize.gated_quantize(gate, None if act == "none" else up, act, grid, torch.empty(()) if static else None)


def norm(tokens: int, columns: int, grid: str, dtype: torch.dtype = BF16, layer: bool = False) -> None:
    x = torch.empty(tokens, columns, dtype=dtype)
    gain, bias = torch.empty(columns, dtype=dtype), torch.empty(columns, dtype=dtype) if layer else None
    norm_quantize.norm_quantize(x, x, gain, bias, 1e-6, layer, not layer, grid, None, None, False)


def gated_values(tokens: int, columns: int, act: str, dtype: torch.dtype = BF16) -> None:
    gate, up = torch.empty(tokens, 2 * columns, dtype=dtype).chunk(2, 1)
    gated_module.gated(gate, up, act)


def hadamard(
    tokens: int, columns: int, block: int, grid: str, dtype: torch.dtype = BF16, plan: HadamardPlan | None = None
) -> None:
    hadamard_kernel(torch.empty(tokens, columns, dtype=dtype), block, grid, plan=plan)


def split_outliers(tokens: int, columns: int = SIDE) -> None:
    x = torch.empty(tokens, columns, dtype=BF16)
    outliers.split(x, torch.ones(columns, dtype=torch.bool), torch.zeros(40, dtype=torch.int32), 48, BF16)


def cases(capability: int) -> dict[str, Callable[[], None]]:
    """What to compile, by name: every decoder, form, op and dtype of activations, for few tokens and for many."""
    g8 = functools.partial(gemm8, capability)
    found = {
        "w4 int4 bf16 g128, 1": lambda: w4(1, 128, BF16),
        "w4 int4 bf16 g64, 256": lambda: w4(256, 64, BF16),
        "w4 int4 bf16 g32 zero, 1": lambda: w4(1, 32, BF16, zero=True),
        "w4 int4 f16 channel zero, 64": lambda: w4(64, -1, F16, zero=True, out=F16),
        "w4 int4_int8 g128, 1": lambda: w4(1, 128, INT8),
        "w4 int4_int8 g128, 2048": lambda: w4(2048, 128, INT8),
        "w4 int4_int8 channel zero, 16": lambda: w4(16, -1, INT8, zero=True),
        "w4 nf4 bf16 g64, 1": lambda: w4(1, 64, BF16, table="nf4"),
        "w4 nf4 bf16 g64, 256": lambda: w4(256, 64, BF16, table="nf4"),
        "w4 nf4 f16 g128, 16": lambda: w4(16, 128, F16, table="nf4", out=F16),
        "w4 int2 bf16 g64, 1": lambda: w4(1, 64, BF16, bits=2),
        "w4 int3 bf16 g128 zero, 64": lambda: w4(64, 128, BF16, zero=True, bits=3),
        "w4 int3 f16 channel, 256": lambda: w4(256, -1, F16, bits=3, out=F16),
        "w4 int8 bf16 g128, 1": lambda: w4(1, 128, BF16, bits=8),
        "w4 int8 f16 g32 zero, 16": lambda: w4(16, 32, F16, zero=True, bits=8, out=F16),
        "w4 shared int2 bf16 g128, 1": lambda: w4(1, 128, BF16, config=SHARING, bits=2),
        "w4 shared nf4 bf16 g128, 8": lambda: w4(8, 128, BF16, table="nf4", config=SHARING),
        "w4 shared int4_int8 g128, 1": lambda: w4(1, 128, INT8, config=SHARING),
        "w4 direct int4 bf16 g128, 1": lambda: w4(1, 128, BF16, config=DIRECT_32),
        "w4 direct int4 f16 g32 zero, 8": lambda: w4(8, 32, F16, zero=True, out=F16, config=DIRECT),
        "w4 direct int4_int8 g128 zero, 8": lambda: w4(8, 128, INT8, zero=True, config=DIRECT),
        "w4 direct int4_int8 channel, 1": lambda: w4(1, -1, INT8, config=DIRECT),
        "w4 direct nf4 bf16 g64, 1": lambda: w4(1, 64, BF16, table="nf4", config=DIRECT),
        "w4 direct nf4 f16 g32, 16": lambda: w4(16, 32, F16, table="nf4", out=F16, config=DIRECT_16),
        "w4 direct nf4 bf16 g64, 16, most warps": lambda: w4(16, 64, BF16, table="nf4", config=MANY_WARPS),
        "dequantize4 int4 g128": lambda: dequantize(128, zero=True),
        "dequantize4 nf4 g64": lambda: dequantize(64, table="nf4"),
        "gemm8 int8, 1": lambda: g8(1, INT8),
        "gemm8 int8 residual silu, 64": lambda: g8(64, INT8, residual=True, activation="silu"),
        "gemm8 int8 zero outliers, 16": lambda: g8(16, INT8, F32, zero=True, n_outliers=48),
        "gemm8 int8, 2048": lambda: g8(2048, INT8),
        "gemm8 int8 zero outliers, 2048": lambda: g8(2048, INT8, zero=True, n_outliers=48),
        "gemm8 int8 residual gelu, 2048": lambda: g8(2048, INT8, F16, residual=True, activation="gelu"),
        "gemm8 e5m2, 2048": lambda: g8(2048, E5M2),
        "quantize_rows int8, 1": lambda: gated(1, 4096, "none", "int8_narrow"),
        "quantize_rows int8 static, 16": lambda: gated(16, 53248, "none", "int8", static=True),
        "quantize_rows e5m2, 16": lambda: gated(16, 4096, "none", "e5m2", F32),
        "gated_quantize silu int8, 8192": lambda: gated(8192, 14336, "silu", "int8_narrow"),
        "gated_quantize gelu values, 64": lambda: gated(64, 4096, "gelu", "", F16),
        "norm_quantize rms int8, 1": lambda: norm(1, 4096, "int8_narrow"),
        "norm_quantize layer int8, 8192": lambda: norm(8192, 8192, "int8_narrow", F32, layer=True),
        "gated silu, 1": lambda: gated_values(1, 14336, "silu"),
        "gated gelu, 8192": lambda: gated_values(8192, 11008, "gelu", F32),
        "norm rms, 1": lambda: norm(1, 4096, ""),
        "norm layer, 8192": lambda: norm(8192, 5120, "", F16, layer=True),
        "hadamard 4096 int8, 1": lambda: hadamard(1, 4096, 4096, "int8_narrow"),
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
            "gemm8 e4m3, 1": lambda: g8(1, E4M3),
            "gemm8 e4m3 residual gelu_tanh, 64": lambda: g8(64, E4M3, residual=True, activation="gelu_tanh"),
            "gemm8 e4m3 relu, 2048": lambda: g8(2048, E4M3, activation="relu"),
            "quantize_rows e4m3, 1": lambda: gated(1, 4096, "none", "e4m3"),
            "gated_quantize gelu_tanh e4m3, 8192": lambda: gated(8192, 14336, "gelu_tanh", "e4m3"),
            "norm_quantize rms e4m3, 64": lambda: norm(64, 4096, "e4m3"),
            "hadamard 4096 e4m3, 64": lambda: hadamard(64, 4096, 4096, "e4m3"),
        }
    if capability == 90:
        found |= {
            "gemm8 specialized int8": lambda: g8(2048, INT8, form="specialized"),
            "gemm8 specialized e4m3": lambda: g8(2048, E4M3, form="specialized"),
            "hadamard 8192 twice int8": lambda: hadamard(
                8192, 8192, 8192, "int8_narrow", plan=HadamardPlan(1, 512, 16, "twice", 8)
            ),
            "hadamard 4096 twice e4m3, the next row ahead": lambda: hadamard(
                8192, 4096, 4096, "e4m3", plan=HadamardPlan(1, 256, 16, "twice", 4, stages=2)
            ),
            "hadamard 8192 in 128 short int8": lambda: hadamard(
                8192, 8192, 128, "int8_narrow", F16, plan=HadamardPlan(1, 256, 32, "short", 8, stages=2)
            ),
            "w4_large bf16 g128": lambda: w4_large(128),
            "w4_large f16 channel zero": lambda: w4_large(-1, F16, zero=True),
            "w4_large bf16 g128 of 128 rows": lambda: w4_large(128, zero=True, stages=4, rows=128),
            "w4_large bf16 nf4 g64 of 128 rows": lambda: w4_large(64, table="nf4", stages=4, rows=128),
            "w4_large f16 nf4 g64 of 256 tokens": lambda: w4_large(64, F16, table="nf4", bt=256, stages=2, rows=128),
            "w4_large bf16 g128 of 256 tokens": lambda: w4_large(128, zero=True, bt=256, stages=2, rows=128),
            "w4a8_large bf16 g128": lambda: w4a8_large(128),
            "w4a8_large f16 channel, 64 tokens": lambda: w4a8_large(-1, F16, bt=64, stages=6),
            "w4a8_large e4m3 g128": lambda: w4a8_large(128, codes=E4M3),
            "w4a8_whole bf16 g128": lambda: w4a8_large(128, second=True, stages=5),
            "w4a8_whole bf16 channel of 256 tokens": lambda: w4a8_large(-1, bt=256, bn=128),
            "w4a8_whole f16 g256 of 256 tokens": lambda: w4a8_large(256, F16, second=True, bt=256, bn=128),
        }
    return found


def spills(cubin: bytes) -> tuple[int, int] | None:
    """Local loads and stores of a kernel in its inner loops, and in all; None where the disassembler is missing."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        sass = subprocess.run([tool, "-c", f.name], capture_output=True, text=True, check=True).stdout.splitlines()
    labels = {m[1]: i for i, line in enumerate(sass) if (m := re.match(r"(\S+):$", line.strip()))}
    jumps = {i: labels[m[1]] for i, line in enumerate(sass) if (m := re.search(r"BRA.*`\((\S+)\)", line))}
    loops = sorted(((target, jump) for jump, target in jumps.items() if target < jump), key=lambda at: at[1] - at[0])
    products = [i for i, line in enumerate(sass) if re.search(r"MMA\.", line)]
    inner: set[tuple[int, int]] = set()
    for a, b in loops:  # the smallest first
        if not any(a <= c and d <= b for c, d in inner) or any(a <= i < b for i in products):
            inner.add((a, b))
            products = [i for i in products if not a <= i < b]
    local = [i for i, line in enumerate(sass) if re.search(r"\b(LDL|STL)\b", line)]
    return sum(any(a <= i < b for a, b in inner) for i in local), len(local)


def shared(kernel: Any) -> int:
    """Bytes of shared memory. What PTX declares itself, Triton does not count when it asks for more than 48 KB."""
    declared = sum(4 * int(n) for n in re.findall(r"\.shared [^;]*\.b32 \w+\[(\d+)\];", kernel.asm["ptx"]))
    dynamic = kernel.metadata.shared
    if declared and dynamic <= 48 * 1024 < declared + dynamic:
        raise ValueError(f"{dynamic} and {declared} bytes of shared memory do not fit in 48 KB")
    return declared + dynamic


def compile_all(capability: int) -> dict[str, dict[str, Any]]:
    """Of every case: shared memory and spills of the kernels that it launches; or what went wrong."""
    found: dict[str, dict[str, Any]] = {}
    for name, launch in cases(capability).items():
        try:
            with compiling(capability) as made:
                launch()
        except Exception as e:
            found[name] = {"error": f"{type(e).__name__}: {e}"}
            continue
        found[name] = {"shared": [shared(k) for _, k in made]}
        if capability == 90:
            found[name]["spills"] = [spills(k.asm["cubin"]) for _, k in made]
    return found


def in_a_process(what: str) -> Any:
    """What this file prints when it is run, without an interpreter and without a GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__, what], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # Triton prints what ptxas does not take


@pytest.mark.parametrize("capability", SHARED)
def test_compiles(capability: int) -> None:
    found = in_a_process(str(capability))
    assert set(found) == set(cases(capability))
    wrong = {name: f for name, f in found.items() if "error" in f or max(f["shared"]) > SHARED[capability] * 1024}
    assert not wrong
    counted = {name: f["spills"] for name, f in found.items() if "spills" in f}
    if any(None in counts for counts in counted.values()):
        pytest.skip("everything compiles; this Triton has no nvdisasm, so spills were not counted")
    assert not {n: c for n, counts in counted.items() for c in counts if c[0] > 0 or c[1] > 8}


def test_spills_in_a_loop_are_seen() -> None:
    """In a kernel of 32 registers a thread that carries 64 values through its loop."""
    counts = in_a_process("spill")
    if counts is None:
        pytest.skip("this Triton has no nvdisasm")
    assert counts[0] > 2


def test_float8_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        codes, wide, x = (torch.empty(2, 32, dtype=dtype, device="cuda") for dtype in (E4M3, E5M2, BF16))
    for capability, refused in (((8, 0), True), ((8, 9), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        for cached in (gemm8_module._device_refusal, rowwise._has_e4m3):
            cached.cache_clear()
        product, linear = gemm8_module.refusal(codes, codes), linear8.refusal(x, codes)
        quantizing = rowwise.takes(x, "e4m3", None, None)
        if refused:
            assert product == linear == "gemm8: compute capability (8, 0) has no such tensor cores"
            assert quantizing == "no E4M3 on this device"
        else:
            assert product is linear is quantizing is None
        assert gemm8_module.refusal(wide, wide) is None and rowwise.takes(x, "e5m2", None, None) is None
    for cached in (gemm8_module._device_refusal, rowwise._has_e4m3):
        cached.cache_clear()


@triton.jit
def _spilling(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.load(x + at)
    for i in range(n):
        total = total * total + tl.load(x + i * BLOCK + at)
    tl.store(x + at, total)


if __name__ == "__main__":
    if sys.argv[1] == "spill":
        with compiling(90) as kernels:
            Launcher(_spilling, BLOCK=2048, num_warps=1, maxnreg=32)((1, 1, 1), torch.empty(1 << 20), 7)
        print(json.dumps(spills(kernels[0][1].asm["cubin"])))
    else:
        print(json.dumps(compile_all(int(sys.argv[1]))))
