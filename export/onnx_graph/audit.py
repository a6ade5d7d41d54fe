"""What ONNX Runtime makes of a quantized graph: its optimizer is run, and the quantized ops that it leaves are counted.

A linear whose product is not fused still runs, in float, many times slower than the float model: nothing else tells.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qfx.core.errors import PackageError
from qfx.export.onnx_graph.lint import RULES
from qfx.export.onnx_graph.lint_ort import NO_CPU_KERNEL
from qfx.export.onnx_graph.reading import (
    DQ,
    Q,
    constant,
    label,
    linears,
    nodes,
    operand,
    readers,
)
from qfx.export.onnx_graph.session import SESSION_OPTIONS, session_entries

__all__ = ["COUNTED", "QDQ", "SESSION_OPTIONS", "Audit", "audit"]

QDQ = "DequantizeLinear>MatMul"
"""Name under which products are counted whose weight is dequantized right before them; TensorRT fuses these."""
FUSED_INT8 = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm")
"""What an int8 product fuses to; which of them depends on its neighbours."""
COUNTED = (
    *FUSED_INT8,
    *("MatMulInteger", "MatMulNBits", "MatMulBnb4", "MatMulBlockQuantizedFp8Weight", "MatMulBlockQuantizedFp4Weight"),
    *("DynamicQuantizeLinear", Q, DQ),
)
"""Ops that are counted."""
_THROUGH = ("Cast", "Transpose", "Reshape", "Identity", "Mul")
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        target: the model's.
        counts: how often each op of `COUNTED`, and `QDQ`, stands in the optimized graph.
        fell_back: products that multiply a dequantized weight in float.
        optimized: whether the graph is ONNX Runtime's; if not, it was counted as it is.
        options: the session's configuration entries.
    """

    target: str
    counts: Mapping[str, int]
    fell_back: tuple[str, ...]
    optimized: bool
    options: Mapping[str, str]


def audit(path: str | Path, expected: Mapping[str, int], target: str, features: Collection[str] = ()) -> Audit:
    """Counts the quantized ops of a model after ONNX Runtime's optimizer, and fails if there are too few.

    For `tensorrt`, nothing is optimized: ONNX Runtime loads the graph, and its products of dequantized weights are
    counted as they stand (`QDQ`). A graph with ops that have no CPU kernel is counted without being loaded.

    Args:
        path: of the model; weights are found beside it.
        expected: least counts by op, of `COUNTED` or `QDQ`. Those of `FUSED_INT8` are counted together.
        target: "tensorrt", "ort-cuda" or "ort-cpu".
        features: names in `SESSION_OPTIONS` that the session is opened with.

    Raises:
        PackageError: counts are below the expected ones (it names the linears), an op cannot be counted, the model does
            not load, or ONNX Runtime is not installed.
    """
    path, options = Path(path), session_entries(features)
    if target not in RULES:
        raise PackageError(f"no target {target!r}; choose of {', '.join(RULES)}")
    if unknown := sorted(set(expected) - {*COUNTED, QDQ}):
        raise PackageError(f"{', '.join(unknown)} cannot be counted; choose of {', '.join((*COUNTED, QDQ))}")
    model = _load(path)
    if has_kernels := not any(node.op_type in NO_CPU_KERNEL for node in nodes(model)):
        with tempfile.TemporaryDirectory() as folder:
            best = target != "tensorrt"
            optimized = _optimize(path, Path(folder), options, best=best)
            found = _found(_load(optimized) if best else model, target)
    else:
        found = _found(model, target)
    counts, fell_back = found
    result = Audit(target, counts, fell_back, has_kernels and target != "tensorrt", options)
    for ops in (FUSED_INT8, *((op,) for op in expected if op not in FUSED_INT8)):
        least, count = (sum(of.get(op, 0) for op in ops) for of in (expected, counts))
        if count < least:
            raise PackageError(_message(path, ops, count, least, fell_back))
    return result


def _found(model: ir.Model, target: str) -> tuple[dict[str, int], tuple[str, ...]]:
    counts = Counter(node.op_type for node in nodes(model) if node.op_type in COUNTED)
    counts[QDQ] = sum(1 for _ in linears(model))
    left = list(dict.fromkeys(label(node).partition("/MatMulAddFusion")[0] for node in _float_products(model)))
    if target == "tensorrt":  # there, a product right after its DequantizeLinear is what is wanted
        good = {label(node) for node, _ in linears(model)}
        left = [name for name in left if name not in good]
    return dict(counts), tuple(left)


def _float_products(model: ir.Model) -> Iterator[ir.Node]:
    """Float products of dequantized weights, also through casts and transposes that the optimizer put between."""
    for node in nodes(model, DQ):
        if constant(operand(node, 0)) is None:
            continue
        ahead = list(node.outputs)
        while ahead:
            for reader, index in readers(ahead.pop()):
                if reader.op_type in _PRODUCTS and index < 2:
                    yield reader
                elif reader.op_type in _THROUGH:
                    ahead.extend(reader.outputs)


def _message(path: Path, ops: Sequence[str], count: int, least: int, fell_back: tuple[str, ...]) -> str:
    some = ", ".join(fell_back[:5]) + (f" and {len(fell_back) - 5} more" if len(fell_back) > 5 else "")
    what = f"{some} fell back to float" if fell_back else "no float product of a quantized weight is left to name"
    return (
        f"{path.name} has {count} {' or '.join(ops)} of {least} in ONNX Runtime ({what}); "
        f"lint it, or use the session options {', '.join(SESSION_OPTIONS)}"
    )


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as e:  # protobuf's and the reader's own
        raise PackageError(f"{path.name} is no ONNX model ({_line(e)}); export it again") from None


def _optimize(path: Path, folder: Path, options: Mapping[str, str], *, best: bool) -> Path:
    """Lets ONNX Runtime load a model, and write what it made of it."""
    try:
        import onnxruntime as ort
    except ImportError:
        raise PackageError('the audit needs onnxruntime; pip install "qfx[onnx]"') from None
    settings, out = ort.SessionOptions(), folder / "optimized.onnx"
    settings.optimized_model_filepath = str(out)
    levels = ort.GraphOptimizationLevel
    settings.graph_optimization_level = levels.ORT_ENABLE_ALL if best else levels.ORT_DISABLE_ALL
    settings.log_severity_level = 3  # it warns that an optimized model fits this CPU alone
    entries = {
        # a model above 2 GB must not be written as one message
        "session.optimized_model_external_initializers_file_name": "optimized.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.disable_prepacking": "1",  # nothing is run
        **options,
    }
    for key, value in entries.items():
        settings.add_session_config_entry(key, value)
    try:
        ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as e:  # pybind's exceptions have no common base but this
        raise PackageError(f"ONNX Runtime does not load {path.name} ({_line(e)}); validate and lint it") from None
    return out


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
