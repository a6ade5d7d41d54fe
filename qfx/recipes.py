"""Recipes: which layers get which scheme, and the steps in the order in which they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from qfx.passes import METHODS, SOLVERS

from .core.errors import RecipeError
from .core.grid import Int
from .core.passes import Pass
from .core.spec import QSpec, Scheme, scheme_from

FLOAT = ("@head", "@router")
"""What the presets keep in float, as the papers do: the output head, and linears that choose experts."""


@dataclass(frozen=True)
class Recipe:
    """A whole quantization.

    Args:
        schemes: pattern to scheme (or None to keep float); the last match wins. Empty: transform only.
        steps: what runs, in order. If there are schemes and no solver among the steps, `rtn` ends them.
        ignore: patterns of layers to keep in float, whatever `schemes` says.
    """

    schemes: Mapping[str, Scheme | None] = field(default_factory=dict)
    steps: Sequence[Pass] = ()
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Resolves names of schemes and steps, and adds the solver that schemes need."""
        schemes = {k: scheme_from(s) for k, s in self.schemes.items()}
        steps = tuple(_step(s) for s in self.steps)
        if any(s is not None for s in schemes.values()) and not any(type(s) in SOLVERS for s in steps):
            steps += (METHODS["rtn"](),)
        for name, value in (("schemes", schemes), ("steps", steps), ("ignore", tuple(self.ignore))):
            object.__setattr__(self, name, value)

    @property
    def needs_data(self) -> bool:
        """Whether any step runs calibration batches."""
        static = any(s and s.input and not s.input.dynamic for s in self.schemes.values())
        return static or any(s.needs_data for s in self.steps)

    def with_group(self, group_size: int) -> Recipe:
        """The same recipe with another group size wherever weights are in groups."""
        schemes = {k: s.with_group(group_size) if s and s.weight.block[1] > 0 else s for k, s in self.schemes.items()}
        return dataclasses.replace(self, schemes=schemes)

    def to_dict(self) -> dict[str, Any]:
        """A form that YAML and JSON hold and `from_dict` reads."""
        return {
            "schemes": {k: s.to_dict() if s else None for k, s in self.schemes.items()},
            "steps": [{s.name: settings(s)} for s in self.steps],
            "ignore": list(self.ignore),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Reads {"schemes": {...}, "steps": [...], "ignore": [...]}; raises RecipeError with what is wrong."""
        if unknown := set(data) - {"schemes", "steps", "ignore"}:
            raise RecipeError(f"recipe: unknown keys {sorted(unknown)}; use 'schemes', 'steps', 'ignore'")
        schemes, steps, ignore = data.get("schemes") or {}, data.get("steps") or [], data.get("ignore") or []
        if not isinstance(schemes, Mapping):
            raise RecipeError(f"recipe: 'schemes' maps patterns to schemes, not {schemes!r}")
        if isinstance(steps, str | Mapping) or not isinstance(steps, Sequence):
            raise RecipeError(f"recipe: 'steps' is a list, not {steps!r}")
        if not isinstance(ignore, list | tuple) or not all(isinstance(p, str) for p in ignore):
            raise RecipeError(f"recipe: 'ignore' is a list of patterns, not {ignore!r}")
        return cls({str(k): scheme_from(v) for k, v in schemes.items()}, tuple(_step(s) for s in steps), tuple(ignore))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Reads a YAML file of `from_dict`'s form."""
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise RecipeError(f"recipe: cannot read {path}: {e.strerror}") from None
        except yaml.YAMLError as e:
            raise RecipeError(f"recipe: {path} is not YAML: {e}") from None
        if not isinstance(data, Mapping):
            raise RecipeError(f"recipe: {path} holds {type(data).__name__}, not a mapping")
        return cls.from_dict(data)

    def to_yaml(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def load(cls, value: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
        """A recipe from itself, a mapping, a preset's name, or the path of a YAML file."""
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if not isinstance(value, str | Path):
            raise RecipeError(f"recipe: a recipe is a preset's name, a YAML file, a mapping or a Recipe, not {value!r}")
        if str(value) in PRESETS:
            return PRESETS[str(value)]()
        if str(value).endswith((".yaml", ".yml")) or Path(value).is_file():
            return cls.from_yaml(value)
        raise RecipeError(f"recipe: {str(value)!r} is no preset and no YAML file; presets: {', '.join(PRESETS)}")


def settings(step: Pass) -> dict[str, Any]:
    """The settings of a step that differ from its defaults."""
    fields = dataclasses.fields(step)  # type: ignore[arg-type]
    return {f.name: getattr(step, f.name) for f in fields if getattr(step, f.name) != f.default}


def _step(value: Any) -> Pass:
    if isinstance(value, Pass) and not isinstance(value, str | Mapping):
        return value
    name, given = (
        (value, {}) if isinstance(value, str) else next(iter(value.items())) if _single(value) else (None, None)
    )
    if name is None:
        raise RecipeError(f"recipe: a step is a name or {{name: settings}}, not {value!r}")
    if name not in METHODS:
        raise RecipeError(f"recipe: unknown step {name!r}; steps: {', '.join(METHODS)}")
    cls, given = METHODS[name], given or {}
    known = [f.name for f in dataclasses.fields(cls)]
    if not isinstance(given, Mapping) or (unknown := sorted(set(given) - set(known))):
        wrong = unknown if isinstance(given, Mapping) else given
        raise RecipeError(f"recipe: step {name!r} has no setting {wrong}; its settings: {', '.join(known) or 'none'}")
    try:
        return TypeAdapter(cls).validate_python(dict(given))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise RecipeError(f"recipe: step {name!r}: {where} = {first['input']!r}: {first['msg']}") from None


def _single(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) == 1


def _preset(scheme: str | Scheme, *steps: str | dict[str, Any]) -> Callable[[], Recipe]:
    return lambda: Recipe({"*": scheme_from(scheme)}, tuple(_step(s) for s in steps), FLOAT)


_INT8 = Int(8, narrow=True)
_DYNAMIC_TENSOR = Scheme(QSpec(_INT8, (-1, -1)), QSpec(_INT8, (-1, -1), dynamic=True))
_GPTQ = {"gptq": {"act_order": True}}

PRESETS: dict[str, Callable[[], Recipe]] = {
    "w8a8": _preset("W8A8", "rtn"),
    "w8a8-dynamic": _preset("W8A8", "rtn"),
    "w8a8-static": _preset("W8A8_STATIC", "rtn"),
    "w8a8-smoothquant": _preset("W8A8", {"smoothquant": {"alpha": 0.5}}, "rtn"),
    "w8a8-smoothquant-o1": _preset("W8A8_TENSOR", {"smoothquant": {"alpha": 0.5}}, "rtn"),
    "w8a8-smoothquant-o2": _preset(_DYNAMIC_TENSOR, {"smoothquant": {"alpha": 0.5}}, "rtn"),
    "w8a8-smoothquant-o3": _preset("W8A8_TENSOR_STATIC", {"smoothquant": {"alpha": 0.5}}, "rtn"),
    "w8a8-static-smoothquant": _preset("W8A8_STATIC", {"smoothquant": {"alpha": 0.5}}, "rtn"),
    "w8a8-static-os": _preset("W8A8_STATIC_ASYM", "outlier_suppression", "rtn"),
    "w8a8-static-osplus": _preset("W8A8_STATIC", "outlier_suppression_plus", "rtn"),
    "w8a8-gptq": _preset("W8A8", _GPTQ),
    "w8a16": _preset("W8A16", "rtn"),
    "w4a16": _preset("W4A16", "rtn"),
    "w4a16-gptq": _preset("W4A16", _GPTQ),
    "w4a16-asym-gptq": _preset("W4A16_ASYM", _GPTQ),
    "w3a16-gptq": _preset("W3A16", _GPTQ),
    "w2a16-gptq": _preset("W2A16_ASYM_G64", _GPTQ),
    "w4a8-gptq": _preset("W4A8", _GPTQ),
    "w4a8-dq-gptq": _preset("W4A8_DQ", _GPTQ),
    "nf4": _preset("NF4", "rtn"),
    "nf4-dq": _preset("NF4_DQ", "rtn"),
    "fp4": _preset("FP4", "rtn"),
    "fp8": _preset("FP8", "rtn"),
    "fp8-dynamic": _preset("FP8_DYNAMIC", "rtn"),
}
"""Named recipes. `*-os` is Outlier Suppression, `*-osplus` Outlier Suppression+."""
