"""int8 and fp8 GEMM with its scales, bias, activation and residual in one launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.runtime.errors import OutOfResources

from qfx.kernels.gpu import gemm8_few, gemm8_large, gemm8_skinny, tune
from qfx.kernels.gpu.gemm8_config import NO_CUBLAS, SKINNY_ONLY, Config, Operands, candidates, default, takes_tma
from qfx.kernels.gpu.launch import capability

_LAUNCH = {"few": gemm8_few.launch, "skinny": gemm8_skinny.launch, "large": gemm8_large.launch}


def gemm8(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "",
    out_dtype: torch.dtype = torch.bfloat16,
    a_zero: Tensor | None = None,
    b_sums: Tensor | None = None,
    outliers: tuple[Tensor, Tensor] | None = None,
    config: Config | None = None,
) -> Tensor:
    """`act((a @ b.T - a_zero · b_sums) · a_scale · b_scale + xo @ wo.T + bias) + residual`.

    int8 sums are exact in int32. fp8 sums are kept in float32, but wgmma drops what lies below 2⁻¹³ of the largest
    addend: with `Config.promote` = p the sums of p products are lossy, and with 0 the sum of all K.

    Args:
        a: codes of the tokens `[M, K]`, int8 or float8; rows may be strided.
        b: codes of the weight `[N, K]` of the same family; rows may be strided.
        a_scale: float32, one for each token or a single one.
        b_scale: float32, one for each channel or a single one.
        bias: `[N]`, any float dtype.
        residual: `[M, N]` contiguous, any float dtype.
        activation: one of `gemm8_epilogue.ACTIVATIONS`.
        out_dtype: bfloat16, float16 or float32.
        a_zero: int32, the zero points of int8 codes, one for each token or a single one; or None.
        b_sums: int32 `[N]`, the sums of b's rows; wanted beside a_zero.
        outliers: xo `[M, n]` and wo `[N, n]`, contiguous, both bfloat16 or float16, n a multiple of 16; or None.
        config: instead of what `tune.pick` chooses.

    Returns:
        `[M, N]` contiguous.
    """
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if m == 0 or n == 0:
        return out
    xo, wo = outliers if outliers is not None else (None, None)
    int8 = a.dtype == torch.int8
    o = Operands(a, b, out, a_scale, b_scale, bias, residual, a_zero, b_sums, xo, wo, activation, int8)
    if config is None:
        tma = _has_tma(a.device) and takes_tma(a) and takes_tma(b)
        cublas = not int8 and m > NO_CUBLAS and tma and _cublas_takes(o)
        shape = (tune.bucket(m), n, k, int8, tma, cublas)
        kind, every = "int8" if int8 else "fp8", m <= SKINNY_ONLY or _specialized_takes(o)
        config = tune.pick(
            "gemm8",
            (kind if every else f"{kind}-general", tma, cublas, f"{n}x{k}", shape[0]),
            default(*shape),
            lambda: candidates(*shape, hopper=every and capability(a.device) == 90),
            lambda c, w: _run(c, o._replace(b=w)),
            b,
        )
        if config.form == "few" and m > config.tokens:  # of a table that was made for another number of tokens
            config = default(*shape)
    return _run(config, o)


def product(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "",
    out_dtype: torch.dtype = torch.bfloat16,
    x_zero: Tensor | None = None,
    sums: Tensor | None = None,
    outliers: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`gemm8` for `[..., in]` codes, as the ops take them; `refusal` says what it does not take."""
    lead = x_codes.shape[:-1]
    a = x_codes if x_codes.dim() == 2 else x_codes.reshape(-1, x_codes.shape[-1])
    if a.stride(1) != 1:
        a = a.contiguous()
    if codes.stride(1) != 1:
        codes = codes.contiguous()
    if residual is not None and not residual.is_contiguous():
        residual = residual.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if not x_scale.is_contiguous():
        x_scale = x_scale.contiguous()
    if not w_scale.is_contiguous():
        w_scale = w_scale.contiguous()
    y = gemm8(a, codes, x_scale, w_scale, bias, residual, activation, out_dtype, x_zero, sums, outliers)
    return y if len(lead) == 1 else y.view(*lead, y.shape[1])


