"""One graph of an export: captured, lowered, checked, written, checked again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import nn

from qfx.core.errors import CaptureError, PackageError
from qfx.export.onnx_graph import numerics, patterns
from qfx.export.onnx_graph.audit import QDQ, audit
from qfx.export.onnx_graph.capture import capture
from qfx.export.onnx_graph.findings import Finding
from qfx.export.onnx_graph.forms import Form
from qfx.export.onnx_graph.lint import lint
from qfx.export.onnx_graph.lint_ort import NO_CPU_KERNEL
from qfx.export.onnx_graph.lower import lower
from qfx.export.onnx_graph.session import session_entries
from qfx.export.onnx_graph.targets import Choice
from qfx.export.onnx_graph.validate import validate

if TYPE_CHECKING:
    from qfx.export.onnx_graph.write import Graph, OnnxExport


def features(choices: Mapping[str, Choice]) -> tuple[str, ...]:
    """What of ONNX Runtime's optimizer must be left out on a CPU: names of `SESSION_OPTIONS`."""
    return ("float8",) if any(c.pattern is patterns.qdq_fp8 for c in choices.values()) else ()


def options(names: tuple[str, ...]) -> dict[str, str]:
    """The entries of a session's configuration."""
    return session_entries(names)


def write(
    made: Path,
    model: nn.Module,
    form: Form,
    choices: Mapping[str, Choice],
    done: OnnxExport,
    names: tuple[str, ...],
    check: bool,
) -> tuple[Graph, Form]:
    """Writes one file and its weights.

    Returns:
        What was written, and as which form: the other one that a form has, if it does not export itself.

    Raises:
        CaptureError: the model does not export.
        PackageError: what was made is not right: it says what, and nothing stays.
    """
    dtype = getattr(torch, done.dtype)
    try:
        graph = capture(model, form, dtype, done.opset)
    except CaptureError as e:
        if form.otherwise is None:
            raise
        form = form.otherwise(str(e))
        graph = capture(model, form, dtype, done.opset)
    if form.note:
        done.notes.append(form.note)
    return write_captured(graph, made, model, form, choices, done, names, check), form


def write_captured(
    graph: ir.Model,
    made: Path,
    model: nn.Module,
    form: Form,
    choices: Mapping[str, Choice],
    done: OnnxExport,
    names: tuple[str, ...],
    check: bool,
) -> Graph:
    """The same for a graph that is captured already; it is lowered in place."""
    from qfx.export.onnx_graph.write import Graph

    inside = _called(graph)
    lowered = lower(graph, {n: c for n, c in choices.items() if n in inside}, done.dtype)
    expected = lowered.expected()
    if check:
        _refuse(validate(graph), "is not valid")
        _refuse(lint(graph, done.target, names), f"does not suit {done.target}")
    file = f"{form.name}.onnx"
    ir.save(graph, made / file, external_data=f"{file}_data", max_workers=1)
    inputs, outputs = ({v.name or "": _axes(v) for v in values} for values in (graph.graph.inputs, graph.graph.outputs))
    written = Graph(file, inputs, outputs, expected)
    if check:
        rounds = any(c.layer.scheme.input is not None for c in choices.values())
        _check(made / file, model, form, done, written, names, rounds)
    return written


def _check(
    path: Path, model: nn.Module, form: Form, done: OnnxExport, written: Graph, names: tuple[str, ...], rounds: bool
) -> None:
    """The file as others see it."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as e:  # the checker's and shape inference's own
        raise PackageError(f"{path.name} does not pass ONNX' checker ({' '.join(str(e).split())[:300]})") from None
    kinds = {node.op_type for node in ir.load(path).graph}
    if lacking := sorted(kinds.intersection(NO_CPU_KERNEL)):
        done.notes.append(f"{path.name} was not run: {', '.join(lacking)} has no CPU kernel")
        return
    wanted = dict(written.expected)
    if done.target == "tensorrt":
        wanted = {QDQ: sum(1 for _ in _products(path))}
    try:
        audit(path, wanted, done.target, names)
        written.error = numerics.compare(path, model, form, done.dtype, names, rounds)
    except PackageError as e:
        if "not installed" not in str(e) and "needs onnxruntime" not in str(e):
            raise
        done.notes.append(f"{path.name} was not run: onnxruntime is not installed")


def _products(path: Path) -> list[str]:
    return [n.name or "" for n in ir.load(path).graph if n.op_type == "MatMul" and "/" in (n.name or "")]


def _called(graph: ir.Model) -> set[str]:
    return {node.attributes["layer"].as_string() for node in graph.graph if node.domain == "qfx"}


def _axes(value: ir.Value) -> list[str]:
    return [] if value.shape is None else [str(d.value if isinstance(d, ir.SymbolicDim) else d) for d in value.shape]


def _refuse(found: list[Finding], what: str) -> None:
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise PackageError(f"the graph {what}: {found[0]}{more}")
