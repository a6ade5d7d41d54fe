"""What every folding method shares: measure a block, choose a map for each of its sites, fold, verify, or undo.

A method is a `choose(site, stats, trial)` that returns maps, or the reason for none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qfx.core.fold import fold
from qfx.core.graph import Graph, layer_path
from qfx.core.linear import Linear
from qfx.core.maps import Diagonal, Map, Shift
from qfx.core.online import add_online, online_site
from qfx.core.passes import Result, State
from qfx.core.report import Fold, Miss
from qfx.core.site import Site
from qfx.core.statistic import Statistic
from qfx.core.sweep import Sweep, segment_of
from qfx.passes.transform._trial import Trial

Stats = dict[fx.Node, dict[type, Any]]
Choose = Callable[[Site, Stats, Trial], Sequence[Map] | Miss]
CHECKED = 2
"""Batches on which each fold is verified."""


@torch.no_grad()
def fold_sites(
    state: State,
    step: str,
    sites: Iterable[Site],
    needs: Callable[[], Sequence[Statistic]],
    choose: Choose,
    *,
    prepare: Callable[[Graph, Site], Callable[[], None] | None] | None = None,
) -> Result:
    """Walks the blocks; in each, measures `needs` at the readers of its sites, then chooses, folds, and verifies.

    Args:
        state: the run.
        step: the method's name, for the report.
        sites: those of `state.sites` that the method wants.
        needs: makes fresh statistics for one value.
        choose: the method.
        prepare: called before a site's fold; may change the graph, and returns how to change it back.
    """
    result = Result()
    sweep = Sweep(state.graph, state.batches)
    position = segment_of(state.graph)
    pending = list(sites)
    total = len(sweep.segments)
    while not sweep.done():
        state.progress(step, sweep.index, total)
        here = [s for s in pending if position[s.value] == sweep.index]
        if here:
            through = max(position[r.linear.node] for s in here for r in s.readers)
            values = dict.fromkeys(r.linear.x for s in here for r in s.readers)
            stats: dict[fx.Node, list[Statistic]] = {v: list(needs()) for v in values}
            sweep.observe(stats, through=through)
            seen: Stats = {v: {type(s): s for s in found} for v, found in stats.items()}
            checked = range(min(CHECKED, len(state.batches)))
            # weights stay in float32 until the block is done: the rounding of one fold is no error of the next
            with state.graph.in_float32(n for seg in sweep.segments[sweep.index : through + 1] for n in seg.nodes):
                before = sweep.outputs(checked, through=through)
                trial = Trial(state, sweep, through)
                for site in here:
                    chosen = choose(site, seen, trial)
                    if isinstance(chosen, Miss):
                        result.misses.append(replace(chosen, step=step))
                        continue
                    _fold_one(state, step, site, chosen, sweep, checked, through, before, result, prepare)
                    trial.forget()
                    position = segment_of(state.graph)
        sweep.advance()
    state.progress(step, total, total)
    return result


def _fold_one(
    state: State,
    step: str,
    site: Site,
    maps: Sequence[Map],
    sweep: Sweep,
    checked: range,
    through: int,
    before: list[list[Any]],
    result: Result,
    prepare: Callable[[Graph, Site], Callable[[], None] | None] | None,
) -> None:
    graph = state.graph
    undo: list[Callable[[], None]] = []
    if site.kind == "online":
        undo.append(add_online(graph, site))
    elif prepare is not None and (back := prepare(graph, site)) is not None:
        undo.append(back)
    undo += [fold(graph, site, m) for m in maps]
    error = difference(before, sweep.outputs(checked, through=through))
    if not error <= state.tolerance:
        for back in reversed(undo):
            back()
    weights = sum(graph.attr(r.linear.weight).numel() for r in site.readers)
    kinds = "+".join(_kind(m) for m in maps)
    if error <= state.tolerance:
        result.changed += 1
        readers = [r.linear.name for r in site.readers]
        writers = [] if site.kind == "online" else [site.writer.name]
        state.report.folds.append(
            Fold(site.name, _describe(site), step, kinds, writers, readers, weights, error, site.kind == "online")
        )
    else:
        why = f"undone: folding {kinds} changed its block by {error:.2g} (at most {state.tolerance:.0e} is allowed)"
        result.misses.append(Miss(site.name, why, step, weights))


def difference(before: list[list[Any]], after: list[list[Any]]) -> float:
    """The largest change of any value, infinite if not finite.

    It is relative to the largest value of its row (the last axis), or to the median row's if that is larger: the
    residual of a few tokens may be thousands of times the others', and must not hide what a fold does to those.
    """
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old, new, strict=True):
            if not isinstance(a, Tensor) or not a.is_floating_point() or not a.numel():
                continue
            finite = a.isfinite()
            if not torch.equal(finite, b.isfinite()):
                return float("inf")
            size, change = a.where(finite, 0).abs(), (a - b).where(finite, 0).abs()
            if a.dim():
                size, change = size.amax(-1), change.amax(-1)
            worst = max(worst, (change / size.clamp_min(max(size.median().item(), 1e-12))).max().item())
    return worst


def wanted_sites(state: State, kinds: set[str]) -> list[Site]:
    """Sites of some kinds that a quantized linear reads; all of them if the recipe quantizes nothing.

    The kind "online" adds a site at each value that no site covers, to be mapped at run time.
    """
    found = [
        s
        for s in state.sites
        if s.kind in kinds and (not state.plan or any(r.linear.weight in state.plan for r in s.readers))
    ]
    return found + (_online_sites(state, found) if "online" in kinds else [])


def _online_sites(state: State, covered: Sequence[Site]) -> list[Site]:
    done = {r.linear.weight for s in covered for r in s.readers}
    readers: dict[fx.Node, list[Linear]] = {}
    for linear in state.linears:
        wanted = linear.weight in state.plan if state.plan else True
        free = len(state.graph.uses(linear.weight)) == 1 and not linear.experts
        if wanted and free and linear.weight not in done and layer_path(linear.node) == linear.name:
            readers.setdefault(linear.x, []).append(linear)
    return [
        online_site(value, group, all(lin.bias for lin in group), state.norms.get(value))
        for value, group in readers.items()
    ]


def reader_stat(site: Site, stats: Stats, kind: type, value: Callable[[Any], Tensor], fill: float) -> Tensor:
    """A statistic of the site's channels, as the largest over all reader channels that hold each of them."""
    out = torch.full((site.channels,), fill, dtype=torch.float32)
    for reader in site.readers:
        per_column = value(stats[reader.linear.x][kind]).float().cpu()
        used = reader.index >= 0
        out.scatter_reduce_(0, reader.index[used], per_column[used], "amax")
    return out


def weight_absmax(graph: Graph, site: Site) -> Tensor:
    """The largest |weight| that reads each channel, over all readers' rows and experts: float32 `[channels]`."""
    out = torch.zeros(site.channels)
    for reader in site.readers:
        w = reader.linear.read(graph).abs().float()
        per_column = w.flatten(0, -2).amax(0).cpu()
        used = reader.index >= 0
        out.scatter_reduce_(0, reader.index[used], per_column[used], "amax")
    return out


def _kind(change: Map) -> str:
    return "Shift" if isinstance(change, Shift) else "Diagonal" if isinstance(change, Diagonal) else "Map"


def _describe(site: Site) -> str:
    return f"{site.kind} -> {len(site.readers)} linear{'s' if len(site.readers) > 1 else ''}"
