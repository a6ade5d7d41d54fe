"""What every rounding method shares: gather what it needs of the inputs, round layer by layer, and record the result.

Sequential solving walks the blocks: each is measured on the inputs that the already quantized blocks before it give.
With `true_sequential` the layers of a block that read the same value are solved together, in execution order, and the
block is measured again before the next ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qfx.core.errors import RecipeError
from qfx.core.linear import Linear
from qfx.core.passes import Result, Solved, State
from qfx.core.qtensor import QTensor, scale_from_range
from qfx.core.ranges import activation_range
from qfx.core.report import Layer
from qfx.core.simulate import FakeQuantize, quantize_input
from qfx.core.spec import Scheme, scheme_label
from qfx.core.statistic import Statistic
from qfx.core.stats import Hessian, MinMax
from qfx.core.sweep import Sweep, segment_of

Round = Callable[[Tensor, Scheme, Tensor | None], tuple[QTensor, str]]
"""(weight `[out, in]`, scheme, Hessian `[in, in]` or None) -> the quantized weight and a remark."""


@dataclass(frozen=True)
class Walk:
    """How the driver walks.

    Attributes:
        solver: the method's name.
        hessian: the method needs the Hessian of each input.
        sequential: measure each block behind the quantized ones before it.
        true_sequential: also within a block.
        group_size: overrides the schemes' group size.
    """

    solver: str
    hessian: bool
    sequential: bool = False
    true_sequential: bool = False
    group_size: int | None = None


@torch.no_grad()
def solve_layers(state: State, walk: Walk, round_: Round) -> Result:
    """Rounds every layer of the plan, in place, and fills `state.solved`."""
    result = Result()
    if walk.group_size is not None:
        _regroup(state, walk)
    by_weight: dict[str, list[Linear]] = {}
    for linear in state.linears:
        if linear.weight in state.plan and linear.weight not in state.solved:
            by_weight.setdefault(linear.weight, []).append(linear)
    stored = {w: found for w in by_weight if state.store and (found := state.store.get(w))}
    if stored:
        result.notes.append(f"{len(stored)} layers were solved before and taken from there")
    static = {w for w in by_weight if (x := state.plan[w].input) and not x.dynamic and w not in state.ranges}
    if not (walk.hessian or static or walk.sequential):
        for i, (weight, linears) in enumerate(by_weight.items()):
            state.progress(walk.solver, i, len(by_weight))
            _solve(state, walk, weight, linears, round_, _Measured(stored=stored.get(weight)), result)
        state.progress(walk.solver, len(by_weight), len(by_weight))
        return result
    sweep = Sweep(state.graph, state.batches)
    position = segment_of(state.graph)
    kept: dict[str, list[_Measured]] = {}
    total = len(sweep.segments)
    while not sweep.done():
        here = [lin for ls in by_weight.values() for lin in ls if position[lin.node] == sweep.index]
        waves = _waves(state, here) if walk.true_sequential else [here]
        ready: list[str] = []
        for wave in waves:
            state.progress(walk.solver, sweep.index, total)
            measured = _measure(sweep, walk, wave, static, stored)
            for linear in wave:
                kept.setdefault(linear.weight, []).append(measured[linear.node])
            # a weight with several uses is solved once all of them were measured
            seen = dict.fromkeys(lin.weight for lin in wave)
            ready += [w for w in seen if len(kept[w]) == len(by_weight[w])]
            if walk.sequential:
                _solve_ready(state, walk, ready, by_weight, round_, kept, result)
        if not walk.sequential:  # the blocks ahead must still see this one in float
            sweep.advance()
        _solve_ready(state, walk, ready, by_weight, round_, kept, result)
        if walk.sequential:
            sweep.advance()
        position = segment_of(state.graph)
    state.progress(walk.solver, total, total)
    return result


def _regroup(state: State, walk: Walk) -> None:
    """Replaces the group size of the plan's integer weights by the step's own."""
    assert walk.group_size is not None
    for linear in state.linears:
        scheme = state.plan.get(linear.weight)
        if scheme is None:
            continue
        try:
            changed = scheme.with_group(walk.group_size)
            changed.weight.groups(linear.shape(state.graph)[-1])
        except ValueError as e:
            raise RecipeError(
                f"{walk.solver}: {linear.name}: {e}; choose another group_size, or ignore the layer"
            ) from None
        state.plan[linear.weight] = changed


def _waves(state: State, linears: Sequence[Linear]) -> list[list[Linear]]:
    """Layers that read the same value, in the order in which the values are computed."""
    order = {n: i for i, n in enumerate(state.graph.nodes)}
    waves: dict[fx.Node, list[Linear]] = {}
    for linear in sorted(linears, key=lambda lin: order[lin.x]):
        waves.setdefault(linear.x, []).append(linear)
    return list(waves.values())


@dataclass
class _Measured:
    """What was seen of a layer's inputs, or what an earlier run made of the layer."""

    hessian: Hessian | None = None
    experts: list[Hessian] | None = None
    range: MinMax | None = None
    stored: tuple[QTensor, dict[str, Any]] | None = None

    def merge(self, other: _Measured) -> None:
        """Adds what another use of the same weight saw; uses that read one value share their statistics."""
        pairs: list[tuple[Statistic | None, Statistic | None]]
        pairs = [(self.hessian, other.hessian), (self.range, other.range)]
        pairs += list(zip(self.experts or [], other.experts or [], strict=True))
        for mine, theirs in pairs:
            if mine is not None and theirs is not None and mine is not theirs:
                mine.merge(theirs)

    def hessians(self) -> tuple[list[Tensor | None], list[str]]:
        """The Hessian, or one for each expert; an expert without tokens takes that of all of them together."""
        if self.experts is None:
            return [None if self.hessian is None else self.hessian.value()], []
        idle = [not h.count for h in self.experts]
        values: list[Tensor | None] = [None if none else h.value() for h, none in zip(self.experts, idle, strict=True)]
        if any(idle) and not all(idle):
            together = Hessian()
            for h in self.experts:
                if h.count:
                    together.merge(h)
            values = [together.value() if v is None else v for v in values]
        note = f"{sum(idle)} of {len(idle)} experts saw no tokens and were rounded by the others' inputs"
        return values, [note] if any(idle) else []


