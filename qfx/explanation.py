"""`qfx.explain`: what a recipe would do to a model, found out without calibration data and without solving anything."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from .core.passes import State
from .core.report import Layer, Miss, general
from .core.site import Site
from .core.spec import scheme_label
from .inputs import check_model, feeds_of
from .quantize import discover, planned_kernel
from .recipes import Recipe, settings
from .report import add_row, new_table, percent, plain

VERSION = 1


@dataclass
class SitePlan:
    """One site, and which steps would use it.

    Attributes:
        name: the layer that writes the channels (with its rows, if they are a part).
        kind: "norm", "value" or "inner"; "online" for a value that nothing can absorb a map for, mapped at run time.
        channels: how many.
        readers: names of the layers that read them.
        folds: maps that can be chosen here; they cost nothing at run time unless the site is online.
        why_not: for other maps, the reason.
        steps: the recipe's steps that would choose a map for it, by number, from 1.
        unused: if there are none, why.
    """

    name: str
    kind: str
    channels: int
    readers: list[str]
    folds: list[str]
    why_not: dict[str, str]
    steps: list[int]
    unused: str = ""


@dataclass
class StepPlan:
    """One step of the recipe.

    Attributes:
        name: of the step.
        settings: those that differ from its defaults.
        needs_data: on this model it runs calibration batches.
        does: what it would take, in words.
    """

    name: str
    settings: dict[str, Any]
    needs_data: bool
    does: str


@dataclass
class Explanation:
    """What would be done.

    Attributes:
        model: class of the model.
        recipe: as `Recipe.to_dict` gives it.
        linear_weights: weights of all linears.
        steps: of the recipe, in order.
        sites: every site that was proved, in graph order.
        misses: linears that no site covers, and why; products that no view covers.
        layers: every linear with its scheme; `op` is the kernel that will compute it on a CUDA device, `note` says why
            that one, or why the layer stays in float.
        warnings: what else the user should know.
    """

    model: str
    recipe: dict[str, Any]
    linear_weights: int
    steps: list[StepPlan] = field(default_factory=list)
    sites: list[SitePlan] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def headline(self) -> str:
        """The plan in one line."""
        planned = [layer for layer in self.layers if layer.scheme is not None]
        share = sum(layer.weights for layer in planned) / self.linear_weights if self.linear_weights else 0.0
        used = sum(bool(site.steps) for site in self.sites)
        data = "needs calibration data" if any(s.needs_data for s in self.steps) else "needs no data"
        return (
            f"would quantize {percent(share)} of linear weights ({len(planned)} of {len(self.layers)} linears) and "
            f"use {used} of {len(self.sites)} sites; {data}"
        )

    def render(self, verbose: bool = False) -> Group:
        """Tables. Rows that differ only in a block's number are shown once, unless all are asked for."""
        tables = (self._steps(), self._sites(verbose), self._misses(verbose), self._layers(verbose))
        warnings = [Text(f"warning: {text}", style="yellow") for text in self.warnings]
        spaced = [item for table in tables if table.row_count for item in (Text(), table)]
        return Group(Text(f"{self.model}: {self.headline()}", style="bold"), *warnings, *spaced)

    def __str__(self) -> str:
        return plain(self.render(), width=120)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description, with a "version"."""
        return {"version": VERSION, **asdict(self)}

    def _steps(self) -> Table:
        table = new_table("Steps", ">", "step", "settings", "data", "takes")
        for number, step in enumerate(self.steps, 1):
            given = ", ".join(f"{name}={value}" for name, value in step.settings.items()) or "defaults"
            add_row(table, str(number), step.name, given, "yes" if step.needs_data else "no", step.does)
        return table

    def _sites(self, verbose: bool) -> Table:
        table = new_table("Sites", "site", ">times", "kind", "read by", "maps", "taken by")
        if verbose:
            table.add_column("does not fold", overflow="fold")
        rows = []
        for s in self.sites:
            taken = ", ".join(f"step {i}" for i in s.steps) or f"none: {s.unused}"
            readers = _within(s.readers, s.name)
            row = [s.name, s.kind, readers, ", ".join(s.folds), taken]
            rows.append([*row, "; ".join(f"{m}: {why}" for m, why in s.why_not.items())] if verbose else row)
        if not verbose:  # names are kept in one piece
            table.columns[0].no_wrap = True
            table.columns[3].min_width = max((len(word) for row in rows for word in row[2].split()), default=None)
        for name, times, cells in _collapsed(rows, verbose):
            add_row(table, name, times, *cells)
        return table

    def _misses(self, verbose: bool) -> Table:
        table = new_table("No site covers the input of", "layer", ">times", "why")
        for name, times, cells in _collapsed([(m.where, m.why) for m in self.misses], verbose):
            add_row(table, name, times, *cells)
        return table

    def _layers(self, verbose: bool) -> Table:
        table = new_table("Layers", "layer", ">times", "scheme", "shape", "kernel", "note")
        rows = [
            (layer.name, layer.scheme or "float", " × ".join(map(str, layer.shape)), layer.op or "-", layer.note)
            for layer in self.layers
        ]
        for name, times, cells in _collapsed(rows, verbose):
            add_row(table, name, times, *cells)
        return table


@torch.no_grad()
def explain(model: nn.Module, recipe: str | Path | Mapping[str, Any] | Recipe, calibration: Any = None) -> Explanation:
    """Says what `qfx.quantize(model, recipe)` would do: nothing is measured, solved, or changed.

    Args:
        model: as for `quantize`.
        recipe: as for `quantize`.
        calibration: one batch shows what the inputs look like; a language model needs none, whatever the recipe.

    Returns:
        Every step with what it would take, every site with the maps that fold there, every linear with its scheme, and
        for what is left out the reason.

    Raises:
        RecipeError, CalibrationError, CaptureError: as `quantize`.
    """
    recipe = Recipe.load(recipe)
    check_model(model)
    # an empty recipe: whatever the steps will measure, no data are needed to see the graph
    batches = feeds_of(model, calibration, Recipe())[:1]
    # the plan may untie a weight: that happens in a copy of the module tree, which shares the tensors
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    state = discover(copy.deepcopy(model, shared).eval(), recipe, batches, lambda what, done, total: None)
    report = state.report
    result = Explanation(report.model, report.recipe, report.linear_weights)
    result.misses, result.warnings = report.misses, report.warnings
    taken = [step.wanted(state) if hasattr(step, "wanted") else None for step in recipe.steps]
    result.steps = [_step(step, sites, state) for step, sites in zip(recipe.steps, taken, strict=True)]
    sites = {
        site.name: site for some in (state.sites, *taken) for site in some or ()
    }  # online ones are in no other list
    for name, site in sites.items():
        numbers = [i for i, some in enumerate(taken, 1) if any(s.name == name for s in some or ())]
        result.sites.append(_site(site, numbers, state))
    result.layers = _layers(state)
    return result


def _site(site: Site, steps: list[int], state: State) -> SitePlan:
    readers = [r.linear.name for r in site.readers]
    unused = ""
    if not steps:
        quantized = any(r.linear.weight in state.plan for r in site.readers)
        unused = "its readers stay in float" if state.plan and not quantized else f"no step takes {site.kind} sites"
    return SitePlan(site.name, site.kind, site.channels, readers, sorted(site.folds), dict(site.why_not), steps, unused)


def _step(step: Any, sites: list[Site] | None, state: State) -> StepPlan:
    if sites is not None:  # a transform
        kinds = Counter(site.kind for site in sites)
        each = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        does = f"{len(sites)} sites: {each}" if sites else "no site"
        return StepPlan(step.name, settings(step), step.needs_data, does)
    static = sum(bool(s.input and not s.input.dynamic) for s in state.plan.values())
    does = f"{len(state.plan)} layers" + (f", {static} of them with static inputs" if static else "")
    return StepPlan(step.name, settings(step), step.needs_data or static > 0, does)


def _layers(state: State) -> list[Layer]:
    """Every linear, in execution order; then what is none, but has weights."""
    floats = {layer.name: layer for layer in state.report.layers}
    layers: dict[str, Layer] = {}
    for linear in state.linears:
        scheme = state.plan.get(linear.weight)
        if scheme is not None:
            kernel, why = planned_kernel(state, linear)
            shape = linear.shape(state.graph)
            layers[linear.weight] = Layer(linear.name, scheme_label(scheme), shape, op=kernel, note=why)
        elif (layer := floats.pop(linear.name, None)) is not None:
            layers[linear.weight] = layer
    return [*layers.values(), *floats.values()]


def _collapsed(rows: Iterable[Sequence[str]], verbose: bool) -> list[tuple[str, str, list[str]]]:
    """(name, how often, other cells): rows that are the same but for the numbers of blocks are one."""
    if verbose:
        return [(name, "1", list(cells)) for name, *cells in rows]
    counts = Counter(tuple(map(general, row)) for row in rows)
    return [(name, str(count), list(cells)) for (name, *cells), count in counts.items()]


def _within(names: Sequence[str], base: str) -> str:
    """Names without the part that they share with `base`: what stands around them says it."""
    own = base.split(".")
    short = []
    for name in names:
        parts = name.split(".")
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, parts, strict=False)))
        short.append(".".join(parts[min(same, len(parts) - 1) :]))
    return ", ".join(short)
