"""Compares models: the captured with the given one, the folded with the float one, the lowered with the simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qfx.passes.discover.capture import exportable

from .core.errors import CalibrationError, PassError
from .core.graph import Env, Graph
from .core.online import GAIN
from .core.passes import State
from .core.report import Miss

ROUNDINGS = 4
"""In low precision, the largest change as a multiple of what its rounding alone changes."""


def check_capture(graph: Graph, batch: Mapping[str, Tensor]) -> None:
    """Raises PassError if the captured graph does not give what the module gives."""
    want, got = reference_outputs(graph.module, batch, 0), floats(graph.run(batch))
    error = relative_difference(want, got)
    if not error < 1e-3 * (30 if _is_low(graph.module) else 1):
        raise PassError(f"capture: the captured graph differs from {type(graph.module).__name__} by {error:.2g}")


def check_whole(state: State, original: nn.Module, inplace: bool, reference: Sequence[list[Tensor]]) -> None:
    """Compares the folded model with the float one, as the user's module runs; takes the folds back on a change."""
    report = state.report
    if not report.folds:
        return
    error = _output_error(state, reference)
    report.output_error = error
    limit = max(state.tolerance, ROUNDINGS * _rounding(state)) if _is_low(state.graph.module) else state.tolerance
    if error <= limit:
        return
    if inplace:
        raise PassError(
            f"quantize: the folds changed the model's output by {error:.2g}; the model was changed in place and is not "
            "usable any more. Load it again and leave inplace=False."
        )
    source = dict(original.named_parameters(remove_duplicate=False))
    for name, p in state.graph.module.named_parameters(remove_duplicate=False):
        p.data.copy_(source[name]) if name in source else p.data.fill_(float(name.endswith(GAIN)))
    why = f"undone: together, the folds changed the model's output by {error:.2g} (at most {limit:.0e} is allowed)"
    report.misses += [Miss(f.site, why, f.step, f.weights) for f in report.folds]
    report.folds.clear()
    report.output_error = _output_error(state, reference)


def _rounding(state: State) -> float:
    """How far the output in low precision is from the one in float32, to which one block after another is brought."""
    graph, batch = state.graph, state.batches[0]
    env: Env = {}
    exact: Any = None
    for segment in graph.segments():
        with graph.in_float32(segment.nodes):
            exact = graph.execute(segment.nodes, env, feeds=batch, drop=segment.drop)
    return relative_difference(floats(exact), floats(graph.run(batch)))


def finish(state: State, simulated: Sequence[list[Tensor]], reference: Sequence[list[Tensor]]) -> None:
    """Measures the result: output error, bytes, and whether the lowered model computes what was simulated."""
    report, model = state.report, state.graph.module
    report.output_error = _output_error(state, reference)
    report.bytes_after = stored_bytes(model)
    if state.solved:
        apart = max(
            relative_difference(a, outputs_of(model, b)) for a, b in zip(simulated, state.batches, strict=False)
        )
        if apart > max(0.05, 0.2 * (report.output_error or 0)):
            report.warnings.append(
                f"the quantized model differs from its reference graph by {apart:.2g}: some module may not run its "
                "layers as the graph says"
            )


def _output_error(state: State, reference: Sequence[list[Tensor]]) -> float:
    pairs = zip(reference, state.batches, strict=False)
    return max((relative_difference(want, outputs_of(state.graph.module, b)) for want, b in pairs), default=0.0)


def relative_difference(want: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest difference of any output relative to its largest value; infinite where only one is finite."""
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        finite = a.isfinite()  # what a model forbids may be -inf
        if not torch.equal(finite, b.isfinite()):
            return float("inf")
        if finite.any():
            worst = max(worst, (a - b)[finite].abs().max().item() / max(a[finite].abs().max().item(), 1e-12))
    return worst


def reference_outputs(model: nn.Module, batch: Mapping[str, Tensor], i: int) -> list[Tensor]:
    """What the float model makes of a batch; raises CalibrationError if it cannot."""
    shown = ", ".join(f"{k} {str(v.dtype).removeprefix('torch.')} {list(v.shape)}" for k, v in batch.items())
    try:
        outputs = outputs_of(model, batch)
    except Exception as e:  # whatever the model's own code raises
        reason = str(e).strip().splitlines()[0] if str(e).strip() else "no message"
        raise CalibrationError(
            f"calibration: {type(model).__name__} fails on batch {i} ({shown}): {type(e).__name__}: {reason}. Check "
            "that it holds the model's own inputs: all that it needs, ids of its tokenizer, no more than its positions"
        ) from e
    if any(bool(t.isnan().any()) for t in outputs):
        raise CalibrationError(
            f"calibration: {type(model).__name__} gives NaN on batch {i} ({shown}), before anything was changed; "
            "look at the batch's values, or use model.float() if the model overflows in its dtype"
        )
    return outputs


def outputs_of(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The floating outputs of a module, in float32."""
    with exportable(model):
        return floats(model(**batch))


def floats(output: Any) -> list[Tensor]:
    """The floating tensors of an output tree, in float32."""
    return [t.float() for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _is_low(model: nn.Module) -> bool:
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())


def stored_bytes(model: nn.Module) -> int:
    """The size of a model's parameters and buffers, shared ones once."""
    seen = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in seen.values())
