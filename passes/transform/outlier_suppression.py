"""Outlier Suppression (Wei et al., 2022, arXiv 2209.13325): gamma migration, then token-wise clipping.

Gamma migration: a norm writes `x_hat * gamma + beta`; its readers take gamma over, `W' = W * gamma`, so that the
quantized value is `x_hat + beta / gamma`. Token-wise clipping: the range of static inputs is cut at a quantile of the
*tokens'* extremes, with one ratio for the whole model, the one of least squared error at the model's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qfx.core.errors import RecipeError
from qfx.core.linear import Linear
from qfx.core.maps import Diagonal, Map
from qfx.core.passes import Result, State
from qfx.core.qtensor import scale_from_range
from qfx.core.report import Miss
from qfx.core.samples import TokenExtremes
from qfx.core.simulate import FakeQuantize, float_input, quantize_input
from qfx.core.site import Site
from qfx.core.sweep import Sweep, segment_of
from qfx.passes.transform._driver import Stats, fold_sites, wanted_sites
from qfx.passes.transform._trial import Trial

SMALLEST = 1e-5
"""A gain below this stays: dividing by it would blow the bias up."""


@dataclass(frozen=True)
class OutlierSuppression:
    """The step `outlier_suppression`.

    Args:
        migrate: gamma migration.
        clip: token-wise clipping of static inputs (without any, nothing is clipped).
        width: how far below 1 the ratio is searched (the paper's: 0.1 for 8 bits, 0.3 for 6, 0.9 for 4).
        step: of the search.
        batches: calibration batches on which the output error is measured.
        online: where a norm's value is also the residual branch (post-norm models), divide by its gain at run time, in
            front of the linears: one multiply-add for each group of them, where the paper multiplies the residual.
    """

    migrate: bool = True
    clip: bool = True
    width: float = 0.1
    step: float = 0.01
    batches: int = 4
    online: bool = False
    name = "outlier_suppression"
    needs_data = True

    def __post_init__(self) -> None:
        """Checks the settings."""
        if not (0 < self.step <= self.width < 1) or self.batches < 1:
            raise RecipeError("outlier_suppression: need 0 < step <= width < 1 and batches >= 1")

    def wanted(self, state: State) -> list[Site]:
        """The sites whose gain it migrates."""
        if not self.migrate:
            return []
        found = wanted_sites(state, {"norm", "online"} if self.online else {"norm"})
        return [s for s in found if s.kind == "norm" or s.value in state.norms]

    def __call__(self, state: State) -> Result:
        """Folds the gains away, then sets `state.ranges`."""
        result = Result()
        if self.migrate:

            def choose(site: Site, stats: Stats, trial: Trial) -> Sequence[Map] | Miss:
                gain = site.writer.gain
                assert gain is not None
                gamma = gain.slope * state.graph.attr(gain.param).double() + gain.offset
                gamma = torch.where(gamma.abs() < SMALLEST, torch.ones_like(gamma), gamma).cpu()
                if bool((gamma < 0).any()) and "SignedDiagonal" not in site.folds:
                    return Miss(site.name, f"some gains are negative, and {site.why_not.get('SignedDiagonal')}")
                return [Diagonal(1 / gamma)]

            result = fold_sites(state, self.name, self.wanted(state), list, choose)
        if self.clip:
            self._clip(state, result)
        return result

    @torch.no_grad()
    def _clip(self, state: State, result: Result) -> None:
        static = [lin for lin in state.linears if (s := state.plan.get(lin.weight)) and s.input and not s.input.dynamic]
        if not static:
            result.notes.append("no layer has a static input: nothing to clip")
            return
        extremes = self._extremes(state, static)
        used = state.batches[: self.batches]
        wanted = [_floats(state.graph.run(b)) for b in used]
        count = int(self.width / self.step + 1e-9)
        best = (float("inf"), 1.0)
        for i in range(count + 1):
            ratio = 1 - i * self.step
            state.progress(self.name, i, count + 1)
            error = self._error(state, static, extremes, ratio, used, wanted)
            if error < best[0]:
                best = (error, ratio)
        state.progress(self.name, count + 1, count + 1)
        for linear in static:
            lo, hi = extremes[linear.x].clip(best[1])
            state.ranges[linear.weight] = (float(lo), float(hi))
        result.changed += len(static)
        result.notes.append(f"token-wise clipping: ratio {best[1]:.3g} of {len(static)} static inputs")

    def _extremes(self, state: State, static: Sequence[Linear]) -> dict[fx.Node, TokenExtremes]:
        found = {lin.x: TokenExtremes() for lin in static}
        sweep, position = Sweep(state.graph, state.batches), segment_of(state.graph)
        while not sweep.done():
            here = {lin.x for lin in static if position[lin.node] == sweep.index}
            fresh = {x: [found[x]] for x in here if not found[x].count}
            sweep.observe(fresh)
            sweep.advance()
        return found

    def _error(
        self,
        state: State,
        static: Sequence[Linear],
        extremes: dict[fx.Node, TokenExtremes],
        ratio: float,
        used: Sequence[dict[str, Tensor]],
        wanted: Sequence[list[Tensor]],
    ) -> float:
        """Squared error at the model's output with all static inputs quantized at one ratio, weights in float."""
        added = []
        for linear in static:
            spec = state.plan[linear.weight].input
            assert spec is not None
            target = FakeQuantize(spec, *scale_from_range(*extremes[linear.x].clip(ratio), spec))
            added.append((linear, quantize_input(state.graph, linear, target)))
        try:
            total = 0.0
            for batch, want in zip(used, wanted, strict=True):
                got = _floats(state.graph.run(batch))
                total += sum((a - b).square().sum().item() for a, b in zip(want, got, strict=True))
            return total
        finally:
            for linear, node in added:
                float_input(state.graph, linear, node)


def _floats(output: Any) -> list[Tensor]:
    return [t.float() for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
