"""Exits to other runtimes; one target a file."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qfx.export.onnx_graph.running import OnnxModel
    from qfx.export.onnx_graph.write import OnnxExport, onnx

_HOMES = {"OnnxExport": "write", "OnnxModel": "running", "onnx": "write"}
__all__ = ["OnnxExport", "OnnxModel", "onnx"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qfx.export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qfx.export.onnx_graph.{_HOMES[name]}"), name)
