"""AWQ checkpoints: packing by its definition, the weight as its readers compute it, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qfx.core.errors import PackageError
from qfx.core.qtensor import QTensor, encode, encode_minmax
from qfx.core.spec import parse_scheme
from qfx.export.checkpoints._format import LinearWeights
from qfx.export.checkpoints.awq import Awq

FORM = Awq()
SCHEMES = ["W4A16_ASYM_G32", "W4A16_G32", "W4A16_ASYM_CHANNEL", "W4A16_CHANNEL"]


def layer(name: str, out: int = 24, columns: int = 96, bias: bool = False) -> LinearWeights:
    scheme = parse_scheme(name)
    torch.manual_seed(out)
    q = encode_minmax(torch.randn(out, columns), scheme.weight)
    return LinearWeights("m.a", q, scheme, torch.float32, torch.randn(out) if bias else None)


def same(a: QTensor, b: QTensor) -> bool:
    zeros = (a.zero is None and b.zero is None) or (a.zero is not None and b.zero is not None and a.zero.equal(b.zero))
    return a.spec == b.spec and torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and zeros


def by_definition(tensors: dict[str, Tensor], group: int) -> Tensor:
    """The weight `[out, in]`, one nibble at a time: place p of a word is output (0, 2, 4, 6, 1, 3, 5, 7)[p] of 8."""
    scales = tensors["scales"].float()

    def nibble(words: Tensor, row: int, o: int) -> int:
        place = o % 8 // 2 + 4 * (o % 2)
        return int(words[row, o // 8]) >> 4 * place & 15

    columns, out = len(tensors["qweight"]), scales.shape[1]
    w = torch.empty(out, columns)
    for i in range(columns):
        g = i // group
        for o in range(out):
            code, zero = nibble(tensors["qweight"], i, o), nibble(tensors["qzeros"], g, o)
            w[o, i] = (code - zero) * scales[g, o]
    return w


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_is_read_bit_for_bit_and_is_the_weight_by_definition(scheme: str, bias: bool) -> None:
    written = layer(scheme, bias=bias)
    assert FORM.refuses(written) is None
    config, tensors = FORM.config([written], []), FORM.write(written)
    assert set(tensors) <= set(FORM.leaves(config, "m.a") or ())
    assert all(t.is_contiguous() for t in tensors.values())
    assert [list(tensors[k].shape) for k in ("qweight", "qzeros")] == [[96, 3], [96 // 32 if "32" in scheme else 1, 3]]
    read = FORM.read(config, "m.a", tensors, torch.float32)
    assert same(read.weight, written.weight) and read.scheme == written.scheme
    assert (read.bias is None and not bias) or torch.equal(read.bias, written.bias)
    group = 32 if "32" in scheme else 96
    assert torch.equal(by_definition(tensors, group), written.weight.dequantize())
    plain = {**tensors, "qweight": tensors["qweight"].roll(1, 0)}
    assert not torch.equal(by_definition(plain, group), written.weight.dequantize())


def test_a_word_by_hand() -> None:
    ours = layer("W4A16_ASYM_G32", out=8, columns=32)
    ours.weight.codes[:] = torch.arange(8, dtype=torch.uint8).unsqueeze(1)
    assert int(FORM.write(ours)["qweight"][0, 0]) == 0x75316420
    assert bool((FORM.write(layer("W4A16_G32"))["qzeros"] == -0x77777778).all())  # 0x88888888


def test_zero_points_of_0_are_held() -> None:
    ours = layer("W4A16_ASYM_G32")
    ours.weight.zero[:3] = 0
    assert FORM.refuses(ours) is None
    assert same(FORM.read(FORM.config([ours], []), "m.a", FORM.write(ours), torch.float32).weight, ours.weight)


def test_scales_are_float16_if_that_loses_no_bit() -> None:
    ours = layer("W4A16_G32")
    assert FORM.write(ours)["scales"].dtype == torch.float32
    half = replace(ours, weight=replace(ours.weight, scale=ours.weight.scale.half().float()))
    assert FORM.write(half)["scales"].dtype == torch.float16
    ours.weight.scale[0, 0] = 1e-9
    assert "float16, where" in (FORM.refuses(ours) or "")


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ("W8A16_G32", "nearest: W4A16_G32"),
        ("W3A16_ASYM_G32", "nearest: W4A16_ASYM_G32"),
        ("NF4_G32", "nearest: W4A16_G32"),
        ("W4A8_G32", "nearest: W4A16_G32"),
        ("W4A16_DQ_G32", "does not quantize scales; nearest: W4A16_G32"),
    ],
)
def test_what_it_has_not_is_refused_with_the_nearest(scheme: str, why: str) -> None:
    assert why in (FORM.refuses(layer(scheme)) or "")


def test_an_order_of_columns_and_a_head_are_refused() -> None:
    ours = layer("W4A16_G32")
    assert "lm_head" in (FORM.refuses(replace(ours, name="lm_head")) or "")
    g_idx = torch.arange(96).flip(0) // 32
    q = encode(torch.randn(24, 96), ours.weight.scale, None, ours.weight.spec, g_idx)
    assert "g_idx" in (FORM.refuses(replace(ours, weight=q)) or "")
    assert "8 rows" in (FORM.refuses(layer("W4A16_G32", out=20)) or "")


def test_two_group_sizes_in_one_checkpoint_are_refused() -> None:
    with pytest.raises(PackageError, match="one group size"):
        FORM.config([layer("W4A16_G32"), layer("W4A16_CHANNEL")], [])


def test_what_stays_in_float_has_no_leaves() -> None:
    config = FORM.config([layer("W4A16_G32")], ["m.gate"])
    assert FORM.leaves(config, "m.gate") is None and FORM.leaves(config, "lm_head") is None
    assert FORM.leaves(config, "m.gate_proj") is not None
    foreign = {"w_bit": 4, "q_group_size": 128, "version": "GEMM", "modules_to_not_convert": ["visual"]}
    assert FORM.leaves(foreign, "model.visual.fc1") is None and FORM.leaves(foreign, "model.fc1") is not None


GOOD = {"bits": 4, "group_size": 32, "version": "gemm"}
BROKEN = [
    ({"version": "gemv"}, {}, "version is 'gemv'"),
    ({"bits": 8}, {}, "bits is 8"),
    ({"group_size": 0}, {}, "group_size"),
    ({"group_size": 36}, {}, "36 does not divide 96"),
    ({"group_size": 48}, {}, "scales"),
    ({}, {"qzeros": None}, "lacks qzeros"),
    ({}, {"qzeros": torch.zeros(3, 2, dtype=torch.int32)}, "qzeros"),
    ({}, {"qweight": torch.zeros(96, 3)}, "int32"),
    ({}, {"scales": torch.full((3, 24), torch.nan)}, "finite"),
]


@pytest.mark.parametrize(("config", "changed", "why"), BROKEN)
def test_what_qfx_does_not_compute_is_an_error(config: dict, changed: dict, why: str) -> None:
    tensors = {**FORM.write(layer("W4A16_G32")), **changed}
    with pytest.raises(PackageError, match=why):
        FORM.read({**GOOD, **config}, "m.a", {k: v for k, v in tensors.items() if v is not None}, torch.float32)
