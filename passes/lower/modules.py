"""Writes what the solvers decided back into the user's own modules.

A linear that is a module of its own becomes a `QLinear`. A parameter that a module multiplies with inside its own
forward (experts, routers, raw parameters) becomes codes behind the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qfx.core.errors import KernelError
from qfx.core.graph import layer_path
from qfx.core.linear import Linear
from qfx.core.online import carry_online
from qfx.core.passes import Result, Solved, State
from qfx.core.report import Miss
from qfx.core.simulate import FakeQuantize
from qfx.modules.linear import QLinear
from qfx.modules.parameter import quantize_parameter

_RESHAPES = {torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default}


@dataclass(frozen=True)
class Lower:
    """The last step of every recipe that quantizes; it is added by itself."""

    name = "lower"
    needs_data = False

    @torch.no_grad()
    def __call__(self, state: State) -> Result:
        """Replaces modules and parameters; a layer that no op computes is reported, and keeps its rounded weight."""
        result = Result()
        layers = {layer.name: layer for layer in state.report.layers}
        for i, (weight, solved) in enumerate(state.solved.items()):
            state.progress(self.name, i, len(state.solved))
            linear = solved.linears[0]
            try:
                op = replace_layer(state.graph.module, linear, weight, solved, state.graph.attr(weight))
            except KernelError as e:
                result.misses.append(Miss(linear.name, str(e), self.name, state.graph.attr(weight).numel()))
                layer = layers[linear.name]
                layer.note = f"rounded to {layer.scheme}, but kept in float: {e}"
                layer.scheme, layer.bits = None, 0.0
                continue
            layers[linear.name].op = op
            result.changed += 1
        state.progress(self.name, len(state.solved), len(state.solved))
        return result


def replace_layer(root: nn.Module, linear: Linear, weight: str, solved: Solved, parameter: Tensor) -> str:
    """Puts one quantized layer into the module tree; returns the name of the op that will compute it."""
    given: dict[str, Any] = {"input_scale": solved.input_scale, "input_zero": solved.input_zero}
    if own_module(root, linear, solved.linears):
        bias = getattr(root.get_submodule(linear.name), "bias", None)
        bias = bias.detach() if isinstance(bias, Tensor) else None
        qtensor = solved.qtensor.to(parameter.device)
        module = QLinear.from_qtensor(qtensor, bias, solved.scheme, dtype=parameter.dtype, **given)
        module.train(False)
        carry_online(root.get_submodule(linear.name), module)
        replace_module(root, root.get_submodule(linear.name), module)
        return module.op
    path, _, leaf = weight.rpartition(".")
    around = [root.get_submodule(p) for p in (path, path.rpartition(".")[0])]
    if solved.scheme.input is not None and any(isinstance(m, nn.MultiheadAttention) for m in around):
        raise KernelError(f"lower: torch's fused attention reads {weight} and quantizes no input; use a WxA16 scheme")
    order = [a for group in linear.axes for a in group]
    if len(order) != solved.qtensor.codes.dim():
        raise KernelError(f"lower: {weight} has {len(order)} axes, more than experts, out, in")
    layout = tuple(order.index(i) for i in range(len(order)))
    qtensor = solved.qtensor.to(parameter.device)
    quantize_parameter(root.get_submodule(path), leaf, qtensor, solved.scheme, layout, **given)
    return "dequantize"


def own_module(root: nn.Module, linear: Linear, uses: Sequence[Linear]) -> bool:
    """Whether all that a parameter's products belong to is one module, which does nothing else."""
    inside = all(layer_path(use.node) == linear.name for use in uses)
    return inside and not linear.experts and _only_multiplies(root.get_submodule(linear.name), uses)


def _only_multiplies(module: nn.Module, uses: Sequence[Linear]) -> bool:
    """Whether a module returns the product and nothing else; one that routes also chooses experts."""
    if type(module) is nn.Linear:
        return True
    products = {n for use in uses for n in (use.node, use.y)}
    for node in uses[0].node.graph.nodes:
        if node.op != "call_function" or layer_path(node) != uses[0].name or node in products:
            continue
        of_weight = all(n.op == "get_attr" for n in node.all_input_nodes)
        computes = isinstance(node.meta.get("val"), Tensor) and not isinstance(node.target, FakeQuantize)
        if computes and not of_weight and node.target not in _RESHAPES:
            return False
    return True


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module wherever another one stands, under all its names."""
    for parent in root.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
