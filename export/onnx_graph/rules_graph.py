"""What must hold for names, versions, domains and files of any graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from qfx.export.onnx_graph.findings import Finding
from qfx.export.onnx_graph.reading import DQ, Q, dtype_of, integer, label, nodes, own

# onnx.proto, comments of `enum Version`
_MIN_IR = {
    "FLOAT8E4M3FN": 9, "FLOAT8E4M3FNUZ": 9, "FLOAT8E5M2": 9, "FLOAT8E5M2FNUZ": 9, "INT4": 10, "UINT4": 10,
    "FLOAT4E2M1": 11, "FLOAT8E8M0": 12, "INT2": 13, "UINT2": 13,
}  # fmt: skip
# types that QuantizeLinear and DequantizeLinear take, and since when
_MIN_OPSET = {
    "FLOAT16": 19, "BFLOAT16": 19, "FLOAT8E4M3FN": 19, "FLOAT8E4M3FNUZ": 19, "FLOAT8E5M2": 19, "FLOAT8E5M2FNUZ": 19,
    "INT16": 21, "UINT16": 21, "INT4": 21, "UINT4": 21, "FLOAT4E2M1": 23, "FLOAT8E8M0": 24, "INT2": 25, "UINT2": 25,
}  # fmt: skip


def ir_version(model: ir.Model) -> Iterator[Finding]:
    """The file's IR version has every type of its tensors."""
    stored = [value for graph in _graphs(model) for value in graph.initializers.values()]
    seen = set()
    for value in [*stored, *model.graph.inputs, *(out for node in nodes(model) for out in node.outputs)]:
        dtype = dtype_of(value)
        if dtype is None or dtype in seen or (needs := _MIN_IR.get(dtype.name, 0)) <= model.ir_version:
            continue
        seen.add(dtype)
        wrong = f"it is {dtype}, which IR version {model.ir_version} does not have"
        yield Finding(str(value.name), wrong, f"set ir_version to {needs} or more")


def opset_version(model: ir.Model) -> Iterator[Finding]:
    """The opset's QuantizeLinear and DequantizeLinear take the types and attributes that they are given."""
    opset = next((v for domain, v in model.opset_imports.items() if own(domain, "")), 0)
    for node in nodes(model, Q, DQ):
        types = {dtype_of(value) for value in (*node.inputs, node.outputs[0])}
        needs = {str(t): _MIN_OPSET[t.name] for t in types if t is not None and t.name in _MIN_OPSET}
        needs |= {"axis": 13} if "axis" in node.attributes else {}
        needs |= {"block_size": 21} if integer(node, "block_size", 0) else {}
        what, least = max(needs.items(), key=lambda item: item[1], default=("", 0))
        if least > opset:
            yield Finding(label(node), f"it uses {what}, which opset {opset} does not have", f"use opset {least}")


def opset_imports(model: ir.Model) -> Iterator[Finding]:
    """Every domain of a node is imported."""
    called = {identifier[0] for identifier in model.functions}
    for domain in sorted({node.domain for node in nodes(model)} | called):
        if not any(own(domain, imported) for imported in model.opset_imports):
            wrong = "the model uses this domain and does not import it"
            yield Finding(domain or "ai.onnx", wrong, "add it to opset_imports")


def leftovers(model: ir.Model) -> Iterator[Finding]:
    """No opaque linear of qfx is left; no runtime knows the domain."""
    for node in nodes(model):
        if node.domain == "qfx":
            yield Finding(label(node), f"it is still qfx::{node.op_type}", "lower the model for its target")
    if "qfx" in model.opset_imports:
        yield Finding("qfx", "the model imports this domain", "remove it from opset_imports")


def unique_names(model: ir.Model) -> Iterator[Finding]:
    """A value's name is its own, also within subgraphs."""
    for kind, value, where in _scan(model.graph, {}):
        if kind == "twice":
            yield Finding(str(value.name), f"{where} gives a second value this name", "rename one of them")


def defined_values(model: ir.Model) -> Iterator[Finding]:
    """A node reads what stands before it: inputs, initializers, outputs of earlier nodes."""
    for kind, value, where in _scan(model.graph, {}):
        if kind == "undefined":
            wrong = f"it reads {value.name}, which nothing before it gives"
            yield Finding(where, wrong, "connect it, or sort the graph")


def graph_outputs(model: ir.Model) -> Iterator[Finding]:
    """Every output of the model is computed or stored."""
    for kind, value, _ in _scan(model.graph, {}):
        if kind == "output":
            yield Finding(str(value.name), "the graph gives it and no node computes it", "connect the output")


def stored_tensors(model: ir.Model) -> Iterator[Finding]:
    """Every initializer has a tensor, and a file beside the model that is long enough to hold it."""
    sizes: dict[Path, int | None] = {}
    for graph in _graphs(model):
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                yield Finding(name, "it is an initializer without a tensor", "set const_value")
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            path = Path(tensor.path)
            if path not in sizes:
                sizes[path] = path.stat().st_size if path.is_file() else None
            length, end = sizes[path], (tensor.offset or 0) + tensor.nbytes
            if length is None:
                yield Finding(name, f"its file {path.name} is missing", "copy it beside the model")
            elif length < end or tensor.length not in (None, 0, tensor.nbytes):
                yield Finding(name, f"its file {path.name} does not hold its {tensor.nbytes} bytes", "export again")


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    for node in nodes(model):
        for found in node.attributes.values():
            if found.type == ir.AttributeType.GRAPH:
                yield found.as_graph()


def _scan(graph: ir.Graph, outer: dict[str, ir.Value]) -> Iterator[tuple[str, ir.Value, str]]:
    """What is wrong with the names of a graph: (kind, value, where)."""
    known = dict(outer)
    for value in (*graph.inputs, *graph.initializers.values()):
        if value.name and known.setdefault(value.name, value) is not value:
            yield "twice", value, "an input or initializer"
    for node in graph:
        for given in node.inputs:
            if given is not None and known.get(given.name or "") is not given:
                yield "undefined", given, label(node)
        for found in node.attributes.values():
            if found.type == ir.AttributeType.GRAPH:
                yield from _scan(found.as_graph(), known)
        for value in node.outputs:
            if value.name and known.setdefault(value.name, value) is not value:
                yield "twice", value, label(node)
    for value in graph.outputs:
        if known.get(value.name or "") is not value:
            yield "output", value, ""
