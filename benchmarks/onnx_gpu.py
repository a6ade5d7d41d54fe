"""Exported linears in ONNX Runtime on a GPU, beside the same in float16: placement, accuracy, time.

    python benchmarks/onnx_gpu.py [--sizes 4096x4096 4096x14336] [--tokens 1 16 256 2048] [--json FILE]

Needs onnxruntime-gpu (`pip install "qfx[onnx-gpu]"`). A model of one linear a size, exported for ort-cuda: W8A8_STATIC
and W8A8 (MatMulInteger with explicit scales), W4A16 and W8A16 (MatMulNBits, also with ONNX Runtime's fpA_intB kernels),
FP8 (MatMulBlockQuantizedFp8Weight), and float16. Each runs with inputs and outputs on the device, `--runs` times after
a warm-up; the median is given. Placement: the nodes that ONNX Runtime gave to each provider.
`--provider CPUExecutionProvider` tries the script without a GPU, on what has kernels there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

import qfx
import qfx.export
from qfx.core.errors import QfxError
from qfx.export.onnx_graph.capture import capture
from qfx.export.onnx_graph.forms import forms_of

CUDA = "CUDAExecutionProvider"
SCHEMES = {
    "float16": None,
    "W8A8_STATIC": "W8A8_STATIC",
    "W8A8": "W8A8",
    "W4A16": "W4A16",
    "W4A16, fpA_intB": "W4A16",
    "W8A16": "W8A16",
    "FP8": "FP8",
}


class One(nn.Module):
    """A linear."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def main() -> None:
    """Prints the table."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--sizes", nargs="*", default=["4096x4096", "4096x14336", "14336x4096"], help="inputs x outputs")
    ap.add_argument("--tokens", nargs="*", type=int, default=[1, 16, 256, 2048])
    ap.add_argument("--runs", type=int, default=50)
    ap.add_argument("--provider", default=CUDA)
    ap.add_argument("--json", default="benchmarks/results/onnx_gpu.json")
    a = ap.parse_args()
    import onnxruntime as ort

    if a.provider not in ort.get_available_providers():
        raise SystemExit(f"onnx_gpu: this onnxruntime has no {a.provider}, only {ort.get_available_providers()}")
    rows = []
    for size in a.sizes:
        columns, outputs = map(int, size.split("x"))
        torch.manual_seed(0)
        model, x = One(columns, outputs).eval(), torch.randn(64, columns)
        for label, scheme in SCHEMES.items():
            with tempfile.TemporaryDirectory() as made:
                try:
                    path = export(model, x, scheme, Path(made))
                    rows += [{"size": size, "scheme": label, **r} for r in measure(path, model, label, columns, a)]
                except QfxError as e:
                    rows.append({"size": size, "scheme": label, "error": str(e)})
                print(rows[-1], flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"onnxruntime": ort.__version__, "torch": torch.__version__, "qfx": qfx.__version__}
    result = {"hardware": device, "versions": versions, "date": time.strftime("%Y-%m-%d"), "rows": rows}
    Path(a.json).write_text(json.dumps(result, indent=1) + "\n")
    show(rows, a.tokens)


def export(model: nn.Module, x: Tensor, scheme: str | None, made: Path) -> Path:
    """The model as a file for ort-cuda."""
    if scheme is None:
        graph = capture(model, forms_of(model, {"x": x}, False)[0], torch.float16, 21)
        ir.save(graph, made / "model.onnx", external_data="model.onnx_data")
        return made / "model.onnx"
    q = qfx.quantize(model, {"schemes": {"*": scheme}}, [{"x": x}], progress=False)
    return qfx.export.onnx(q, made / "out", target="ort-cuda", example={"x": x}, check=False).folder / "model.onnx"


def measure(path: Path, model: nn.Module, label: str, columns: int, a: argparse.Namespace) -> list[dict[str, Any]]:
    """Time, error against float32, and placement, for each number of tokens."""
    import onnxruntime as ort

    os.environ["ORT_FPA_INTB_GEMM"] = "1" if "fpA_intB" in label else "0"
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = ort.InferenceSession(str(path), options, providers=[a.provider, "CPUExecutionProvider"])
    except Exception as e:  # pybind's exceptions have no common base but this
        return [{"tokens": 0, "error": " ".join(str(e).split())[:200]}]
    rows = []
    for tokens in a.tokens:
        x = torch.randn(tokens, columns)
        place = "cuda" if a.provider == CUDA else "cpu"
        bound = session.io_binding()
        bound.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x.numpy().astype(np.float16), place, 0))
        bound.bind_output("output", place)
        seconds = []
        for i in range(a.runs + 5):
            began = time.perf_counter()
            session.run_with_iobinding(bound)  # returns when the device is done
            bound.synchronize_outputs()
            if i >= 5:
                seconds.append(time.perf_counter() - began)
        got = bound.copy_outputs_to_cpu()[0].astype(np.float32)
        with torch.no_grad():
            want = model(x).numpy()
        error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        rows.append(
            {"tokens": tokens, "us": 1e6 * statistics.median(seconds), "error": error, "nodes": placed(session)}
        )
    return rows


def placed(session: Any) -> dict[str, dict[str, int]]:
    """Nodes by provider and type."""
    found: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        nodes = Counter(node.op_type for node in part.get_nodes())
        found[part.ep_name] = found.get(part.ep_name, Counter()) + nodes
    return {name: dict(nodes) for name, nodes in found.items()}


def show(rows: list[dict[str, Any]], tokens: list[int]) -> None:
    """Microseconds, and times as fast as float16."""
    from rich.console import Console
    from rich.table import Table

    table = Table("inputs x outputs", "scheme", *(f"{t} tokens" for t in tokens), "error", "not on the GPU")
    times = {(r["size"], r["scheme"], r["tokens"]): r["us"] for r in rows if "us" in r}
    for size, label in dict.fromkeys((r["size"], r["scheme"]) for r in rows):
        mine = [r for r in rows if (r["size"], r["scheme"]) == (size, label)]
        cells = []
        for t in tokens:
            us, base = times.get((size, label, t)), times.get((size, "float16", t))
            cells.append("-" if us is None else f"{us:.0f} us" + (f" ({base / us:.2f})" if base else ""))
        away = {op for r in mine for ep, ops in r.get("nodes", {}).items() if ep != CUDA for op in ops}
        error = next((r["error"] for r in mine if "us" in r), mine[0].get("error", ""))
        shown = f"{error:.1e}" if isinstance(error, float) else str(error)[:60]
        table.add_row(size, label, *cells, shown, ", ".join(sorted(away)) or "-")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
