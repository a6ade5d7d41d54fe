"""Every scheme that a target takes: the lowered graph gives in ONNX Runtime what the quantized model gives."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from qfx.core.grid import Int
from qfx.core.spec import QSpec, Scheme
from qfx.export.onnx_graph.lower import lower
from qfx.export.onnx_graph.numerics import difference, feeds
from qfx.export.onnx_graph.validate import validate
from qfx.modules.linear import QLinear
from tests.export.onnx_graph.exported import captured, lowered, quantized, values, wanted

TENSOR_DYNAMIC = Scheme(
    QSpec(Int(8, narrow=True), (1, -1)), QSpec(Int(8, signed=False), (-1, -1), symmetric=False, dynamic=True)
)
ON_CPU = {
    "W8A8_STATIC": {"MatMulIntegerToFloat": 12},
    "W8A8_STATIC_ASYM": {"MatMulIntegerToFloat": 12},
    "W8A8_TENSOR_STATIC": {"MatMulIntegerToFloat": 12},
    "W8A8_ASYM_STATIC": {"MatMulIntegerToFloat": 12},
    "W5A8_CHANNEL_STATIC": {"MatMulIntegerToFloat": 12},
    "W8A8": {"MatMulInteger": 12},
    "W8A16": {"MatMulNBits": 12},
    "W8A16_ASYM_G32": {"MatMulNBits": 12},
    "W4A16_G32": {"MatMulNBits": 12},
    "W4A16_G16": {"MatMulNBits": 12},
    "W4A16_ASYM_G32": {"MatMulNBits": 12},
    "W4A16_DQ_G32": {"MatMulNBits": 12},
    "W4A16_CHANNEL": {"MatMulNBits": 12},
    "W4A16_TENSOR": {"MatMulNBits": 12},
    "W3A16_ASYM_G32": {"MatMulNBits": 12},
    "W2A16_ASYM_G32": {"MatMulNBits": 12},
    "W6A16_G32": {"MatMulNBits": 12},
    "FP8": {},
    "FP8_E5M2": {},
    "NF4_G32": {"MatMulBnb4": 12},
    "NF4_DQ_G32": {"MatMulBnb4": 12},
    "FP4_BNB_G16": {"MatMulBnb4": 12},
}
EXACT = 1e-5
"""Relative, in the 2-norm. Sums of up to 96 products in float32, in two orders, differ by at most 96 · 2^-23 = 1.1e-5
of the sum of magnitudes, and by far less of it as a rule; one wrong code or scale makes 1e-3 and more."""


def features(scheme: str) -> tuple[str, ...]:
    return ("float8",) if scheme.startswith("FP8") else ()


@pytest.mark.parametrize("scheme", ON_CPU)
def test_on_a_cpu_the_values_are_those_of_the_model(scheme: str) -> None:
    model, _ = quantized("opt", scheme)
    graph, done, form = lowered(model, "opt", "ort-cpu", "float32")
    assert done.expected() == ON_CPU[scheme]
    assert validate(graph) == []
    assert difference(values(graph, form, "float32", features(scheme)), wanted(model, form)) < EXACT


def test_one_range_for_all_of_the_input() -> None:
    model, _ = quantized("opt", TENSOR_DYNAMIC)
    graph, done, form = lowered(model, "opt", "ort-cpu", "float32")
    assert done.expected() == {"DynamicQuantizeMatMul": 12}
    assert difference(values(graph, form, "float32"), wanted(model, form)) < EXACT


def test_weights_of_three_bits_are_stored_in_four() -> None:
    model, _ = quantized("opt", "W3A16_G32")
    graph, done, _ = lowered(model, "opt", "ort-cpu", "float32")
    assert {c.note for c in done.choices.values()} == {"codes of 3 bits are stored in 4"}
    packed = graph.graph.initializers["model.decoder.layers.0.fc1.weight"]
    assert packed.shape == (96, 2, 16)


@pytest.mark.parametrize("scheme", ["W4A16_ASYM_G16", "W8A16_G32", "W4A16_G32"])
def test_columns_in_the_order_of_their_groups(scheme: str) -> None:
    model, _ = quantized("opt", scheme, shuffle=True)
    graph, _, form = lowered(model, "opt", "ort-cpu", "float32")
    gathers = [node for node in graph.graph if node.op_type == "Gather" and "/" in (node.name or "")]
    assert len(gathers) == 8  # q, k and v of a layer have one order, and read one value
    assert difference(values(graph, form, "float32"), wanted(model, form)) < EXACT


CUDA = {
    "W8A8_STATIC": 2e-2,
    "W8A8_STATIC_ASYM": 2e-2,
    "W8A8": 2e-2,
    "W8A16": 5e-3,
    "W4A16_G32": 5e-3,
    "W4A16_ASYM_G32": 5e-3,
    "NF4_G32": 5e-3,
}
"""In float16: each value is rounded to 2^-11 = 5e-4 after each op, ten in a row; where inputs are rounded to int8
(steps of 1/127 of the largest), a value near the middle of a step goes the other way."""


@pytest.mark.parametrize("scheme", CUDA)
def test_for_a_cuda_device_in_float16(scheme: str) -> None:
    model, _ = quantized("opt", scheme)
    graph, _, form = lowered(model, "opt", "ort-cuda", "float16")
    assert validate(graph) == []
    assert difference(values(graph, form, "float16"), wanted(model, form)) < CUDA[scheme]


@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "W8A8_STATIC_ASYM", "W8A8"])
def test_the_integer_products_of_a_cuda_device_in_float32(scheme: str) -> None:
    """The same nodes without float16: what is left is the order of sums."""
    model, _ = quantized("opt", scheme)
    graph, done, form = lowered(model, "opt", "ort-cuda", "float32")
    assert done.expected() == {"MatMulInteger": 12}
    assert difference(values(graph, form, "float32"), wanted(model, form)) < EXACT


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16_G64", "W3A16_G64", "FP8"])
def test_for_tensorrt_in_float32(scheme: str) -> None:
    """Float16 would hide small faults; W8A8_STATIC uses one code more than the model, see below."""
    model, _ = quantized("opt", scheme)
    graph, _, form = lowered(model, "opt", "tensorrt", "float32")
    assert validate(graph) == []
    exact = (*features(scheme), "exact_nbits")
    assert difference(values(graph, form, "float32", exact), wanted(model, form)) < EXACT


def test_tensorrt_saturates_one_code_lower() -> None:
    """QuantizeLinear goes down to -128: with that code in the grid, the values are the same."""
    wide = Scheme(QSpec(Int(8, narrow=True), (1, -1)), QSpec(Int(8), (-1, -1)))
    for scheme, same in ((wide, True), ("W8A8_STATIC", False)):
        model, _ = quantized("opt", scheme)
        graph, _, form = lowered(model, "opt", "tensorrt", "float32")
        # at no optimization: ONNX Runtime's own products of int8 may saturate, see qdq_int8
        got = ReferenceEvaluator(ir.to_proto(graph)).run(None, feeds(form, "float32"))
        assert (difference(got, wanted(model, form)) < EXACT) == same


class MatMulBlockQuantizedFp8Weight(OpRun):
    """As its schema says: both operands are rounded to E4M3, products are summed in float."""

    op_domain = "com.microsoft"

    def _run(self, a, b, b_scale, a_scale, bias=None, block_size=None):  # type: ignore[no-untyped-def]
        x = torch.from_numpy(a.astype(np.float32)) / float(a_scale)
        x = x.clamp(-448, 448).to(torch.float8_e4m3fn).float() * float(a_scale)
        w = b.astype(np.float32) * np.repeat(b_scale, block_size, 1)[:, : b.shape[1]]
        y = x.numpy() @ w.T
        return ((y if bias is None else y + bias.astype(np.float32)).astype(a.dtype),)


def test_float8_for_a_cuda_device() -> None:
    """No CPU kernel: ONNX' own evaluator, with the op as its schema describes it; in float32, to see small faults."""
    model, _ = quantized("opt", "FP8")
    graph, done, _ = lowered(model, "opt", "ort-cuda", "float16")
    assert done.expected() == {"MatMulBlockQuantizedFp8Weight": 12}
    assert validate(graph) == []
    data, form = captured("opt", "float32")
    graph = ir.from_proto(onnx.load_from_string(data))
    lower(graph, done.choices, "float32")
    runner = ReferenceEvaluator(ir.to_proto(graph), new_ops=[MatMulBlockQuantizedFp8Weight])
    assert difference(runner.run(None, feeds(form, "float32")), wanted(model, form)) < EXACT


