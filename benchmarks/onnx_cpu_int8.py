"""The forms in which a static W8A8 linear can be exported for a CPU: exactness and time in ONNX Runtime.

    python benchmarks/onnx_cpu_int8.py [--size 1024] [--tokens 1 128 512] [--threads 2]

The usual form has int8 weights, qfx's has uint8 weights around 128; both are fused. Without VNNI instructions the first
saturates. The third is MatMulInteger of int8 and int8. Errors are relative to the quantized model (2-norm).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from bench.hardware import cpu
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import qfx
from qfx.export.onnx_graph import patterns
from qfx.export.onnx_graph.capture import capture
from qfx.export.onnx_graph.forms import forms_of
from qfx.export.onnx_graph.lower import lower, plan
from qfx.export.onnx_graph.opaque import quantized_linears

FORMS: dict[str, tuple[Any, bool] | None] = {
    "float32": None,
    "int8 weights, fused": (patterns.qdq_int8, False),
    "uint8 weights around 128, fused (qfx)": (patterns.qdq_int8, True),
    "MatMulInteger of int8 and int8": (patterns.integer_static, False),
}


class One(nn.Module):
    """A linear."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def main() -> None:
    """Prints the table."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--size", type=int, default=1024)
    ap.add_argument("--tokens", nargs="*", type=int, default=[1, 128, 512])
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--runs", type=int, default=30)
    ap.add_argument("--json", default="benchmarks/results/onnx_cpu_int8.json")
    a = ap.parse_args()
    torch.manual_seed(0)
    model, x = One(a.size).eval(), torch.randn(512, a.size).clamp(-3, 3)
    q = qfx.quantize(model, {"schemes": {"*": "W8A8_STATIC"}}, [{"x": x}], progress=False)
    rows = {label: measure(label, model, q, x, a) for label in FORMS}
    import onnxruntime

    versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "qfx": qfx.__version__}
    result = {"hardware": cpu(), "threads": a.threads, "size": a.size, "versions": versions}
    result |= {"date": time.strftime("%Y-%m-%d"), "rows": rows}
    Path(a.json).write_text(json.dumps(result, indent=1) + "\n")
    table = Table("form", "error", *(f"{t} tokens" for t in a.tokens), title=f"{cpu()}, {a.size} x {a.size}")
    for label, row in rows.items():
        table.add_row(label, f"{row['error']:.1e}", *(f"{ms:.2f} ms" for ms in row["ms"].values()))
    Console(width=120).print(table)


def measure(label: str, model: nn.Module, q: nn.Module, x: Tensor, a: argparse.Namespace) -> dict[str, Any]:
    """One form: its error, and milliseconds by tokens."""
    import onnxruntime as ort

    form = forms_of(model, {"x": x}, False)[0]
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "model.onnx"
        source = q if FORMS[label] else model
        graph = capture(source, form, torch.float32, 21)
        if (wanted := FORMS[label]) is not None:
            pattern, unsigned = wanted
            choices = plan(quantized_linears(q), "ort-cpu", "float32")
            choices = {n: replace(c, pattern=pattern, settings={"unsigned": unsigned}) for n, c in choices.items()}
            lower(graph, choices, "float32")
        ir.save(graph, path, external_data="model.onnx_data")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = a.threads, 3
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        with torch.no_grad():
            want = source(x).numpy()
        got = session.run(None, {"x": x.numpy()})[0]
        times = {}
        for tokens in a.tokens:
            feed, seconds = {"x": np.ascontiguousarray(x.numpy()[:tokens])}, []
            for _ in range(a.runs):
                began = time.perf_counter()
                session.run(None, feed)
                seconds.append(time.perf_counter() - began)
            times[str(tokens)] = 1e3 * statistics.median(seconds)
    return {"error": float(np.linalg.norm(got - want) / np.linalg.norm(want)), "ms": times}


if __name__ == "__main__":
    main()
