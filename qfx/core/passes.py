"""The contract of passes: what they share (`State`), what they declare, and what they return."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, fx

from .errors import PassError, QfxError
from .graph import Graph
from .linear import Linear
from .qtensor import QTensor
from .report import Miss, Report, StepRecord
from .site import Gain, Site
from .spec import Scheme

Progress = Callable[[str, int, int], None]


@dataclass
class Solved:
    """What a solver decided for one parameter.

    Attributes:
        qtensor: the canonical quantized weight.
        scheme: how; its weight spec is the qtensor's.
        linears: the products that use the parameter.
        input_scale: float32 scalar of a static input, or None.
        input_zero: int32 scalar of a static asymmetric input, or None.
    """

    qtensor: QTensor
    scheme: Scheme
    linears: list[Linear]
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None


class LayerStore(Protocol):
    """Where solved layers are kept, so that an interrupted run can go on."""

    def get(self, weight: str) -> tuple[QTensor, dict[str, Any]] | None:
        """A layer that was solved before, and what was noted of it."""
        ...

    def put(self, weight: str, qtensor: QTensor, note: Mapping[str, Any]) -> None:
        """Keeps a layer."""
        ...


@dataclass
class State:
    """What the passes of one run share.

    Attributes:
        graph: the captured model; its parameters are edited in place.
        linears: every linear, in execution order.
        sites: every proved site, in graph order.
        plan: the scheme of each parameter that will be quantized, by parameter name.
        batches: the calibration set, inputs by name.
        norms: the gain of each norm, by the value that it writes.
        ranges: the static input range (lo, hi) of a parameter's input, where a pass has fixed one.
        solved: what the solvers decided, by parameter name.
        report: what was done.
        store: where solved layers are kept, if the user wants to be able to resume.
        progress: called with (what, done, total).
        tolerance: the largest relative change that a fold may make to its block, in float32.
    """

    graph: Graph
    linears: list[Linear]
    sites: list[Site]
    plan: dict[str, Scheme]
    batches: list[dict[str, Tensor]]
    report: Report
    norms: dict[fx.Node, Gain] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    solved: dict[str, Solved] = field(default_factory=dict)
    store: LayerStore | None = None
    progress: Progress = lambda what, done, total: None
    tolerance: float = 1e-4


@dataclass
class Result:
    """What one pass did: how many places it changed, what it left and why, and remarks."""

    changed: int = 0
    misses: list[Miss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@runtime_checkable
class Pass(Protocol):
    """A step of a recipe: a frozen dataclass of settings that edits a State."""

    name: str

    @property
    def needs_data(self) -> bool:
        """Whether the pass, as set, runs calibration batches."""
        ...

    def __call__(self, state: State) -> Result:
        """Does the work."""
        ...


def run_pass(state: State, step: Pass, settings: dict[str, Any], before: Sequence[str]) -> None:
    """Runs a pass, times it, and records its result.

    Raises:
        PassError: the pass failed with an error that is not qfx's own; names it and the passes that ran before.
    """
    began = time.perf_counter()
    try:
        result = step(state)
    except QfxError:
        raise
    except Exception as e:
        done = ", ".join(before) or "nothing"
        raise PassError(f"{step.name}: failed with {type(e).__name__}: {e} (ran before it: {done})") from e
    seconds = time.perf_counter() - began
    state.report.misses += result.misses
    state.report.steps.append(StepRecord(step.name, settings, result.changed, seconds, result.notes))
