"""Bit packing: exact round trips, the layout, and what a cast leaves alone."""

import pytest
import torch

from qfx.core.errors import KernelError
from qfx.core.spec import parse_scheme
from qfx.kernels.pack import CASES, apply_to_bits, dequantize, pack, packed_columns, unpack
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
