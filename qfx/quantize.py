"""`qfx.quantize`: the pipeline, in the order in which it runs."""

from __future__ import annotations

import copy
import dataclasses
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qfx.modules.kernels import choose_kernel
from qfx.passes.discover.capture import capture, check_feeds, fixed_size
from qfx.passes.discover.linears import find_linears
from qfx.passes.discover.plan import make_plan, untie
from qfx.passes.discover.sites import find_sites, norm_gains
from qfx.passes.lower.modules import Lower, own_module

from ._tree import stored_names
from .core.errors import KernelError
from .core.graph import Env, Graph
from .core.linear import Linear
from .core.memory import estimate
from .core.passes import Progress, State, run_pass
from .core.report import Layer, Miss, Report, StepRecord
from .inputs import check_model, device_of, feeds_of
from .lowering import lower
from .package import Quantized, attach
from .progress import progress_bar
from .recipes import Recipe, settings
from .report import human_size
from .resume import Store, fingerprint
from .verify import check_capture, check_whole, finish, floats, reference_outputs, stored_bytes

CHECKED = 2
"""Calibration batches on which the whole model is compared before and after."""
TOLERANCE = 1e-4
"""The largest relative change that folds may make to the model's float32 output."""
EXAMPLE_TOKENS = 32
"""Positions of the example on which sites are probed."""


def quantize(
    model: nn.Module,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    calibration: Any = None,
    *,
    inplace: bool = False,
    resume: str | Path | None = None,
    progress: bool | Progress = True,
    tolerance: float = TOLERANCE,
) -> nn.Module:
    """Quantizes a transformer after training.

    Args:
        model: any module that `torch.export` captures, in evaluation mode or not; it is not changed unless `inplace`.
        recipe: a preset's name, a `Recipe`, a mapping, or the path of a YAML file.
        calibration: an iterable of dicts of tensors (the model's inputs by name) or of `input_ids` tensors. One batch
            is enough for recipes that need no data: it shows what the inputs look like.
        inplace: change `model` itself, to save its memory.
        resume: a folder in which solved layers are kept as they come. The same call with the same folder, after an
            interruption, takes them from there. It can be removed afterwards.
        progress: show bars on a terminal, or a callable that gets (what, done, total).
        tolerance: the largest relative change of a block's, and of the model's, float32 output that a fold may make.

    Returns:
        A model of the class it was given, with quantized layers in it. `.qfx.report` says what was done.

    Raises:
        RecipeError, CalibrationError, CaptureError, PassError: with who, what, and what to do.
    """
    began = time.perf_counter()
    recipe = Recipe.load(recipe)
    check_model(model)
    batches = feeds_of(model, calibration, recipe)
    original = model
    model = model if inplace else copy.deepcopy(model)
    model.eval()
    names = stored_names(model)
    with progress_bar(progress) as show, torch.no_grad():
        reference = [reference_outputs(model, b, i) for i, b in enumerate(batches[:CHECKED])]
        state = discover(model, recipe, batches, show, tolerance)
        if resume is not None:
            state.store = Store(resume, fingerprint(original, recipe.to_dict(), batches))
        report = state.report
        report.bytes_before = stored_bytes(original)
        done: list[str] = []
        for step in recipe.steps:
            if not state.solved:
                check_whole(state, original, inplace, reference)
            run_pass(state, step, settings(step), done)
            done.append(step.name)
        if not state.solved:
            check_whole(state, original, inplace, reference)
        simulated: list[list[Tensor]] = []
        if state.solved:
            # before lowering: a lowered layer shows its weight as [out, in], whatever the parameter's layout was
            simulated = [floats(state.graph.run(b)) for b in state.batches[:1]]
            run_pass(state, Lower(), {}, done)
        finish(state, simulated, reference)
    attach(model, Quantized(report, recipe, {k: list(v.shape) for k, v in batches[0].items()}), names)
    if device_of(model).type == "cuda" and state.solved:
        lower(model, batches[0])
    report.seconds = time.perf_counter() - began
    return model


