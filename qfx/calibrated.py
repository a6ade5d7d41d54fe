"""The backend of `torch.compile` for recipes that measure activations: one solution of the whole model for all graphs.

The passes run as in `quantize`, on a copy of the model that Dynamo compiles; or a solution is given. Each graph of
Dynamo's then reads the solution's tensors instead of the model's parameters, which stay as they are.
"""

from __future__ import annotations

import json
import logging
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx.passes.discover.capture import input_names
from qfx.passes.discover.dynamo import Traced, compiled_model, input_source, parameter_path, trace

from ._handover import fake, finish
from .backend import Backend, Compiled, check_inputs, told
from .core.errors import CalibrationError, CaptureError, QfxError, RecipeError
from .core.report import Report
from .inputs import device_of
from .package import Quantized, is_checkpoint, load
from .quantize import quantize
from .solution import Solution

NO_MODEL = (
    "backend: Dynamo does not say which model a graph is of; compile the model itself, or use qfx.backend(..., "
    "model=model)"
)
STALE = (
    "backend: the model's weights are not those any more for which it was quantized (new values, another device or "
    "dtype); call torch.compiler.reset(), and give torch.compile a new qfx.backend(...)"
)
_INPUT = re.compile(r"L\['(\w+)'\](?:\['(\w+)'\]|\[(\d+)\])?")
log = logging.getLogger("qfx")


