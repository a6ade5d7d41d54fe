"""Quantized tensors: scales, codes within half a step, and one arithmetic for weights and activations."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qfx.core.grid import E4M3, E5M2, Codebook, Float, Int
from qfx.core.qtensor import (
    QTensor,
    blocked,
    dynamic_scale,
    encode,
    encode_minmax,
    fake_quantize,
    quantize_scale,
    scale_from_range,
    spread,
    stored_scale,
)
from qfx.core.spec import MULTIPLES, QSpec, parse_scheme

GRIDS = {
    "int8": Int(8),
    "int8_narrow": Int(8, narrow=True),
    "uint8": Int(8, signed=False),
    "int4": Int(4),
    "uint4": Int(4, signed=False),
    "int3": Int(3),
    "uint2": Int(2, signed=False),
    "uint1": Int(1, signed=False),
    "e4m3": E4M3,
    "e5m2": E5M2,
    "nf4": Codebook("nf4"),
    "fp4_bnb": Codebook("fp4_bnb"),
    "e2m1": Codebook("e2m1"),
}
BLOCKS = {"tensor": (-1, -1), "channel": (1, -1), "group": (1, 8), "tensor_group": (-1, 8)}
SPECS = {
    f"{grid}-{block}": QSpec(g, b, symmetric=not grid.startswith("uint"))
    for grid, g in GRIDS.items()
    for block, b in BLOCKS.items()
}
UINT8_SCALES = QSpec(Int(8, signed=False), (1, 5), symmetric=False)
NESTED = {
    "nf4": QSpec(Codebook("nf4"), (1, 8), scale=UINT8_SCALES),
    "fp4_bnb": QSpec(Codebook("fp4_bnb"), (1, -1), scale=UINT8_SCALES),
    "e2m1": QSpec(Codebook("e2m1"), (1, 8), scale=QSpec(E4M3, (-1, -1))),
    "int4": QSpec(Int(4), (1, 8), scale=QSpec(E5M2, (1, 7))),
    "int8": QSpec(Int(8), (-1, -1), scale=UINT8_SCALES),
    "int4_rows": QSpec(Int(4), (1, 8), scale=MULTIPLES),
    "int3_rows": QSpec(Int(3), (1, 4), scale=QSpec(E4M3, (1, -1))),
}
"""Scales that are quantized themselves."""
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
rounding = pytest.mark.parametrize(
    "spec", [*SPECS.values(), *NESTED.values()], ids=[*SPECS, *(f"{n}-dq" for n in NESTED)]
)
OUT, IN = 6, 24
INT8, UINT8, INT4G = SPECS["int8_narrow-channel"], SPECS["uint8-channel"], SPECS["int4-group"]


def draw(*shape: int) -> Tensor:
    """Off-centre rows of very different sizes; one is zero, one has one sign."""
    w = torch.randn(shape) * torch.logspace(-6, 3, shape[-2])[:, None] + 0.3
    w[..., 1, :] = 0
    w[..., 2, :] = w[..., 2, :].abs() + 5
    return w


def half_step(q: QTensor) -> Tensor:
    """The largest error that rounding to the nearest value in range can make."""
    scale = q.per_column()[0].double()
    grid = q.spec.grid
    if isinstance(grid, Int):
        return scale / 2
    if isinstance(grid, Codebook):
        return scale * torch.tensor(sorted(grid.values)).double().diff().max() / 2
    ulp = 2.0 ** (-grid.man - 1)  # half of the last place, relative to a power of two
    smallest = 2.0 ** (2 - 2 ** (grid.exp - 1))  # the least normal number; below it the steps are all alike
    return scale * ulp * torch.exp2((q.dequantize().double().abs() / scale).clamp_min(smallest).log2().floor())


@every_spec
@pytest.mark.parametrize("lead", [(), (3,)], ids=["linear", "experts"])
def test_codes_are_within_half_a_step(spec: QSpec, lead: tuple[int, ...]) -> None:
    w = draw(*lead, OUT, IN)
    q = encode_minmax(w, spec)
    groups = IN // spec.block[1] if spec.block[1] > 0 else 1
    assert q.scale.shape == (*lead, 1 if spec.block[0] == -1 else OUT, groups)
    assert q.scale.dtype == torch.float32 and q.codes.dtype == spec.grid.dtype and q.codes.shape == w.shape
    assert (q.zero is None) == spec.symmetric
    # the quotient, the product, and the rounded scale are off by a 2^-24th each of up to 2^8 steps
    error = (w.double() - q.dequantize().double()).abs()
    assert bool((error <= half_step(q) * (1 + 2**-13) + 1e-30).all())
    if lead:  # each expert is a weight of its own
        assert q.dequantize().equal(torch.stack([encode_minmax(expert, spec).dequantize() for expert in w]))


@rounding
def test_encoding_again_changes_nothing(spec: QSpec) -> None:
    q = encode_minmax(draw(OUT, IN), spec)
    again = encode(q.dequantize(), q.scale, q.zero, spec)
    assert again.dequantize().equal(q.dequantize())


@rounding
def test_fake_quantize_is_encode_and_dequantize(spec: QSpec) -> None:
    w = draw(OUT, IN)
    q = encode_minmax(w, spec)
    scale, zero = q.per_column()
    for dtype in (torch.float32, torch.bfloat16):
        found = fake_quantize(w.to(dtype), scale, zero, spec)
        assert found.dtype == dtype
        assert found.equal(encode(w.to(dtype), q.scale, q.zero, spec).dequantize(dtype))


@pytest.mark.parametrize("block", [(-1, -1), (1, -1), (1, 8), (-1, 8)])
def test_blocks_hold_what_shares_a_scale(block: tuple[int, int]) -> None:
    w = torch.arange(OUT * IN).view(OUT, IN)
    rows, columns = (OUT if block[0] == -1 else 1), (IN if block[1] == -1 else block[1])
    found = blocked(w, QSpec(Int(8), block))
    assert found.shape == (OUT // rows, IN // columns, rows * columns)
    for i in range(OUT // rows):
        for j in range(IN // columns):
            part = w[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            assert set(found[i, j].tolist()) == set(part.flatten().tolist())
    assert blocked(torch.stack([w, -w]), QSpec(Int(8), block)).equal(torch.stack([found, -found]))


def test_blocks_that_are_not_supported_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 2 rows"):
        blocked(torch.ones(4, 8), QSpec(Int(8), (2, -1)))
    with pytest.raises(ValueError, match="group_size 5 does not divide 8"):
        blocked(torch.ones(4, 8), QSpec(Int(8), (1, 5)))
    with pytest.raises(ValueError, match=r"activations in blocks of \(1, 8\)"):
        dynamic_scale(torch.ones(4, 8), INT4G)


def test_a_symmetric_scale_is_a_true_division() -> None:
    top = torch.rand(2000) * 10
    wanted = torch.tensor([x / 127 for x in top.tolist()])  # in float64, then rounded once
    assert not (top * (1 / 127)).equal(wanted)  # the product with the reciprocal is another number
    for lo, hi in ((-top, top / 2), (-top / 2, top)):
        scale, zero = scale_from_range(lo, hi, INT8)
        assert zero is None and scale.equal(wanted)
    assert scale_from_range(-top, top, SPECS["int8-channel"])[0].equal(torch.tensor([x / 127.5 for x in top.tolist()]))
    assert scale_from_range(top, top, SPECS["e4m3-channel"])[0].equal(top / 448)


@pytest.mark.parametrize(
    ("lo", "hi", "scale", "zero"),
    [
        (-1.0, 254.0, 1.0, 1),
        (-255.0, 255.0, 2.0, 128),  # 127.5 rounds to even
        (3.0, 510.0, 2.0, 0),  # a range above 0 is widened to hold it
        (-510.0, -3.0, 2.0, 255),
        (0.0, 0.0, 1.0, 0),
    ],
)
def test_an_asymmetric_range_holds_zero(lo: float, hi: float, scale: float, zero: int) -> None:
    found, point = scale_from_range(torch.tensor([lo]), torch.tensor([hi]), UINT8)
    assert point is not None and point.dtype == torch.int32
    assert (found.item(), point.item()) == (scale, zero)
    values = torch.tensor([[0.0, min(lo, 0), max(hi, 0)]])
    decoded = encode(values, found[:, None], point[:, None], UINT8).dequantize()
    assert decoded[0, 0] == 0 and (decoded - values).abs().max() <= scale / 2


@pytest.mark.parametrize("zero", [2, 3])
def test_ties_are_rounded_before_the_zero_point_is_added(zero: int) -> None:
    w, scale, point = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5]]), torch.ones(1, 1), torch.tensor([[zero]]).int()
    assert encode(w, scale, point, UINT8).codes.tolist() == [[zero - 2, zero, zero, zero + 2, zero + 2]]
    assert fake_quantize(w, scale, point, UINT8).tolist() == [[-2, 0, 0, 2, 2]]


@every_spec
def test_zeros_and_the_smallest_numbers_have_a_scale(spec: QSpec) -> None:
    for value in (0.0, 1e-45, 1e-38, -1e-40):
        w = torch.full((OUT, IN), value)
        q = encode_minmax(w, spec)
        assert bool((q.scale > 0).all()) and q.dequantize().isfinite().all()
        assert value != 0 or (bool((q.scale == 1).all()) and not q.dequantize().any())


def test_columns_with_a_group_each() -> None:
    w = draw(OUT, IN)
    order = torch.randperm(IN)
    for spec in (INT4G, SPECS["uint4-group"]):
        plain = encode_minmax(w[:, order], spec)
        g_idx = torch.empty(IN, dtype=torch.long)
        g_idx[order] = torch.arange(IN) // 8
        q = encode(w, plain.scale, plain.zero, spec, g_idx)
        assert q.g_idx is g_idx and q.codes[:, order].equal(plain.codes)
        assert q.dequantize()[:, order].equal(plain.dequantize())
        assert not encode(w, plain.scale, plain.zero, spec).codes.equal(q.codes)


@pytest.mark.parametrize("name", ["W8A8", "W8A8_STATIC_ASYM", "W8A4", "FP8_DYNAMIC", "FP8"])
def test_dynamic_scales_are_those_of_a_token_or_of_the_tensor(name: str) -> None:
    spec = parse_scheme(name).input
    assert spec is not None
    x = torch.randn(2, 5, 16) * torch.logspace(-3, 3, 5)[:, None] + 1
    scale, zero = dynamic_scale(x, spec)
    tokens = spec.block == (1, -1)
    assert scale.shape == ((2, 5, 1) if tokens else (1, 1, 1)) and (zero is None) == spec.symmetric
    rows = x.flatten(0, 1) if tokens else x.flatten()[None]
    wanted = encode_minmax(rows, QSpec(spec.grid, (1, -1), spec.symmetric))
    assert fake_quantize(x, scale, zero, spec).flatten().equal(wanted.dequantize().flatten())


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (INT8, 8 + 32 / IN),
        (UINT8, 8 + 40 / IN),
        (INT4G, 4 + 32 / 8),
        (SPECS["uint4-group"], 4 + 36 / 8),
        (SPECS["int4-tensor"], 4 + 32 / (IN * OUT)),
        (SPECS["e4m3-tensor"], 8 + 32 / (IN * OUT)),
        (SPECS["nf4-group"], 4 + 32 / 8),
        (NESTED["nf4"], 4 + 8 / 8 + 32 * 4 / (IN * OUT)),
        (NESTED["e2m1"], 4 + 8 / 8 + 32 / (IN * OUT)),
        (NESTED["int4_rows"], 4 + 8 / 8 + 32 / IN),  # 4 bits of a scale are stored as a byte
    ],
)
def test_bits_per_weight_count_scales_and_zeros(spec: QSpec, bits: float) -> None:
    assert encode_minmax(draw(OUT, IN), spec).bits_per_weight == pytest.approx(bits)
    assert spec.block[0] == -1 or encode_minmax(draw(3, OUT, IN), spec).bits_per_weight == pytest.approx(bits)


def test_dequantize_rounds_once_and_moves_with_its_parts() -> None:
    q = encode_minmax(draw(OUT, IN), UINT8)
    assert q.dequantize(torch.bfloat16).equal(q.dequantize().bfloat16())
    moved = q.to("meta")
    assert {moved.codes.device.type, moved.scale.device.type, moved.zero.device.type} == {"meta"}
    assert q.codes.device.type == "cpu" and moved.spec == q.spec


def test_spread_gives_each_column_its_group() -> None:
    per_group = torch.arange(6.0).view(2, 3)
    assert spread(per_group, 6).tolist() == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]]
    assert spread(per_group[:, :1], 6).shape == (2, 1)
    assert spread(per_group, 4, torch.tensor([2, 0, 0, 1])).tolist() == [[2, 0, 0, 1], [5, 3, 3, 4]]


@pytest.mark.parametrize("spec", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("lead", [(), (3,)], ids=["linear", "experts"])
def test_scales_are_quantized_in_blocks(spec: QSpec, lead: tuple[int, ...]) -> None:
    inner = spec.scale
    assert inner is not None
    # scales of very different sizes beside each other, and a block of zeros, which must not weigh on the others
    w = torch.randn(*lead, OUT, IN) * torch.logspace(-3, 3, OUT)[:, None]
    w[..., 2, :8] = 0
    blocks = blocked(w, spec)
    fine, _ = scale_from_range(blocks.amin(-1), blocks.amax(-1), spec)
    q, (codes, second) = encode_minmax(w, spec), quantize_scale(fine, spec)
    rows, groups = fine.shape[-2:]
    size = {(-1, -1): rows * groups, (1, -1): groups}.get(inner.block, inner.block[1])
    assert codes.dtype == inner.grid.dtype and codes.shape == fine.shape
    assert second.shape == (*lead, -(-rows * groups // size)) and second.dtype == torch.float32
    values = inner.grid.decode(codes).double().flatten(-2)
    factors = second.double().repeat_interleave(size, -1)[..., : rows * groups]
    assert torch.equal(q.scale.double().flatten(-2), values * factors)  # exact, without a rounding
    # the largest of a block has the largest code, and all have the nearest but 0
    every = inner.grid.decode(torch.arange(256, dtype=torch.uint8).view(inner.grid.dtype)).double()
    largest = inner.grid.hi if isinstance(inner.grid, Int) else inner.grid.reach
    every = every[every.isfinite() & (every > 0) & (every <= largest)]
    for scales, chosen, factor in zip(*(t.reshape(-1, rows * groups) for t in (fine, values, factors)), strict=True):
        for i in range(0, rows * groups, size):
            part = slice(i, i + size)
            assert (factor[i] * every.max() / scales[part].max() - 1).abs() < 2**-16 and chosen[
                part
            ].max() == every.max()
            distance = (scales[part].double() / factor[i])[:, None] - every
            assert torch.allclose(
                (scales[part].double() / factor[i] - chosen[part]).abs(), distance.abs().amin(1), rtol=0, atol=1e-4
            )
    # the same bits again: solvers may round scales before the weight is encoded
    assert torch.equal(stored_scale(q.scale, spec), q.scale)
    again = quantize_scale(q.scale, spec)
    assert torch.equal(again[0].float(), codes.float()) and torch.equal(again[1], second)
    assert bool((q.scale > 0).all()) and not q.dequantize()[..., 2, :8].any()
    assert spec.block[1] != 8 or q.scale[..., 2, 0].max() < q.scale[..., 2, 1].min()
    # codes are the nearest of the scales that are kept, not of those that were rounded
    assert torch.equal(q.codes, encode(w, q.scale, None, replace(spec, scale=None)).codes)
    if lead:
        each = torch.stack([encode_minmax(expert, spec).scale for expert in w])
        assert torch.equal(each, q.scale)


def test_scales_are_multiples_of_one_of_their_row() -> None:
    spec = parse_scheme("W4A8_DQ_G32").weight
    w = torch.randn(16, 256) * torch.logspace(-3, 3, 16)[:, None] * torch.rand(16, 8).repeat_interleave(32, 1)
    q = encode_minmax(w, spec)
    multiples, second = quantize_scale(q.scale, spec)
    assert second.shape == (16,) and q.scale.equal(multiples * second[:, None])
    assert bool((multiples >= 1).all()) and bool((multiples.amax(1) == 15).all())
    assert (q.codes.int() * multiples.repeat_interleave(32, 1)).abs().max() <= 127  # what fits in int8
    # a row is on its own: another one's size changes nothing, as it would where all share a second scale
    w[3] *= 1000
    for inner, alike in ((MULTIPLES, True), (replace(MULTIPLES, block=(-1, -1)), False)):
        before, after = (encode_minmax(t, replace(spec, scale=inner)).scale[4] for t in (w, w[4:5].expand(16, -1)))
        assert torch.equal(before, after) == alike


def test_double_quantization_costs_next_to_nothing() -> None:
    w = torch.randn(64, 1024)
    plain, double = (encode_minmax(w, parse_scheme(name).weight) for name in ("NF4", "NF4_DQ"))
    # 8 bits in blocks of 256, and 32 more for each of those, in place of 32 bits for each block of 64
    assert (plain.bits_per_weight, double.bits_per_weight) == (4.5, 4 + 8 / 64 + 32 / (64 * 256))
    errors = [((q.dequantize() - w).norm() / w.norm()).item() for q in (plain, double)]
    assert 0.08 < errors[0] < 0.1 and abs(errors[1] / errors[0] - 1) < 0.001
    assert (double.scale / plain.scale - 1).abs().max() < 0.5 / 255 * plain.scale.max() / plain.scale.min() + 1e-4


@pytest.mark.parametrize("spec", NESTED.values(), ids=NESTED)
def test_quantized_scales_of_zeros_and_of_the_smallest_numbers(spec: QSpec) -> None:
    for value in (0.0, 1e-45, 1e-38, -1e-40):
        q = encode_minmax(torch.full((OUT, IN), value), spec)
        assert bool((q.scale > 0).all()) and q.dequantize().isfinite().all()
        assert value != 0 or not q.dequantize().any()
        assert torch.equal(stored_scale(q.scale, spec), q.scale)


def test_floats_reach_their_largest_value() -> None:
    for grid in (E4M3, E5M2):
        assert isinstance(grid, Float)
        w = torch.tensor([[-3.0, 1.0, 2.0]])
        q = encode_minmax(w, QSpec(grid))
        assert q.scale.item() == pytest.approx(3 / grid.reach)
        assert math.isclose(q.dequantize()[0, 0].item(), -3, rel_tol=2**-22)
