"""The model as an ONNX graph whose quantized linears are opaque nodes `qfx::QLinear`."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import convenience
from torch import nn

from qfx.core.errors import CaptureError
from qfx.export.onnx_graph.bfloat16 import widen
from qfx.export.onnx_graph.forms import Form
from qfx.export.onnx_graph.opaque import opaque_copy
from qfx.export.onnx_graph.translations import RealUnsqueeze, translations

OPSETS = range(21, 26)
"""Those that torch exports and the ONNX checker takes: below there are no blocks, above attention fails the checker."""
_TALKERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch._subclasses", "transformers")
_EXPERTS = "_experts_implementation_internal"
_MISSING = "has no translation to ONNX"
_NOT_THEIRS = (os.path.dirname(torch.__file__), os.path.dirname(__file__))


def capture(model: nn.Module, form: Form, dtype: torch.dtype, opset: int) -> ir.Model:
    """Exports one form of a quantized model.

    Args:
        model: it is not changed.
        form: what to export.
        dtype: of the float parts.
        opset: one of `OPSETS`.

    Returns:
        A graph of float ops, and a `qfx::QLinear` with the attribute `layer` for each quantized linear. Its
        initializers share the model's memory.

    Raises:
        CaptureError: the model does not export; with the place in its code.
    """
    twin = exportable(opaque_copy(model, dtype))
    config = getattr(twin, "config", None)
    own: str = getattr(config, "_attn_implementation", None) or ""
    with torch.no_grad(), _quiet(), RealUnsqueeze():
        # sdpa is exported as masks with IsNaN and Where below opset 23
        chosen = bool(own) and _attention(twin, "eager")
        try:
            return _tidy(_program(twin, form, dtype, opset).model)
        except Exception as e:  # whatever the model's own code raises under tracing
            told = CaptureError(_explain(model, form, e))
            told.__cause__ = e
        # not every model's eager attention runs
        if chosen and own != "eager" and _MISSING not in str(told) and _attention(twin, own):
            with contextlib.suppress(Exception):
                return _tidy(_program(twin, form, dtype, opset).model)
    raise told


def _program(twin: nn.Module, form: Form, dtype: torch.dtype, opset: int) -> Any:
    dims = [form.dims[name] for name in form.inputs]
    return torch.onnx.export(
        form.wrap(twin).eval(),
        tuple(v.to(dtype) if v.is_floating_point() else v for v in form.inputs.values()),
        dynamo=True,
        opset_version=opset,
        input_names=list(form.inputs),
        output_names=list(form.outputs),
        dynamic_shapes=(tuple(dims),) if form.variadic else tuple(dims),
        custom_translation_table=translations(),
        verbose=False,
    )


def _attention(twin: Any, name: str) -> bool:
    """Chooses how attention is computed, if the model offers a choice."""
    try:
        twin.set_attn_implementation(name)
    except (AttributeError, ValueError):
        return False
    return True


def exportable(twin: nn.Module) -> nn.Module:
    """Sets what a Hugging Face model offers to make its forward exportable; it is changed and given back."""
    for config in {id(c): c for m in twin.modules() if (c := getattr(m, "config", None)) is not None}.values():
        if _EXPERTS in vars(config):  # the loop over the experts that were chosen depends on values
            setattr(config, _EXPERTS, "grouped_mm")
    return twin


def _tidy(graph: ir.Model) -> ir.Model:
    """Names of initializers as in the model, no operations in bfloat16; texts that name the exporter's own files go."""
    for name, value in list(graph.graph.initializers.items()):
        if name.startswith("model."):
            plain = name.removeprefix("model.")
            if plain not in graph.graph.initializers:
                value.name = plain
    _share_transposed(graph)
    widen(graph)
    for node in graph.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
    graph.metadata_props.clear()
    graph.producer_name, graph.doc_string = "qfx", None
    return graph


def _share_transposed(model: ir.Model) -> None:
    """A tied head reads the embedding: the exporter has folded its transpose into a second copy, which goes again."""
    graph = model.graph
    named = {v.name: v for v in graph.initializers.values() if v.shape is not None and len(v.shape) == 2}
    made = [v for name, v in named.items() if (name or "").startswith("val_")]
    for copy in made:
        for source in named.values():
            turned = tuple(reversed(tuple(source.shape or ())))
            if source in made or copy.shape != turned or source.dtype != copy.dtype:
                continue
            a, b = source.const_value, copy.const_value
            if a is None or b is None or not np.array_equal(a.numpy().T, b.numpy()):
                continue
            node = ir.node("Transpose", [source], {"perm": [1, 0]}, name=f"{source.name}/Transpose")
            node.outputs[0].name, node.outputs[0].shape = f"{source.name}/Transpose", copy.shape
            node.outputs[0].type = copy.type
            convenience.replace_all_uses_with(copy, node.outputs[0])
            graph.insert_before(graph[0], node)
            graph.initializers.pop(copy.name or "")
            break


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of absent packages, of its deprecations, and of failures that we tell."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explain(model: nn.Module, form: Form, error: BaseException) -> str:
    """The first cause, the last place in code that is not the exporter's, and what to try."""
    while (inner := error.__cause__) is not None:
        error = inner
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THEIRS)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # some messages are a heading and a list
    kind, reason = type(error).__name__, " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    if missing := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", reason):
        advice = f"write what calls {missing[1].replace('.', '::')} with operations that ONNX has"
        kind, reason = "the operation", f"{missing[1].replace('.', '::')} {_MISSING}"
    elif "DataDependent" in kind:
        advice = "remove the branch or loop that depends on values of tensors"
    else:
        advice = "check that torch.onnx.export(model, ..., dynamo=True) works"
    if form.cache and form.otherwise is None:
        advice = f"try cache=False, or {advice}"
    return (
        f"export: {type(model).__name__} does not export to ONNX{where}: {kind}: {reason.rstrip('.')}. To do: {advice}."
    )