def refusal(a: Tensor, b: Tensor) -> str | None:
    """None if `gemm8` takes these codes on this device, otherwise the reason why not."""
    if a.shape[-1] == 0:
        return "gemm8: no input channels"
    return _device_refusal(a.device, a.dtype == b.dtype == torch.float8_e5m2 or a.dtype == torch.int8)


@cache
def _device_refusal(device: torch.device, wide: bool) -> str | None:
    if device.type == "cuda":
        version = torch.cuda.get_device_capability(device)
        if version < (8, 0) or (not wide and version < (8, 9)):
            return f"gemm8: compute capability {version} has no such tensor cores"
    return None


_sums: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def row_sums(codes: Tensor) -> Tensor:
    """int32 sums of the rows of a weight."""
    return kept(_sums, codes, lambda c: c.sum(1, dtype=torch.int32))


def kept(cache: WeakTensorKeyDictionary, of: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """`compute(of)`, kept as long as `of` lives and nobody writes to it."""
    if of.is_inference():  # does not tell who writes to it
        return compute(of)
    found = cache.get(of)
    if found is not None and found[0] == of._version:
        return found[1]
    value = compute(of)
    if not (of.is_cuda and torch.cuda.is_current_stream_capturing()):  # there, values come when the graph runs
        cache[of] = of._version, value
    return value


def _run(config: Config, o: Operands) -> Tensor:
    if config.form == "cublas":
        return _cublas(o)
    if config.form == "specialized":
        if _specialized_takes(o):
            from qfx.kernels.gpu import gemm8_specialized

            gemm8_specialized.launch(config, o)
            return o.out
        config = _instead(config)
    _launch(config, o)
    return o.out


_fitting: dict[tuple[Any, ...], Config] = {}


def _launch(config: Config, o: Operands) -> None:
    """With fewer stages where the epilogue, or a smaller device, leaves too little shared memory for all of them."""
    kind = config, o.out.dtype, None if o.residual is None else o.residual.dtype, o.activation
    config = _fitting.get(kind, config)
    while True:
        try:
            _LAUNCH[config.form](config, o)
            return
        except OutOfResources:
            if config.stages == 1:
                raise
            config = _fitting[kind] = replace(config, stages=config.stages - 1)


@cache
def _instead(config: Config) -> Config:
    """For what the specialized form does not store or add."""
    return replace(config, form="large", persistent=True)


@cache
def _has_tma(device: torch.device) -> bool:
    # sm_120 has it too, but only 99 KB of shared memory
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def _specialized_takes(o: Operands) -> bool:
    """Whether the specialized form adds and stores what there is."""
    return o.xo is None and o.out.element_size() == 2 and o.out.shape[1] % 8 == 0


def _cublas_takes(o: Operands) -> bool:
    """Whether cuBLASLt's fp8 product with a scale for each row and column does all of it."""
    return (
        o.a.is_cuda
        and o.out.dtype == torch.bfloat16
        and o.b.shape[0] % 16 == 0
        and o.b.shape[1] % 16 == 0
        and (o.bias is None or o.bias.dtype == torch.bfloat16)
        and o.residual is None
        and o.xo is None
        and not o.activation
        and o.a.dtype == o.b.dtype == torch.float8_e4m3fn
        and o.a.is_contiguous()
        and o.b.is_contiguous()
    )


def _cublas(o: Operands) -> Tensor:
    m, n = o.out.shape
    a_scale = o.a_scale.reshape(-1, 1).expand(m, 1).contiguous()
    b_scale = o.b_scale.reshape(1, -1).expand(1, n).contiguous()
    return torch._scaled_mm(o.a, o.b.t(), a_scale, b_scale, o.bias, out_dtype=o.out.dtype, use_fast_accum=True)
