"""Bit packing: exact round trips, the layout, and what a cast leaves alone."""

from dataclasses import replace

import pytest
import torch

from qfx.core.errors import KernelError
from qfx.core.qtensor import encode
from qfx.core.spec import parse_scheme
from qfx.kernels.pack import (
    CASES,
    apply_to_bits,
    dequantize,
    dequantize_stored,
    empty_store,
    kernel_scale,
    pack,
    packed_columns,
    plain_scale,
    restore,
    store,
    store_scale,
    unpack,
)
from tests.kernels.law import quantize_weight


def codes_of(bits: int, shape: tuple[int, ...], signed: bool) -> torch.Tensor:
    lo = -(2 ** (bits - 1)) if signed else 0
    return torch.randint(lo, lo + 2**bits, shape, dtype=torch.int8 if signed else torch.uint8)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("bits", "shape"), CASES)
def test_round_trip(bits: int, shape: tuple[int, ...], signed: bool) -> None:
    codes = codes_of(bits, shape, signed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], packed_columns(shape[-1], bits))
    back = unpack(packed, bits, shape[-1], signed)
    assert back.dtype == codes.dtype and back.is_contiguous() and torch.equal(back, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_is_a_little_endian_bit_stream(bits: int) -> None:
    codes = codes_of(bits, (1, 16), signed=True)
    stream = sum((int(c) % 2**bits) << (bits * i) for i, c in enumerate(codes[0]))
    assert bytes(pack(codes, bits)[0].tolist()) == stream.to_bytes(2 * bits, "little")


def test_four_bits_are_nibbles_even_column_low() -> None:
    assert pack(torch.tensor([[1, -1, 7]], dtype=torch.int8), 4).tolist() == [[0xF1, 0x07, 0, 0]]


def test_non_contiguous_codes() -> None:
    codes = codes_of(3, (10, 5), signed=True).t()
    assert torch.equal(unpack(pack(codes, 3), 3, 10, True), codes)


def test_padding_is_zero_and_short_rows_are_refused() -> None:
    assert pack(torch.full((1, 1), -1, dtype=torch.int8), 5).tolist() == [[31, 0, 0, 0, 0]]
    with pytest.raises(KernelError, match="9 codes of 4 bits are 8 bytes"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 4, 9, True)
    with pytest.raises(KernelError, match="use int8 or uint8"):
        pack(torch.zeros(2, 4, dtype=torch.int32), 4)


@pytest.mark.parametrize("scheme", ["W4A16_G8", "W3A16_ASYM_G8", "W8A16_TENSOR", "FP8", "W2A16_CHANNEL", "W8A16_ASYM"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24)])
def test_dequantize_equals_the_qtensor(scheme: str, act_order: bool, shape: tuple[int, ...]) -> None:
    spec = parse_scheme(scheme).weight
    g_idx = torch.arange(spec.groups(24)).repeat(24 // spec.groups(24)) if act_order else None
    q = quantize_weight(torch.randn(shape), spec, g_idx)
    codes = pack(q.codes, spec.grid.bits) if spec.grid.bits < 8 else q.codes
    zero = None if q.zero is None else q.zero.to(torch.uint8)
    layout = {"bits": spec.grid.bits, "columns": 24, "signed": getattr(spec.grid, "signed", True)}
    assert torch.equal(dequantize(codes, q.scale, zero, g_idx, **layout), q.dequantize())


@pytest.mark.parametrize("scheme", ["NF4_G8", "NF4_DQ_G8", "FP4_BNB_CHANNEL", "FP4_DQ_CHANNEL", "W4A16_ASYM_G8", "FP8"])
@pytest.mark.parametrize("shape", [(70, 24), (2, 70, 24), (3, 8)])
def test_what_is_stored_comes_back(scheme: str, shape: tuple[int, ...]) -> None:
    spec = parse_scheme(scheme).weight
    q = quantize_weight(torch.randn(shape) * torch.logspace(-2, 2, shape[-2])[:, None], spec)
    stored, empty = store(q), empty_store(spec, shape)
    for key, value in stored.items():
        like = empty[key]
        assert (value is None) == (like is None)
        assert value is None or (value.dtype, value.shape) == (like.dtype, like.shape)
    assert (stored["scale_scale"] is None) == (spec.scale is None)
    back = restore(stored, spec, shape[-1])
    assert torch.equal(back.codes.float(), q.codes.float()) and back.codes.dtype == q.codes.dtype
    assert torch.equal(back.scale, q.scale) and (back.zero is None or torch.equal(back.zero, q.zero))
    assert torch.equal(dequantize_stored(stored, spec, shape[-1]), q.dequantize())
    kept = [t for key, t in stored.items() if t is not None]
    bits = 8 * sum(t.numel() * t.element_size() for t in kept) / q.codes.numel()
    in_bytes = q.zero is not None and spec.grid.bits < 8  # zero points
    assert in_bytes or bits == pytest.approx(q.bits_per_weight)
    zeros = {key: t.to("meta") if t is not None else None for key, t in stored.items()}
    assert dequantize_stored(zeros, spec, shape[-1]).shape == shape
    one = dequantize_stored(empty, spec, shape[-1])
    assert one.isfinite().all() and (one == one[..., :1, :1]).all()
    plain = plain_scale(stored, spec)
    assert torch.equal(plain["scale"], q.scale) and "scale_scale" not in plain
    again = store_scale(plain, spec)
    assert all(again[key] is t or torch.equal(again[key], t) for key, t in stored.items())
    assert kernel_scale(stored, spec).keys() == plain.keys()


def test_scales_that_no_codes_stand_for_are_refused() -> None:
    q = quantize_weight(torch.randn(70, 24), parse_scheme("NF4_G8").weight)
    double = replace(q, spec=parse_scheme("NF4_DQ_G8").weight)
    with pytest.raises(KernelError, match="encode rounds them"):
        store(double)
    stored = store(encode(q.dequantize(), q.scale, None, double.spec))
    stored["scale"].clamp_(max=250)
    with pytest.raises(KernelError, match="other codes of scales than qfx would give"):
        kernel_scale(stored, double.spec)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.uint8, torch.int64])
def test_casts_pass_over_bits(dtype: torch.dtype) -> None:
    t = torch.randn(3).to(dtype)
    for fn in (
        lambda t: t.half() if t.is_floating_point() else t,
        lambda t: t.type(torch.float64),
        lambda t: t.clone(),
    ):
        out = apply_to_bits(fn, t)
        assert out.dtype == dtype and torch.equal(out.float(), t.float())
    assert apply_to_bits(lambda t: t.to("meta"), t).is_meta
