"""`qfx.quantize`: the pipeline, in the order in which it runs."""

from __future__ import annotations

import copy
import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qfx.passes.discover.capture import capture, check_feeds, exportable, fixed_size, input_names
from qfx.passes.discover.linears import find_linears
from qfx.passes.discover.plan import make_plan, untie
from qfx.passes.discover.sites import find_sites, norm_gains
from qfx.passes.lower.modules import Lower

from . import data as _data
from ._tree import stored_names
from .core.errors import CalibrationError, PassError, RecipeError
from .core.graph import Env, Graph
from .core.memory import estimate
from .core.online import GAIN
from .core.passes import Progress, State, run_pass
from .core.report import Layer, Miss, Report, StepRecord
from .package import Quantized, attach
from .progress import progress_bar
from .recipes import Recipe, settings
from .report import human_size
from .resume import Store, fingerprint

CHECKED = 2
"""Calibration batches on which the whole model is compared before and after."""
TOLERANCE = 1e-4
"""The largest relative change that folds may make to the model's float32 output."""
ROUNDINGS = 4
"""In low precision, the largest change as a multiple of what its rounding alone changes."""
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
        reference = [_reference(model, b, i) for i, b in enumerate(batches[:CHECKED])]
        state = discover(model, recipe, batches, show, tolerance)
        if resume is not None:
            state.store = Store(resume, fingerprint(original, recipe.to_dict(), batches))
        report = state.report
        report.bytes_before = _bytes(original)
        done: list[str] = []
        for step in recipe.steps:
            if not state.solved:
                _check_whole(state, original, inplace, reference)
            run_pass(state, step, settings(step), done)
            done.append(step.name)
        if not state.solved:
            _check_whole(state, original, inplace, reference)
        simulated: list[list[Tensor]] = []
        if state.solved:
            # before lowering: a lowered layer shows its weight as [out, in], whatever the parameter's layout was
            simulated = [_floats(state.graph.run(b)) for b in state.batches[:1]]
            run_pass(state, Lower(), {}, done)
        _finish(state, simulated, reference)
    report.seconds = time.perf_counter() - began
    attach(model, Quantized(report, recipe, {k: list(v.shape) for k, v in batches[0].items()}), names)
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
    _check_capture(graph, batches[0])
    show("capture", 1, 1)
    linears, uncovered = find_linears(graph)
    odd = {m.where: m.why for m in uncovered}  # once each, however often it is used
    plan = make_plan(graph, linears, recipe.schemes, recipe.ignore)
    untie(graph, linears, plan)
    show("sites", 0, 1)
    env = _example(graph, batches[0])
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


def check_model(model: nn.Module) -> None:
    """Raises with advice if the weights cannot be worked on."""
    if not isinstance(model, nn.Module):
        raise RecipeError(f"quantize: model is a {type(model).__name__}, not a torch.nn.Module")
    done = getattr(model, "qfx", None)
    if isinstance(done, Quantized) and done.report.share_quantized:
        raise RecipeError("quantize: the model is quantized already; start from the float model")
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.device.type == "meta":
            raise RecipeError(f"quantize: {name} is on the meta device and has no values; load the weights first")
        if p.dtype == torch.float16 and p.device.type == "cpu":
            raise RecipeError(
                f"quantize: {name} is float16 on the CPU, where it is slow and overflows; use model.float() or "
                "model.bfloat16(), or move the model to a GPU"
            )
        # a buffer may be infinite: masks are
        broken = not bool(p.isfinite().all()) if isinstance(p, nn.Parameter) else bool(p.isnan().any())
        if broken:
            raise RecipeError(f"quantize: {name} has NaN or infinite values; the checkpoint is damaged")


def feeds_of(model: nn.Module, calibration: Any, recipe: Recipe) -> list[dict[str, Tensor]]:
    """The calibration set as inputs by name; tensors go to the model's first input."""
    if calibration is None:
        if recipe.needs_data:
            who = ", ".join(s.name for s in recipe.steps if s.needs_data) or "static inputs"
            raise CalibrationError(f"calibration: the recipe measures activations ({who}); pass calibration=batches")
        calibration = [_dummy(model)]
    names = input_names(model)
    batches = _data.batches(calibration)
    main = getattr(model, "main_input_name", None)
    first = main if isinstance(main, str) and main in names else (names[0] if names else "input")
    feeds = []
    for i, batch in enumerate(batches):
        if set(batch) == {"input_ids"} and "input_ids" not in names:
            batch = {first: batch["input_ids"]}
        if unknown := sorted(set(batch) - set(names)):
            if "labels" in unknown:
                unknown.remove("labels")
            if unknown:
                raise CalibrationError(
                    f"calibration: batch {i} has {', '.join(unknown)}, which "
                    f"{type(model).__name__}.forward does not take"
                )
        feeds.append({k: v.to(_device(model)) for k, v in batch.items() if k != "labels"})
    return feeds


def _dummy(model: nn.Module) -> dict[str, Tensor]:
    """Token ids for a language model, where no data are needed but the graph is."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if "input_ids" not in input_names(model) or not isinstance(vocabulary, int):
        raise CalibrationError("calibration: pass one batch, so that the model's inputs are known")
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids}


def _example(graph: Graph, batch: Mapping[str, Tensor]) -> Env:
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


def _check_capture(graph: Graph, batch: Mapping[str, Tensor]) -> None:
    want, got = _reference(graph.module, batch, 0), _floats(graph.run(batch))
    error = relative_difference(want, got)
    if not error < 1e-3 * (30 if _is_low(graph.module) else 1):
        raise PassError(f"capture: the captured graph differs from {type(graph.module).__name__} by {error:.2g}")


def _check_whole(state: State, original: nn.Module, inplace: bool, reference: Sequence[list[Tensor]]) -> None:
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
    return relative_difference(_floats(exact), _floats(graph.run(batch)))


def _finish(state: State, simulated: Sequence[list[Tensor]], reference: Sequence[list[Tensor]]) -> None:
    report, model = state.report, state.graph.module
    report.output_error = _output_error(state, reference)
    report.bytes_after = _bytes(model)
    if state.solved:
        apart = max(relative_difference(a, _outputs(model, b)) for a, b in zip(simulated, state.batches, strict=False))
        if apart > max(0.05, 0.2 * (report.output_error or 0)):
            report.warnings.append(
                f"the quantized model differs from its reference graph by {apart:.2g}: some module may not run its "
                "layers as the graph says"
            )


def _output_error(state: State, reference: Sequence[list[Tensor]]) -> float:
    pairs = zip(reference, state.batches, strict=False)
    return max((relative_difference(want, _outputs(state.graph.module, b)) for want, b in pairs), default=0.0)


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


def _reference(model: nn.Module, batch: Mapping[str, Tensor], i: int) -> list[Tensor]:
    """What the float model makes of a batch; raises CalibrationError if it cannot."""
    shown = ", ".join(f"{k} {str(v.dtype).removeprefix('torch.')} {list(v.shape)}" for k, v in batch.items())
    try:
        outputs = _outputs(model, batch)
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


def _outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    with exportable(model):
        return _floats(model(**batch))


def _floats(output: Any) -> list[Tensor]:
    return [t.float() for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _is_low(model: nn.Module) -> bool:
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())


def _bytes(model: nn.Module) -> int:
    seen = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in seen.values())


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _version(name: str) -> dict[str, str]:
    import importlib.metadata

    try:
        return {name: importlib.metadata.version(name)}
    except importlib.metadata.PackageNotFoundError:
        return {}
