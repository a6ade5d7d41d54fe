"""Quantized weights that follow their parameters: made once for all graphs, and anew when a parameter changes."""

from __future__ import annotations

import functools
import json
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from qfx.modules.linear import QLinear
from qfx.passes.lower.graph import Dequantize, quantized_weight

from .core.graph import Graph
from .core.linear import Linear
from .core.passes import Pass, State, run_pass
from .core.report import Report
from .core.spec import Scheme
from .recipes import settings


@dataclass(frozen=True)
class Product:
    """What becomes of a parameter: the product that reads it, and how it is quantized there.

    Attributes:
        name: of the layer.
        target: the product's op.
        axes: of the parameter, as in `Linear`.
        scheme: what the recipe plans for it.
        steps: the recipe's.
    """

    name: str
    target: Any
    axes: Any
    scheme: Scheme
    steps: tuple[Pass, ...]

    @functools.cached_property
    def key(self) -> str:
        """The same for products that make the same codes of a parameter."""
        chosen = [{s.name: settings(s)} for s in self.steps]
        return json.dumps([self.scheme.to_dict(), chosen, self.axes, str(self.target)])

    def quantize(self, parameter: Tensor) -> QLinear | Dequantize:
        """Runs the steps on a graph of this product alone, with a copy of the parameter: solvers write into it."""
        holder = nn.Module()
        holder.weight = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        graph = fx.Graph()
        x, weight = graph.placeholder("x"), graph.create_node("get_attr", "weight")
        y = graph.call_function(self.target, (x, weight))
        graph.output(y)
        linear = Linear(self.name, y, x, "weight", self.axes, None, y)
        whole = Graph(holder, graph, nn.Module(), pytree.tree_structure(0))
        state = State(whole, [linear], [], {"weight": self.scheme}, [], Report(self.name, {}, 0))
        done: list[str] = []
        for step in self.steps:
            run_pass(state, step, settings(step), done)
            done.append(step.name)
        return quantized_weight(linear, state.solved["weight"], parameter)


@dataclass(eq=False)
class Weight:
    """A parameter's quantized weight, and the state of the parameter from which it was made.

    Attributes:
        product: how it was made.
        module: holds the codes; graphs read its buffers.
        made: how often the weight was quantized.
    """

    product: Product
    module: QLinear | Dequantize
    made: int = 1
    _parameter: Any = None
    _version: int = 0
    _address: int = 0

    def __post_init__(self) -> None:
        """Finds the tensors that graphs read."""
        self.tensors = list(self.module.buffers())

    @classmethod
    def of(cls, product: Product, parameter: Tensor) -> Weight:
        """The weight of a parameter in a product, quantized when it is first asked for and when it has changed."""
        known: dict[str, Weight] = WEIGHTS.setdefault(parameter, {})
        if product.key not in known:
            with torch.inference_mode(False), torch.no_grad():
                known[product.key] = cls(product, product.quantize(parameter))
            known[product.key].watch(parameter)
        known[product.key].check(parameter)
        return known[product.key]

    def watch(self, parameter: Tensor) -> None:
        """Remembers the parameter as it is now."""
        self._parameter = weakref.ref(parameter)
        self._version, self._address = parameter._version, parameter.data_ptr()

    def fits(self, parameter: Tensor) -> bool:
        """Whether this is the parameter, and nothing was written to it since."""
        same = self._parameter() is parameter and self._version == parameter._version
        return bool(same and self._address == parameter.data_ptr())

    def check(self, parameter: Tensor) -> None:
        """Quantizes its own parameter anew if that was written to."""
        if not self.fits(parameter):
            with torch.inference_mode(False), torch.no_grad():
                fresh = self.product.quantize(parameter)
                for old, new in zip(self.tensors, fresh.buffers(), strict=True):
                    old.copy_(new)  # in place: recorded CUDA graphs hold the addresses
            self.made += 1
            self.watch(parameter)


@dataclass
class Slot:
    """A place of a graph where a quantized weight is read.

    Attributes:
        at: position of its parameter among the graph's inputs.
        weight: the one that was read last; Dynamo may call one graph with several layers' parameters.
    """

    at: int
    weight: Weight

    def tensors(self, parameter: Tensor) -> list[Tensor]:
        """The codes and scales of the parameter with which the graph is called."""
        if not self.weight.fits(parameter):
            self.weight = Weight.of(self.weight.product, parameter)
        return self.weight.tensors


WEIGHTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By parameter and then by how it is quantized: every graph and every recompilation reads the same codes."""
