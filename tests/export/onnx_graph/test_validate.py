"""Every rule finds its mistake in a model that is right but for it, and finds nothing in models that are right."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qfx.export.onnx_graph.validate import RULES, validate
from tests.export.onnx_graph import models
from tests.export.onnx_graph.models import GROUP, K, N, feed, insert, node, rules, set_attributes, store

f4, f16, f32 = ml_dtypes.float4_e2m1fn, np.float16, np.float32
GOOD: list[tuple[str, Callable[[], ir.Model]]] = [
    ("static", models.static),
    ("static, float16", partial(models.static, dtype=f16)),
    ("static, two axes, bias", partial(models.static, rank=2, bias=True)),
    ("static, float8", partial(models.static, kind=models.E4M3)),
    ("gemm", models.gemm),
    ("int4", models.int4),
    ("int4, float16, bias", partial(models.int4, dtype=f16, bias=True)),
    ("integer", models.integer),
    ("integer, float16", partial(models.integer, dtype=f16)),
    ("dynamic", models.dynamic),
    ("nbits", models.nbits),
    ("nbits, 8 bits, float16", partial(models.nbits, bits=8, zero=False, dtype=f16)),
    ("bnb4", models.bnb4),
    ("fp8_weight", models.fp8_weight),
    ("fp4_weight", models.fp4_weight),
]


@pytest.mark.parametrize("make", [make for _, make in GOOD], ids=[name for name, _ in GOOD])
def test_a_good_model_has_no_findings(make: Callable[[], ir.Model]) -> None:
    assert [str(found) for found in validate(make())] == []


def _many(count: int, low: float) -> np.ndarray:
    """Scales of which one is off."""
    values = np.full(count, 0.01, f32)
    values[1] = low
    return values


def _shorter_block(m: ir.Model) -> None:
    set_attributes(m, "weight", block_size=48)
    store(m, sw=np.full((3, N), 0.01, f32))


def _summed_axis(m: ir.Model) -> None:
    set_attributes(m, "weight", axis=0)
    store(m, sw=np.full(K, 0.01, f32))


def _blocks_of_outputs(m: ir.Model) -> None:
    set_attributes(m, "weight", axis=1, block_size=16)
    store(m, sw=np.full((K, N // 16), 0.01, f32))


def _float4(m: ir.Model) -> None:
    m.graph.opset_imports[""] = 23
    store(m, codes=np.zeros((K, N), f4))


def _int2(m: ir.Model) -> None:
    m.ir_version = 13
    store(m, codes=np.zeros((K, N), ml_dtypes.int2))


def _opset(version: int) -> Callable[[ir.Model], None]:
    return lambda m: m.graph.opset_imports.update({"": version})


def _opaque(m: ir.Model) -> None:
    insert(m, "QLinear", "act", domain="qfx")
    m.graph.opset_imports["qfx"] = 1


def _half_sums(m: ir.Model) -> None:
    set_attributes(m, "cast", to=ir.DataType.FLOAT16.value)
    store(m, s=np.full(N, 0.001, f16))


def _half_sums_reshaped(m: ir.Model) -> None:
    _half_sums(m)
    insert(m, "Identity", "cast")


def _lost_producer(m: ir.Model) -> None:
    q = node(m, "q")
    q.prepend(ir.node("Neg", [m.graph.inputs[0]], name="neg"))
    new = node(m, "neg")
    new.outputs[0].name = "neg.out"
    q.replace_input_with(0, new.outputs[0])
    m.graph.remove(new)


def _unsorted(m: ir.Model) -> None:
    first = node(m, "q")
    m.graph.remove(first)
    m.graph.append(first)


def _second_name(m: ir.Model) -> None:
    node(m, "dq").outputs[0].name = "weight.out"


def _lost_output(m: ir.Model) -> None:
    m.graph.outputs[0] = ir.Value(name="logits", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([N]))


def _unstored(m: ir.Model) -> None:
    m.graph.initializers["codes"].const_value = None


def _short_file(m: ir.Model, folder: Path, length: int) -> None:
    (folder / "small.data").write_bytes(bytes(length))
    tensor = ir.ExternalTensor(
        "small.data", 0, K * N, ir.DataType.INT8, shape=ir.Shape([K, N]), name="codes", base_dir=folder
    )
    store(m, codes=tensor)


def _transpose(m: ir.Model) -> None:
    store(m, codes=models.codes(N, K))
    set_attributes(m, "weight", axis=0)
    insert(m, "Transpose", "layer.proj", 1, perm=[1, 0])


MISTAKES: list[tuple[str, Callable[[], ir.Model], Callable[[ir.Model], object], str]] = [
    ("group does not divide K", models.int4, _shorter_block, "block_divides"),
    ("negative block", models.int4, lambda m: set_attributes(m, "weight", block_size=-1), "block_divides scale_shape"),
    ("blocks: too few", models.int4, lambda m: store(m, sw=np.full((1, N), 0.01, f32)), "scale_shape"),
    ("blocks: flat scales", models.int4, lambda m: store(m, sw=np.full(2 * N, 0.01, f32)), "scale_shape"),
    (
        "blocks without block_size",
        models.int4,
        lambda m: node(m, "weight").attributes.pop("block_size"),
        "scale_axis scale_shape",
    ),
    ("channels: length", models.static, lambda m: store(m, sw=np.full(N + 1, 0.01, f32)), "scale_shape"),
    ("channels: axis", models.static, lambda m: set_attributes(m, "weight", axis=0), "scale_axis scale_shape"),
    ("channels: no such axis", models.static, lambda m: set_attributes(m, "weight", axis=2), "scale_axis scale_shape"),
    ("summed axis has scales", models.static, _summed_axis, "scale_axis"),
    ("blocks of outputs", models.int4, _blocks_of_outputs, "scale_axis"),
    ("scale: zero", models.static, lambda m: store(m, sw=_many(N, 0.0)), "scale_values"),
    ("scale: negative", models.static, lambda m: store(m, sw=_many(N, -0.01)), "scale_values"),
    ("scale: inf", models.static, lambda m: store(m, sw=_many(N, np.inf)), "scale_values"),
    ("scale: nan", models.static, lambda m: store(m, sw=_many(N, np.nan)), "scale_values"),
    ("scale: zero, of x", models.static, lambda m: store(m, sx=np.zeros((), f32)), "scale_values"),
    (
        "scale: subnormal",
        partial(models.int4, dtype=f16),
        lambda m: store(m, sw=np.full((2, N), 6e-5, f16)),
        "scale_values",
    ),
    ("scale: zero, MatMulNBits", models.nbits, lambda m: store(m, sw=np.zeros((N, 2), f32)), "scale_values"),
    ("scale: zero, float8", models.fp8_weight, lambda m: store(m, sw=np.zeros((N, 1), f32)), "scale_values"),
    ("scale: other type", partial(models.static, opset=23), lambda m: store(m, sx=np.asarray(0.1, f16)), "scale_type"),
    ("scale: other type, opset 21", models.static, lambda m: store(m, sx=np.asarray(0.1, f16)), "scale_type"),
    ("zero point: other type", models.static, lambda m: feed(m, "weight", 2, np.zeros(N, np.uint8)), "zero_point_type"),
    ("zero point: one of many", models.static, lambda m: feed(m, "weight", 2, np.zeros(1, np.int8)), "zero_point_type"),
    (
        "zero point: of float8",
        partial(models.static, kind=models.E4M3),
        lambda m: store(m, zx=np.ones((), models.E4M3)),
        "zero_point_range",
    ),
    ("zero point: of a bias", models.gemm, lambda m: feed(m, "bias.dq", 2, np.ones(N, np.int32)), "zero_point_range"),
    ("IR version: int4", models.int4, lambda m: setattr(m, "ir_version", 9), "ir_version"),
    ("IR version: float4", models.int4, _float4, "ir_version"),
    ("opset: int2", models.int4, _int2, "opset_version"),
    ("opset: int4", models.int4, _opset(20), "opset_version"),
    ("opset: float16 scale", partial(models.static, dtype=f16), _opset(18), "opset_version"),
    ("opset: float8", partial(models.static, kind=models.E4M3), _opset(18), "opset_version"),
    ("opset: axis", models.static, _opset(12), "opset_version"),
    ("domain not imported", models.nbits, lambda m: m.graph.opset_imports.pop("com.microsoft"), "opset_imports"),
    ("standard not imported", models.static, lambda m: m.graph.opset_imports.pop(""), "opset_imports opset_version"),
    ("opaque linear left", partial(models.static, relu=True), _opaque, "leftovers"),
    ("its domain left", models.static, lambda m: m.graph.opset_imports.update(qfx=1), "leftovers"),
    ("float16 sums", partial(models.integer, dtype=f16), _half_sums, "half_accumulator"),
    ("float16 sums, further on", partial(models.integer, dtype=f16), _half_sums_reshaped, "half_accumulator"),
    ("transposed weight", models.static, _transpose, "weight_transpose"),
    ("name twice", models.static, _second_name, "defined_values unique_names"),
    ("value of a removed node", models.static, _lost_producer, "defined_values"),
    ("not sorted", models.static, _unsorted, "defined_values"),
    ("output of nothing", models.static, _lost_output, "graph_outputs"),
    ("initializer of nothing", models.static, _unstored, "stored_tensors"),
    ("nbits: block of 24", models.nbits, lambda m: set_attributes(m, "layer.proj", block_size=24), "nbits_attributes"),
    ("nbits: block of 8", models.nbits, lambda m: set_attributes(m, "layer.proj", block_size=8), "nbits_attributes"),
    ("nbits: 3 bits", models.nbits, lambda m: set_attributes(m, "layer.proj", bits=3), "nbits_attributes"),
    ("nbits: no N", models.nbits, lambda m: node(m, "layer.proj").attributes.pop("N"), "nbits_attributes"),
    ("nbits: K", models.nbits, lambda m: set_attributes(m, "layer.proj", K=K - GROUP), "nbits_shapes"),
    ("nbits: codes", models.nbits, lambda m: store(m, codes=np.zeros((N, 2, GROUP), np.uint8)), "nbits_shapes"),
    ("nbits: signed", models.nbits, lambda m: store(m, codes=np.zeros((N, 2, GROUP // 2), np.int8)), "nbits_shapes"),
    ("nbits: flat scales", models.nbits, lambda m: store(m, sw=np.full(2 * N, 0.01, f32)), "nbits_shapes"),
    ("nbits: scales' type", models.nbits, lambda m: store(m, sw=np.full((N, 2), 0.01, f16)), "nbits_shapes"),
    ("nbits: zero points", models.nbits, lambda m: store(m, zeros=np.zeros((N, 2), np.uint8)), "nbits_shapes"),
    ("nbits: bias", models.nbits, lambda m: store(m, bias=np.zeros(K, f32)), "nbits_shapes"),
    ("nbits: float zero", models.nbits, lambda m: store(m, zeros=np.full((N, 2), 16, f32)), "nbits_zero_range"),
    ("bnb4: block", models.bnb4, lambda m: set_attributes(m, "layer.proj", block_size=0), "bnb4"),
    ("bnb4: table", models.bnb4, lambda m: set_attributes(m, "layer.proj", quant_type=2), "bnb4"),
    ("bnb4: columns", models.bnb4, lambda m: set_attributes(m, "layer.proj", transB=0), "bnb4"),
    ("bnb4: codes", models.bnb4, lambda m: store(m, codes=np.zeros((N, K // 2), np.uint8)), "bnb4"),
    ("bnb4: scales", models.bnb4, lambda m: store(m, absmax=np.full(N, 0.1, f32)), "bnb4"),
    ("bnb4: negative", models.bnb4, lambda m: store(m, absmax=np.full(N * K // GROUP, -0.1, f32)), "bnb4"),
    ("fp8: codes' type", models.fp8_weight, lambda m: store(m, codes=np.zeros((N, K), np.uint8)), "fp8_weight"),
    ("fp8: transposed", models.fp8_weight, lambda m: store(m, codes=np.zeros((K, N), models.E4M3)), "fp8_weight"),
    ("fp8: scales", models.fp8_weight, lambda m: store(m, sw=np.full(N, 0.01, f32)), "fp8_weight"),
    ("fp8: scale of x", models.fp8_weight, lambda m: store(m, sx=np.full(2, 0.01, f32)), "fp8_weight"),
    ("fp8: bias", models.fp8_weight, lambda m: store(m, bias=np.ones(N, f32)), "fp8_weight"),
    (
        "fp8: float32",
        models.fp8_weight,
        lambda m: setattr(m.graph.inputs[0], "type", ir.TensorType(ir.DataType.FLOAT)),
        "fp8_weight",
    ),
    ("fp4: scales", models.fp4_weight, lambda m: store(m, sw=np.ones((N, K // 32), np.uint8)), "fp4_weight"),
    ("fp4: global scale", models.fp4_weight, lambda m: store(m, **{"global": np.ones(N, f32)}), "fp4_weight"),
]


@pytest.mark.parametrize(("make", "spoil", "expected"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_found(make: Callable[[], ir.Model], spoil: Callable[[ir.Model], object], expected: str) -> None:
    model = make()
    spoil(model)
    found = validate(model)
    assert rules(found) == set(expected.split())
    assert all("\n" not in str(one) and str(one).count("; ") == 1 for one in found)


def test_every_rule_has_a_mistake_and_says_what_must_hold() -> None:
    shown = {rule for *_, expected in MISTAKES for rule in expected.split()}
    assert {rule.__name__ for rule in RULES} == shown
    assert all(rule.__doc__ for rule in RULES)


@pytest.mark.parametrize(("length", "expected"), [(K * N, set()), (K * N - 1, {"stored_tensors"})])
def test_weights_in_a_file_are_looked_for_and_not_read(
    length: int, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.static()
    _short_file(model, tmp_path, length)
    monkeypatch.setattr(ir.ExternalTensor, "numpy", lambda self, *args: pytest.fail(f"{self.name} was read"))
    assert rules(validate(model)) == expected
    (tmp_path / "small.data").unlink()
    assert rules(validate(model)) == {"stored_tensors"}


def _branch(name: str, reads: ir.Value) -> ir.Graph:
    add = ir.node("Add", [reads, reads], name="inner")
    add.outputs[0].name = name
    return ir.Graph([], [add.outputs[0]], nodes=[add], name="body")


@pytest.mark.parametrize(
    ("name", "after", "expected"),
    [
        ("inner.out", False, set()),  # both branches may give it
        ("dq.out", False, {"unique_names", "graph_outputs"}),
        ("inner.out", True, {"defined_values"}),
    ],
)
def test_subgraphs_are_read_and_see_the_values_around_them(name: str, after: bool, expected: set[str]) -> None:
    model = models.static()
    reads = (node(model, "layer.proj") if after else node(model, "dq")).outputs[0]
    branches = {leaf: _branch(name, reads) for leaf in ("then_branch", "else_branch")}
    condition = ir.node("If", [model.graph.inputs[0]], branches, name="if")
    condition.outputs[0].name = "if.out"
    node(model, "layer.proj").prepend(condition)
    assert rules(validate(model)) == expected
