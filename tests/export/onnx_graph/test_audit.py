"""ONNX Runtime's optimizer is believed, not the graph that it is given."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qfx.core.errors import PackageError
from qfx.export.onnx_graph.audit import QDQ, SESSION_OPTIONS, audit
from qfx.export.onnx_graph.session import session_entries
from tests.export.onnx_graph import models

f16 = np.float16
biased = partial(models.static, rank=2, bias=True)
float8 = partial(models.static, kind=models.E4M3, relu=True)


def saved(model: ir.Model, folder: Path) -> Path:
    path = folder / "model.onnx"
    ir.save(model, path, external_data="model.onnx_data", size_threshold_bytes=0)
    return path


FUSED: list[tuple[str, str, Callable[[], ir.Model], Mapping[str, int]]] = [
    ("static int8", "ort-cpu", models.static, {"MatMulIntegerToFloat": 1}),
    ("static int8, bias", "ort-cpu", partial(models.static, bias=True), {"MatMulIntegerToFloat": 1}),
    ("static int8, two axes", "ort-cpu", partial(models.static, rank=2), {"MatMulIntegerToFloat": 1}),
    ("static int8, int32 bias", "ort-cpu", models.gemm, {"QGemm": 1}),
    ("dynamic int8", "ort-cpu", models.dynamic, {"DynamicQuantizeMatMul": 1}),
    ("MatMulNBits", "ort-cpu", models.nbits, {"MatMulNBits": 1}),
    ("int4", "ort-cpu", models.int4, {"MatMulNBits": 1}),
    ("int4, bias", "ort-cpu", partial(models.int4, bias=True), {"MatMulNBits": 1}),
    ("bnb4", "ort-cpu", models.bnb4, {"MatMulBnb4": 1}),
    ("MatMulInteger", "ort-cuda", partial(models.integer, dtype=f16), {"MatMulInteger": 1}),
    ("int4, float16", "ort-cuda", partial(models.int4, dtype=f16), {"MatMulNBits": 1}),
    ("float8", "ort-cuda", models.fp8_weight, {"MatMulBlockQuantizedFp8Weight": 1}),
    ("static int8", "tensorrt", partial(models.static, dtype=f16, bias=True, rank=2), {QDQ: 1}),
    ("float8", "tensorrt", partial(models.static, dtype=f16, kind=models.E4M3), {QDQ: 1}),
    ("int4", "tensorrt", partial(models.int4, dtype=f16), {QDQ: 1}),
]


@pytest.mark.parametrize(
    ("target", "make", "expected"), [case[1:] for case in FUSED], ids=[f"{case[1]}: {case[0]}" for case in FUSED]
)
def test_fused_products_are_counted(
    target: str, make: Callable[[], ir.Model], expected: Mapping[str, int], tmp_path: Path
) -> None:
    path = saved(make(), tmp_path)
    found = audit(path, expected, target)
    assert {op: found.counts[op] for op in expected} == expected
    assert found.fell_back == ()
    assert found.optimized == (target != "tensorrt" and "MatMulBlockQuantizedFp8Weight" not in expected)
    (op,) = expected
    with pytest.raises(PackageError, match=r"1 .*of 2 in ONNX Runtime \(no float product"):
        audit(path, {op: 2}, target)


FELL_BACK: list[tuple[str, str, Callable[[], ir.Model], str, tuple[str, ...]]] = [
    ("two axes and a bias", "ort-cpu", biased, "MatMulIntegerToFloat", ("biased_2d",)),
    ("Gemm with a float bias", "ort-cpu", partial(models.gemm, float_bias=True), "QGemm", ()),
    ("float16", "ort-cpu", partial(models.static, dtype=f16), "MatMulIntegerToFloat", ()),
    ("static int8", "ort-cuda", partial(models.static, dtype=f16), "MatMulInteger", ()),
]


@pytest.mark.parametrize(
    ("target", "make", "op", "cure"), [case[1:] for case in FELL_BACK], ids=[case[0] for case in FELL_BACK]
)
def test_a_linear_that_fell_back_to_float_is_named(
    target: str, make: Callable[[], ir.Model], op: str, cure: tuple[str, ...], tmp_path: Path
) -> None:
    path = saved(make(), tmp_path)
    with pytest.raises(PackageError, match=r"model.onnx has 0 .*of 1 .*\(layer.proj fell back to float\)"):
        audit(path, {op: 1}, target)
    assert audit(path, {}, target).fell_back == ("layer.proj",)
    if cure:
        found = audit(path, {op: 1}, target, cure)
        assert found.fell_back == () and found.options == session_entries(cure)


def test_a_weight_behind_a_transpose_is_named_for_tensorrt(tmp_path: Path) -> None:
    model = models.static(dtype=f16)
    models.store(model, codes=models.codes(models.N, models.K))
    models.set_attributes(model, "weight", axis=0)
    models.insert(model, "Transpose", "layer.proj", 1, perm=[1, 0])
    with pytest.raises(PackageError, match=r"layer\.proj fell back"):
        audit(saved(model, tmp_path), {QDQ: 1}, "tensorrt")


def test_what_an_int8_product_fuses_to_does_not_matter(tmp_path: Path) -> None:
    """A second reader of the dynamically quantized input changes the ops, and not what is computed."""
    path = saved(models.dynamic(), tmp_path)
    found = audit(path, {"MatMulIntegerToFloat": 1}, "ort-cpu")
    assert found.counts["DynamicQuantizeMatMul"] == 1 and "MatMulIntegerToFloat" not in found.counts
    with pytest.raises(PackageError, match="of 2"):
        audit(path, {"MatMulIntegerToFloat": 1, "QGemm": 1}, "ort-cpu")


@pytest.mark.parametrize(
    ("make", "rank", "features"),
    [
        (models.static, 3, ["exact_int8"]),
        (models.unsigned, 3, []),
        (biased, 2, ["biased_2d", "exact_int8"]),
        (models.gemm, 2, ["exact_int8"]),
        (float8, 3, ["float8"]),
        (models.int4, 3, ["exact_nbits"]),
    ],
)
def test_with_its_options_a_session_computes_what_the_graph_says(
    make: Callable[[], ir.Model], rank: int, features: list[str], tmp_path: Path
) -> None:
    path = saved(make(), tmp_path)
    x = np.random.default_rng(1).normal(size=(2, 3, models.K)[3 - rank :]) * 4

    def run(level: onnxruntime.GraphOptimizationLevel, entries: Mapping[str, str]) -> np.ndarray:
        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level, settings.log_severity_level = level, 3
        for key, value in entries.items():
            settings.add_session_config_entry(key, value)
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x.astype(np.float32)})[0]

    levels = onnxruntime.GraphOptimizationLevel
    want = run(levels.ORT_DISABLE_ALL, {})
    got = run(levels.ORT_ENABLE_ALL, session_entries(features))
    # sums of 128 products in float32, in another order
    assert np.abs(got - want).max() <= 128 * np.finfo(np.float32).eps * np.abs(want).max()


def test_entries_of_several_features_are_joined() -> None:
    entries = session_entries(SESSION_OPTIONS)
    assert entries == {
        "optimization.disable_specified_optimizers": "MatMulAddFusion;ReluQuantRewrite",
        "session.disable_quant_qdq": "1",
        "session.x64quantprecision": "1",
        "session.qdq_matmulnbits_accuracy_level": "1",
    }


BAD: list[tuple[str, dict[str, int], str, tuple[str, ...], str]] = [
    ("unknown target", {}, "tflite", (), "no target 'tflite'; choose of"),
    ("unknown op", {"MatMulNBit": 1}, "ort-cpu", (), "MatMulNBit cannot be counted; choose of"),
    ("unknown option", {}, "ort-cpu", ("fast",), "no session options for 'fast'; choose of"),
]


@pytest.mark.parametrize(("expected", "target", "features", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_an_unknown_name_is_refused(
    expected: dict[str, int], target: str, features: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PackageError, match=message):
        audit(saved(models.static(), tmp_path), expected, target, features)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(PackageError, match=r"model.onnx is no ONNX model .*export it again"):
        audit(tmp_path / "model.onnx", {}, "ort-cpu")


def test_a_model_that_does_not_load_says_why_in_one_line(tmp_path: Path) -> None:
    path = saved(models.static(), tmp_path)
    (tmp_path / "model.onnx_data").unlink()
    with pytest.raises(PackageError, match=r"ONNX Runtime does not load model\.onnx") as raised:
        audit(path, {}, "ort-cpu")
    assert "\n" not in str(raised.value)


def test_without_onnxruntime_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(models.static(), tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PackageError, match=r'pip install "qfx\[onnx\]"'):
        audit(path, {}, "ort-cpu")