def _measure(
    sweep: Sweep, walk: Walk, wave: Sequence[Linear], static: set[str], stored: Mapping[str, Any]
) -> dict[fx.Node, _Measured]:
    found: dict[fx.Node, _Measured] = {}
    wanted: dict[fx.Node, dict[type, Statistic]] = {}
    experts: dict[Linear, list[Hessian]] = {}
    for linear in wave:
        measured = found[linear.node] = _Measured(stored=stored.get(linear.weight))
        if measured.stored:
            continue
        of_value = wanted.setdefault(linear.x, {})
        if walk.hessian and linear.experts:
            measured.experts = experts[linear] = [Hessian() for _ in range(linear.shape(sweep.graph)[0])]
        elif walk.hessian:
            measured.hessian = of_value.setdefault(Hessian, Hessian())  # type: ignore[assignment]
        if linear.weight in static:
            measured.range = of_value.setdefault(MinMax, MinMax())  # type: ignore[assignment]
    sweep.observe({x: list(s.values()) for x, s in wanted.items() if s}, experts=experts)
    return found


def _solve_ready(
    state: State,
    walk: Walk,
    ready: list[str],
    by_weight: dict[str, list[Linear]],
    round_: Round,
    kept: dict[str, list[_Measured]],
    result: Result,
) -> None:
    while ready:
        weight = ready.pop(0)
        first, *others = kept.pop(weight)
        for other in others:
            first.merge(other)
        _solve(state, walk, weight, by_weight[weight], round_, first, result)


def _solve(
    state: State,
    walk: Walk,
    weight: str,
    linears: list[Linear],
    round_: Round,
    measured: _Measured,
    result: Result,
) -> None:
    graph, linear, scheme = state.graph, linears[0], state.plan[weight]
    w = linear.read(graph)
    if measured.stored:
        qtensor, note = measured.stored[0].to(w.device), measured.stored[1]
    else:
        qtensor, note = _round(state, weight, linear, w, round_, measured)
        if state.store:
            state.store.put(weight, qtensor, note)
    scheme = Scheme(qtensor.spec, scheme.input)
    solved = Solved(qtensor, scheme, linears)
    if note["input_scale"] is not None:
        solved.input_scale = torch.tensor(note["input_scale"], device=w.device)
    if note["input_zero"] is not None:
        solved.input_zero = torch.tensor(note["input_zero"], dtype=torch.int32, device=w.device)
    linear.write(graph, qtensor.dequantize(w.dtype))
    if scheme.input is not None:
        for use in linears:
            quantize_input(graph, use, FakeQuantize(scheme.input, solved.input_scale, solved.input_zero))
    state.solved[weight] = solved
    result.changed += 1
    label, bits = scheme_label(scheme), qtensor.bits_per_weight
    layer = Layer(linear.name, label, list(w.shape), walk.solver, note["error"], bits, note=note["remark"])
    state.report.layers.append(layer)


def _round(
    state: State, weight: str, linear: Linear, w: Tensor, round_: Round, measured: _Measured
) -> tuple[QTensor, dict[str, Any]]:
    """The quantized weight, and in numbers and words what is to be noted of the layer."""
    scheme = state.plan[weight]
    hessians, notes = measured.hessians()
    if linear.experts:
        hessians = hessians if len(hessians) == len(w) else hessians * len(w)
        parts = [round_(part, scheme, h) for part, h in zip(w, hessians, strict=True)]
        qtensor, notes = _stack([p[0] for p in parts]), notes + sorted({p[1] for p in parts if p[1]})
        q = qtensor.dequantize()
        error = sum(relative_error(a, b, h) for a, b, h in zip(w, q, hessians, strict=True)) / len(w)
    else:
        qtensor, remark = round_(w, scheme, hessians[0])
        notes += [remark] if remark else []
        error = relative_error(w, qtensor.dequantize(), hessians[0])
    note: dict[str, Any] = {"error": error, "remark": "; ".join(notes), "input_scale": None, "input_zero": None}
    if scheme.input is not None and not scheme.input.dynamic:
        if weight in state.ranges:
            lo, hi = (torch.tensor(v) for v in state.ranges[weight])
        else:
            assert measured.range is not None
            lo, hi = activation_range(measured.range, scheme.input)
        scale, zero = scale_from_range(lo, hi, scheme.input)
        note |= {"input_scale": float(scale), "input_zero": None if zero is None else int(zero)}
    return qtensor, note


def relative_error(w: Tensor, q: Tensor, hessian: Tensor | None) -> float:
    """Root of the squared error of the layer's outputs over their squares; of the weights if there is no Hessian."""
    w = w.float()
    e = w - q.to(w.device)
    if hessian is None:
        return (e.norm() / w.norm().clamp_min(1e-20)).item()
    h = hessian.to(e)
    lost, whole = ((e @ h) * e).sum(), ((w @ h) * w).sum()
    return (lost / whole.clamp_min(1e-20)).clamp_min(0).sqrt().item()


def _stack(parts: Sequence[QTensor]) -> QTensor:
    first = parts[0]
    zero = None if first.zero is None else torch.stack([p.zero for p in parts])  # type: ignore[misc]
    return QTensor(torch.stack([p.codes for p in parts]), torch.stack([p.scale for p in parts]), zero, first.spec)
