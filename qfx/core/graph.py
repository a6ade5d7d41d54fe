"""The graph that every pass reads: an `fx.Graph` of aten ops over the user's own parameters.

Invariants, which a pass may assume and must keep:

1. Nodes are `placeholder` (named after the model's inputs), `get_attr` (a parameter, buffer, or lifted constant),
functional
   `call_function`, and one `output`. Assertions, no-op casts, and dropout are gone.
2. A `get_attr` target is the name of a parameter or buffer in the user's module tree, and its value is looked up there
each
   time, so an edit of the module and an edit seen by the graph are the same thing.
3. Nodes are in execution order; `node.meta["val"]` holds the shape and dtype seen at capture, with symbolic sizes.
4. Running the graph on the inputs gives the module's own output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

Env = dict[Node, Any]


@dataclass(frozen=True)
class Segment:
    """A run of consecutive nodes.

    Attributes:
        name: the block's module path, or "outside".
        nodes: in execution order, without constants.
        drop: for a node, the values that nothing reads after it.
        leaves: values computed here that later segments read, or the model returns.
    """

    name: str
    nodes: tuple[Node, ...]
    drop: dict[Node, list[Node]]
    leaves: tuple[Node, ...]


@dataclass
class Graph:
    """A captured model.

    Attributes:
        module: the user's module; parameters live here.
        fx: the graph.
        constants: holder of what the capture lifted (constants that are in no module).
        out_spec: the tree of the output, to rebuild the model's own return value.
        overrides: values that stand in for parameters while a fold is checked in float32.
        working_dtype: the dtype that floating values are cast to in such a check; None computes as the model does.
    """

    module: nn.Module
    fx: fx.Graph
    constants: nn.Module
    out_spec: pytree.TreeSpec
    overrides: dict[str, Tensor] = field(default_factory=dict)
    working_dtype: torch.dtype | None = None
    _segments: list[Segment] | None = None

    @property
    def nodes(self) -> list[Node]:
        """All nodes in execution order."""
        return list(self.fx.nodes)

    @property
    def inputs(self) -> list[Node]:
        """The placeholders."""
        return [n for n in self.fx.nodes if n.op == "placeholder"]

    @property
    def output(self) -> Node:
        """The output node."""
        return next(n for n in reversed(self.fx.nodes) if n.op == "output")

    def attr(self, name: str) -> Any:
        """The current value behind a `get_attr` target."""
        if name in self.overrides:
            return self.overrides[name]
        for holder in (self.module, self.constants):
            try:
                return _getattr(holder, name)
            except AttributeError:
                continue
        raise AttributeError(f"graph: no parameter, buffer, or constant named {name!r}")

    def is_parameter(self, name: str) -> bool:
        """Whether a `get_attr` target is a floating-point parameter of the user's module."""
        try:
            value = _getattr(self.module, name)
        except AttributeError:
            return False
        return isinstance(value, nn.Parameter) and value.is_floating_point()

    def uses(self, name: str) -> list[Node]:
        """Every node that reads the storage behind a parameter, also under another name (tied weights)."""
        storage = _storage(self.attr(name))
        found = []
        for node in self.fx.nodes:
            value = self.attr(str(node.target)) if node.op == "get_attr" else None
            if isinstance(value, Tensor) and _storage(value) == storage:
                found += list(node.users)
        return found

    def unread(self) -> list[str]:
        """The module's parameters that no node reads under any name: what the captured call does not run."""
        constants = [self.attr(str(n.target)) for n in self.fx.nodes if n.op == "get_attr" and n.users]
        read = {_storage(value) for value in constants if isinstance(value, Tensor)}
        return [name for name, p in self.module.named_parameters() if _storage(p) not in read]

    def add_parameter(self, name: str, value: Tensor, before: Node) -> Node:
        """Registers a new parameter in the user's module and returns its `get_attr` node, placed before a node."""
        path, _, leaf = name.rpartition(".")
        owner = self.module.get_submodule(path)
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        with self.fx.inserting_before(before):
            node = self.fx.create_node("get_attr", name)
        node.meta["val"] = value
        self.touch()
        return node

    def run(
        self,
        feeds: Mapping[str, Tensor],
        *,
        tap: Callable[[Node, Any], Any] | None = None,
    ) -> Any:
        """Runs the whole graph on named inputs and returns the model's output tree.

        Args:
            feeds: input name to tensor.
            tap: called with each computed (node, value); what it returns, if not None, replaces the value.
        """
        env: Env = {}
        out: Any = None
        for segment in self.segments():
            out = self.execute(segment.nodes, env, feeds=feeds, tap=tap, drop=segment.drop)
        return pytree.tree_unflatten(out, self.out_spec)

    def execute(
        self,
        nodes: Sequence[Node],
        env: Env,
        *,
        feeds: Mapping[str, Tensor] | None = None,
        tap: Callable[[Node, Any], Any] | None = None,
        drop: Mapping[Node, Sequence[Node]] | None = None,
    ) -> Any:
        """Computes nodes in order, reading and filling `env`; returns the flat output if the output node is among them.

        Args:
            nodes: what to compute, in execution order.
            env: values of earlier nodes; changed.
            feeds: values of placeholders by name.
            tap: see `run`.
            drop: values to forget after a node (see `Segment.drop`).
        """
        for node in nodes:
            if node.op == "output":
                return self._args(node.args[0], env)
            if node.op == "get_attr":
                continue
            value = self.value(node, env, feeds)
            if tap is not None and (replaced := tap(node, value)) is not None:
                value = replaced
            env[node] = value
            for dead in drop.get(node, ()) if drop else ():
                env.pop(dead, None)
        return None

    def value(self, node: Node, env: Env, feeds: Mapping[str, Tensor] | None = None) -> Any:
        """The value of one node given those of its arguments."""
        if node.op == "call_function":
            args, kwargs = self._args(node.args, env), self._args(node.kwargs, env)
            if self.working_dtype is not None:
                args, kwargs = cast(args, self.working_dtype), cast(kwargs, self.working_dtype)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "get_attr":
            return self.attr(str(node.target))
        if node.op == "placeholder":
            return (feeds or {})[str(node.target)]
        raise RuntimeError(f"graph: unexpected {node.op} node {node}")

    def _args(self, tree: Any, env: Env) -> Any:
        return fx.map_arg(tree, lambda n: env[n] if n in env else self._constant(n))

    def _constant(self, node: Node) -> Any:
        if node.op != "get_attr":
            raise KeyError(f"graph: {node} is read before it is computed")
        return self.attr(str(node.target))

    def segments(self) -> list[Segment]:
        """Cuts the graph at its repeated blocks: the children of the outermost module lists, and what lies between."""
        if self._segments is None:
            self._segments = self._cut()
        return self._segments

    def touch(self) -> None:
        """To be called after an edit of `fx`: the segments are cut anew when they are next asked for."""
        self._segments = None

    def _cut(self) -> list[Segment]:
        runs: list[tuple[str, list[Node]]] = []
        for node in self.fx.nodes:
            if node.op == "get_attr":
                continue
            key = _block(node)
            if runs and (key == runs[-1][0] or node.op in ("placeholder", "output")):
                runs[-1][1].append(node)
            else:
                runs.append((key, [node]))
        last: dict[Node, Node] = {}
        for node in self.fx.nodes:
            for value in node.all_input_nodes:
                last[value] = node
        return [_segment(name or "outside", nodes, last) for name, nodes in runs]

    @contextlib.contextmanager
    def in_float32(self, nodes: Iterable[Node]) -> Iterator[None]:
        """Works on float32 copies of the low-precision parameters that `nodes` read; stores them back in the end."""
        names = {str(a.target) for n in nodes for a in n.all_input_nodes if a.op == "get_attr"}
        low = {n for n in names if isinstance(t := self.attr(n), Tensor) and t.dtype in (torch.float16, torch.bfloat16)}
        if not low or self.working_dtype is not None:
            yield
            return
        copies: dict[int, Tensor] = {}
        for name in low:
            value = self.attr(name)
            self.overrides[name] = copies.setdefault(id(value), value.detach().float())
        self.working_dtype = torch.float32
        try:
            yield
        finally:
            self.working_dtype = None
            stored, self.overrides = self.overrides, {}
            for name, value in stored.items():  # also biases that were added meanwhile
                self.attr(name).data.copy_(value)


