"""Quantized models without a search, and their graphs captured once for all schemes."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from qfx.core.qtensor import dynamic_scale, encode_minmax
from qfx.core.spec import Scheme, parse_scheme
from qfx.export.onnx_graph.capture import capture
from qfx.export.onnx_graph.forms import Form, forms_of
from qfx.export.onnx_graph.lower import Lowered, lower, plan
from qfx.export.onnx_graph.numerics import feeds, reference, run
from qfx.export.onnx_graph.opaque import quantized_linears
from qfx.modules.linear import QLinear
from tests.zoo import ZOO


def quantized(name: str, scheme: str | Scheme, *, shuffle: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of the zoo whose linears, but the head, are rounded to a scheme; static inputs get one range.

    Linears that the group size does not divide get W8A16.
    """
    model, example = ZOO[name].load()
    wanted = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    for path, module in list(model.named_modules()):
        if type(module).__name__ not in ("Linear", "Conv1D") or "head" in path or "classifier" in path:
            continue
        weight = module.weight.detach()
        if type(module).__name__ == "Conv1D":
            weight = weight.t()
        size = wanted.weight.block[1]
        fits = wanted if size == -1 or weight.shape[1] % size == 0 else parse_scheme("W8A16")
        model.set_submodule(path, quantized_linear(weight, module.bias, fits, shuffle=shuffle))
    return model.eval(), example


def quantized_linear(weight: Tensor, bias: Tensor | None, scheme: Scheme, *, shuffle: bool = False) -> QLinear:
    """One linear; with `shuffle` its columns belong to groups that are not consecutive."""
    q = encode_minmax(weight, scheme.weight)
    if shuffle:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
        q = encode_minmax(weight[:, order], scheme.weight)
        back = order.argsort()
        groups = torch.arange(weight.shape[1]) // scheme.weight.block[1]
        q.codes, q.g_idx = q.codes[:, back], groups[back]
    x, given = scheme.input, {}
    if x is not None and not x.dynamic:
        # for values in [-3, 4]: some are beyond it, and must saturate as in the model
        scale, zero = dynamic_scale(torch.tensor([[-3.0, 4.0]]), x)
        given = {"input_scale": scale.reshape(()), "input_zero": None if zero is None else zero.reshape(())}
    return QLinear.from_qtensor(q, None if bias is None else bias.detach(), scheme, dtype=torch.float32, **given)


@functools.cache
def captured(name: str, dtype: str, opset: int = 21) -> tuple[bytes, Form]:
    """The graph of a model with opaque linears, as bytes; whatever the scheme, it is the same."""
    model, example = quantized(name, "W8A8")
    form = forms_of(model, example, False)[0]
    graph = capture(model, form, getattr(torch, dtype), opset)
    return ir.to_proto(graph).SerializeToString(), form


def lowered(
    model: nn.Module, name: str, target: str, dtype: str, accuracy_level: int = 0
) -> tuple[ir.Model, Lowered, Form]:
    """A quantized model of the zoo, lowered for a target."""
    import onnx

    data, form = captured(name, dtype)
    graph = ir.from_proto(onnx.load_from_string(data))
    choices = plan(quantized_linears(model), target, dtype, accuracy_level)
    return graph, lower(graph, choices, dtype), form


def values(graph: ir.Model, form: Form, dtype: str, features: tuple[str, ...] = ()) -> list[np.ndarray]:
    """What ONNX Runtime makes of the form's inputs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(graph, path, external_data="model.onnx_data")
        return run(path, feeds(form, dtype), features)


def wanted(model: nn.Module, form: Form) -> list[np.ndarray]:
    """What the model makes of them."""
    return reference(model, form)