@dataclass(eq=False, repr=False)
class CalibratedBackend(Backend):
    """A backend with one solution: `qfx.backend(recipe, calibration=...)`, `calibrate=N`, or a quantized model.

    Attributes:
        given: a quantized model, or the folder of one.
        calibration: batches, as for `quantize`.
        calibrate: how many calls run in float, and are recorded.
        model: the float model, if Dynamo does not tell it.
        recorded: inputs by name of the calls so far.
        solution: what graphs read instead of the model's parameters; None until the passes have run.
    """

    given: nn.Module | str | Path | None = None
    calibration: Any = None
    calibrate: int = 0
    model: nn.Module | None = None
    recorded: list[dict[str, Tensor]] = field(default_factory=list)
    solution: Solution | None = None
    kept: Any = None  # options whose ids stand for them
    _report: Report | None = None
    _read: frozenset[str] | None = None

    def _check_recipe(self) -> None:
        """Refuses what cannot be: every step of a recipe can run here."""
        if isinstance(self.given, nn.Module) and not isinstance(getattr(self.given, "qfx", None), Quantized):
            raise RecipeError(
                f"backend: this {type(self.given).__name__} has no .qfx; give a recipe, or what qfx.quantize returned"
            )
        if (self.calibration is not None) + (self.calibrate != 0) + (self.given is not None) > 1:
            raise RecipeError(
                "backend: choose one of calibration=batches, calibrate=N, and a model or folder that is quantized"
            )

    def release(self) -> int:
        """Refused: a solution is compared with the model's own weights.

        Raises:
            QfxError: always.
        """
        raise QfxError(
            "backend: a solution is one of the model's weights, and is compared with them; to hold no float weights, "
            "compile what qfx.quantize returns"
        )

    @property
    def pending(self) -> int:
        """How many calls are still to be recorded before the model is quantized."""
        return 0 if self.solution is not None else self.calibrate - len(self.recorded)

    @property
    def report(self) -> Report:
        """What the passes did, as `quantize` reports it.

        Raises:
            CalibrationError: they have not run yet.
        """
        if self._report is None:
            recorded = f"{len(self.recorded)} of {self.calibrate} calls are recorded" if self.calibrate else "no call"
            raise CalibrationError(f"backend: nothing is quantized so far ({recorded}); call the compiled model")
        return self._report

    def __call__(self, gm: fx.GraphModule, examples: Sequence[Any], **options: Any) -> Compiled:
        """Compiles one graph of Dynamo's."""
        with told():
            self._take(**options)
            check_inputs(gm, examples)
            self.graphs += 1
            if not any(isinstance(x, nn.Parameter) for x in examples):
                return self._compile(gm, list(examples))  # type: ignore[no-any-return]
            root = self._root()
            with torch.inference_mode(False), torch.no_grad():
                traced = trace(gm, examples, root)
            _check_names(traced, examples, root)
            if self.solution is not None and not self.solution.is_current():
                self._forget()
            if self.calibrate and self.solution is None:
                return self._later(gm, traced, examples, root)
            solution = self._solve(root)
            if solution.names.isdisjoint(traced.positions):
                return self._compile(gm, list(examples))  # type: ignore[no-any-return]
            rewritten, kept, stored = self._rewrite_solved(solution, traced, gm)
        inner = self._compile(rewritten, [*(examples[i] for i in kept), *map(fake, stored)])
        return _Checked(solution, traced.positions, kept, stored, inner)

    def _root(self) -> nn.Module:
        root = self.model if self.model is not None else compiled_model()
        if root is None:
            raise CaptureError(NO_MODEL)
        if self.solution is not None and self.solution.model() is not root:
            raise QfxError("backend: it has the solution of another model; make one qfx.backend(...) for each model")
        if root.training:
            raise QfxError("backend: the model is in training mode, and is quantized for inference; call model.eval()")
        return root

    def _forget(self) -> None:
        """Lets the next compilation quantize the changed model, if the data are there or will be."""
        if self.given is not None:
            raise QfxError(STALE)
        log.warning("qfx backend: the model's weights have changed; it is quantized anew")
        self.solution, self._report, self._read = None, None, None
        self.recorded.clear()

    def _solve(self, root: nn.Module) -> Solution:
        """The solution, for which the passes run when it is first asked for."""
        if self.solution is None:
            # nothing here belongs to the graph that Dynamo compiles just now
            with torch._guards.tracing(None), torch.inference_mode(False), torch.no_grad():
                solved = self._quantized(root)
                self.solution = Solution.of(solved, root)
            info = solved.qfx
            assert isinstance(info, Quantized)
            self._report = info.report
            self.layers |= self.solution.schemes
            self.floats |= {x.name: x.note for x in info.report.layers if x.scheme is None}
            self.recorded.clear()
        return self.solution

    def _quantized(self, root: nn.Module) -> nn.Module:
        if isinstance(self.given, nn.Module):
            return self.given
        if self.given is not None:
            like = None if is_checkpoint(Path(self.given)) else root
            return load(self.given, like, device_of(root), lower=False)
        batches = self.recorded if self.calibrate else self.calibration
        return quantize(root, self.recipe, batches, progress=False)

    def _rewrite_solved(
        self, solution: Solution, traced: Traced, gm: fx.GraphModule
    ) -> tuple[fx.GraphModule, list[int], list[Tensor]]:
        with torch.inference_mode(False), torch.no_grad():
            extra, merged = solution.rewrite(traced, self.fuse)
            self._fuse(traced, merged)
        rewritten, kept = finish(traced, gm, extra)
        return rewritten, kept, list(extra.values())

    def _later(self, gm: fx.GraphModule, traced: Traced, examples: Sequence[Any], root: nn.Module) -> Compiled:
        """A graph that is compiled when the model has been calibrated, and runs in float until then."""
        names = _model_inputs(gm, examples, root)
        read = frozenset(traced.positions)
        if self._read is not None and self._read != read:
            raise CaptureError(
                "backend: Dynamo cuts the model into several graphs, and calibrate=N records the inputs of one; "
                "compile with fullgraph=True to see where it breaks, or use qfx.quantize and compile what it returns"
            )
        if self._read is None:
            log.warning("qfx backend: the next %d calls run in float, and calibrate; see .pending", self.pending)
        self._read = read
        return _Later(self, gm, traced, names, weakref.ref(root))


class _Checked:
    """What Dynamo calls for a graph: with the solution's tensors, as long as the parameters are those it is for."""

    def __init__(
        self,
        solution: Solution,
        positions: Mapping[str, int],
        kept: Sequence[int],
        stored: Sequence[Tensor],
        inner: Compiled,
    ) -> None:
        self.solution, self.positions, self.kept, self.stored, self.inner = solution, positions, kept, stored, inner

    def __call__(self, *inputs: Any) -> Any:
        if not all(self.solution.fits(name, inputs[at]) for name, at in self.positions.items()):
            raise QfxError(STALE)
        return self.inner(*[inputs[i] for i in self.kept], *self.stored)