def test_inputs_are_quantized_once_for_all_readers() -> None:
    model, _ = quantized("opt", "W8A8")
    graph, _, _ = lowered(model, "opt", "ort-cpu", "float32")
    assert sum(node.op_type == "ReduceMax" for node in graph.graph) == 8  # of 12 linears, q, k and v read one value


@pytest.mark.parametrize("what", ["scale", "zero", "codes", "bias"])
def test_a_fault_in_one_linear_shows(what: str) -> None:
    model, _ = quantized("opt", "W4A16_ASYM_G32")
    want_of, _ = quantized("opt", "W4A16_ASYM_G32")
    linear = model.get_submodule("model.decoder.layers.1.fc2")
    assert isinstance(linear, QLinear)
    assert linear.weight_zero is not None and linear.bias is not None
    if what == "scale":
        linear.weight_scale.mul_(1.02)
    elif what == "zero":
        linear.weight_zero.copy_(linear.weight_zero.flip(0))
    elif what == "codes":
        linear.weight_codes.copy_(linear.weight_codes.roll(1, -1))
    else:
        linear.bias.zero_()
    graph, _, form = lowered(model, "opt", "ort-cpu", "float32")
    assert difference(values(graph, form, "float32"), wanted(want_of, form)) > 10 * EXACT


def test_int8_inputs_of_matmulnbits_are_about_right() -> None:
    model, _ = quantized("opt", "W4A16_G32")
    graph, _, form = lowered(model, "opt", "ort-cpu", "float32", accuracy_level=4)
    found = difference(values(graph, form, "float32"), wanted(model, form))
    assert EXACT < found < 2e-2
