"""Puts quantized weights into a graph: the counterpart of `modules.py` where there is no module tree to write into.

A product with a matrix becomes the op, or kernel, that a `QLinear` calls. Any other product, over experts or by an
einsum, reads the dequantized weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx.core.errors import KernelError
from qfx.core.graph import Graph
from qfx.core.linear import Linear
from qfx.core.passes import Solved
from qfx.core.qtensor import fake_quantize
from qfx.core.simulate import FakeQuantize
from qfx.core.spec import QSpec, Scheme
from qfx.kernels.pack import dequantize_stored, store
from qfx.modules.kernels import KERNELS, choose_kernel
from qfx.modules.linear import QLinear
from qfx.modules.merged import merge
from qfx.passes.lower._rewrite import emit, part

aten = torch.ops.aten
_PRODUCTS = {aten.linear.default: 0, aten.matmul.default: 0, aten.mm.default: 0, aten.addmm.default: 1}
_STATIC = ("input_scale", "input_zero")
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_STRIDED = {aten.transpose.int, aten.permute.default, aten.t.default, aten.slice.Tensor, aten.unsqueeze.default}
BIAS = "joined_bias"
"""The biases of linears that are computed as one, one below the other."""


class Dequantize(nn.Module):
    """A quantized weight that a product reads as it was: in the parameter's own layout and dtype.

    Attributes:
        scheme: of the layer.
        call: computes the weight from the buffers.

    Args:
        stored: the weight, as `store` gives it, and `input_scale` and `input_zero` if the input is static.
        scheme: as above.
        columns: inputs of the layer.
        layout: the permutation that takes canonical dims to the parameter's own.
        dtype: of the weight.
    """

    def __init__(
        self,
        stored: Mapping[str, Tensor | None],
        scheme: Scheme,
        columns: int,
        layout: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        keys = tuple(key for key, value in stored.items() if value is not None and key not in _STATIC)
        self.scheme = scheme
        self.call = Dequantizer(scheme.weight, keys, columns, layout, dtype)
        for key, value in stored.items():
            if value is not None:
                self.register_buffer(key, value)

    @classmethod
    def of(cls, solved: Solved, parameter: Tensor) -> Dequantize:
        """What a solver gave for a parameter, with an input that is not static."""
        linear, stored = solved.linears[0], store(solved.qtensor.to(parameter.device))
        order = [a for group in linear.axes for a in group]
        if len(order) != solved.qtensor.codes.dim():
            raise KernelError(f"lower: {linear.name} has {len(order)} axes, more than experts, out, in")
        layout = tuple(order.index(i) for i in range(len(order)))
        return cls(stored, solved.scheme, solved.qtensor.codes.shape[-1], layout, parameter.dtype)


@dataclass(frozen=True)
class Dequantizer:
    """The target of a node that computes a weight from what is stored of it.

    Attributes:
        spec: of the weight.
        keys: what its arguments are, as `store` calls them.
        columns: inputs of the layer.
        layout: the permutation that takes canonical dims to the parameter's own.
        dtype: of the weight.
    """

    spec: QSpec
    keys: tuple[str, ...]
    columns: int
    layout: tuple[int, ...]
    dtype: torch.dtype

    __name__ = "dequantize"

    def __call__(self, *values: Tensor) -> Tensor:
        """The weight, computed each time."""
        stored = dict.fromkeys(("codes", "scale", "zero", "g_idx", "scale_scale")) | dict(
            zip(self.keys, values, strict=True)
        )
        weight = dequantize_stored(stored, self.spec, self.columns)
        return weight.to(self.dtype).permute(self.layout).contiguous()


@dataclass(frozen=True)
class StaticQuantize:
    """The target of a node that quantizes and dequantizes its input by a scale, and a zero point, that it reads."""

    spec: QSpec

    __name__ = "static_quantize"

    def __call__(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Values of x's dtype on the grid."""
        return fake_quantize(x, scale, zero, self.spec)


def quantized_weight(linear: Linear, solved: Solved, parameter: Tensor, fit: bool = True) -> QLinear | Dequantize:
    """The module that holds a solved weight and calls what computes it, on the parameter's device.

    Args:
        linear: the product.
        solved: what a solver gave for its weight.
        parameter: the weight.
        fit: whether a linear on a CUDA device gets the layout of its kernel.

    Raises:
        KernelError: no op computes the scheme.
    """
    if not by_op(linear):
        return Dequantize.of(solved, parameter)
    qtensor = solved.qtensor.to(parameter.device)
    given: Any = {"input_scale": solved.input_scale, "input_zero": solved.input_zero}
    module = QLinear.from_qtensor(qtensor, None, solved.scheme, dtype=parameter.dtype, **given)
    if fit:
        fit_kernel(module, parameter.device)
    return module