def discover(
    model: nn.Module, recipe: Recipe, batches: list[dict[str, Tensor]], show: Progress, tolerance: float = TOLERANCE
) -> State:
    """Everything before the first step: capture, linears, the plan, sites."""
    began = time.perf_counter()
    show("capture", 0, 1)
    graph = capture(model, batches[0])
    for i, batch in enumerate(batches):
        check_feeds(graph, batch, f"batch {i}")
    check_capture(graph, batches[0])
    show("capture", 1, 1)
    linears, uncovered = find_linears(graph)
    odd = {m.where: m.why for m in uncovered}  # once each, however often it is used
    plan = make_plan(graph, linears, recipe.schemes, recipe.ignore)
    untie(graph, linears, plan)
    show("sites", 0, 1)
    env = example_values(graph, batches[0])
    sites, misses = find_sites(graph, linears, env)
    show("sites", 1, 1)
    found = {lin.weight: lin for lin in linears}
    sizes = {name: graph.attr(name).numel() for name in [*found, *odd]}
    report = Report(type(model).__name__, recipe.to_dict(), sum(sizes.values()))
    report.versions = {"torch": torch.__version__, "python": platform.python_version(), **_version("transformers")}
    report.warnings += plan.notes
    report.misses += [Miss(w.removesuffix(".weight"), why, "discover", sizes[w]) for w, why in odd.items()]
    report.misses += [dataclasses.replace(m, step="sites") for m in misses]
    for linear in found.values():
        if linear.weight not in plan.schemes:
            why = plan.floats.get(linear.weight, "no pattern matches it")
            report.layers.append(Layer(linear.name, None, linear.shape(graph), note=why))
    for name, why in odd.items():
        if name not in found:
            report.layers.append(Layer(name.removesuffix(".weight"), None, list(graph.attr(name).shape), note=why))
    norms = norm_gains(graph)
    memory = estimate(graph, batches)
    notes = [
        f"{len(linears)} linears, {len(sites)} sites",
        f"a sweep of the calibration set keeps about {human_size(memory.boundary)} between blocks and "
        f"{human_size(memory.block)} in one",
    ]
    report.steps.append(StepRecord("discover", {}, len(sites), time.perf_counter() - began, notes))
    return State(graph, linears, sites, plan.schemes, batches, report, norms, progress=show, tolerance=tolerance)


def example_values(graph: Graph, batch: Mapping[str, Tensor]) -> Env:
    """Every value for a small input, in float64 if the ops have it: rows of probabilities then sum to one."""
    feeds = _small(graph, batch)
    graph.working_dtype = torch.float64
    try:
        env: Env = {}
        graph.execute(graph.nodes, env, feeds=feeds)
    except RuntimeError:  # an op for low precision only
        graph.working_dtype, env = None, {}
        graph.execute(graph.nodes, env, feeds=feeds)
    finally:
        graph.working_dtype = None
    return env


def planned_kernel(state: State, linear: Linear) -> tuple[str, str]:
    """What will compute a linear of the plan on a CUDA device, and why."""
    uses = [other for other in state.linears if other.weight == linear.weight]
    if not own_module(state.graph.module, linear, uses):
        return "dequantize", "a parameter that a module multiplies with in its own forward is dequantized each time"
    *_, out, columns = linear.shape(state.graph)
    try:
        return choose_kernel(state.plan[linear.weight], columns, out)
    except KernelError as e:
        return "", f"rounded, but kept in float: {e}"


def _small(graph: Graph, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first two rows and positions of a batch, where the graph lets sizes vary."""
    sizes: dict[str, int] = {}
    small = {}
    for node in graph.inputs:
        name, value = str(node.target), batch[str(node.target)]
        for dim, size in enumerate(node.meta["val"].shape):
            if fixed_size(size) is not None:
                continue
            most = sizes.setdefault(str(size), 2 if dim == 0 else EXAMPLE_TOKENS)
            value = value.narrow(dim, 0, min(most, value.shape[dim]))
        small[name] = value
    return small


def _version(name: str) -> dict[str, str]:
    import importlib.metadata

    try:
        return {name: importlib.metadata.version(name)}
    except importlib.metadata.PackageNotFoundError:
        return {}
