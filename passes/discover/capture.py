"""Captures a model with `torch.export` and brings the result to the canonical form that `qfx.core.graph` describes."""

from __future__ import annotations

import contextlib
import inspect
import operator
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from qfx.core.errors import CalibrationError, CaptureError
from qfx.core.graph import Graph
from qfx.passes.discover._functional import functionalize, writes_in_place

aten = torch.ops.aten
_ASSERTS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
# What is allocated is overwritten later, but a value that differs from run to run looks to a probe like a computed one.
_EMPTIES = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}
# Settings of Hugging Face configs under which a model's forward is a pure function of its inputs that exports.
_EXPORTABLE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "use_cache": (False, (True,)),
    "_experts_implementation_internal": ("grouped_mm", ("eager", "batched_mm", None)),
}


def capture(model: nn.Module, example: Mapping[str, Tensor]) -> Graph:
    """Captures `model(**example)`; batch and sequence sizes stay dynamic where the model allows it.

    Args:
        model: in evaluation mode; its parameters may be on the meta device.
        example: the model's inputs by name; only shapes and dtypes matter.

    Raises:
        CaptureError: the model does not capture; the message says where and what to try.
    """
    example = {k: _at_least_two(v).detach() for k, v in example.items()}
    shapes = _dynamic_shapes(model, example)
    with torch.no_grad(), exportable(model), warnings.catch_warnings():
        # torch.export copies its own tree specs in a way that it has itself deprecated
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        try:
            program = torch.export.export(model, (), dict(example), dynamic_shapes=shapes, strict=False)
            unlifted = program.module()
            if not _canonicalize(unlifted):
                # decomposes nothing, but makes the graph functional; it takes longer than the export itself
                unlifted = program.run_decompositions({}).module()
                _canonicalize(unlifted)
        except Exception as e:  # whatever the model's own code raises under tracing
            raise CaptureError(_explain(model, e)) from e
    assert unlifted._out_spec is not None
    return Graph(model, unlifted.graph, unlifted, unlifted._out_spec)


@contextlib.contextmanager
def exportable(model: nn.Module) -> Iterator[None]:
    """Sets what a Hugging Face config offers to make `forward` a pure function, and restores it."""
    saved: list[tuple[Any, str, Any]] = []
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        for key, (value, instead_of) in _EXPORTABLE.items():
            if key in vars(config) and vars(config)[key] in instead_of:
                saved.append((config, key, vars(config)[key]))
                with contextlib.suppress(Exception):
                    setattr(config, key, value)
    try:
        yield
    finally:
        for config, key, value in reversed(saved):
            with contextlib.suppress(Exception):
                setattr(config, key, value)


