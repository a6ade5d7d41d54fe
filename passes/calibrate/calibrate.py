"""Sets the ranges of static inputs from calibration data, by an observer of the user's choice, on the float model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from qfx.core.histograms import Histogram, Percentile
from qfx.core.linear import Linear
from qfx.core.passes import Result, State
from qfx.core.ranges import AverageRange, MovingAverage, activation_range
from qfx.core.statistic import Statistic
from qfx.core.stats import MinMax
from qfx.core.sweep import Sweep, segment_of

Observer = Literal["minmax", "moving_average", "average", "percentile", "mse"]


@dataclass(frozen=True)
class Calibrate:
    """The step `calibrate`: without it, a solver measures the minimum and maximum itself.

    Args:
        observer: `minmax`; `moving_average` or `average` of the batches' extremes; `percentile` of the values; `mse`,
            the clipping range of least squared error on a histogram.
        percentile: of |x|, for `percentile`.
        momentum: weight of a new batch, for `moving_average`.
    """

    observer: Observer = "minmax"
    percentile: float = 99.99
    momentum: float = 0.01
    name = "calibrate"
    needs_data = True

    @torch.no_grad()
    def __call__(self, state: State) -> Result:
        """Fills `state.ranges` for every layer of the plan with a static input."""
        result = Result()
        wanted: dict[fx.Node, list[Linear]] = {}
        for linear in state.linears:
            scheme = state.plan.get(linear.weight)
            if scheme and scheme.input and not scheme.input.dynamic:
                wanted.setdefault(linear.x, []).append(linear)
        if not wanted:
            result.notes.append("no layer has a static input: nothing to calibrate")
            return result
        make = self._observer()
        statistics: dict[fx.Node, Statistic] = {x: make() for x in wanted}
        sweep, position = Sweep(state.graph, state.batches), segment_of(state.graph)
        total = len(sweep.segments)
        reads = {x: min(position[lin.node] for lin in linears) for x, linears in wanted.items()}
        while not sweep.done():
            state.progress(self.name, sweep.index, total)
            sweep.observe({x: [statistics[x]] for x in wanted if reads[x] == sweep.index})
            sweep.advance()
        state.progress(self.name, total, total)
        for x, linears in wanted.items():
            for linear in linears:
                spec = state.plan[linear.weight].input
                assert spec is not None
                lo, hi = (float(v) for v in activation_range(statistics[x], spec))
                known = state.ranges.get(linear.weight, (lo, hi))
                state.ranges[linear.weight] = (min(lo, known[0]), max(hi, known[1]))
                result.changed += 1
        return result

    def _observer(self) -> Callable[[], Statistic]:
        return {
            "minmax": MinMax,
            "moving_average": lambda: MovingAverage(self.momentum),
            "average": AverageRange,
            "percentile": lambda: Percentile(self.percentile),
            "mse": Histogram,
        }[self.observer]
