"""Other libraries' kernels as benchmark cases; one that is not installed raises `Missing`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Linear, MakeLinear, Missing, Tensors

GROUP = 128
BIG = (8192, 8192)
"""Where peers are measured that compile or tune for each shape."""
GEMLITE = ((4096, 4096), (28672, 4096), (4096, 14336))
"""Where gemlite ships its own measurements (of H100s), so that it need not tune."""
MOST = 1 << 30


@dataclass(frozen=True)
class Peer:
    """A peer's linear: the family it is compared in, the case, and where it is measured (None: everywhere)."""

    family: str
    make: MakeLinear
    shapes: tuple[tuple[int, int], ...] | None = None
    tokens: tuple[int, ...] | None = None


@functools.cache
def library(name: str) -> Any:
    """A module, imported once; whatever keeps it from being imported counts as not installed."""
    try:
        return importlib.import_module(name)
    except Exception as e:
        why = str(e).splitlines()[0][:80] if str(e) else ""
        raise Missing(f"{name} not installed ({type(e).__name__}: {why})") from e


def absmax_rows(x: Tensor, top: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and float32 scale `[rows, 1]`, in plain PyTorch."""
    scale = (x.abs().amax(1, keepdim=True).float() / top).clamp_min(1e-12)
    y = x.float() / scale
    return (y.round() if dtype == torch.int8 else y).clamp(-top, top).to(dtype), scale


int8_rows = functools.partial(absmax_rows, top=127.0, dtype=torch.int8)
fp8_rows = functools.partial(absmax_rows, top=448.0, dtype=torch.float8_e4m3fn)


def int4_groups(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes -8..7 `[out, in]`, bf16 scales `[out, groups]`."""
    groups = w.view(w.shape[0], -1, GROUP).float()
    scale = (groups.abs().amax(2, keepdim=True) / 7.0).clamp_min(1e-12).bfloat16()
    codes = (groups / scale.float()).round().clamp(-8, 7)
    return codes.view_as(w).to(torch.int8), scale.squeeze(2)


def at_least_32(codes: Tensor) -> Tensor:
    """`torch._int_mm` takes more than 16 rows."""
    return F.pad(codes, (0, 0, 0, max(0, 32 - codes.shape[0]))) if codes.shape[0] <= 16 else codes


def bf16(w: Tensor) -> Linear:
    return Linear((w,), lambda x, v: F.linear(x[0], v[0]))


def int_mm(w: Tensor) -> Linear:
    """cuBLASLt's int8 product alone; its result is int32 and unscaled."""
    codes = int8_rows(w)[0]

    def call(x: Tensors, v: Tensors) -> Tensor:
        return torch._int_mm(x[0], v[0].t())

    return Linear((codes,), call, lambda x: (at_least_32(int8_rows(x)[0]),))


def _int8_dynamic(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    x_codes, x_scale = int8_rows(x)
    product = torch._int_mm(at_least_32(x_codes), codes.t())[: x.shape[0]]
    return (product.float() * x_scale * scale).to(x.dtype)


def _fp8_dynamic(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    x_codes, x_scale = fp8_rows(x)
    return torch._scaled_mm(x_codes, codes.t(), x_scale, scale, out_dtype=x.dtype, use_fast_accum=True)


def dynamic(quantize: Any, fn: Callable[..., Tensor], compiled: bool) -> MakeLinear:
    def make(w: Tensor) -> Linear:
        codes, scale = quantize(w)
        torch.compiler.reset()
        run = torch.compile(fn, dynamic=False) if compiled else fn
        return Linear((codes, scale.view(1, -1).contiguous()), lambda x, v: run(x[0], *v))

    return make


def scaled_mm(w: Tensor) -> Linear:
    codes, scale = fp8_rows(w)

    def call(x: Tensors, v: Tensors) -> Tensor:
        return torch._scaled_mm(x[0], v[0].t(), x[1], v[1], out_dtype=torch.bfloat16, use_fast_accum=True)

    return Linear((codes, scale.view(1, -1).contiguous()), call, fp8_rows)


def tinygemm(w: Tensor) -> Linear:
    codes, scale = int4_groups(w)
    u = (codes + 8).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(((u[:, ::2] << 4) | u[:, 1::2]).contiguous(), 8)
    scales = torch.stack([scale.t(), torch.zeros_like(scale.t())], -1).contiguous()
    call = torch.ops.aten._weight_int4pack_mm
    return Linear((packed, scales), lambda x, v: call(x[0], v[0], GROUP, v[1]), largest=256)


def mslk(kind: str) -> MakeLinear:
    def make(w: Tensor) -> Linear:
        library("mslk.gemm")
        ops = torch.ops.mslk
        flat: Callable[[Tensor], Tensors] = lambda x: (fp8_rows(x)[0], fp8_rows(x)[1].view(-1))  # noqa: E731
        if kind == "fp8":
            codes, scale = fp8_rows(w)
            weights: Tensors = (codes, scale.view(-1).contiguous())
            return Linear(weights, lambda x, v: ops.f8f8bf16_rowwise(x[0], v[0], x[1], v[1]), flat)
        if kind == "int8":  # one scale for all: not comparable as a result, only in time
            return Linear(
                (int8_rows(w)[0],), lambda x, v: ops.i8i8bf16(x[0], v[0], 1e-4, 1), lambda x: int8_rows(x)[:1]
            )
        shuffle = library("mslk.quantize.shuffle").quantize_int4_preshuffle
        if kind == "bf16i4":
            packed, (scale, zero) = shuffle(w, group_size=GROUP, dtype="bf16", use_zp=False)
            weights = (packed, scale.contiguous(), zero.contiguous())
            return Linear(weights, lambda x, v: ops.bf16i4bf16_shuffled(x[0], *v))
        packed, (groups, rows) = shuffle(w, group_size=GROUP, dtype="fp8")
        weights = (packed, rows.contiguous(), groups.contiguous())
        return Linear(weights, lambda x, v: ops.f8i4bf16_shuffled(x[0], v[0], x[1], v[1], v[2]), flat)

    return make


def gemlite(kind: str) -> MakeLinear:
    def make(w: Tensor) -> Linear:
        lib, helper = library("gemlite"), library("gemlite.helper")
        shipped_table(lib)
        quick_autotune()
        settings = {"device": "cuda", "dtype": torch.bfloat16}
        if kind == "a16w4":
            codes, scale = int4_groups(w)
            scale = scale.contiguous()
            lib.set_packing_bitwidth(32)
            layer = helper.A16W4_HQQ_INT(**settings).from_weights(
                (codes + 8).to(torch.uint8), scale, torch.full_like(scale, 8.0)
            )
        else:
            maker = helper.A8W8_INT8_dynamic if kind == "int8" else helper.A8W8_FP8_dynamic
            layer = maker(**settings).from_weights(w.clone())
        weights = tuple(t.detach() for t in layer.get_tensor_args())
        meta = layer.get_meta_args()
        return Linear(weights, lambda x, v: lib.forward_functional(x[0], None, list(v), meta))

    return make


@functools.cache
def shipped_table(lib: Any) -> None:
    """gemlite's own measurements for the H100 serve the H200 too, whose name it does not know; same multiprocessors."""
    if torch.cuda.get_device_capability() == (9, 0) and "h100" not in torch.cuda.get_device_name().lower():
        lib.GemLiteLinear.load_config(str(Path(lib.__file__).parent / "configs" / "h100.json"))


COMPILE_ONLY = False
"""Whether Triton's own autotuner only compiles its candidates (set in processes that fill Triton's cache)."""


def quick_autotune() -> None:
    """Triton's own autotuner spends 15 ms on a candidate, not 125; what is reported is measured by us."""
    import triton
    from triton.testing import do_bench

    def once(fn: Callable[[], object], quantiles: Any = None, **settings: Any) -> Any:
        fn()
        return 1.0 if quantiles is None else [1.0] * 3

    def short(fn: Callable[[], object], quantiles: Any = None, **settings: Any) -> Any:
        return do_bench(fn, warmup=2, rep=12, quantiles=quantiles)

    driver = type(triton.runtime.driver.active)
    driver.get_benchmarker = lambda self: once if COMPILE_ONLY else short


def bitsandbytes_nf4(w: Tensor) -> Linear:
    functional = library("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=64)
    call, shape = torch.ops.bitsandbytes.gemm_4bit, state.shape
    return Linear((codes.view(-1, 1), state.absmax), lambda x, v: call(x[0], v[0], shape, v[1], 64, "nf4"))


def bitsandbytes_int8(w: Tensor) -> Linear:
    """LLM.int8 with threshold 6: it asks the GPU for the outlier columns, so that no graph holds it. fp16."""
    nn = library("bitsandbytes").nn
    layer = nn.Linear8bitLt(w.shape[1], w.shape[0], bias=False, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": w.half().cpu()})
    layer = layer.to("cuda")

    def prepare(x: Tensor) -> Tensors:
        x = x.half()
        x[:, ::100] *= 30.0
        return (x,)

    return Linear((layer.weight.data,), lambda x, v: layer(x[0]), prepare, captured=False)


def torchao(kind: str) -> MakeLinear:
    def make(w: Tensor) -> Linear:
        quantization = library("torchao.quantization")
        if kind == "int8":
            config = quantization.Int8DynamicActivationInt8WeightConfig(version=2, set_inductor_config=False)
        else:
            common = library("torchao.quantization.quantize_.common")
            config = quantization.Float8DynamicActivationFloat8WeightConfig(
                granularity=quantization.PerRow(),
                set_inductor_config=False,
                kernel_preference=common.KernelPreference.TORCH,  # AUTO would take MSLK's
            )
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta", dtype=torch.bfloat16)
        layer.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
        quantization.quantize_(layer, config)
        torch.compiler.reset()
        run = torch.compile(lambda x, v: F.linear(x, v), dynamic=False)
        return Linear((layer.weight.detach(),), lambda x, v: run(x[0], v[0]))

    return make


COMPILED = (16, 256, 8192)
PEERS: dict[str, Peer] = {
    "cuBLASLt _int_mm": Peer("int8 gemm", int_mm),
    "cuBLASLt _scaled_mm": Peer("fp8 gemm", scaled_mm),
    "eager + _int_mm": Peer("int8 linear", dynamic(int8_rows, _int8_dynamic, False)),
    "eager + _scaled_mm": Peer("fp8 linear", dynamic(fp8_rows, _fp8_dynamic, False)),
    "tinygemm": Peer("w4a16", tinygemm),
    "MSLK f8f8": Peer("fp8 gemm", mslk("fp8")),
    "MSLK i8i8": Peer("int8 gemm", mslk("int8")),
    "MSLK bf16i4": Peer("w4a16", mslk("bf16i4")),
    "MSLK f8i4": Peer("w4a8 gemm", mslk("f8i4")),
    "bitsandbytes NF4": Peer("nf4", bitsandbytes_nf4),
    "bitsandbytes LLM.int8": Peer("llm.int8", bitsandbytes_int8, (BIG,), (16, 256, 2048)),
    "gemlite A16W4": Peer("w4a16", gemlite("a16w4"), GEMLITE, (1, 16, 64, 256, 2048)),
    "gemlite A8W8 int8": Peer("int8 linear", gemlite("int8"), GEMLITE, COMPILED),
    "gemlite A8W8 fp8": Peer("fp8 linear", gemlite("fp8"), GEMLITE[:1], COMPILED),
    "torch.compile int8": Peer("int8 linear", dynamic(int8_rows, _int8_dynamic, True), (BIG,), COMPILED),
    "torch.compile fp8": Peer("fp8 linear", dynamic(fp8_rows, _fp8_dynamic, True), (BIG,), COMPILED),
    "torchao int8": Peer("int8 linear", torchao("int8"), (BIG,), COMPILED),
    "torchao fp8": Peer("fp8 linear", torchao("fp8"), (BIG,), COMPILED),
}
AUTOTUNED = ("gemlite",)
"""Names that begin so compile many candidates at each shape."""
BUILTIN = ("cuBLASLt", "eager", "tinygemm")
"""Names that begin so are PyTorch's own, and measured also without --peers."""