class _Later:
    """What Dynamo calls for a graph that was compiled before the model was calibrated."""

    def __init__(
        self,
        owner: CalibratedBackend,
        gm: fx.GraphModule,
        traced: Traced,
        names: Mapping[int, str],
        root: weakref.ref[nn.Module],
    ) -> None:
        self.owner, self.gm, self.traced, self.names, self.root = owner, gm, traced, names, root
        self.inner: Compiled | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self.inner is None:
            if self.owner.pending > 0:
                with torch.inference_mode(False):
                    feeds = {name: inputs[at].detach().clone() for at, name in self.names.items()}
                self.owner.recorded.append(feeds)
                return self.gm.forward(*inputs)
            self.inner = self._lowered()
        return self.inner(*inputs)

    def _lowered(self) -> Compiled:
        owner, traced = self.owner, self.traced
        root = self.root()
        if root is None:
            raise QfxError(NO_MODEL)
        solution = owner._solve(root)
        rewritten, kept, stored = owner._rewrite_solved(solution, traced, self.gm)
        # Dynamo has left: it is asked again for what it traces, guards and compiles
        inner = torch.compile(rewritten, backend=owner._compile if owner.mode or owner.then_options else owner.then)
        return _Checked(solution, traced.positions, kept, stored, inner)


def _check_names(traced: Traced, examples: Sequence[Any], root: nn.Module) -> None:
    known = dict(root.named_parameters(remove_duplicate=False))
    for name, at in traced.positions.items():
        if known.get(name) is not examples[at]:
            raise CaptureError(
                f"backend: Dynamo's graph reads {name}, which is no parameter of the {type(root).__name__} that was "
                "taken for the model; use qfx.backend(..., model=model)"
            )


def _model_inputs(gm: fx.GraphModule, examples: Sequence[Any], root: nn.Module) -> dict[int, str]:
    """The model's inputs among those of a graph of the whole model: their names by position."""
    sources = [input_source(node) for node in gm.graph.find_nodes(op="placeholder")]
    known = dict(root.named_parameters(remove_duplicate=False))
    buffers = {id(b) for b in root.buffers()}
    taken, names = input_names(root), {}
    wrapped = any(s.startswith("L['args'][0].") for s in sources)  # a function around forward, which gets the model
    for at, (source, value) in enumerate(zip(sources, examples, strict=True)):
        if isinstance(value, nn.Parameter):
            path = parameter_path(source.replace("L['args'][0].", "L['self'].", 1) if wrapped else source)
            if known.get(path) is not value:
                raise CaptureError(
                    f"backend: Dynamo compiles a part of the model by itself ({source}), whose inputs are not the "
                    "model's; use calibration=batches instead of calibrate=N"
                )
        elif isinstance(value, Tensor) and id(value) not in buffers:
            name = _input_name(source, taken, wrapped)
            if name is None:
                raise CalibrationError(
                    f"backend: the model's call has a tensor that is no input of its own ({source}), and calibrate=N "
                    "records inputs by name; use calibration=batches"
                )
            names[at] = name
    return names


def _input_name(source: str, taken: Sequence[str], wrapped: bool) -> str | None:
    found = _INPUT.fullmatch(source)
    if found is None:
        return None
    name, key, number = found.groups()
    if key is None and number is not None and name == "args":
        at = int(number) - wrapped
        return taken[at] if 0 <= at < len(taken) else None
    if name == "kwargs" and key is not None:
        name = key
    elif key is not None or number is not None:
        return None
    return name if name in taken else None


_SHARED: weakref.WeakKeyDictionary[nn.Module, dict[str, CalibratedBackend]] = weakref.WeakKeyDictionary()


def shared_backend(options: Mapping[str, Any], make: Callable[..., Any]) -> CalibratedBackend:
    """The one backend of a model and of options that are given by name: torch asks for every graph anew."""
    root = compiled_model()
    if root is None:
        raise CaptureError(NO_MODEL)
    key = json.dumps({k: v if isinstance(v, str | int) else id(v) for k, v in options.items()}, sort_keys=True)
    known = _SHARED.setdefault(root, {})
    if key not in known:
        known[key] = make(**options)
        known[key].kept = options
    return known[key]
