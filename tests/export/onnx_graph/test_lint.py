"""Each target's rules find what it does not take, in a model that is right for it but for that."""

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qfx.core.errors import PackageError
from qfx.export.onnx_graph.lint import RULES, lint
from qfx.export.onnx_graph.session import SESSION_OPTIONS
from qfx.export.onnx_graph.validate import validate
from tests.export.onnx_graph import models
from tests.export.onnx_graph.models import GROUP, K, N, feed, insert, node, rules, set_attributes, store

f16, f32, bf16 = np.float16, np.float32, ml_dtypes.bfloat16
half = partial(models.static, dtype=f16)
float8 = partial(models.static, kind=models.E4M3)

GOOD: list[tuple[str, Callable[[], ir.Model]]] = [
    ("tensorrt", half),
    ("tensorrt", partial(models.static, dtype=f16, bias=True)),
    ("tensorrt", partial(models.static, dtype=f16, kind=models.E4M3)),
    ("tensorrt", partial(models.int4, dtype=f16)),
    ("tensorrt", partial(models.static, dtype=bf16)),
    ("ort-cuda", partial(models.integer, dtype=f16)),
    ("ort-cuda", partial(models.nbits, dtype=f16)),
    ("ort-cuda", partial(models.int4, dtype=f16)),
    ("ort-cuda", models.fp8_weight),
    ("ort-cuda", models.bnb4),
    ("ort-cpu", models.unsigned),
    ("ort-cpu", models.integer),
    ("ort-cpu", models.nbits),
    ("ort-cpu", partial(models.int4, rank=2, bias=True)),
    ("ort-cpu", models.bnb4),
]


@pytest.mark.parametrize(("target", "make"), GOOD)
def test_a_good_model_has_no_findings(target: str, make: Callable[[], ir.Model]) -> None:
    assert [str(found) for found in lint(make(), target)] == []


def _run_time_scale(m: ir.Model) -> None:
    scale = ir.node("ReduceMax", [m.graph.inputs[0]], {"keepdims": 0}, name="max")
    scale.outputs[0].name = "max.out"
    node(m, "q").prepend(scale)
    node(m, "q").replace_input_with(1, scale.outputs[0])


def _int4_activation(m: ir.Model) -> None:
    store(m, zx=np.zeros((), ml_dtypes.int4))


def _int4_weight(m: ir.Model) -> None:
    store(m, codes=models.codes(K, N, dtype=ml_dtypes.int4, low=-8, high=8))


