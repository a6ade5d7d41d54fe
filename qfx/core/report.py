"""What was done to a model: folds, misses, layers, steps. Plain data, JSON both ways, no torch.

A report is kept with the quantized model, so that a file alone says what is in it. `str(report)` is
a summary in plain lines; `qfx.report` renders tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any, ClassVar, TypeVar

VERSION = 1

T = TypeVar("T")


@dataclass
class Fold:
    """A map that was folded into the parameters of a site.

    Attributes:
        site: name of the site.
        kind: what was folded through: "norm", "value", "up", "residual" ...
        step: the pass that did it.
        map: the map's name: "Diagonal", "Rotate" ...
        writers: names of the parameters that write the axis.
        readers: names of the layers that read it; those in `Report.layers` count as folded.
        weights: number of the readers' weights.
        error: relative change of the block's output in float, as verified.
        online: applied at run time instead.
    """

    site: str
    kind: str
    step: str
    map: str
    writers: list[str]
    readers: list[str]
    weights: int
    error: float
    online: bool = False


@dataclass(frozen=True)
class Miss:
    """Something that was not done. It is falsy, so that a result can be tested as it is.

    Attributes:
        where: the site or layer.
        why: the reason; misses are grouped by it.
        step: the pass that gave up.
        weights: number of weights that go without.
    """

    where: str
    why: str
    step: str = ""
    weights: int = 0

    def __bool__(self) -> bool:
        return False


@dataclass
class Layer:
    """One linear of the model, quantized or not.

    Attributes:
        name: path of the module or parameter.
        scheme: name of its scheme, or None if it stays in float.
        shape: of the weight, `[out, in]` or `[experts, out, in]`.
        solver: the method that rounded it.
        error: relative error of its output on calibration data; None if not measured.
        bits: stored bits per weight.
        op: what computes it.
        note: what the solver had to say, or why the layer stays in float.
    """

    name: str
    scheme: str | None
    shape: list[int]
    solver: str = ""
    error: float | None = None
    bits: float = 0.0
    op: str = ""
    note: str = ""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return prod(self.shape)


@dataclass
class StepRecord:
    """One step of the recipe: its settings, how much it changed, how long it took."""

    name: str
    settings: dict[str, Any]
    changed: int
    seconds: float
    notes: list[str]


@dataclass
class Report:
    """The whole of it.

    Attributes:
        model: name or class of the model.
        recipe: the recipe as its own `to_dict` gives it.
        linear_weights: weights of all linears of the model, the base of both shares.
        folds: what was folded, in order.
        misses: what was not, and why.
        layers: every linear.
        steps: every step, in order.
        bytes_before: stored size of the model as given.
        bytes_after: stored size of the quantized model.
        seconds: wall-clock time.
        output_error: relative error of the model's output; None if not measured.
        versions: of the packages that took part.
        warnings: what the user should know.
    """

    model: str
    recipe: dict[str, Any]
    linear_weights: int
    folds: list[Fold] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    output_error: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    _PARTS: ClassVar[dict] = {"folds": Fold, "misses": Miss, "layers": Layer, "steps": StepRecord}

    @property
    def share_quantized(self) -> float:
        """The share of linear weights whose layer has a scheme, 0 to 1."""
        return self._share(layer.weights for layer in self.layers if layer.scheme is not None)

    @property
    def share_folded(self) -> float:
        """The share of linear weights whose layer reads a folded site, 0 to 1; online maps aside.

        A layer counts once, however many folds it takes part in.
        """
        readers = {name for fold in self.folds if not fold.online for name in fold.readers}
        return self._share(layer.weights for layer in self.layers if layer.name in readers)

    def _share(self, weights: Iterable[int]) -> float:
        return sum(weights) / self.linear_weights if self.linear_weights else 0.0

    def folds_by_kind(self) -> dict[str, list[Fold]]:
        """Folds of each kind, in order of first appearance; those online under "<kind> (online)"."""
        return _grouped(self.folds, lambda fold: f"{fold.kind} (online)" if fold.online else fold.kind)

    def misses_by_reason(self) -> dict[str, list[Miss]]:
        """Misses of each reason (`general`), the reason that costs the most weights first."""
        groups = _grouped(self.misses, lambda miss: general(miss.why))
        cost = {why: sum(miss.weights for miss in group) for why, group in groups.items()}
        return dict(sorted(groups.items(), key=lambda item: (-cost[item[0]], -len(item[1]))))

    def headline(self) -> str:
        """The result in one line."""
        done = sum(layer.scheme is not None for layer in self.layers)
        kinds = ", ".join(f"{len(folds)} {kind}" for kind, folds in self.folds_by_kind().items())
        change = self.output_error
        error = "not measured" if change is None else f"{100 * change:.3g} %"
        return (
            f"quantized {100 * self.share_quantized:.1f} % of linear weights "
            f"({done} of {len(self.layers)} linears), "
            f"folded {100 * self.share_folded:.1f} % ({kinds or 'no folds'}), "
            f"output error {error}"
        )

    def __str__(self) -> str:
        lines = [self.headline()]
        if self.bytes_after:
            ratio = self.bytes_before / self.bytes_after
            sizes = f"{self.bytes_before:,} → {self.bytes_after:,} bytes ({ratio:.2f} × smaller)"
            lines.append(f"  {self.model}: {sizes} in {self.seconds:.1f} s")
        for step in self.steps:
            notes = "".join(f"; {note}" for note in step.notes)
            lines.append(f"  step {step.name}: {step.changed} in {step.seconds:.1f} s{notes}")
        for kind, folds in self.folds_by_kind().items():
            worst = max(fold.error for fold in folds)
            lines.append(f"  folded {kind}: {len(folds)}, worst error {worst:.1e}")
        for why, misses in self.misses_by_reason().items():
            others = ", ..." if len(misses) > 1 else ""
            lines.append(f"  missed {len(misses)}: {why} ({misses[0].where}{others})")
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description, with a "version"."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`.

        Raises:
            ValueError: another version, an unknown key, or a missing one.
        """
        values = dict(data)
        if (version := values.pop("version", None)) != VERSION:
            raise ValueError(f"report: version {version!r}; this qfx reads version {VERSION}")
        for name, part in cls._PARTS.items():
            values[name] = [_build(part, item, name) for item in values.get(name, [])]
        return _build(cls, values, "report")

    def to_json(self) -> str:
        """`to_dict` as text. An error that is NaN stays NaN, as Python's json writes it."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`; ValueError if the text is not one."""
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"report: a report is a JSON object, not {type(data).__name__}")
        return cls.from_dict(data)


def general(text: str) -> str:
    """A name or a reason with `*` for the numbers of blocks and without those of nodes.

    What is the same in each of a model's blocks then reads the same: "layers.3.up: 'pow' at pow_2" becomes
    "layers.*.up: 'pow' at pow".
    """
    text = re.sub(r"( at [a-z]\w*?)_\d+\b", r"\1", text)
    return re.sub(r"\b[A-Za-z_]\w*(\.\w+)+", lambda path: re.sub(r"\.\d+(?=\.|$)", ".*", path[0]), text)


def _build(cls: type[T], data: Any, where: str) -> T:
    if not isinstance(data, Mapping):
        raise ValueError(f"report: {where} holds {data!r} where an object should be")
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"report: unknown keys {unknown} in {where}; it has {', '.join(known)}")
    try:
        return cls(**data)
    except TypeError as e:
        raise ValueError(f"report: {where}: {e}") from None


def _grouped(items: Iterable[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