def join(members: Sequence[QLinear], biases: Sequence[Tensor]) -> QLinear:
    """One linear of several that read one value; `BIAS` is a buffer of it. The members give their weights away.

    Raises:
        KernelError: they are not alike.
    """
    whole = merge(members).whole
    if biases:
        whole.register_buffer(BIAS, torch.cat([b.detach() for b in biases]))
    fit_kernel(whole, whole.device)
    return whole


def fit_kernel(module: QLinear, device: torch.device) -> None:
    """Gives a quantized linear on a CUDA device the layout of the kernel that computes it."""
    if device.type == "cuda":
        kernel, _ = choose_kernel(module.scheme, module.in_features, module.out_features, module.has_g_idx)
        if kernel in KERNELS:
            with contextlib.suppress(KernelError):  # groups of unequal sizes: it reads the weight as it is stored
                module.use_kernel(kernel)


def lacks_kernel(module: QLinear) -> bool:
    """Whether a quantized linear on a CUDA device has its weight in another layout than its kernel reads."""
    if module.device.type != "cuda" or not module.as_stored:
        return False
    return choose_kernel(module.scheme, module.in_features, module.out_features, module.has_g_idx)[0] in KERNELS


def by_op(linear: Linear) -> bool:
    """Whether one op computes a linear: a plain product with a matrix."""
    experts, out, columns = linear.axes
    return linear.node.target in _PRODUCTS and not experts and len(out) == len(columns) == 1


def form_of(linear: Linear, scheme: Scheme, parameter: Tensor) -> QLinear | None:
    """An empty module of the form that a linear will have; None if no op computes it."""
    if not by_op(linear):
        return None
    out, columns = (parameter.shape[axes[0]] for axes in linear.axes[1:])
    with contextlib.suppress(KernelError):  # whoever makes the weight tells it
        return QLinear.empty(columns, out, scheme, bias=False, dtype=parameter.dtype, device="meta")
    return None


def put_module(
    graph: Graph, linears: Sequence[Linear], group: Sequence[Linear], module: QLinear | Dequantize, name: str
) -> None:
    """Computes a linear, or several with what `join` gave, with a module that the graph reads below `name`.

    Args:
        graph: it is changed.
        linears: of the graph; those that read a value which is replaced read the new one.
        group: one of them, or several that read one value.
        module: what computes them.
        name: as above.
    """
    graph.module.add_module(name, module)
    before = [linear.y for linear in group]
    if len(group) > 1:
        assert isinstance(module, QLinear)
        after = replace_joined(graph, group, module, name)
    else:
        after = [replace_linear(graph, group[0], module, name)]
    for old, new in zip(before, after, strict=True):
        for other in linears:
            if other.x is old:
                other.x = new


def replace_linear(graph: Graph, linear: Linear, module: QLinear | Dequantize, name: str) -> fx.Node:
    """Computes a linear with a quantized weight, which the graph reads below `name`; returns its output value."""
    if isinstance(module, Dequantize):
        _dequantize(graph, linear, module, name)
        return linear.y
    y, bias = linear.y, bias_of(linear)
    if linear.foreign_bias:
        y = linear.node
    with graph.fx.inserting_before(y):
        result = _call(graph.fx, module, linear.x, None if linear.foreign_bias else bias, name, y)
        if linear.foreign_bias:
            result = graph.fx.call_function(aten.add.Tensor, (result, bias))
            result.meta = dict(y.meta)
    y.replace_all_uses_with(result)
    graph.fx.erase_node(y)
    if y is not linear.node:
        graph.fx.erase_node(linear.node)
    graph.touch()
    return result


def plain_bias(linear: Linear) -> str | None:
    """The name of the bias that is added to a product, "" if there is none, None if it is no parameter as it is."""
    bias = bias_of(linear)
    if bias is None or linear.foreign_bias:
        return "" if bias is None else None
    return str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def replace_joined(graph: Graph, linears: Sequence[Linear], module: QLinear, name: str) -> list[fx.Node]:
    """Computes linears that read one value with what `join` gave; returns their output values."""
    first, sizes = linears[0], [linear.y.meta["val"].shape[-1] for linear in linears]
    with graph.fx.inserting_before(first.node):
        bias = _attribute(graph.fx, BIAS, module, name) if BIAS in module._buffers else None
        whole = _call(graph.fx, module, first.x, bias, name, first.node)
        like = first.node.meta["val"]
        whole.meta["val"] = like.new_empty((*like.shape[:-1], sum(sizes)))
        split = emit(graph.fx, aten.split_with_sizes.default, (whole, sizes, -1), first.node)
        parts = [part(graph.fx, split, i) for i in range(len(sizes))]
    for linear, new in zip(linears, parts, strict=True):
        new.meta |= {k: v for k, v in linear.y.meta.items() if k != "val"}
        linear.y.replace_all_uses_with(new)
        graph.fx.erase_node(linear.y)
        if linear.y is not linear.node:
            graph.fx.erase_node(linear.node)
        _allow_strides(new)
    graph.touch()
    return parts


