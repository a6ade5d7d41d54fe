"""Session options of ONNX Runtime that a quantized graph may need on the CPU, by what they are for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qfx.core.errors import PackageError

_LISTS = "optimization.disable_specified_optimizers"

SESSION_OPTIONS: Mapping[str, Mapping[str, str]] = {
    # An Add after a MatMul of two axes makes a Gemm of them, before the quantized product is looked for.
    "biased_2d": {_LISTS: "MatMulAddFusion"},
    # A Relu before a QuantizeLinear is dropped, also where the codes are float8 and have no zero point to clip at;
    # and a float8 product is fused to one that has no kernel (up to ONNX Runtime 1.31).
    "float8": {_LISTS: "ReluQuantRewrite", "session.disable_quant_qdq": "1"},
    # Products of uint8 inputs (int8 ones are made uint8) and int8 weights add pairs in int16, which saturates, on x64
    # CPUs without VNNI: results are off by a fifth. There, and only there, weights are made uint8 then.
    "exact_int8": {"session.x64quantprecision": "1"},
    # A DequantizeLinear of 4 bits becomes a product that quantizes its input to int8 (level 4), unless told not to.
    "exact_nbits": {"session.qdq_matmulnbits_accuracy_level": "1"},
}
"""What for, to configuration entries of a session. A lint rule that they satisfy has the same name."""


def session_entries(features: Iterable[str]) -> dict[str, str]:
    """The configuration entries for several features in one session.

    Args:
        features: names in `SESSION_OPTIONS`.

    Raises:
        PackageError: one is not there.
    """
    entries: dict[str, str] = {}
    for feature in features:
        if feature not in SESSION_OPTIONS:
            raise PackageError(f"no session options for {feature!r}; choose of {', '.join(SESSION_OPTIONS)}")
        for key, value in SESSION_OPTIONS[feature].items():
            joined = [*entries.get(key, "").split(";"), value] if key == _LISTS else [value]
            entries[key] = ";".join(part for part in joined if part)
    return entries
