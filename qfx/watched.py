"""Quantized weights that follow their parameters: made once for all graphs, and anew when a parameter changes."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from qfx.modules.linear import QLinear
from qfx.passes.lower.graph import Dequantize, join, quantized_weight

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

    def quantize(self, parameter: Tensor, *fit: bool) -> QLinear | Dequantize:
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
        return quantized_weight(linear, state.solved["weight"], parameter, *fit)


@dataclass(eq=False)
class Weight:
    """The quantized weight of a parameter, or of several that are multiplied with one value, and how those were then.

    Attributes:
        products: how it was made; several are computed as one.
        module: holds the codes; graphs read its buffers.
        made: how often the weight was quantized.
    """

    products: tuple[Product, ...]
    module: QLinear | Dequantize
    made: int = 1
    _seen: tuple[tuple[Any, int, int], ...] = ()

    def __post_init__(self) -> None:
        """Finds the tensors that graphs read."""
        self.tensors = list(self.module.buffers())

    @classmethod
    def of(cls, products: Sequence[Product], parameters: Sequence[Tensor]) -> Weight:
        """The weight, quantized when it is first asked for and when a parameter has changed.

        Args:
            products: of one linear, or of those that become one.
            parameters: of each product; behind them, the bias of each, if several are joined and have biases.
        """
        known: dict[Any, Weight] = WEIGHTS.setdefault(parameters[0], {})
        for stale in [k for k, w in known.items() if any(reference() is None for reference, *_ in w._seen)]:
            del known[stale]  # joined with a parameter that is gone
        key = (*(product.key for product in products), *map(id, parameters[1:]))
        if key not in known:
            known[key] = cls(tuple(products), _quantize(products, parameters))
            known[key].watch(parameters)
        known[key].check(parameters)
        return known[key]

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """Remembers the parameters as they are now."""
        self._seen = tuple((weakref.ref(p), p._version, p.data_ptr()) for p in parameters)

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters, and nothing was written to them since."""
        return all(
            reference() is p and version == p._version and address == p.data_ptr()
            for (reference, version, address), p in zip(self._seen, parameters, strict=True)
        )

    def release(self, read: Collection[int]) -> int:
        """Leaves one element, NaN, of each of its matrices whose `id` is not in `read`; returns the bytes freed."""
        freed, parameters = 0, [reference() for reference, *_ in self._seen]
        if any(p is None for p in parameters):
            return 0
        for p in parameters:
            if p.dim() > 1 and id(p) not in read and any(p.stride()):
                freed += p.numel() * p.element_size()
                p.data = torch.full([1] * p.dim(), torch.nan, dtype=p.dtype, device=p.device).expand(p.shape)
        self.watch(parameters)
        return freed

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Quantizes its own parameters anew if one was written to."""
        if not self.fits(parameters):
            fresh = _quantize(self.products, parameters)
            with torch.inference_mode(False), torch.no_grad():
                for old, new in zip(self.tensors, fresh.buffers(), strict=True):
                    old.copy_(new)  # in place: recorded CUDA graphs hold the addresses
            self.made += 1
            self.watch(parameters)


@torch.inference_mode(False)
@torch.no_grad()
def _quantize(products: Sequence[Product], parameters: Sequence[Tensor]) -> QLinear | Dequantize:
    if len(products) == 1:
        return products[0].quantize(parameters[0])
    made = [product.quantize(parameter, False) for product, parameter in zip(products, parameters, strict=False)]
    return join([m for m in made if isinstance(m, QLinear)], parameters[len(products) :])


@dataclass
class Slot:
    """A place of a graph where a quantized weight is read.

    Attributes:
        at: positions of its parameters among the graph's inputs.
        weight: the one that was read last; Dynamo may call one graph with several layers' parameters.
    """

    at: Sequence[int]
    weight: Weight

    def tensors(self, inputs: Sequence[Any]) -> list[Tensor]:
        """The codes and scales of the parameters with which the graph is called."""
        parameters = [inputs[at] for at in self.at]
        if not self.weight.fits(parameters):
            self.weight = Weight.of(self.weight.products, parameters)
        return self.weight.tensors


WEIGHTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the first parameter and then by how it is quantized: every graph and every recompilation reads the same codes."""