def input_names(model: nn.Module) -> list[str]:
    """The names of the inputs that `model.forward` takes, in order."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def check_feeds(graph: Graph, feeds: Mapping[str, Tensor], where: str) -> None:
    """Raises CalibrationError if a batch does not fit the captured graph (missing inputs, sizes that were fixed)."""
    if extra := sorted(set(feeds) - {str(node.target) for node in graph.inputs}):
        raise CalibrationError(
            f"calibration: {where} has {', '.join(extra)}, which the first batch had not. Use batches of one form."
        )
    for node in graph.inputs:
        name, want = str(node.target), node.meta["val"]
        got = feeds.get(name)
        if got is None:
            raise CalibrationError(f"calibration: {where} lacks the input {name!r} that the first batch had")
        fixed = [fixed_size(s) for s in want.shape]
        if got.dim() != len(fixed) or any(f is not None and f != s for f, s in zip(fixed, got.shape, strict=True)):
            shape = [f if f is not None else "any" for f in fixed]
            raise CalibrationError(
                f"calibration: {where} has {name!r} of shape {list(got.shape)}; the model was captured for {shape}. "
                "Use batches of one form."
            )
        if got.dtype != want.dtype:
            raise CalibrationError(
                f"calibration: {where} has {name!r} in {got.dtype}; the model was captured for {want.dtype}. "
                "Use batches of one form."
            )


def fixed_size(size: int | torch.SymInt) -> int | None:
    """A size in a captured shape, or None if it may vary; the export writes some fixed ones as one-valued symbols."""
    return int(size) if is_concrete_int(size) else None


def _dynamic_shapes(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, dict[int, Any]] | None:
    """Which sizes may vary, by input; None if marks on the tensors say so."""
    parameters = inspect.signature(model.forward).parameters
    rest = [k for k in example if k not in parameters]
    if not rest:
        return {k: {d: torch.export.Dim.AUTO for d in _open_dims(v)} for k, v in example.items()}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise CaptureError(f"capture: {type(model).__name__}.forward does not take {sorted(rest)}")
    # torch.export (2.13) takes no description of inputs that fall into **kwargs
    for value in example.values():
        for dim in _open_dims(value):
            torch._dynamo.maybe_mark_dynamic(value, dim)
    return None


def _at_least_two(x: Tensor) -> Tensor:
    """Sizes of one would be baked in by the export: repeat them (the values do not matter)."""
    for dim in range(min(x.dim(), 2)):
        if x.shape[dim] == 1:
            x = x.repeat_interleave(2, dim)
    return x


def _open_dims(x: Tensor) -> range:
    """All sizes may vary but those of images: models compute on them, and an export of that takes minutes."""
    return range(1 if x.dim() > 3 else x.dim())


def _explain(model: nn.Module, error: Exception) -> str:
    not_theirs = (os.path.dirname(torch.__file__), __file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_theirs)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"capture: {type(model).__name__} does not export with torch.export{where}: {type(error).__name__}: {reason}. "
        "Try attn_implementation='sdpa' or 'eager', remove branches that depend on values of tensors, and check that "
        "torch.export.export(model, (), inputs, strict=False) works."
    )


def _canonicalize(gm: fx.GraphModule) -> bool:
    """Strips what carries no meaning for a pass; inlines regions that only change grad mode or autocast.

    Returns:
        Whether the graph is functional: no op writes in place, also in no region that was kept whole.
    """
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and "wrap_with_" in str(node.target):
            _inline(gm, node)
    for node in list(gm.graph.nodes):
        if node.op == "call_module" or node.target in _ASSERTS:
            gm.graph.erase_node(node)
        elif node.target in _DROPOUTS or (node.target in _CASTS and _same_type(node)):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        elif node.target in _EMPTIES:
            node.target = _EMPTIES[node.target]
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
    functional = functionalize(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    modules = dict(gm.named_modules())
    kept = [modules[str(n.target)] for n in gm.graph.nodes if n.op == "get_attr" and str(n.target) in modules]
    return functional and not any(writes_in_place(m.graph) for m in kept if isinstance(m, fx.GraphModule))


def _same_type(node: fx.Node) -> bool:
    source, result = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    if not isinstance(source, Tensor) or not isinstance(result, Tensor):
        return False
    return source.dtype == result.dtype and source.device == result.device and source.layout == result.layout


def _inline(gm: fx.GraphModule, call: fx.Node) -> None:
    """Replaces `wrap_with_…(settings, submodule, *args)` by the submodule's nodes."""
    at = next(i for i, a in enumerate(call.args) if isinstance(a, fx.Node) and a.op == "get_attr")
    body_node = call.args[at]
    assert isinstance(body_node, fx.Node)
    body = getattr(gm, str(body_node.target))
    if "autocast" in str(call.target) and call.args[1] not in (None, False) and call.args[2] is not False:
        return  # an enabled autocast changes dtypes: keep the region whole
    env = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), call.args[at + 1 :], strict=True))
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "output":
                results = fx.map_arg(node.args[0], lambda n: env[n])
            elif node.op != "placeholder":
                env[node] = gm.graph.node_copy(node, lambda n: env[n])
                if node.op == "get_attr":
                    setattr(gm, str(node.target), getattr(body, str(node.target)))
    if not isinstance(results, tuple | list):
        call.replace_all_uses_with(results)
    else:
        for user in list(call.users):
            assert user.target is operator.getitem, f"unexpected user {user} of {call}"
            user.replace_all_uses_with(results[int(user.args[1])])  # type: ignore[arg-type]
            gm.graph.erase_node(user)
    gm.graph.erase_node(call)
