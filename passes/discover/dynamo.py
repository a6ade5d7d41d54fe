"""Brings a graph of TorchDynamo to the canonical form that `qfx.core.graph` describes.

Dynamo hands over the functions and methods of torch that a frame of Python calls, with the model's parameters among the
inputs. They are traced down to aten ops above autograd, as `torch.export` does it, so that a linear stays a linear.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from qfx.core.errors import CaptureError
from qfx.core.graph import Graph
from qfx.passes.discover._canonical import DROPOUTS, canonicalize

aten = torch.ops.aten
_MODES = {torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast}
_STEP = re.compile(r"\.(\w+)|\['([^']*)'\]|\[(\d+)\]")


@dataclass
class Traced:
    """A part of a model, as Dynamo cut it.

    Attributes:
        graph: canonical; its module holds the part's own parameters under their names in the model.
        positions: of each parameter among the inputs of Dynamo's graph.
        placeholders: the graph's, one for each input of Dynamo's graph; nothing reads those of parameters.
    """

    graph: Graph
    positions: dict[str, int]
    placeholders: list[fx.Node]


def trace(gm: fx.GraphModule, examples: Sequence[Any], root: nn.Module | None = None) -> Traced:
    """Traces Dynamo's graph; its inputs' sizes stay as open as Dynamo has them.

    Args:
        gm: what a backend of `torch.compile` gets; it is not changed.
        examples: with it. Parameters are the model's own.
        root: the model, in which names are found; None takes `compiled_model()`.

    Raises:
        CaptureError: the graph trains, or does not trace; the message says where.
    """
    fakes = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
    mode = next(f.fake_mode for f in fakes if isinstance(f, torch._subclasses.FakeTensor))

    def call(*inputs: Any) -> Any:
        with fx_traceback.preserve_node_meta():
            return fx.Interpreter(gm).run(*inputs)

    try:
        with mode, enable_python_dispatcher():
            traced = make_fx(call, pre_dispatch=True)(*fakes)
    except Exception as e:  # whatever an op raises
        reason = str(e).strip().splitlines()[0] if str(e).strip() else "no message"
        raise CaptureError(
            f"capture: a graph of Dynamo does not trace to aten ops: {type(e).__name__}: {reason}"
        ) from e
    _check_modes(traced.graph)
    canonicalize(traced)
    placeholders = list(traced.graph.find_nodes(op="placeholder"))
    root = compiled_model() if root is None else root
    _name_modules(traced.graph, root)
    names = _parameter_names(gm, examples, root)
    first = next(n for n in traced.graph.nodes if n.op != "placeholder")
    for at, name in names.items():
        _put(traced, name, examples[at])
        with traced.graph.inserting_before(first):
            node = traced.graph.create_node("get_attr", name)
        node.meta = dict(placeholders[at].meta)
        placeholders[at].replace_all_uses_with(node)
    spec = pytree.tree_structure(pytree.tree_map(lambda _: 0, traced.graph.output_node().args[0]))
    return Traced(Graph(traced, traced.graph, traced, spec), {n: at for at, n in names.items()}, placeholders)


def _check_modes(graph: fx.Graph) -> None:
    """Takes switches of grad mode, and of autocast where it is off, out of the graph; refuses what is left."""
    devices = {v.device.type for n in graph.nodes if isinstance(v := n.meta.get("val"), Tensor)} - {"meta"}
    around = any(torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d) for d in devices)
    for node in list(graph.nodes):
        inside = node.target is torch.amp.autocast_mode._enter_autocast and node.args[2] is not False
        if around or inside:
            raise CaptureError(
                "capture: the model computes under torch.autocast, which does not see quantized ops; "
                "convert the model, for instance with model.bfloat16()"
            )
        if node.target in DROPOUTS and node.args[2] is True:
            raise CaptureError("capture: the model is in training mode, where dropout is random; call model.eval()")
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in _MODES:
            graph.erase_node(node)


def compiled_model() -> nn.Module | None:
    """The model whose call made Dynamo compile: names of modules are found in it.

    After a graph break Dynamo sees a submodule's frame alone, in which a layer has no name of its own. The callers'
    frames still hold the model.
    """
    found: list[nn.Module] = []
    frame = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner not in found:
            found.append(owner)
        frame = frame.f_back  # type: ignore[assignment]
    marked = [m for m in found if isinstance(m, torch._dynamo.OptimizedModule)]
    if marked:
        return marked[0]._orig_mod  # type: ignore[no-any-return]
    marked = [m for m in found if getattr(m, "_compiled_call_impl", None) is not None or "forward" in vars(m)]
    return (marked or found or [None])[-1]  # type: ignore[list-item]


def _name_modules(graph: fx.Graph, root: nn.Module | None) -> None:
    """Paths of modules become those in the model. Dynamo's keys begin with the modules' ids."""
    paths = {id(m): path for path, m in root.named_modules()} if root is not None else {}
    kinds = {path: type(m) for path, m in root.named_modules()} if root is not None else {}
    for node in graph.nodes:
        stack = {}
        for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
            number = re.match(r"\d+", str(key))
            known = paths.get(int(number[0])) if number else None
            stack[key] = (known if known is not None else parameter_path(path), kind)
        outermost = next(iter(stack.values()))[0] if stack else ""
        parts = outermost.split(".")[:-1]
        around = [".".join(parts[: i + 1]) for i in range(len(parts))]  # of the frame that Dynamo saw
        node.meta["nn_module_stack"] = {p: (p, kinds.get(p, nn.Module)) for p in around} | stack


def _parameter_names(gm: fx.GraphModule, examples: Sequence[Any], root: nn.Module | None) -> dict[int, str]:
    """The names of the inputs that are parameters, by position."""
    known = {id(p): name for name, p in root.named_parameters()} if root is not None else {}
    taken: set[str] = set()
    names = {}
    for at, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if isinstance(examples[at], nn.Parameter):
            name = known.get(id(examples[at])) or parameter_path(input_source(node))
            names[at] = name if name not in taken else f"{name}_{at}"
            taken.add(names[at])
    return names


def input_source(node: fx.Node) -> str:
    """Where Dynamo takes an input of its graph from, as Python: `L['input_ids']`."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", None)
    return str(name() if callable(name) else name or f"input.{node.name}")


def parameter_path(source: str) -> str:
    """`L['self']._modules['h']._modules['0']._parameters['w']` and `L['self'].h[0].w` are h.0.w."""
    steps = ["".join(groups) for groups in _STEP.findall(source)]
    first = 1 if source.startswith(("L[", "G[")) else 0
    return ".".join(s for s in steps[first:] if s not in ("_modules", "_parameters", "_buffers"))


def _put(holder: nn.Module, name: str, value: Tensor) -> None:
    """Gives a tree of empty modules a parameter."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    holder.register_parameter(leaf, value)  # type: ignore[arg-type]