def layer_path(node: Node) -> str:
    """The path of the module in which a node was computed ('' outside of any)."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def module_paths(node: Node) -> list[str]:
    """The paths of all modules around a node, outermost first."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def depends(nodes: Iterable[Node], seeds: Iterable[Node]) -> list[Node]:
    """Those of `nodes` (in order) that depend on a seed."""
    reached = set(seeds)
    found = []
    for node in nodes:
        if node not in reached and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            found.append(node)
    return found


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, and floating dtypes among an op's arguments, become `dtype`; float64 is left alone."""
    if isinstance(tree, Tensor):
        return tree.detach().to(dtype) if tree.is_floating_point() and tree.dtype != torch.float64 else tree
    if isinstance(tree, torch.dtype):
        return dtype if tree.is_floating_point and tree != torch.float64 else tree
    if isinstance(tree, tuple):
        return tuple(cast(t, dtype) for t in tree)
    if isinstance(tree, list):
        return [cast(t, dtype) for t in tree]
    if isinstance(tree, dict):
        return {k: cast(v, dtype) for k, v in tree.items()}
    return tree


def _block(node: Node) -> str:
    for path in module_paths(node):
        if path.rpartition(".")[2].isdigit():
            return path
    return ""


def _segment(name: str, nodes: list[Node], last: dict[Node, Node]) -> Segment:
    inside = set(nodes)
    drop: dict[Node, list[Node]] = {}
    leaves = []
    for node in nodes:
        for value in node.all_input_nodes:
            if last[value] is node and value.op != "get_attr":
                drop.setdefault(node, []).append(value)
        if node not in last and node.op != "output":
            drop.setdefault(node, []).append(node)
        elif node in last and (last[node] not in inside or last[node].op == "output"):
            leaves.append(node)
    return Segment(name, tuple(nodes), drop, tuple(leaves))


def _getattr(holder: nn.Module, name: str) -> Any:
    value: Any = holder
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata
