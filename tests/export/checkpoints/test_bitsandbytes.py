"""bitsandbytes: what we write, its own code reads, and the reverse, bit for bit."""

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qfx.core.errors import PackageError
from qfx.core.grid import E4M3
from qfx.core.qtensor import QTensor, encode_minmax
from qfx.core.spec import QSpec, Scheme, parse_scheme
from qfx.export.checkpoints._format import LinearWeights
from qfx.export.checkpoints.bitsandbytes import BitsAndBytes
from qfx.modules.linear import QLinear

FORM = BitsAndBytes()
TABLES = ["NF4", "NF4_DQ", "NF4_G128", "FP4_BNB", "FP4_BNB_DQ_G32", "FP4_BNB_G256"]


def layer(scheme: str | Scheme, out: int = 24, columns: int = 256, bias: bool = False) -> LinearWeights:
    found = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    torch.manual_seed(out)
    w = torch.randn(out, columns) * torch.logspace(-3, 1, out).unsqueeze(1)
    w[0] = 0
    return LinearWeights(
        "a.b", encode_minmax(w, found.weight), found, torch.float32, torch.randn(out) if bias else None
    )


def equal(a: QTensor, b: QTensor) -> bool:
    same = all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("codes", "scale"))
    return same and a.codes.dtype == b.codes.dtype and a.spec == b.spec and a.zero is None and b.zero is None


def theirs(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as bitsandbytes computes it from a checkpoint's tensors."""
    stats = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    state = bnb.QuantState.from_dict(stats, torch.device("cpu"))
    state.dtype = dtype
    return bnb.dequantize_4bit(tensors["weight"], state)


def made_by_them(w: Tensor, kind: str, nested: bool, size: int = 64) -> dict[str, Tensor]:
    packed, state = bnb.quantize_4bit(w, quant_type=kind, compress_statistics=nested, blocksize=size)
    return {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", TABLES)
def test_what_is_written_is_read_bit_for_bit(scheme: str, bias: bool) -> None:
    written = layer(scheme, bias=bias)
    assert FORM.refuses(written) is None
    config = FORM.config([written], [])
    tensors = FORM.write(written)
    assert set(tensors) <= set(FORM.leaves(config, "a.b") or ())
    assert all(t.is_contiguous() for t in tensors.values())
    read = FORM.read(config, "a.b", tensors, torch.float32)
    assert equal(read.weight, written.weight) and read.scheme == written.scheme
    assert (read.bias is None and not bias) or torch.equal(read.bias, written.bias)


@pytest.mark.parametrize("scheme", TABLES)
def test_their_code_computes_our_weight(scheme: str) -> None:
    ours = layer(scheme)
    assert torch.equal(theirs(FORM.write(ours)), ours.weight.dequantize())
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(theirs(FORM.write(ours), dtype), ours.weight.dequantize(dtype))


def test_scales_in_float8_are_nested_exactly_too() -> None:
    spec = replace(parse_scheme("NF4_DQ").weight, scale=QSpec(E4M3, (1, 256)))
    ours = layer(Scheme(spec))
    tensors = FORM.write(ours)
    assert torch.equal(theirs(dict(tensors)), ours.weight.dequantize())
    assert equal(FORM.read(FORM.config([ours], []), "a.b", tensors, torch.float32).weight, ours.weight)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", [32, 64, 256])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_they_quantize_is_read_bit_for_bit(kind: str, size: int, nested: bool) -> None:
    torch.manual_seed(0)
    w = torch.randn(40, 512)
    tensors = made_by_them(w, kind, nested, size)
    config = {"load_in_4bit": True, "llm_int8_skip_modules": None}
    read = FORM.read(config, "a.b", tensors, torch.float32)
    assert torch.equal(read.weight.dequantize(), theirs(dict(tensors)))
    assert read.weight.spec.block == (1, size) and read.weight.spec.scale is None
    again = FORM.read(config, "a.b", FORM.write(read), torch.float32)
    assert equal(again.weight, read.weight)


def test_the_laws_see_swapped_nibbles_and_a_missing_offset() -> None:
    tensors = made_by_them(torch.randn(8, 256), "nf4", True)
    right = theirs(dict(tensors))
    swapped = {**tensors, "weight": tensors["weight"] << 4 | tensors["weight"] >> 4}
    config = {"load_in_4bit": True}
    assert not torch.equal(FORM.read(config, "a", swapped, torch.float32).weight.dequantize(), right)
    assert not torch.equal(theirs({**tensors, "weight.nested_absmax": tensors["weight.nested_absmax"] * 2}), right)
    key = "weight.quant_state.bitsandbytes__nf4"
    state = bytes(tensors[key].tolist()).decode()
    moved = state[: state.index('"nested_offset": ')] + '"nested_offset": 0.5}'
    tensors[key] = torch.tensor(list(moved.encode()), dtype=torch.uint8)
    assert not torch.equal(FORM.read(config, "a", tensors, torch.float32).weight.dequantize(), right)


def test_the_packing_is_that_of_the_definition() -> None:
    ours = layer("NF4", 2, 64)
    packed = FORM.write(ours)["weight"]
    codes = [c for row in ours.weight.codes.tolist() for c in row]
    assert packed.flatten().tolist() == [16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)]
    assert list(packed.shape) == [64, 1]


def test_weights_stored_as_another_dtype_are_read() -> None:
    ours = layer("NF4")
    tensors = FORM.write(ours)
    stored = {**tensors, "weight": tensors["weight"].flatten().view(torch.bfloat16).unsqueeze(1)}
    assert equal(FORM.read({"load_in_4bit": True}, "a", stored, torch.float32).weight, ours.weight)


def test_int8_is_their_llm_int8() -> None:
    ours = layer("W8A8", bias=True)
    assert FORM.refuses(ours) is None
    config, tensors = FORM.config([ours], ["head"]), FORM.write(ours)
    assert config["load_in_8bit"] and config["llm_int8_threshold"] == 0.0
    assert set(tensors) == set(FORM.leaves(config, "a.b") or ())
    want = ours.weight.dequantize()
    # theirs is codes * SCB * float32(1/127), with SCB rounded: four roundings and ours one, each of 2^-24
    got = bnb.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
    assert bool(((got - want).abs() <= 5.001 * 2**-24 * want.abs()).all())
    read = FORM.read(config, "a.b", tensors, torch.float32)
    assert torch.equal(read.weight.codes, ours.weight.codes) and read.scheme == ours.scheme
    assert bool(((read.weight.scale - ours.weight.scale).abs() <= 2**-23 * ours.weight.scale).all())


def test_int8_weights_that_they_quantize_are_read() -> None:
    w = torch.randn(32, 64, dtype=torch.float16)
    codes, scb, _ = bnb.int8_vectorwise_quant(w)
    config = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    read = FORM.read(config, "a", {"weight": codes, "SCB": scb}, torch.float16)
    again = FORM.write(read)["SCB"]
    assert torch.equal(read.weight.codes, codes)
    assert bool(((again - scb).abs() <= 2**-23 * scb).all())  # a division and a product, each of 2^-24


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ("FP4", "nearest: FP4_BNB"),
        ("NF4_CHANNEL", "nearest: NF4"),
        ("NF4_G16", "nearest: NF4_G32"),
        ("W4A16", "nearest: NF4_G128"),
        ("W4A16_DQ", "nearest: NF4_DQ_G128"),
        ("W8A16", "nearest: W8A8"),
        ("W8A8_STATIC", "nearest: W8A8"),
        ("FP8_DYNAMIC", "nearest: NF4"),
    ],
)
def test_what_it_has_not_is_refused_with_the_nearest(scheme: str, why: str) -> None:
    reason = FORM.refuses(layer(scheme)) or ""
    assert reason.startswith("bitsandbytes has no") and why in reason