def _odd(m: ir.Model) -> None:
    store(m, codes=np.zeros((K, N - 1), ml_dtypes.int4), sw=np.full((K // GROUP, N - 1), 0.01, f16))


def _indivisible(m: ir.Model) -> None:
    set_attributes(m, "weight", block_size=GROUP)
    store(m, codes=np.zeros((GROUP + 16, N), ml_dtypes.int4), sw=np.full((2, N), 0.01, f16))


def _dequantized_output(m: ir.Model) -> None:
    m.graph.outputs.append(node(m, "weight").outputs[0])


def _float_weight(m: ir.Model) -> None:
    feed(m, "layer.proj", 1, np.ones((K, N), f16))


def _island(m: ir.Model) -> None:
    """A linear in float32 behind the one in float16."""
    y = node(m, "layer.proj").outputs[0]
    up = ir.node("Cast", [y], {"to": ir.DataType.FLOAT.value}, name="up")
    up.outputs[0].name = "up.out"
    m.graph.append(up)
    product = ir.node("MatMul", [up.outputs[0], up.outputs[0]], name="head")
    product.outputs[0].name = "head.out"
    m.graph.append(product)
    feed(m, "head", 1, np.ones((N, 4), f32))


def _prepacked(m: ir.Model) -> None:
    set_attributes(m, "layer.proj", weight_prepacked=1)


def _unsigned(m: ir.Model) -> None:
    store(m, zx=np.zeros((), np.uint8))


def _float4(m: ir.Model) -> None:
    m.graph.opset_imports[""], m.ir_version = 23, 11
    store(m, codes=np.zeros((K, N), ml_dtypes.float4_e2m1fn))


CASES: list[tuple[str, str, Callable[[], ir.Model], Callable[[ir.Model], object], str]] = [
    ("op of ONNX Runtime", "tensorrt", models.nbits, lambda m: None, "standard_ops"),
    ("integer product", "tensorrt", partial(models.integer, dtype=f16), lambda m: None, "imported_ops"),
    ("dynamic inputs", "tensorrt", models.dynamic, lambda m: None, "imported_ops"),
    ("late opset", "tensorrt", half, lambda m: m.graph.opset_imports.update({"": 26}), "opset"),
    ("uint8 inputs", "tensorrt", half, _unsigned, "code_types"),
    ("uint8 by default", "tensorrt", half, lambda m: node(m, "q").resize_inputs(2), "code_types"),
    ("int32 bias", "tensorrt", models.gemm, lambda m: None, "adjacent code_types"),
    ("zero point", "tensorrt", half, lambda m: store(m, zx=np.asarray(3, np.int8)), "symmetric"),
    ("scale of zero", "tensorrt", half, lambda m: store(m, sx=np.zeros((), f16)), "build_time_scales"),
    ("scale at run time", "tensorrt", half, _run_time_scale, "build_time_scales"),
    ("scales of channels of x", "tensorrt", half, lambda m: store(m, sx=np.full(K, 0.1, f16)), "activation_scale"),
    ("int4 inputs", "tensorrt", half, _int4_activation, "int4_weights"),
    ("int4 without blocks", "tensorrt", half, _int4_weight, "int4_weights"),
    ("int4 in blocks of 32", "tensorrt", partial(models.int4, dtype=f16, group=32), lambda m: None, "int4_weights"),
    ("int4 of odd N", "tensorrt", partial(models.int4, dtype=f16), _odd, "int4_weights"),
    ("int4, half a block", "tensorrt", partial(models.int4, dtype=f16), _indivisible, "int4_weights"),
    ("Cast between", "tensorrt", half, lambda m: insert(m, "Cast", "layer.proj", 1, to=10), "adjacent both_operands"),
    ("Relu between", "tensorrt", half, lambda m: insert(m, "Relu", "layer.proj", 0), "adjacent"),
    ("dequantized output", "tensorrt", half, _dequantized_output, "adjacent"),
    ("weight is float", "tensorrt", half, _float_weight, "both_operands"),
    ("float32 island", "tensorrt", half, _island, "float_islands"),
    ("dynamic inputs", "ort-cuda", models.dynamic, lambda m: None, "cuda_kernels integer_products"),
    ("bfloat16", "ort-cuda", partial(models.int4, dtype=bf16), lambda m: None, "bfloat16_qdq"),
    ("int32 bias", "ort-cuda", models.gemm, lambda m: None, "float_products int32_dequantize"),
    (
        "MatMulNBits, 256",
        "ort-cuda",
        models.nbits,
        lambda m: set_attributes(m, "layer.proj", block_size=256),
        "nbits_blocks",
    ),
    ("int4 in blocks of 8", "ort-cuda", partial(models.int4, group=8), lambda m: None, "nbits_blocks"),
    (
        "g_idx",
        "ort-cuda",
        models.nbits,
        lambda m: feed(m, "layer.proj", 4, np.arange(K, dtype=np.int32)),
        "nbits_portable",
    ),
    ("prepacked", "ort-cuda", models.nbits, _prepacked, "nbits_portable"),
    ("uint8 inputs", "ort-cuda", models.integer, _unsigned, "integer_products"),
    (
        "zero points of channels",
        "ort-cuda",
        models.integer,
        lambda m: feed(m, "layer.proj", 3, np.zeros(N, np.int8)),
        "integer_products",
    ),
    ("static int8", "ort-cuda", half, lambda m: None, "float_products"),
    ("static float8", "ort-cuda", float8, lambda m: None, "float_products"),
    ("float8 product", "ort-cpu", models.fp8_weight, lambda m: None, "cpu_kernels"),
    ("float4 product", "ort-cpu", models.fp4_weight, lambda m: None, "cpu_kernels"),
    ("float4", "ort-cpu", models.int4, _float4, "cpu_kernels"),
    ("bfloat16", "ort-cpu", partial(models.int4, dtype=bf16), lambda m: None, "bfloat16_qdq"),
    ("static int8", "ort-cpu", models.static, lambda m: None, "exact_int8"),
    ("dynamic int8", "ort-cpu", models.dynamic, lambda m: None, "exact_int8"),
    ("static float8", "ort-cpu", float8, lambda m: None, "float8"),
    ("float8 after Relu", "ort-cpu", partial(models.static, kind=models.E4M3, relu=True), lambda m: None, "float8"),
    (
        "two axes and a bias",
        "ort-cpu",
        partial(models.static, rank=2, bias=True),
        lambda m: None,
        "biased_2d exact_int8",
    ),
    (
        "Gemm with a float bias",
        "ort-cpu",
        partial(models.gemm, float_bias=True),
        lambda m: None,
        "biased_2d exact_int8",
    ),
    (
        "Gemm, no zero point",
        "ort-cpu",
        models.gemm,
        lambda m: node(m, "weight").resize_inputs(2),
        "biased_2d exact_int8",
    ),
    ("float16", "ort-cpu", half, lambda m: None, "half_qdq"),
]


@pytest.mark.parametrize(
    ("target", "make", "spoil", "expected"), [c[1:] for c in CASES], ids=[f"{c[1]}: {c[0]}" for c in CASES]
)
def test_what_a_target_does_not_take_is_found(
    target: str, make: Callable[[], ir.Model], spoil: Callable[[ir.Model], object], expected: str
) -> None:
    model = make()
    spoil(model)
    found = lint(model, target)
    assert rules(found) == set(expected.split())
    assert all("\n" not in str(one) and str(one).count("; ") == 1 for one in found)


@pytest.mark.parametrize("target", RULES)
def test_every_rule_has_a_case_and_says_what_must_hold(target: str) -> None:
    shown = {rule for _, of, *_, expected in CASES if of == target for rule in expected.split()}
    assert {rule.__name__ for rule in RULES[target]} == shown
    assert all(rule.__doc__ for rule in RULES[target])


def test_float32_products_over_one_element_are_no_islands() -> None:
    model = half()
    _island(model)
    store(model, **{"head.1": np.ones((1, 4), f32)})
    node(model, "up").outputs[0].shape = ir.Shape(["batch", N, 1])
    assert lint(model, "tensorrt") == []


def test_a_relu_that_would_be_lost_is_named() -> None:
    (found,) = lint(models.static(kind=models.E4M3, relu=True), "ort-cpu")
    assert "Relu act, which is dropped" in str(found)


@pytest.mark.parametrize(
    ("features", "make"),
    [
        (["biased_2d", "exact_int8"], partial(models.static, rank=2, bias=True)),
        (["exact_int8"], partial(models.static, bias=True)),
        (["exact_int8"], models.gemm),
        (["exact_int8"], models.dynamic),
        (["float8"], float8),
    ],
)
def test_session_options_satisfy_the_rules_of_their_names(features: list[str], make: Callable[[], ir.Model]) -> None:
    model = make()
    assert rules(lint(model, "ort-cpu")) == set(features) <= set(SESSION_OPTIONS)
    assert lint(model, "ort-cpu", features) == []
    assert rules(lint(model, "ort-cpu", features[1:])) == {features[0]}


def test_good_models_are_also_valid() -> None:
    assert [str(found) for _, make in GOOD for found in validate(make())] == []


@pytest.mark.parametrize(("target", "features"), [("tflite", ()), ("ort-cpu", ("fast",))])
def test_an_unknown_name_is_refused(target: str, features: tuple[str, ...]) -> None:
    with pytest.raises(PackageError, match="choose of"):
        lint(half(), target, features)
