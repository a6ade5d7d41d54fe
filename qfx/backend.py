"""The backend of `torch.compile`: quantizes the linears of what Dynamo captures, and compiles the rest with another.

>>> fast = torch.compile(model, backend="qfx", options={"recipe": "W8A8"})  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx.modules.linear import QLinear
from qfx.passes import SOLVERS
from qfx.passes.discover.dynamo import Traced, compiled_model, trace
from qfx.passes.discover.linears import find_linears
from qfx.passes.discover.plan import make_plan
from qfx.passes.lower._rewrite import Rewritten
from qfx.passes.lower.graph import by_op, form_of, lacks_kernel, plain_bias, put_module
from qfx.passes.lower.merge import merge_linears

from ._handover import calls_quantized, codes_of, fake, finish, fuse
from .core.errors import CalibrationError, CaptureError, KernelError, QfxError, RecipeError
from .core.graph import Graph
from .core.linear import Linear
from .core.report import Miss
from .core.spec import Scheme, parse_scheme
from .recipes import FLOAT, PRESETS, Recipe
from .watched import Product, Slot, Weight

OPTIONS = ("recipe", "then", "mode", "then_options", "fuse", "calibration", "calibrate")
Compiled = Callable[..., Any]
SHARED = (
    "backend: Dynamo calls one graph with the parameters of several layers, which patterns on names of layers cannot "
    "tell apart, or a parameter was replaced by another one. Call torch.compiler.reset(), compile with fullgraph=True, "
    "or write the recipe with '*' and roles alone"
)
log = logging.getLogger("qfx")


def backend(
    recipe: str | Path | Mapping[str, Any] | Recipe | nn.Module | None = None,
    *,
    then: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    then_options: Mapping[str, Any] | None = None,
    fuse: bool = True,
    calibration: Any = None,
    calibrate: int | None = None,
    model: nn.Module | None = None,
) -> Backend:
    """A backend for `torch.compile(model, backend=...)`.

    Args:
        recipe: as for `quantize`, or a scheme's name ("W8A8" quantizes all but the head and routers). Or what is
            quantized already: a model that `quantize` or `load` gave, or the folder of one. None if the model that
            is compiled is itself quantized: its graphs are rewritten.
        then: the backend that compiles the rewritten graph, by name or itself.
        mode: of `then`, as `torch.compile` takes it: "max-autotune", "reduce-overhead".
        then_options: of `then`, as `torch.compile` takes its options. Inductor takes a mode and options together.
        fuse: whether norms, activations, sums and quantization become one op where they follow each other.
        calibration: as for `quantize`; the passes run once, when the first graph is compiled.
        calibrate: instead of `calibration`, how many calls of the compiled model run in float and are recorded. The
            passes run at the call that follows.
        model: the float model, if it is not the model itself that is compiled but a function that calls it.

    Raises:
        RecipeError, CalibrationError: the recipe cannot be read, or needs data.
    """
    given: Any = recipe if _is_solved(recipe) else None
    if given is None and calibration is None and calibrate is None:
        return Backend(_recipe(recipe), then, mode, then_options, fuse)
    from .calibrated import CalibratedBackend  # it captures models, which few recipes need

    if calibrate is not None and (isinstance(calibrate, bool) or not isinstance(calibrate, int) or calibrate < 1):
        raise CalibrationError(f"backend: calibrate={calibrate!r} is no number of calls; use 1 or more")
    chosen = Recipe() if given is not None else _recipe(recipe)
    data: dict[str, Any] = {"calibration": calibration, "calibrate": calibrate or 0, "model": model}
    return CalibratedBackend(chosen, then, mode, then_options, fuse, given=given, **data)


def compile_graph(
    gm: fx.GraphModule, examples: list[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Compiled:
    """What `torch.compile(model, backend="qfx", options=...)` calls for every graph.

    Args:
        gm: Dynamo's graph.
        examples: its inputs.
        options: {"recipe": ..., "then": ..., "mode": ..., "calibration": ...} and so on, as for `backend`.
        mode: of the next backend; torch takes none beside options, which may have one.
    """
    with told():
        options = {**({} if mode is None else {"mode": mode}), **(options or {})}
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise RecipeError(f"backend: unknown options {unknown}; use {', '.join(map(repr, OPTIONS))}")
        if _is_solved(options.get("recipe")) or options.keys() & {"calibration", "calibrate"}:
            from .calibrated import shared_backend

            chosen: Backend = shared_backend(options, backend)
        else:
            chosen = backend(**options)
    return chosen(gm, examples)


@dataclass(eq=False)
class Backend:
    """A configured backend: `torch.compile(model, backend=qfx.backend("W8A8"))`.

    Attributes:
        recipe: what is done to the linears.
        then: what compiles the rewritten graph.
        mode: of `then`.
        then_options: of `then`.
        fuse: whether the graph is rewritten behind the quantization.
        graphs: how many graphs were compiled.
        layers: names and schemes of the layers that were quantized in any of them.
        floats: names of the linears that were not, and why.
        rewrites: for each graph that was rewritten: what each rewrite did, what it left and why.
    """

    recipe: Recipe
    then: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    then_options: Mapping[str, Any] | None = None
    fuse: bool = True
    graphs: int = 0
    layers: dict[str, Scheme] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)
    rewrites: list[list[Rewritten]] = field(default_factory=list)

    _weights: weakref.WeakSet[Weight] = field(default_factory=weakref.WeakSet, repr=False)
    """Those that graphs have read."""
    _reads: dict[int, weakref.ref[Tensor]] = field(default_factory=dict, repr=False)
    """By id, matrices that graphs read as they are."""

    __name__ = "qfx"  # what Dynamo calls it in messages

    def __post_init__(self) -> None:
        """Refuses a recipe that this backend cannot run, and a `then` that does not exist."""
        self._check_recipe()
        if self.then == "qfx" or isinstance(self.then, Backend):
            raise RecipeError("backend: 'then' compiles what qfx has rewritten, and cannot be qfx again")
        if isinstance(self.then, str):
            try:
                torch._dynamo.lookup_backend(self.then)
            except torch._dynamo.exc.InvalidBackend:
                known = ", ".join(torch._dynamo.list_backends())
                raise RecipeError(f"backend: then={self.then!r} is no backend of torch.compile; {known} are") from None

    def _check_recipe(self) -> None:
        """Refuses a recipe for which a graph alone is not enough."""
        if self.recipe.needs_data:
            who = ", ".join(s.name for s in self.recipe.steps if s.needs_data) or "static inputs"
            raise CalibrationError(
                f"backend: the recipe measures activations ({who}), and there is no calibration set here; give "
                "calibration=batches or calibrate=N, or what qfx.quantize returned instead of the recipe"
            )
        if others := [s.name for s in self.recipe.steps if type(s) not in SOLVERS]:
            raise RecipeError(f"backend: {', '.join(others)} needs the whole model; give calibration=batches")

    def _take(self, mode: str | None = None, options: Mapping[str, Any] | None = None) -> None:
        """Takes what `torch.compile(model, backend=self, ...)` was given for the next backend."""
        for name, new in (("mode", mode), ("then_options", options)):
            if new is not None and getattr(self, name) not in (None, new):
                raise RecipeError(f"backend: it has {name}={getattr(self, name)!r} already, and {new!r} is given")
            if new is not None:
                setattr(self, name, new)

    def __call__(self, gm: fx.GraphModule, examples: Sequence[Any], **options: Any) -> Compiled:
        """Compiles one graph of Dynamo's."""
        with told():
            self._take(**options)
            check_inputs(gm, examples)
            self.graphs += 1
            if not self.recipe.schemes:
                _check_quantized(compiled_model())
            elif not any(isinstance(x, nn.Parameter) and x.dim() > 1 for x in examples):
                return self._compile(gm, list(examples))  # type: ignore[no-any-return]
            if not any(isinstance(x, Tensor) for x in examples):
                return self._compile(gm, list(examples))  # type: ignore[no-any-return]
            with torch.inference_mode(False), torch.no_grad():
                traced = trace(gm, examples)
                weights = self._rewrite(traced, examples)
            rewritten, kept = finish(traced, gm, codes_of(weight.module for _, weight in weights))
        slots = [Slot(at, weight) for at, weight in weights]
        matrices = [i for i in kept if isinstance(examples[i], nn.Parameter) and examples[i].dim() > 1]
        codes = [fake(t) for slot in slots for t in slot.weight.tensors]
        inner = self._compile(rewritten, [*(examples[i] for i in kept), *codes])
        only = [(at, weakref.ref(examples[at])) for at in traced.positions.values()] if self._names_layers else []

        def run(*inputs: Any) -> Any:
            for at, parameter in only:
                if parameter() is not inputs[at]:
                    raise QfxError(SHARED)
            stored = [t for slot in slots for t in slot.tensors(inputs)]
            if any(slot.weight not in self._weights for slot in slots):  # of this call's layer, if layers share it
                self._weights.update(slot.weight for slot in slots)
                self._reads |= {id(inputs[i]): weakref.ref(inputs[i]) for i in matrices}
            return inner(*[inputs[i] for i in kept], *stored)

        return run

    def release(self) -> int:
        """Frees the float values of the matrices that were quantized and that no compiled graph reads.

        For a model that is called through `torch.compile` alone from here on: each such parameter keeps its shape and
        dtype over one element, which is NaN, so that whatever else reads it is seen. A graph is compiled once more
        when it is called next, since strides are not what they were, and reads the same codes.

        Returns:
            Bytes that the parameters gave back; 0 before the first call.
        """
        read = {number for number, reference in self._reads.items() if reference() is not None}
        return sum(weight.release(read) for weight in self._weights)

    @property
    def _names_layers(self) -> bool:
        return any(p != "*" and not p.startswith("@") for p in (*self.recipe.schemes, *self.recipe.ignore))

    @property
    def _compile(self) -> Callable[..., Any]:
        """What `torch.compile` calls for a graph, with this backend, mode and options."""
        if self.then == "inductor" and (self.mode or self.then_options):
            return torch._TorchCompileInductorWrapper(self.mode, dict(self.then_options or {}), None)
        given = {"mode": self.mode, "options": self.then_options}
        then = torch._dynamo.lookup_backend(self.then)  # type: ignore[arg-type]
        return functools.partial(then, **{k: v for k, v in given.items() if v})

    def _fuse(self, traced: Traced, before: Sequence[Rewritten] = ()) -> None:
        if self.fuse and calls_quantized(traced.graph.fx):
            self.rewrites.append([*before, *fuse(traced)])

    def _rewrite(self, traced: Traced, examples: Sequence[Any]) -> list[tuple[list[int], Weight]]:
        """Quantizes what the recipe plans; each weight, read as `qfx_0`, `qfx_1` ..., and where its parameters are."""
        graph = traced.graph
        if not self.recipe.schemes:
            self._fuse(traced)
            return []
        linears, misses = find_linears(graph)
        plan = make_plan(graph, linears, self.recipe.schemes, self.recipe.ignore, whole=False)
        covered = {linear.weight for linear in linears}
        missed = {m.where: m.why for m in misses} | _fused(graph)
        self.floats |= {name.removesuffix(".weight"): why for name, why in missed.items() if name not in covered}
        self.floats |= {name.removesuffix(".weight"): why for name, why in plan.floats.items()}
        products = {
            linear: Product(linear.name, linear.node.target, linear.axes, scheme, tuple(self.recipe.steps))
            for linear in linears
            if (scheme := plan.schemes.get(linear.weight)) is not None
        }
        merged = self._merge(graph, {x: form_of(x, p.scheme, graph.attr(x.weight)) for x, p in products.items()})
        used: list[tuple[list[int], Weight]] = []
        for group in merged[0]:
            names = [linear.weight for linear in group]
            names += [name for linear in group if len(group) > 1 and (name := plain_bias(linear))]
            at = [traced.positions[name] for name in names]
            try:
                weight = Weight.of([products[linear] for linear in group], [examples[i] for i in at])
            except KernelError as e:
                for linear in group:
                    self.floats[linear.name] = str(e)
                    log.warning("qfx backend: %s stays in float: %s", linear.name, e)
                continue
            if (at, weight) not in used:
                used.append((at, weight))
            put_module(graph, linears, group, weight.module, f"qfx_{used.index((at, weight))}")
            self.layers |= {linear.name: products[linear].scheme for linear in group}
        self._fuse(traced, merged[1])
        return used

    def _merge(
        self, graph: Graph, forms: Mapping[Linear, QLinear | None]
    ) -> tuple[list[list[Linear]], list[Rewritten]]:
        """Linears in groups that become one, or alone; and what was merged."""
        if not self.fuse:
            return [[linear] for linear in forms], []
        biases = {linear: plain_bias(linear) for linear in forms}
        fit = {x: form for x, form in forms.items() if form is not None and biases[x] is not None}
        groups, done = merge_linears(list(forms), fit, {x for x, bias in biases.items() if bias})
        why = "what is added to it is no parameter as it is"
        done.misses += [Miss(x.name, why, done.name) for x in forms if by_op(x) and biases[x] is None]
        of = {linear: group for group in groups for linear in group}
        return [of.get(x, [x]) for x in forms if of.get(x, [x])[0] is x], [done]


