"""Outlier Suppression+ (Wei et al., 2023, arXiv 2304.09145): centres every channel, then scales outliers.

Shift `z_j = (max X_j + min X_j) / 2`; scale `s_j = max(1, max|X_j - z_j| / t)`; `X' = (X - z) / s`, `W' = W * s`, `b' =
b + W z`. The one threshold t of a site is found by the joint objective: the error that the quantized readers make at
the attention's or the MLP's own output (the inputs of the next linears), not in each matrix alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.core.errors import RecipeError
from qfx.core.graph import Graph
from qfx.core.maps import Diagonal, Map, Shift
from qfx.core.passes import Result, State
from qfx.core.report import Miss
from qfx.core.shifted import add_shift
from qfx.core.site import Site
from qfx.core.stats import MinMax
from qfx.passes.transform._driver import Stats, fold_sites, reader_stat, wanted_sites
from qfx.passes.transform._trial import Trial


@dataclass(frozen=True)
class OutlierSuppressionPlus:
    """The step `outlier_suppression_plus`.

    Args:
        steps: thresholds tried in a geometric grid from the largest magnitude down; seven more refine around the best.
            The paper walks 100 or more equal steps; the geometric grid reaches the same loss with fewer runs when
            outliers are hundreds of times the rest.
        shift: centre the channels where the norm has a bias and its readers can take one.
        shift_rmsnorm: also on norms without a bias, which then get one (one more addition at run time).
        value: also fold between value and output projection.
        inner: also fold between the two linears of an MLP.
        online: also map, at run time, the inputs that no norm or linear can take the map for (one multiply-add each).
    """

    steps: int = 32
    shift: bool = True
    shift_rmsnorm: bool = False
    value: bool = False
    inner: bool = True
    online: bool = False
    name = "outlier_suppression_plus"
    needs_data = True

    def __post_init__(self) -> None:
        """Checks the settings."""
        if self.steps < 2:
            raise RecipeError(f"outlier_suppression_plus: steps is {self.steps}; use 2 or more")

    def wanted(self, state: State) -> list[Site]:
        """The sites that it takes."""
        kinds = {"norm"} | ({"value"} if self.value else set()) | ({"inner"} if self.inner else set())
        kinds |= {"online"} if self.online else set()
        return wanted_sites(state, kinds)

    def __call__(self, state: State) -> Result:
        """Folds shift and scale into every site whose readers will be quantized."""
        shifted = 0

        def choose(site: Site, stats: Stats, trial: Trial) -> Sequence[Map] | Miss:
            nonlocal shifted
            hi = reader_stat(site, stats, MinMax, lambda s: s.value().hi, -torch.inf).double()
            lo = -reader_stat(site, stats, MinMax, lambda s: -s.value().lo, -torch.inf).double()
            maps: list[Map] = []
            if self._can_shift(site):
                shifted += 1
                maps.append(Shift((hi + lo) / 2))
                hi, lo = (hi - lo) / 2, (lo - hi) / 2
            size = torch.maximum(hi.abs(), lo.abs())
            return [*maps, Diagonal(1 / self._search(site, maps, size, trial))]

        def prepare(graph: Graph, site: Site) -> Callable[[], None] | None:
            if "Shift" in site.folds or not self._can_shift(site):
                return None
            return add_shift(graph, site, state.linears)

        result = fold_sites(state, self.name, self.wanted(state), lambda: [MinMax()], choose, prepare=prepare)
        result.notes.append(f"shifted {shifted} sites")
        return result

    def _can_shift(self, site: Site) -> bool:
        return self.shift and ("Shift" in site.folds or (self.shift_rmsnorm and "AddedShift" in site.folds))

    def _search(self, site: Site, maps: Sequence[Map], size: Tensor, trial: Trial) -> Tensor:
        """The scale of the threshold with the least loss; the largest magnitude (no scaling) is among those tried."""
        top = size.max().item()
        if top == 0:
            return torch.ones_like(size)
        low = min(0.1, top / 2)

        def loss(t: float) -> float:
            return trial.loss(site, [*maps, Diagonal(1 / threshold_scale(size, t))])

        grid = [top * (low / top) ** (i / (self.steps - 1)) for i in range(self.steps)]
        losses = {t: loss(t) for t in grid}
        best = min(losses, key=losses.__getitem__)
        at = grid.index(best)
        upper, lower = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
        for i in range(1, 8):
            t = lower * (upper / lower) ** (i / 8)
            losses[t] = loss(t)
        return threshold_scale(size, min(losses, key=losses.__getitem__))


def threshold_scale(size: Tensor, t: float) -> Tensor:
    """`max(1, size / t)` for each channel: only those beyond the threshold are scaled."""
    return (size / t).clamp_min(1.0)