def _allow_strides(node: fx.Node) -> None:
    """Views of a value, which is a part of another one now, copy where its strides allow no view."""
    for user in node.users:
        if user.target in _VIEWS:
            user.target = aten.reshape.default
        if user.target is aten.reshape.default or user.target in _STRIDED:
            _allow_strides(user)


def bias_of(linear: Linear) -> Any:
    """The value that is added to the product."""
    node, y = linear.node, linear.y
    if y is not node:
        return y.args[1] if y.args[0] is node else y.args[0]
    if node.target is aten.addmm.default:
        return node.args[0]
    return node.args[2] if node.target is aten.linear.default and len(node.args) > 2 else None


def _call(graph: fx.Graph, module: QLinear, x: fx.Node, bias: Any, name: str, like: fx.Node) -> fx.Node:
    """The nodes that a quantized linear's forward is, with a value of the graph as its bias."""
    inner = _Tracer().trace(_WithBias(module))
    given = iter((x, bias))
    env: dict[fx.Node, Any] = {}
    for node in inner.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "output":
            return env[node.args[0]]  # type: ignore[index]
        elif node.op == "get_attr":
            env[node] = _attribute(graph, str(node.target).removeprefix("linear."), module, name)
        else:
            env[node] = new = graph.node_copy(node, lambda n: env[n])
            if isinstance(new.target, torch._ops.OpOverloadPacket):
                new.target = new.target.default
            new.meta = dict(like.meta)
    raise AssertionError("a traced forward has no output")


def _attribute(graph: fx.Graph, leaf: str, module: nn.Module, name: str) -> fx.Node:
    node = graph.create_node("get_attr", f"{name}.{leaf}")
    node.meta["val"] = module.get_buffer(leaf)
    return node


class _WithBias(nn.Module):
    """A quantized linear to which another value is added than a buffer of its own."""

    def __init__(self, linear: QLinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Any, bias: Any) -> Any:
        """The linear, which itself has no bias, with this one."""
        self.linear.__dict__["bias"] = bias
        try:
            return self.linear(x)
        finally:
            self.linear.__dict__["bias"] = None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return False


def _dequantize(graph: Graph, linear: Linear, module: Dequantize, name: str) -> None:
    scheme = module.scheme
    if (read := _reader(linear)) is not None:  # None: another product reads it by the same way
        at, source = read
        _read_codes(graph, at, source, module, name)
    if scheme.input is not None:
        _quantize_input(graph, linear, module, name)
    graph.touch()


def _read_codes(graph: Graph, at: fx.Node, source: fx.Node, module: Dequantize, name: str) -> None:
    with graph.fx.inserting_before(at):
        stored = tuple(_attribute(graph.fx, key, module, name) for key in module.call.keys)
        weight = graph.fx.call_function(module.call, stored)
        weight.meta = {k: v for k, v in at.meta.items() if k == "nn_module_stack"} | {"val": source.meta["val"]}
    at.replace_input_with(source, weight)


def _quantize_input(graph: Graph, linear: Linear, module: Dequantize, name: str) -> None:
    spec = module.scheme.input
    assert spec is not None
    target = FakeQuantize(spec) if spec.dynamic else StaticQuantize(spec)
    with graph.fx.inserting_before(linear.node):
        static = tuple(_attribute(graph.fx, key, module, name) for key in _STATIC if hasattr(module, key))
        node = graph.fx.call_function(target, (linear.x, *static))
    node.meta = dict(linear.x.meta)
    linear.node.replace_input_with(linear.x, node)
    linear.x = node


def _reader(linear: Linear) -> tuple[fx.Node, fx.Node] | None:
    """The first reader of a linear's parameter on the way to its product, and the parameter's node."""
    for operand in linear.node.all_input_nodes:
        reader, source = linear.node, operand
        while operand is not linear.x:
            if source.op == "get_attr" and source.target == linear.weight:
                return reader, source
            if source.op != "call_function" or len(source.all_input_nodes) != 1:  # not a transpose or a cast
                break
            reader, source = source, source.all_input_nodes[0]
    return None