def _is_solved(recipe: Any) -> bool:
    """Whether a model is given, or the folder of one, and not a recipe."""
    is_folder = isinstance(recipe, str | Path) and str(recipe) not in PRESETS and Path(recipe).is_dir()
    return isinstance(recipe, nn.Module) or is_folder


def _recipe(value: Any) -> Recipe:
    if value is None:
        return Recipe()
    is_name = isinstance(value, str) and value not in PRESETS and not value.endswith((".yaml", ".yml"))
    if is_name and not Path(value).is_file():
        try:
            return Recipe({"*": parse_scheme(value)}, (), FLOAT)
        except RecipeError as e:
            raise RecipeError(f"{e}. Or use a preset: {', '.join(PRESETS)}") from None
    return Recipe.load(value)


def check_inputs(gm: fx.GraphModule, examples: Sequence[Any]) -> None:
    """Raises what is wrong with a call, whichever the recipe is."""
    if next(gm.parameters(), None) is not None:
        raise CaptureError(
            "backend: Dynamo keeps the parameters inside of its graph, where a change of theirs cannot be seen; set "
            "torch._dynamo.config.inline_inbuilt_nn_modules = True, which is its default"
        )
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in examples):
        raise QfxError(
            "backend: the call records gradients, and quantized linears have none; call the model under "
            "torch.no_grad() or torch.inference_mode(), or model.requires_grad_(False)"
        )
    for x in examples:
        if isinstance(x, nn.Parameter) and x.dtype == torch.float64:
            raise QfxError("backend: a parameter is float64, in which no quantized op computes; use model.float()")
        if isinstance(x, nn.Parameter) and x.is_inference():
            raise QfxError(
                "backend: the model's parameters were made under torch.inference_mode(), where a change of theirs "
                "cannot be seen; load the model outside of it"
            )


