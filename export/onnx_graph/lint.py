"""What a target would refuse or run in float, though the graph is right."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from qfx.core.errors import PackageError
from qfx.export.onnx_graph import lint_ort, lint_tensorrt
from qfx.export.onnx_graph.findings import Finding, Rule, findings
from qfx.export.onnx_graph.session import session_entries

__all__ = ["RULES", "Finding", "lint"]

RULES: Mapping[str, Sequence[Rule]] = {
    "tensorrt": lint_tensorrt.RULES,
    "ort-cuda": lint_ort.CUDA_RULES,
    "ort-cpu": lint_ort.CPU_RULES,
}


def lint(model: ir.Model, target: str, features: Collection[str] = ()) -> list[Finding]:
    """What does not suit a target.

    Args:
        model: one that `validate` finds nothing wrong with.
        target: a key of `RULES`.
        features: names in `SESSION_OPTIONS` that sessions will be opened with; the rules of those names are left out.

    Returns:
        Findings in the order of the rules; types and shapes that nothing tells pass.

    Raises:
        PackageError: the target or a feature is unknown.
    """
    if target not in RULES:
        raise PackageError(f"no target {target!r}; choose of {', '.join(RULES)}")
    session_entries(features)  # knows the names
    return findings(model, [rule for rule in RULES[target] if rule.__name__ not in features])
