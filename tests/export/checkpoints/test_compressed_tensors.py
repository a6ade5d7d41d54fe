"""The tensors and the config of compressed-tensors are those of the library, and come back bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from torch import Tensor

from qfx.core.errors import PackageError
from qfx.core.grid import E4M3, E5M2, Float, Int
from qfx.core.qtensor import QTensor, encode_minmax
from qfx.core.spec import QSpec, Scheme, parse_scheme
from qfx.export.checkpoints._format import LinearWeights
from qfx.export.checkpoints.compressed_tensors import CompressedTensors, pack, unpack

CT = CompressedTensors()
OUT, IN = 12, 64  # rows that fill no whole word of 4-bit zero points
SCHEMES = [
    "W4A16_G16",
    "W4A16_CHANNEL",
    "W4A16_TENSOR",
    "W4A16_ASYM_G16",
    "W4A16_ASYM_CHANNEL",
    "W4A16_ASYM_TENSOR",
    "W2A16_G32",
    "W2A16_ASYM_G32",
    "W8A16",
    "W8A16_G32",
    "W8A16_ASYM_G16",
    "W8A8",
    "W8A8_TENSOR",
    "W8A8_STATIC",
    "W8A8_STATIC_ASYM",
    "W4A8_G16",
    "W3A8_G16",
    "W4AFP8",
    "FP8",
    "FP8_DYNAMIC",
]
FP8_WEIGHTS = Scheme(QSpec(E4M3))


def scheme_of(name: str) -> Scheme:
    scheme = parse_scheme(name)
    return scheme.with_group(32) if name == "W4AFP8" else scheme


def linear(scheme: Scheme, dtype: torch.dtype = torch.float32, name: str = "fc", columns: int = IN) -> LinearWeights:
    x = scheme.input
    static = x is not None and not x.dynamic
    return LinearWeights(
        name=name,
        weight=encode_minmax(torch.randn(OUT, columns) + 0.1, scheme.weight),
        scheme=scheme,
        dtype=dtype,
        bias=torch.randn(OUT).to(dtype),
        input_scale=torch.tensor(0.037) if static else None,
        input_zero=torch.tensor(117, dtype=torch.int32) if static and not x.symmetric else None,
    )


def same(a: LinearWeights, b: LinearWeights) -> bool:
    def tensors(layer: LinearWeights) -> dict[str, Tensor | None]:
        q = layer.weight
        found = {"codes": q.codes.view(torch.uint8), "scale": q.scale, "zero": q.zero, "g_idx": q.g_idx}
        return {**found, "bias": layer.bias, "x": layer.input_scale, "x_zero": layer.input_zero}

    pairs = ((x, b_[key]) for b_ in [tensors(b)] for key, x in tensors(a).items())
    equal = all((x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs)
    return equal and a.scheme == b.scheme == replace(b.scheme, weight=b.weight.spec)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_comes_back(name: str, dtype: torch.dtype) -> None:
    layer = linear(scheme_of(name), dtype)
    assert CT.refuses(layer) is None
    config = CT.config([layer], ["head"])
    written = CT.write(layer)
    assert CT.leaves(config, "head") is None and set(written) == set(CT.leaves(config, "fc") or ())
    assert all(t.is_contiguous() for t in written.values())
    back = CT.read(config, "fc", written, dtype)
    assert same(layer, back)
    other = written | {"weight_scale": written["weight_scale"] * 2}
    assert not same(layer, CT.read(config, "fc", other, dtype))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_library_takes_the_tensors_for_the_same_weight(name: str) -> None:
    layer = linear(scheme_of(name))
    config = QuantizationConfig.model_validate(CT.config([layer], []))  # with all its own checks
    scheme = config.config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme)
    written = CT.write(layer)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    assert set(compressor.compression_param_names(scheme)) == {n for n in written if n.startswith("weight")}
    weight = compressor.decompress(dict(written), scheme)["weight"]
    assert torch.equal(weight, layer.weight.dequantize())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 31, 64])
def test_words_are_packed_as_the_library_packs_them(bits: int, columns: int) -> None:
    values = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    words = pack(values, bits)
    signed = (values.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(words, pack_to_int32(signed, bits)) and torch.equal(unpack(words, bits, columns), values)
    assert not torch.equal(words, pack(values.flip(1), bits)) or columns == 1


def test_scales_are_small_only_where_nothing_is_lost() -> None:
    layer = linear(scheme_of("W4A16_G16"), torch.bfloat16)
    coarse = replace(layer, weight=replace(layer.weight, scale=layer.weight.scale.bfloat16().float()))
    for given, dtype in ((layer, torch.float32), (coarse, torch.bfloat16)):
        written = CT.write(given)
        assert written["weight_scale"].dtype == dtype
        assert same(given, CT.read(CT.config([given], []), "fc", written, torch.bfloat16))


def test_layers_that_differ_have_groups_of_their_own() -> None:
    names = ("W4A16_G16", "W8A8", "FP8_DYNAMIC", "W4A16_G16")
    layers = [linear(scheme_of(scheme), name=f"fc{i}") for i, scheme in enumerate(names)]
    config = CT.config(layers, ["fc9"])
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    assert config["config_groups"]["group_0"]["targets"] == ["fc0", "fc3"]
    QuantizationConfig.model_validate(config)
    for layer in layers:
        assert same(layer, CT.read(config, layer.name, CT.write(layer), layer.dtype))
    assert CT.leaves(config, "fc9") is None and CT.leaves(config, "fc") is None


def test_a_target_is_a_name_a_pattern_or_a_class() -> None:
    config = CT.config([linear(scheme_of("W8A8"))], [])
    other = CT.config([linear(scheme_of("W4A16_G16"))], [])["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = other | {"targets": ["a.b", r"re:.*\.q$"]}
    config["ignore"] = ["re:.*head", "c"]
    packed, plain = "weight_packed", "weight"
    expected = {"a.b": packed, "l.q": packed, "a.bc": plain, "l.qq": plain, "lm_head": None, "c": None}
    assert {n: leaves and leaves[0] for n in expected for leaves in [CT.leaves(config, n)]} == expected


def spec(grid: Any, block: tuple[int, int] = (1, -1), **more: Any) -> QSpec:
    return QSpec(grid, block, **more)


def ordered(layer: LinearWeights) -> LinearWeights:
    g_idx = torch.arange(IN).flip(0) // 16
    return replace(layer, weight=replace(layer.weight, g_idx=g_idx))


REFUSED: dict[str, tuple[LinearWeights, str]] = {
    "codebook": (linear(parse_scheme("NF4_G16")), "nearest: W4A16_G32"),
    "e5m2": (linear(parse_scheme("FP8_E5M2")), "nearest: FP8"),
    "odd bits": (linear(parse_scheme("W3A16_G16")), "nearest: W4A16"),
    "one bit": (linear(parse_scheme("W1A16_ASYM_G16")), "nearest: W2A16"),
    "narrow activations": (linear(parse_scheme("W4A4_G16")), "nearest: W4A8"),
    "activations of 16 steps more": (linear(Scheme(spec(Int(8)), spec(Int(8), dynamic=True))), "nearest: W8A8"),
    "quantized scales": (
        linear(Scheme(spec(Int(4), (1, 16), scale=spec(Int(8, signed=False), (1, 256), symmetric=False)))),
        "without _DQ",
    ),
    "multiples of a scale": (linear(parse_scheme("W4A8_DQ_G16")), "without _DQ"),
    "float weights in groups": (linear(Scheme(spec(E4M3, (1, 16)))), "nearest: FP8_DYNAMIC"),
    "float weights, integer activations": (
        linear(Scheme(spec(E4M3), spec(Int(8, narrow=True), dynamic=True))),
        "nearest: FP8_DYNAMIC",
    ),
    "columns out of order": (ordered(linear(parse_scheme("W4A16_G16"))), "static_groups=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_hold_is_refused_with_the_nearest(case: str) -> None:
    layer, nearest = REFUSED[case]
    reason = CT.refuses(layer)
    assert reason is not None and nearest in reason and "\n" not in reason


def test_float8_weights_alone_are_naive() -> None:
    layer = linear(FP8_WEIGHTS)
    config = CT.config([layer], [])
    assert config["format"] == "naive-quantized"
    assert same(layer, CT.read(config, "fc", CT.write(layer), layer.dtype))
    assert isinstance(layer.scheme.weight.grid, Float) and layer.scheme.weight.grid != E5M2


def test_columns_out_of_order_of_older_releases_are_read() -> None:
    layer = ordered(linear(parse_scheme("W4A16_G16")))
    config, written = CT.config([layer], []), CT.write(layer)
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    assert layer.weight.g_idx is not None
    back = CT.read(config, "fc", written | {"weight_g_idx": layer.weight.g_idx.to(torch.int32)}, layer.dtype)
    assert same(layer, back) and torch.equal(back.weight.dequantize(), layer.weight.dequantize())
    unset = CT.read(config, "fc", written | {"weight_g_idx": torch.full((IN,), -1, dtype=torch.int32)}, layer.dtype)
    assert unset.weight.g_idx is None
    with pytest.raises(PackageError, match="other groups"):
        CT.read(config, "fc", written | {"weight_g_idx": torch.full((IN,), 9, dtype=torch.int32)}, layer.dtype)


def test_the_lowest_code_of_8_bits_says_which_grid_it_is() -> None:
    wide = Scheme(QSpec(Int(8)), parse_scheme("W8A8").input)
    q = QTensor(torch.randint(-128, 128, (OUT, IN)).to(torch.int8), torch.rand(OUT, 1) + 0.1, None, wide.weight)
    q.codes[3, 4] = -128
    layer = LinearWeights("fc", q, wide, torch.float32)
    assert same(layer, CT.read(CT.config([layer], []), "fc", CT.write(layer), torch.float32))


def weights(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(changes)


def top(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(changes)


def group(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["config_groups"]["group_0"].update(changes)


ARGS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
UNREAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "cache": (top(kv_cache_scheme=ARGS), "kv_cache_scheme"),
    "sparsity": (top(sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
    "transforms": (top(transform_config={"config_groups": {"a": {}}}), "transforms"),
    "status": (top(quantization_status="frozen"), "'frozen'"),
    "preset": (top(config_groups={"W4A16": ["Linear"]}), "no config_groups"),
    "outputs": (group(output_activations=ARGS), "output_activations"),
    "no weights": (group(weights=None, input_activations=ARGS), "no weights"),
    "layout": (group(format="marlin-24"), "'marlin-24'"),
    "layout of floats": (group(format="float-quantized"), "for weights of int"),
    "blocks": (weights(strategy="block", block_structure=[128, 128]), "'block'"),
    "group size": (weights(group_size=None), "group_size None"),
    "odd bits": (weights(num_bits=3), "3 bits"),
    "wide": (weights(num_bits=16), "16 bits"),
    "4-bit floats": (weights(type="float"), "floats of 4 bits"),
    "dynamic weights": (weights(dynamic=True), "dynamic"),
    "unknown key": (weights(rounding="up"), "'rounding'"),
    "local": (group(input_activations=ARGS | {"dynamic": "local", "strategy": "tensor_group"}), "dynamic=local"),
    "static tokens": (group(input_activations=ARGS | {"dynamic": False}), "per token"),
    "inputs of 4 bits": (group(input_activations=ARGS | {"num_bits": 4}), "int4"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_settings_that_qfx_does_not_compute_are_errors(case: str) -> None:
    change, said = UNREAD[case]
    config = CT.config([linear(scheme_of("W4A16_G16"))], [])
    assert CT.leaves(config, "fc")
    change(config)
    with pytest.raises(PackageError) as error:
        CT.leaves(config, "fc")
    assert said in str(error.value) and "\n" not in str(error.value)


BROKEN: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Any]], str]] = {
    "missing": ("W4A16_G16", lambda t: {"weight_scale": None}, "lacks weight_scale"),
    "words": ("W4A16_G16", lambda t: {"weight_packed": t["weight_packed"][:, 1:]}, "weight_packed"),
    "shape": ("W4A16_G16", lambda t: {"weight_shape": torch.tensor([OUT])}, "weight_shape"),
    "scales": ("W4A16_G16", lambda t: {"weight_scale": t["weight_scale"][:, 1:]}, "weight_scale"),
    "zeros": ("W4A16_ASYM_G16", lambda t: {"weight_zero_point": t["weight_zero_point"][1:]}, "weight_zero_point"),
    "dtype": ("W8A8", lambda t: {"weight": t["weight"].float()}, "float32"),
    "input scale": ("W8A8_STATIC", lambda t: {"input_scale": torch.ones(2)}, "one value"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_tensors_that_do_not_fit_are_errors(case: str) -> None:
    name, change, said = BROKEN[case]
    layer = linear(scheme_of(name))
    config, written = CT.config([layer], []), CT.write(layer)
    broken = {n: t for n, t in (written | change(written)).items() if t is not None}
    with pytest.raises(PackageError, match=said):
        CT.read(config, "fc", broken, layer.dtype)
