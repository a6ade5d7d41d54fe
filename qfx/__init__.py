"""qfx: quantization of transformers as a graph-transform compiler pass.

>>> q = qfx.quantize(model, "w8a8-smoothquant", calibration=batches)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.spec import QSpec, Scheme
    from .quantize import quantize
    from .recipes import Recipe

__version__ = "0.1.0"
__all__ = ["QSpec", "Recipe", "Scheme", "quantize"]
_HOMES = {"quantize": "quantize", "Recipe": "recipes", "Scheme": "core.spec", "QSpec": "core.spec"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that `import qfx` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qfx' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"qfx.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
