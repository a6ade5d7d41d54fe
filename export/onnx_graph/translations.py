"""How torch ops that its exporter does not know, or not well, are written in ONNX."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DOMAIN, NODE = "qfx", "QLinear"
"""The opaque node of a quantized linear."""


def translations() -> dict[Any, Any]:
    """Ops and the functions that write them: opaque linears, and products of rows that are sorted by their expert."""
    made = {torch.ops.qfx.opaque_linear.default: _opaque()}
    # registered when transformers loads its experts; torch's own takes bfloat16 alone under export
    if (grouped := getattr(torch.ops.transformers, "grouped_mm_fallback", None)) is not None:
        made[grouped.default] = _grouped_mm
    return made


class RealUnsqueeze(TorchFunctionMode):
    """Adds axes to complex tensors as to pairs of real ones: the exporter writes these alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.unsqueeze, Tensor.unsqueeze) and args and args[0].is_complex():
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            pairs = torch.view_as_real(args[0])
            return torch.view_as_complex(pairs.unsqueeze(dim if dim >= 0 else dim - 1))
        return func(*args, **(kwargs or {}))


@functools.cache
def _opaque() -> Any:
    """The exporter wants a schema for a domain that is not ONNX' own."""
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


def _grouped_mm(input: Any, weight: Any, offs: Any) -> Any:
    """`out[rows of e] = input[rows of e] @ weight[e]`, rows `offs[e - 1]` to `offs[e]`: one product for each expert.

    A slice may be empty. Runtimes split the weight, which is a constant, once, when they load the file.

    Args:
        input: `[rows, in]`, sorted by expert.
        weight: `[experts, in, out]`.
        offs: `[experts]`, the ends of the experts' rows.
    """
    from onnxscript import opset18

    op: Any = opset18  # its types ask for literals
    experts = weight.shape[0]
    if experts == 1:
        return op.MatMul(input, op.Squeeze(weight, op.Constant(value_ints=[0])))
    zero = start = op.Constant(value_ints=[0])
    products = []
    ends = op.Split(op.Cast(offs, to=7), axis=0, num_outputs=experts)
    for end, matrix in zip(ends, op.Split(weight, axis=0, num_outputs=experts), strict=True):
        products.append(op.MatMul(op.Slice(input, start, end, zero), matrix))  # [1, rows, out]
        start = end
    return op.Squeeze(op.Concat(*products, axis=1), zero)
