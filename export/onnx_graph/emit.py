"""Writes nodes and initializers in place of one opaque linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401  (registers numpy's types of 4 and 8 bits)
import numpy as np
import onnx_ir as ir

from qfx.export.onnx_graph.layer import Layer

CONTRIB = "com.microsoft"
TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


class Emit:
    """Builds what replaces one node; its nodes are named `<layer>/<op>`, so that every tool's output says whose.

    Attributes:
        layer: the linear.
        x: the node's input.
        dtype: "float32" or "float16": of the graph around it.
        nodes: made so far, in order.
    """

    def __init__(
        self, layer: Layer, x: ir.Value, dtype: str, graph: ir.Graph, shared: dict[Any, Any], again: int = 0
    ) -> None:
        self.layer, self.x, self.dtype = layer, x, dtype
        self.nodes: list[ir.Node] = []
        self._graph, self._shared, self._used = graph, shared, dict[str, int]()
        self._call = f"#{again}" if again else ""  # a linear may be called more than once

    @property
    def kind(self) -> ir.DataType:
        """Of the graph around it."""
        return TYPES[self.dtype]

    @property
    def numpy(self) -> type:
        """The same for numpy."""
        return np.float16 if self.dtype == "float16" else np.float32

    def __call__(
        self,
        op: str,
        *inputs: ir.Value | None,
        to: ir.DataType | None = None,
        like: ir.Value | None = None,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Adds a node.

        Args:
            op: its type.
            inputs: None for one that is left out.
            to: the type of the (first) output.
            like: a value of its shape.
            outputs: how many; a single one is returned as itself.
            domain: of the op.
            attributes: of the node.
        """
        if (cast := attributes.pop("to_", None)) is not None:  # the attribute of Cast
            attributes["to"], to = cast, cast
        count = self._used[op] = self._used.get(op, 0) + 1
        name = f"{self.layer.name}{self._call}/{op}" + (f"_{count}" if count > 1 else "")
        node = ir.node(op, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = name if i == 0 else f"{name}:{i}"
        if to is not None:
            node.outputs[0].type = ir.TensorType(to)
        if like is not None:
            node.outputs[0].shape = like.shape
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def lazy(self, leaf: str, kind: ir.DataType, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> ir.Value:
        """An initializer that is computed when it is written."""
        name = f"{self.layer.name}.{leaf}"
        whole = ir.Shape(shape)

        def tensor() -> ir.TensorProtocol:
            made = make()
            if tuple(made.shape) != shape:
                raise AssertionError(f"{name}: made {made.shape}, promised {shape}")
            return ir.tensor(made, dtype=kind, name=name)

        return self._put(ir.LazyTensor(tensor, kind, whole, name=name), name)

    def const(self, leaf: str, values: np.ndarray) -> ir.Value:
        """An initializer of a few values."""
        name = f"{self.layer.name}.{leaf}"
        return self._put(ir.tensor(values, name=name), name)

    def scalar(self, value: float, kind: ir.DataType) -> ir.Value:
        """A constant that all linears share."""
        made = np.asarray(value, dtype=kind.numpy())
        key = ("scalar", kind, made.tobytes())
        if key not in self._shared:
            name = f"qfx.{kind.name.lower()}.{value:g}"
            while name in self._graph.initializers:
                name += "_"
            self._shared[key] = self._put(ir.tensor(made, name=name), name)
        return self._shared[key]

    def axes(self, *axes: int) -> ir.Value:
        """Axes as an input, shared by all linears."""
        made = np.asarray(axes, np.int64)
        key = ("axes", axes)
        if key not in self._shared:
            self._shared[key] = self._put(ir.tensor(made, name=f"qfx.axes.{axes}"), f"qfx.axes.{axes}")
        return self._shared[key]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` emits, once for all linears that read the same value with the same key."""
        whole = (self.x, key)
        if whole not in self._shared:
            self._shared[whole] = make()
        return self._shared[whole]

    def _put(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        if (known := self._graph.initializers.get(name)) is not None:
            return known
        shape = ir.Shape(tensor.shape.numpy())  # an initializer's sizes are numbers
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value
