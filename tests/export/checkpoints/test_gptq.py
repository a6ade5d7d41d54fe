"""GPTQ checkpoints: packing by its definition, the weight as its readers compute it, and what is refused."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qfx.core.errors import PackageError
from qfx.core.qtensor import QTensor, encode, encode_minmax
from qfx.core.spec import parse_scheme
from qfx.export.checkpoints._format import LinearWeights
from qfx.export.checkpoints.gptq import Gptq

V1, V2 = Gptq(), Gptq("gptq_v2")
SCHEMES = [
    f"W{bits}A16{asym}{block}" for bits in (2, 3, 4, 8) for asym in ("", "_ASYM") for block in ("_G32", "_CHANNEL")
]


def layer(name: str, out: int = 32, columns: int = 96, *, bias: bool = False, order: bool = False) -> LinearWeights:
    scheme = parse_scheme(name)
    torch.manual_seed(out + columns)
    w = torch.randn(out, columns)
    q = encode_minmax(w, scheme.weight)
    if order and scheme.weight.block[1] > 0:
        g_idx = torch.randperm(columns) // scheme.weight.block[1]
        q = encode(w, q.scale, q.zero, scheme.weight, g_idx)
    return LinearWeights("m.a", q, scheme, torch.float32, torch.randn(out) if bias else None)


def same(a: QTensor, b: QTensor) -> bool:
    def equal(x: Tensor | None, y: Tensor | None) -> bool:
        return (x is None and y is None) or (x is not None and y is not None and x.dtype == y.dtype and x.equal(y))

    return a.spec == b.spec and all(equal(getattr(a, k), getattr(b, k)) for k in ("codes", "scale", "zero", "g_idx"))


def by_bits(words: list[int], bits: int, count: int) -> list[int]:
    """Values from a stream of bits that starts in the lowest bit of the first word, one bit at a time."""
    stream = [(word >> i) & 1 for word in words for i in range(32)]
    return [sum(stream[bits * n + i] << i for i in range(bits)) for n in range(count)]


def by_definition(tensors: dict[str, Tensor], bits: int, stored_minus_one: bool) -> Tensor:
    """The weight `[out, in]`: scales[g_idx] * (code - zero), as the plain kernels of the readers compute it."""
    scales, g_idx = tensors["scales"].float(), tensors["g_idx"].tolist()
    columns, (groups, out) = len(g_idx), scales.shape
    w = torch.empty(out, columns)
    zeros = [by_bits(tensors["qzeros"][g].tolist(), bits, out) for g in range(groups)]
    for o in range(out):
        codes = by_bits(tensors["qweight"][:, o].tolist(), bits, columns)
        for i, g in enumerate(g_idx):
            w[o, i] = scales[g, o] * (codes[i] - (zeros[g][o] + stored_minus_one))
    return w


@pytest.mark.parametrize(("scheme", "form"), list(itertools.product(SCHEMES, (V1, V2))))
def test_what_is_written_is_read_bit_for_bit_and_is_the_weight_by_definition(scheme: str, form: Gptq) -> None:
    for bias, order in ((False, False), (True, True)):
        written = layer(scheme, bias=bias, order=order)
        if form is V1 and written.weight.zero is not None:
            written.weight.zero.clamp_(min=1)
        assert form.refuses(written) is None
        config, tensors = form.config([written], []), form.write(written)
        assert set(tensors) <= set(form.leaves(config, "m.a") or ())
        assert all(t.is_contiguous() for t in tensors.values())
        read = V1.read(config, "m.a", tensors, torch.float32)  # either reads both
        assert same(read.weight, written.weight) and read.scheme == written.scheme
        assert (read.bias is None and not bias) or torch.equal(read.bias, written.bias)
        bits = written.weight.spec.grid.bits
        assert config["desc_act"] is (written.weight.g_idx is not None)
        assert torch.equal(by_definition(tensors, bits, form is V1), written.weight.dequantize())
        assert not torch.equal(by_definition(tensors, bits, form is not V1), written.weight.dequantize())


def test_three_bits_cross_words_as_the_first_kernel_had_them() -> None:
    """Code 10 has its two low bits on top of word 0, code 21 one bit on top of word 1."""
    written = layer("W3A16_ASYM_G32", columns=32)
    words, codes = V2.write(written)["qweight"][:, 0].tolist(), written.weight.codes[0].tolist()
    fields = {0: [(k, 3 * k) for k in range(11)], 1: [(10, -2), *((11 + k, 1 + 3 * k) for k in range(11))]}
    fields[2] = [(21, -1), *((22 + k, 2 + 3 * k) for k in range(10))]
    for word, held in fields.items():
        want = sum(codes[k] << at if at >= 0 else codes[k] >> -at for k, at in held) & 0xFFFFFFFF
        assert words[word] & 0xFFFFFFFF == want


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_zero_points_are_the_known_words(bits: int) -> None:
    middle = {2: 0x55555555, 4: 0x77777777, 8: 0x7F7F7F7F}[bits]
    assert bool((V1.write(layer(f"W{bits}A16_G32"))["qzeros"] == middle).all())


def test_scales_are_float16_if_that_loses_no_bit() -> None:
    ours = layer("W4A16_G32")
    assert V1.write(ours)["scales"].dtype == torch.float32
    half = replace(ours, weight=replace(ours.weight, scale=ours.weight.scale.half().float()))
    tensors = V1.write(half)
    assert tensors["scales"].dtype == torch.float16
    assert same(V1.read(V1.config([half], []), "m.a", tensors, torch.float16).weight, half.weight)


@pytest.mark.parametrize("scale", [7e4, 1e-9])
def test_scales_that_readers_would_lose_are_refused(scale: float) -> None:
    ours = layer("W4A16_G32")
    ours.weight.scale[3, 1] = scale
    assert "float16, where" in (V1.refuses(ours) or "")


def test_eight_bits_come_back_narrow_unless_the_lowest_code_is_there() -> None:
    ours = layer("W8A16")
    config = V1.config([ours], [])
    assert V1.read(config, "m.a", V1.write(ours), torch.float32).scheme == ours.scheme
    ours.weight.codes[0, 0] = -128
    read = V1.read(config, "m.a", V1.write(ours), torch.float32)
    assert not read.weight.spec.grid.narrow and torch.equal(read.weight.dequantize(), ours.weight.dequantize())


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ("NF4", "nearest: W4A16_G64"),
        ("W4A8_G32", "nearest: W4A16_G32"),
        ("W5A16_G32", "nearest: W8A16_G32"),
        ("W4A16_TENSOR", "nearest: W4A16_CHANNEL"),
        ("FP8_DYNAMIC", "nearest: W8A16"),
        ("W8A8", "nearest: W8A16"),
        ("W4A16_DQ_G32", "has no W4A16_DQ_G32, it does not quantize scales; nearest: W4A16_G32"),
        ("W1A16_ASYM_G32", "nearest: W2A16_ASYM_G32"),
    ],
)
def test_what_it_has_not_is_refused_with_the_nearest(scheme: str, why: str) -> None:
    assert why in (V1.refuses(layer(scheme, columns=128)) or "")


def test_rows_that_fill_no_words_are_refused() -> None:
    assert "12 x 96" in (V1.refuses(layer("W4A16_G32", out=12)) or "")


def test_a_zero_point_of_0_needs_the_second_version() -> None:
    ours = layer("W4A16_ASYM_G32")
    ours.weight.zero[5, 0] = 0
    assert "gptq_v2" in (V1.refuses(ours) or "")
    assert V2.refuses(ours) is None
    assert same(V2.read(V2.config([ours], []), "m.a", V2.write(ours), torch.float32).weight, ours.weight)
    with pytest.raises(PackageError, match="zero points of 0"):  # another tool may have written it
        V1.read(V1.config([ours], []), "m.a", V1.write(ours), torch.float32)


def test_each_linear_has_its_own_settings() -> None:
    a, b = replace(layer("W4A16_G32"), name="m.1.a"), replace(layer("W8A16_ASYM_G32"), name="m.1.b")
    c, head = replace(layer("W4A16_G32"), name="m.1.c"), replace(layer("W8A16_ASYM_G32"), name="lm_head")
    config = V1.config([a, b, c, head], ["m.2.a", "m.2.b"])
    assert (config["bits"], config["group_size"], config["sym"], config["lm_head"]) == (4, 32, True, True)
    for one in (a, b, c, head):
        assert same(V1.read(config, one.name, V1.write(one), torch.float32).weight, one.weight)
    assert V1.leaves(config, "m.2.a") is None and V1.leaves(config, "m.1.a") is not None
    assert V1.leaves(config, "m.11.a") is None  # a pattern is of one path, and it is in no list
    for key in ("dynamic", "modules_in_block_to_quantize"):  # each is enough for those who read only that one
        one_of_two = {k: v for k, v in config.items() if k != key}
        assert V1.leaves(one_of_two, "m.2.b") is None
    with pytest.raises(PackageError, match="stays in float"):
        V1.read(config, "m.2.a", {}, torch.float32)


def test_a_head_stays_in_float_unless_the_config_says_so() -> None:
    config = V1.config([layer("W4A16_G32")], ["lm_head"])
    assert "modules_in_block_to_quantize" not in config and config["lm_head"] is False
    foreign = {"bits": 4, "group_size": 128}
    assert V1.leaves(foreign, "lm_head") is None and V1.leaves(foreign, "m.a") is not None


GOOD = {"bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}
BROKEN = [
    ({"checkpoint_format": "gptq_p"}, {}, "gptq_p"),
    ({"is_marlin_format": True}, {}, "checkpoint_format"),
    ({"pack_dtype": "int16"}, {}, "pack_dtype"),
    ({"rotation": "hadamard"}, {}, "rotation"),
    ({"bits": 5}, {}, "bits is 5"),
    ({"group_size": None}, {}, "group_size"),
    ({"group_size": 36}, {}, "36 does not divide 96"),
    ({"group_size": 48}, {}, "scales"),
    ({"bits": 8}, {}, "qweight"),
    ({"dynamic": {"+:(": {"bits": 8}}}, {}, "pattern"),
    ({}, {"qweight": None}, "lacks qweight"),
    ({}, {"scales": torch.zeros(3, 32, dtype=torch.int32)}, "scales"),
    ({}, {"scales": torch.full((3, 32), torch.inf)}, "finite"),
    ({}, {"qzeros": torch.zeros(3, 4, dtype=torch.int32)}, "sym is true"),
    ({}, {"g_idx": torch.full((96,), 3)}, "3 groups"),
]


@pytest.mark.parametrize(("config", "changed", "why"), BROKEN)
def test_what_qfx_does_not_compute_is_an_error(config: dict, changed: dict, why: str) -> None:
    tensors = {**V1.write(layer("W4A16_G32")), **changed}
    assert V1.leaves(GOOD, "m.a") is not None
    with pytest.raises(PackageError, match=why):
        V1.read({**GOOD, **config}, "m.a", {k: v for k, v in tensors.items() if v is not None}, torch.float32)


def test_a_version_that_is_not_there_is_an_error() -> None:
    with pytest.raises(PackageError, match="gptq_v2"):
        Gptq("v3")
