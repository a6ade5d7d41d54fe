"""`qfx.lower`: rewrites a quantized model in place so that it runs fast, without changing what it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx, nn

from qfx.modules.kernels import KERNELS, choose_kernel
from qfx.modules.linear import QLinear
from qfx.modules.merged import Group, Share, Whole, merge, unmerge
from qfx.passes.discover.capture import capture
from qfx.passes.lower.fuse import rewrite
from qfx.passes.lower.merge import find_calls, find_groups

from ._handover import LEFT
from .core.errors import CalibrationError, CaptureError, KernelError
from .core.lowering import LoweredLayer, LoweringReport
from .core.report import Miss
from .core.spec import scheme_label
from .inputs import feeds_of
from .package import Quantized
from .recipes import Recipe
from .verify import outputs_of, relative_difference

TOLERANCE = 0.02
"""The largest relative change of a linear's output: sums in another order, weights that are rounded once more."""


@torch.no_grad()
def lower(
    model: nn.Module,
    example: Mapping[str, Tensor] | Tensor | None = None,
    *,
    device: str | torch.device | None = None,
) -> LoweringReport:
    """Chooses a kernel for every quantized linear, and merges linears that read the same value.

    The model computes the same, its `state_dict` and `qfx.save` give the same tensors, and `restore` takes it back.
    `quantize` and `load` do this by themselves where the weights are on a CUDA device. On others there is nothing to
    do, and the report says so.

    Args:
        model: it is changed in place. What was lowered before is restored first.
        example: one batch of inputs, to see which linears read the same value, and to run the model before and after.
            A language model needs none. Without one, nothing is merged.
        device: the device to lower for; by default the one that holds the weights.

    Returns:
        Every linear with its kernel and the reason, what was merged, and what was not and why.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    report = _lower(model, example, device)
    if isinstance(info := getattr(model, "qfx", None), Quantized):
        info.lowering = report
    return report


def _lower(
    model: nn.Module, example: Mapping[str, Tensor] | Tensor | None, device: str | torch.device | None
) -> LoweringReport:
    layers = _linears(model)
    kind = _device_of(layers) if device is None else torch.device(device).type
    report = LoweringReport(kind)
    restore(model)
    if kind != "cuda" or not layers:
        why = f"computed by the ops' PyTorch bodies: the kernels are for CUDA devices, the weights are on {kind}"
        report.layers = [LoweredLayer(n, scheme_label(m.scheme), m.op, why) for n, m in layers.items()]
        report.notes.append(
            f"nothing was changed: the weights are on {kind}, the kernels are for CUDA devices"
            if layers
            else "nothing was changed: the model has no quantized linear"
        )
        return report
    feeds, want = _reference(model, example, report)
    if feeds is not None:
        _merge_all(model, feeds, report)
    _choose_all(layers, report)
    if feeds is not None and want is not None:
        _check(model, feeds, want, report)
    return report


@torch.no_grad()
def lower_graph(model: nn.Module, example: Mapping[str, Tensor] | Tensor | None = None) -> fx.GraphModule:
    """The model's forward without a cache as one graph, in which ops that quantize, normalize and add are fused.

    Args:
        model: a quantized model, lowered or not; it is not changed, and the graph shares its tensors.
        example: as for `lower`. Sizes of batch and sequence stay open.

    Returns:
        A module that is called as the model is, with the example's inputs by name. `meta["rewrites"]` lists what each
        rewrite did, what it left and why, and how many ops computed before and after.

    Raises:
        CalibrationError, CaptureError: the inputs are not known, or the model is not captured.
    """
    feeds = feeds_of(model, None if example is None else [example], Recipe())[0]
    graph = capture(model, feeds)
    rewrites = rewrite(graph.fx)
    constants = {str(n.target): graph.attr(str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    module = fx.GraphModule(constants, graph.fx, type(model).__name__)
    module.meta["rewrites"] = rewrites
    return module


def inductor_pass(graph: fx.Graph) -> None:
    """Rewrites a graph of Inductor's: `torch.compile(quantized, options={"post_grad_custom_pre_pass": inductor_pass})`.

    `torch.compile(quantized, backend="qfx")` does the same on a graph whose ops are not decomposed yet, and Inductor's
    cache of compiled graphs takes that one.

    Args:
        graph: of the model's forward, in aten ops; it is changed.
    """
    rewrite(graph, LEFT)


def restore(model: nn.Module) -> None:
    """Takes `lower` back: every linear has its own weight again, as it is stored."""
    for module in list(model.modules()):
        if isinstance(module, QLinear) and isinstance(module.part, Share):
            unmerge(module.part.group)
    for module in model.modules():
        if isinstance(module, QLinear) and module.kernel:
            module.use_kernel("")


def _linears(model: nn.Module) -> dict[str, QLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QLinear) and not isinstance(m, Whole)}


def _device_of(layers: Mapping[str, QLinear]) -> str:
    kinds = {m.device.type for m in layers.values()}
    return kinds.pop() if len(kinds) == 1 else "cpu"


def _reference(
    model: nn.Module, example: Mapping[str, Tensor] | Tensor | None, report: LoweringReport
) -> tuple[dict[str, Tensor] | None, list[Tensor] | None]:
    """One batch, and what the model makes of it before anything is changed."""
    try:
        feeds = feeds_of(model, None if example is None else [example], Recipe())[0]
    except CalibrationError:
        report.notes.append("no linears were merged: the model's inputs are not known; pass lower(model, example)")
        return None, None
    return feeds, outputs_of(model, feeds)


def _merge_all(model: nn.Module, feeds: dict[str, Tensor], report: LoweringReport) -> None:
    try:
        graph = capture(model, feeds)
    except CaptureError as e:
        report.notes.append(f"no linears were merged: {e}")
        return
    found, misses = find_groups(graph)
    report.misses += misses
    calls = {name: len(c.nodes) for name, c in find_calls(graph).items()}
    wanted = [([model.get_submodule(name) for name in names], names) for names in found]
    made = [(merge(members), names) for members, names in wanted]  # type: ignore[arg-type]
    if _counts(model, feeds, [group for group, _ in made]) != [calls[names[0]] for _, names in made]:
        for group, _ in made:
            unmerge(group)
        for members, names in wanted:  # one at a time: now that one does not serve, which?
            group = merge(members)  # type: ignore[arg-type]
            if (got := _counts(model, feeds, [group])) != [calls[names[0]]]:
                unmerge(group)
                copies = "its members are called with copies of one value"
                report.misses += [
                    Miss(n, f"merged, {copies if isinstance(got, list) else got}", "merge") for n in names
                ]


def _counts(model: nn.Module, feeds: dict[str, Tensor], groups: list[Group]) -> list[int] | str:
    """How often each merged linear is computed when the model is run once; or why the model does not run."""
    counts = [0] * len(groups)

    def counting(i: int, whole: Whole) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            counts[i] += 1
            return whole(x)

        return call

    wholes = [group.whole for group in groups]
    for i, group in enumerate(groups):
        group.whole = counting(i, group.whole)  # type: ignore[assignment]
    try:
        outputs_of(model, feeds)
    except Exception as e:  # whatever the model's own code raises
        return f"its output is a view, which fails: {type(e).__name__}: {e}".splitlines()[0]
    finally:
        for group, whole in zip(groups, wholes, strict=True):
            group.whole, group.held = whole, None
    return counts


def _choose_all(layers: Mapping[str, QLinear], report: LoweringReport) -> None:
    names = {module: name for name, module in layers.items()}
    chosen: dict[QLinear, tuple[str, str]] = {}
    for name, module in layers.items():
        part = module.part
        group = part.group if isinstance(part, Share) else None
        holder = module if group is None else group.whole
        if holder not in chosen:
            sizes = holder.in_features, holder.out_features
            chosen[holder] = choose_kernel(holder.scheme, *sizes, holder.has_g_idx)
            if (kernel := chosen[holder][0]) in KERNELS:
                try:
                    holder.use_kernel(kernel)
                except KernelError as e:
                    chosen[holder] = holder.op, f"the weight is read as it is stored; {e}"
        merged = [names[m] for m in group.members] if group is not None else []
        report.layers.append(LoweredLayer(name, scheme_label(module.scheme), *chosen[holder], merged))


def _check(model: nn.Module, feeds: dict[str, Tensor], want: list[Tensor], report: LoweringReport) -> None:
    """Runs the lowered model; takes everything back if a linear computes something else than it did alone.

    The model's output says less: what one layer rounds otherwise, the layers behind it may amplify.
    """
    layers = [(layer.name, model.get_submodule(layer.name)) for layer in report.layers]
    lowered = {name: m for name, m in layers if isinstance(m, QLinear) and not m.as_stored}
    errors: dict[str, float] = {}
    try:
        with _compared(lowered, errors):
            got = outputs_of(model, feeds)
    except Exception as e:  # whatever the model's own code raises
        failure = f"the lowered model fails: {type(e).__name__}: {e}".splitlines()[0]
    else:
        report.error = relative_difference(want, got)
        worst = max(errors, key=lambda name: errors[name], default=None)
        report.layer_error = None if worst is None else errors[worst]
        if worst is None or errors[worst] <= TOLERANCE:
            return
        failure = f"it changed the output of {worst} by {errors[worst]:.2g}"
    restore(model)
    report.notes.append(f"undone: {failure}; every linear is computed from its weight as it is stored")
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        layer.kernel, layer.reason, layer.merged = str(module.op), "lowering was undone", []


@contextlib.contextmanager
def _compared(layers: Mapping[str, QLinear], errors: dict[str, float]) -> Iterator[None]:
    """Within it, each call of a linear notes how far its output is from that of the same linear alone."""

    def watched(name: str, module: QLinear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            y = type(module).forward(module, x)
            errors[name] = max(errors.get(name, 0.0), _distance(module.alone()(x).float(), y.float()))
            return y

        return forward

    try:
        for name, module in layers.items():
            module.__dict__["forward"] = watched(name, module)
        yield
    finally:
        for module in layers.values():
            module.__dict__.pop("forward", None)


def _distance(want: Tensor, got: Tensor) -> float:
    """Relative, of norms; infinite where only one is finite."""
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return float("inf")
    return (got - want)[finite].norm().item() / max(want[finite].norm().item(), 1e-30)