def test_nested_blocks_without_a_kernel_are_refused() -> None:
    inner = QSpec(parse_scheme("NF4_DQ").weight.scale.grid, (1, 64), symmetric=False)
    spec = replace(parse_scheme("NF4").weight, scale=inner)
    assert "nearest: NF4_DQ" in (FORM.refuses(layer(Scheme(spec))) or "")


def test_two_kinds_in_one_checkpoint_are_refused() -> None:
    with pytest.raises(PackageError, match="one kind of weights"):
        FORM.config([layer("NF4"), layer("W8A8")], [])


def test_what_stays_in_float_has_no_leaves() -> None:
    config = FORM.config([layer("NF4_DQ")], ["m.head", "m.gate"])
    assert config["bnb_4bit_use_double_quant"]
    assert FORM.leaves(config, "m.head") is None and FORM.leaves(config, "m.gate_proj") is not None
    assert FORM.leaves({"load_in_4bit": True, "llm_int8_skip_modules": None}, "lm_head") is None


BROKEN = [
    ({}, {}, "neither load_in_4bit"),
    ({"load_in_8bit": True}, {}, "threshold"),
    ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, {}, "16 bits"),
    ({"load_in_4bit": True}, {"weight.quant_state.bitsandbytes__nf4": None}, "lacks"),
    ({"load_in_4bit": True}, {"weight.absmax": None}, "lacks weight.absmax"),
    ({"load_in_4bit": True}, {"weight.absmax": torch.ones(3)}, "3 values"),
    ({"load_in_4bit": True}, {"weight": torch.zeros(5, 1, dtype=torch.uint8)}, "5 bytes"),
    ({"load_in_4bit": True}, {"weight.quant_map": torch.zeros(16)}, "another table"),
    ({"load_in_4bit": True}, {"weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "none"),
]


@pytest.mark.parametrize(("config", "changed", "why"), BROKEN)
def test_what_qfx_does_not_compute_is_an_error(config: dict, changed: dict, why: str) -> None:
    tensors = {**FORM.write(layer("NF4")), **changed}
    with pytest.raises(PackageError, match=why):
        FORM.read(config, "a", {k: v for k, v in tensors.items() if v is not None}, torch.float32)


def test_blocks_across_rows_are_an_error() -> None:
    tensors = made_by_them(torch.randn(4, 96), "nf4", False)
    with pytest.raises(PackageError, match="across rows"):
        FORM.read({"load_in_4bit": True}, "a", tensors, torch.float32)


def test_their_int8_product_is_that_of_our_linear() -> None:
    ours = layer("W8A8")
    linear, tensors = QLinear.from_qtensor(ours.weight, None, ours.scheme, dtype=torch.float32), FORM.write(ours)
    x = torch.randn(5, 256).half()  # they cast inputs to float16
    codes, stats, _ = bnb.int8_vectorwise_quant(x, threshold=0.0)
    got = bnb.int8_mm_dequant(bnb.int8_linear_matmul(codes, tensors["weight"]), stats, tensors["SCB"]).float()
    want = linear(x.float())
    # the same integers; float16 outputs round by 2^-11 (2^-25 below its normal numbers), scales by some 2^-24
    assert bool(((got - want).abs() <= 2**-11 * 1.001 * want.abs() + 2**-25).all())
    other = bnb.int8_mm_dequant(bnb.int8_linear_matmul(codes, tensors["weight"]), stats, tensors["SCB"] / 127).float()
    assert not bool(((other - want).abs() <= 2**-11 * 1.001 * want.abs() + 2**-25).all())
