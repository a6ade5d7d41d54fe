"""Captures a model with `torch.export` and brings the result to the canonical form that `qfx.core.graph` describes."""

from __future__ import annotations

import contextlib
import inspect
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from qfx.core.errors import CalibrationError, CaptureError
from qfx.core.graph import Graph
from qfx.passes.discover._canonical import canonicalize

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
            if not canonicalize(unlifted):
                # decomposes nothing, but makes the graph functional; it takes longer than the export itself
                unlifted = program.run_decompositions({}).module()
                canonicalize(unlifted)
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
