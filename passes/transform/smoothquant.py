"""SmoothQuant (Xiao et al., 2023, arXiv 2211.10438): moves activation outliers into the weights by a scale per channel.

Eq. 4: `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`, `X' = X / s`, `W' = W * s`. The weight's maximum runs over all
linears that read the channel, routers and experts included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.core.errors import RecipeError
from qfx.core.maps import Diagonal, Map
from qfx.core.passes import Result, State
from qfx.core.report import Miss
from qfx.core.site import Site
from qfx.core.stats import AbsMax
from qfx.passes.transform._driver import Stats, fold_sites, reader_stat, wanted_sites, weight_absmax
from qfx.passes.transform._trial import Trial

GRID = tuple(round(0.4 + 0.05 * i, 2) for i in range(12))
"""The values of alpha that a search tries: 0.4 to 0.95."""


@dataclass(frozen=True)
class SmoothQuant:
    """The step `smoothquant`.

    Args:
        alpha: how much of the difficulty moves to the weights (0 none, 1 all); "search" tries 0.4 to 0.95 for each site
            and keeps what moves the values ahead least under the target quantizers (ties: the smaller).
        smooth_o: also fold between the value projection and the attention's output projection.
        smooth_down: also fold between the two linears of an MLP, where the ops between them allow it.
        online: also map, at run time, the inputs that no norm or linear can take the map for (one multiply-add each).
    """

    alpha: float | str = 0.5
    smooth_o: bool = False
    smooth_down: bool = False
    online: bool = False
    name = "smoothquant"
    needs_data = True

    def __post_init__(self) -> None:
        """Checks the settings."""
        ok = self.alpha == "search" or (isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1)
        if not ok:
            raise RecipeError(f"smoothquant: alpha is {self.alpha!r}; use a number from 0 to 1, or 'search'")

    def wanted(self, state: State) -> list[Site]:
        """The sites that it takes."""
        kinds = {"norm"} | ({"value"} if self.smooth_o else set()) | ({"inner"} if self.smooth_down else set())
        kinds |= {"online"} if self.online else set()
        return wanted_sites(state, kinds)

    def __call__(self, state: State) -> Result:
        """Folds a scale into every site whose readers will be quantized."""
        found: dict[float, int] = {}

        def choose(site: Site, stats: Stats, trial: Trial) -> Sequence[Map] | Miss:
            x = reader_stat(site, stats, AbsMax, lambda s: s.value(), 0.0)
            w = weight_absmax(state.graph, site)
            if self.alpha != "search":
                return [Diagonal(1 / smooth_scale(x, w, float(self.alpha)))]
            losses = {a: trial.loss(site, [Diagonal(1 / smooth_scale(x, w, a))]) for a in GRID}
            best = min(losses, key=losses.__getitem__)
            found[best] = found.get(best, 0) + 1
            return [Diagonal(1 / smooth_scale(x, w, best))]

        result = fold_sites(state, self.name, self.wanted(state), lambda: [AbsMax()], choose)
        if found:
            result.notes.append("alpha: " + ", ".join(f"{a} at {n} sites" for a, n in sorted(found.items())))
        return result


def smooth_scale(x_absmax: Tensor, w_absmax: Tensor, alpha: float) -> Tensor:
    """Eq. 4 in float64, clamped to [1e-5, 1e5]; channels that are never active keep scale 1.

    Args:
        x_absmax: largest |activation| of each channel, `[channels]`.
        w_absmax: largest |weight| that reads each channel, `[channels]`.
        alpha: migration strength.
    """
    x, w = x_absmax.double(), w_absmax.double().clamp_min(1e-5)
    s = (x.pow(alpha) / w.pow(1 - alpha)).clamp(1e-5, 1e5)
    return torch.where(x > 0, s, torch.ones_like(s))