def _check_quantized(model: nn.Module | None) -> None:
    quantized = [m for m in model.modules() if isinstance(m, QLinear) or hasattr(m, "qfx")] if model else []
    if not quantized:
        raise RecipeError(
            f"backend: no recipe, and this {type(model).__name__} is not quantized; write torch.compile(..., "
            "options={'recipe': 'W8A8'}), or compile what qfx.quantize returns"
        )
    if slow := [m for m in quantized if isinstance(m, QLinear) and lacks_kernel(m)]:
        warnings.warn(
            f"qfx: {len(slow)} of the model's linears are on a GPU, and are not in the layout of its kernels; they run "
            "in plain PyTorch. Call qfx.lower(model) before it is compiled",
            RuntimeWarning,
            stacklevel=2,
        )


def _fused(graph: Graph) -> dict[str, str]:
    """Matrices that an op reads which computes more than a product; torch's own encoder layers have one."""
    found = {}
    for node in graph.fx.find_nodes(op="get_attr"):
        readers = {str(user.target).removeprefix("aten.").split(".")[0] for user in node.users}
        fused = sorted(r for r in readers if r.startswith("_transformer") or "multi_head" in r)
        if fused and graph.attr(str(node.target)).dim() > 1:
            found[str(node.target)] = f"it is read inside {fused[0]}"
    for name, why in found.items():
        log.warning("qfx backend: %s stays in float: %s", name, why)
    return found


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Sees that an error is heard of where Dynamo is set to go on without the backend."""
    try:
        yield
    except QfxError as e:
        if torch._dynamo.config.suppress_errors:
            warnings.warn(f"qfx: this part of the model runs in float: {e}", RuntimeWarning, stacklevel=3)
        raise
