"""qfx: quantization of transformers as a graph-transform compiler pass.

>>> q = qfx.quantize(model, "w8a8-smoothquant", calibration=batches)  # doctest: +SKIP
>>> qfx.save(q, "quantized")  # doctest: +SKIP
>>> q = qfx.load("quantized")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._registration import register_with_transformers

if TYPE_CHECKING:
    from .backend import backend
    from .core import errors
    from .core.spec import QSpec, Scheme
    from .explanation import explain
    from .lowering import lower
    from .package import load, save
    from .quantize import quantize
    from .recipes import Recipe

__version__ = "0.1.0"
__all__ = ["QSpec", "Recipe", "Scheme", "backend", "errors", "explain", "load", "lower", "quantize", "save"]
_HOMES = {
    "backend": "backend",
    "explain": "explanation",
    "quantize": "quantize",
    "lower": "lowering",
    "save": "package",
    "load": "package",
    "Recipe": "recipes",
    "Scheme": "core.spec",
    "QSpec": "core.spec",
    "errors": "core.errors",
}


class _Package(ModuleType):
    """Keeps public names what they are: an import of the module `qfx.quantize` would put it over the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that `import qfx` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qfx' has no attribute {name!r}")
    home = importlib.import_module(f"qfx.{_HOMES[name]}")
    value = home if name == "errors" else getattr(home, name)
    globals()[name] = value
    return value


register_with_transformers()
