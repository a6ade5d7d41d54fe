"""The model as an ONNX graph whose quantized linears are opaque nodes `qfx::QLinear`."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from qfx.core.errors import CaptureError
from qfx.export.onnx_graph.forms import Form
from qfx.export.onnx_graph.opaque import opaque_copy

DOMAIN, NODE = "qfx", "QLinear"
OPSETS = range(21, 26)
"""Those that torch exports and the ONNX checker takes: below there are no blocks, above attention fails the checker."""
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
    twin = opaque_copy(model, dtype)
    if (choose := getattr(twin, "set_attn_implementation", None)) is not None:
        # sdpa is exported as masks with IsNaN and Where below opset 23
        with contextlib.suppress(ValueError):
            choose("eager")
    module = form.wrap(twin).eval()
    args = tuple(v.to(dtype) if v.is_floating_point() else v for v in form.inputs.values())
    dims = [form.dims[name] for name in form.inputs]
    shapes: tuple[Any, ...] = (tuple(dims),) if form.variadic else tuple(dims)
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                module,
                args,
                dynamo=True,
                opset_version=opset,
                input_names=list(form.inputs),
                output_names=list(form.outputs),
                dynamic_shapes=shapes,
                custom_translation_table={torch.ops.qfx.opaque_linear.default: _translation()},
                verbose=False,
            )
        except Exception as e:  # whatever the model's own code raises under tracing
            raise CaptureError(_explain(model, e)) from e
    assert program is not None
    return _tidy(program.model)


def _tidy(graph: ir.Model) -> ir.Model:
    """Initializers get the names that they have in the model; texts that name the exporter's own files go."""
    for name, value in list(graph.graph.initializers.items()):
        if name.startswith("model."):
            plain = name.removeprefix("model.")
            if plain not in graph.graph.initializers:
                value.name = plain
    for node in graph.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
    graph.metadata_props.clear()
    graph.producer_name, graph.doc_string = "qfx", None
    return graph


@functools.cache
def _translation() -> Any:
    """How the exporter writes the opaque op: it wants a schema for a domain that is not ONNX' own."""
    import onnx
    from onnxscript import values

    schema = onnx.defs.OpSchema
    tensor = "T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Float tensors."
    described = schema(
        NODE,
        DOMAIN,
        1,
        inputs=[schema.FormalParameter("x", "T")],
        outputs=[schema.FormalParameter("y", "T")],
        type_constraints=[tensor],
        attributes=[
            schema.Attribute("layer", schema.AttrType.STRING, "The linear's path in the model."),
            schema.Attribute("out_features", schema.AttrType.INT, "Columns of y."),
        ],
    )
    op = values.Op(values.Opset(DOMAIN, 1), NODE, described)

    def translate(x: Any, layer: str, out_features: int) -> Any:
        return op(x, layer=layer, out_features=out_features)

    return translate


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that are not there and of its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explain(model: nn.Module, error: BaseException) -> str:
    """The first cause, and the last place in code that is not the exporter's."""
    while (inner := error.__cause__) is not None:
        error = inner
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THEIRS)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"export: {type(model).__name__} does not export to ONNX{where}: {type(error).__name__}: {reason}. Remove "
        "branches that depend on values of tensors, and check that torch.onnx.export(model, ..., dynamo=True) works."
    )
