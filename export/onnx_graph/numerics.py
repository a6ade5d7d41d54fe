"""The exported graph beside the quantized model that it came from: the same inputs, the outputs compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qfx._manifest import one_line
from qfx.core.errors import PackageError
from qfx.export.onnx_graph.forms import Form
from qfx.export.onnx_graph.opaque import copy_in
from qfx.export.onnx_graph.session import session_entries

CPU = ("CPUExecutionProvider",)
LIMITS = {
    ("float32", False): 1e-3,
    ("float32", True): 0.05,
    ("float16", False): 0.05,
    ("float16", True): 0.25,
}
"""The largest relative difference, in the 2-norm over an output, that an export may have, by the dtype of the float
parts and whether inputs are quantized. Where they are, a value half way between two codes rounds the other way after
the least change; in float16, with the three bits of float8, that made 5e-2 on random models. A wrong axis, order or
zero point makes about 1. That the nodes themselves are exact is what their tests show."""


def open_session(path: Path, options: Mapping[str, str], providers: Sequence[str] = CPU) -> Any:
    """A session of ONNX Runtime on a file.

    Args:
        path: of the file.
        options: entries of the session's configuration.
        providers: execution providers, by preference.

    Raises:
        PackageError: it does not load, or ONNX Runtime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise PackageError('ONNX Runtime is not installed; pip install "qfx[onnx]", or pass check=False') from None
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    for key, value in options.items():
        settings.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(str(path), settings, providers=list(providers))
    except Exception as e:  # pybind's exceptions have no common base but this
        raise PackageError(f"ONNX Runtime does not load {path.name} ({one_line(e)})") from None


def run(path: Path, inputs: dict[str, np.ndarray], features: Collection[str] = ()) -> list[np.ndarray]:
    """Runs a file in ONNX Runtime on the CPU, as it optimizes it; PackageError if it does not run."""
    session = open_session(path, session_entries(features))
    try:
        return session.run(None, inputs)
    except Exception as e:
        raise PackageError(f"ONNX Runtime does not run {path.name} ({one_line(e)})") from None


@torch.no_grad()
def reference(model: nn.Module, form: Form) -> list[np.ndarray]:
    """What the model gives for the form's inputs in float32, whatever dtype its float parts have."""
    plain = model
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        plain = copy_in(model, torch.float32)
    values = (v.float() if v.is_floating_point() else v for v in form.inputs.values())
    out: Any = form.wrap(plain)(*values)
    outs = out if isinstance(out, tuple) else (out,)
    return [t.detach().float().cpu().numpy() for t in outs]


def feeds(form: Form, dtype: str) -> dict[str, np.ndarray]:
    """The form's inputs as the graph takes them."""
    plain = {k: v.detach().cpu() for k, v in form.inputs.items()}
    kind = getattr(torch, dtype)
    return {k: (v.to(kind) if v.is_floating_point() else v).numpy() for k, v in plain.items()}


def difference(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    """The largest relative difference of any output, in the 2-norm."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape or not np.isfinite(a).all():
            return float("inf")
        size = float(np.linalg.norm(b.astype(np.float64)))
        worst = max(worst, float(np.linalg.norm(a.astype(np.float64) - b)) / max(size, 1e-30))
    return worst


def compare(
    path: Path, model: nn.Module, form: Form, dtype: str, features: Collection[str], quantized_inputs: bool
) -> float:
    """Runs both; PackageError if they differ by more than `LIMITS` says."""
    got, want = run(path, feeds(form, dtype), features), reference(model, form)
    if (found := difference(got, want)) > LIMITS[dtype, quantized_inputs]:
        raise PackageError(
            f"{path.name} gives other values than the model in ONNX Runtime, by {found:.2g} of their size; this is a "
            "fault of the exporter, please report the model and the recipe"
        )
    return found
