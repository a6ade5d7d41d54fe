"""Which nodes a target gets for a scheme, or why it gets none and the nearest scheme that it takes.

Facts about the runtimes (kernels, fusions, parsers) are those of ONNX Runtime 1.31 and TensorRT 10 to 11; they stand
beside the rule that they are the reason for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import onnx_ir as ir

from qfx.core.grid import E4M3, Codebook, Float, Int
from qfx.core.spec import QSpec, scheme_label
from qfx.export.onnx_graph import patterns
from qfx.export.onnx_graph.emit import Emit
from qfx.export.onnx_graph.layer import Layer, table_code
from qfx.modules.linear import QLinear

Target = Literal["ort-cpu", "ort-cuda", "tensorrt"]
TARGETS: dict[str, tuple[str, ...]] = {
    "ort-cpu": ("float32", "float16"),
    "ort-cuda": ("float16", "float32"),
    "tensorrt": ("float16", "float32"),
}
"""Dtypes of the float parts, the default first."""


@dataclass(frozen=True)
class Choice:
    """How one linear is written.

    Attributes:
        pattern: what writes it.
        layer: it, with the block and the width that it is stored with.
        op: the node that computes it in the end, after ONNX Runtime's own fusions on the target; "" if none is known.
        settings: of the pattern.
        note: what a user should know.
    """

    pattern: Callable[..., ir.Value]
    layer: Layer
    op: str
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def write(self, emit: Emit) -> ir.Value:
        """Adds the nodes; returns y."""
        return self.pattern(emit, **self.settings)

    def describe(self) -> dict[str, str]:
        """Scheme, and node or pattern, for people."""
        node = self.op or self.pattern.__name__
        return {"scheme": scheme_label(self.layer.scheme), "node": node, "note": self.note}


@dataclass(frozen=True)
class Refusal:
    """Why a target has no nodes for a linear, and the nearest scheme that it does."""

    why: str
    nearest: str

    def __str__(self) -> str:
        return f"{self.why}; the nearest scheme is {self.nearest}"


def choose(name: str, linear: QLinear, target: str, dtype: str, accuracy_level: int = 0) -> Choice | Refusal:
    """The nodes for one linear.

    Args:
        name: the linear's path.
        linear: it.
        target: of `TARGETS`.
        dtype: of the graph around it.
        accuracy_level: of MatMulNBits on a CPU: 0 computes in float, 4 rounds x to int8 in blocks.
    """
    layer, scheme = Layer(name, linear), linear.scheme
    if linear.has_g_idx and not _equal_groups(layer):
        return Refusal("its groups have unequal sizes", "the same with static_groups: true")
    if scheme.input is None:
        if isinstance(scheme.weight.grid, Codebook):
            return _table(layer, target)
        if isinstance(scheme.weight.grid, Float):
            return Refusal("float8 weights with float inputs have no op", "FP8")
        return _weight_only(layer, target, accuracy_level)
    if isinstance(scheme.weight.grid, Float) or isinstance(scheme.input.grid, Float):
        return _fp8(layer, target, dtype)
    return _int8(layer, target, dtype)


def _weight_only(layer: Layer, target: str, accuracy_level: int) -> Choice | Refusal:
    weight = layer.scheme.weight
    bits = weight.grid.bits
    if target == "tensorrt":
        return _weight_only_tensorrt(layer)
    # MatMulNBits has 2, 4 and 8 bits: other codes keep their values in the next width
    width = next(b for b in (2, 4, 8) if b >= bits)
    block = _block(weight, layer.K, 128)  # larger ones have no kernel
    if block is None:
        return Refusal(f"groups of {weight.block[1]} hold no block of 16, 32, 64 ... columns", f"W{bits}A16_G32")
    settings = {"accuracy_level": accuracy_level if target == "ort-cpu" else 0}
    return Choice(patterns.nbits, replace(layer, bits=width, block=block), "MatMulNBits", settings, _wider(bits, width))


def _weight_only_tensorrt(layer: Layer) -> Choice | Refusal:
    weight = layer.scheme.weight
    bits, group = weight.grid.bits, weight.block[1]
    width = 4 if bits <= 4 else 8
    if not weight.symmetric:
        return Refusal("TensorRT takes no zero points", f"W{width}A16")
    if width == 8:  # int8 has scales per tensor or channel, no blocks
        if group != -1 and group < layer.K:
            return Refusal("TensorRT takes no groups of int8", "W8A16")
        return Choice(patterns.dq_channels, replace(layer, bits=8), "", note=_wider(bits, width))
    block = next((b for b in (128, 64) if _divides(b, layer.K if group == -1 else group)), None)
    if block is None:  # only blocks of 64 and 128 are built
        size = f"groups of {group}" if group != -1 else f"{layer.K} inputs"
        return Refusal(f"TensorRT takes int4 in blocks of 64 or 128, which {size} are not", "W4A16_G64")
    if layer.N % 2:
        return Refusal(f"TensorRT packs int4 in pairs of outputs, and there are {layer.N}", "W8A16")
    return Choice(patterns.dq_blocks, replace(layer, bits=4, block=block), "", note=_wider(bits, width))


def _table(layer: Layer, target: str) -> Choice | Refusal:
    weight = layer.scheme.weight
    if target == "tensorrt":
        return Refusal("TensorRT has no weights on a table", "W4A16_G64")
    if table_code(layer) is None:
        return Refusal(f"ONNX Runtime has no table {weight.grid.name}", "FP4_BNB")  # type: ignore[union-attr]
    if layer.order is not None:
        return Refusal("weights on a table take no order of columns", "NF4 with act_order: false")
    block = _block(weight, layer.K, 256, whole=True)
    if block is None:
        return Refusal(f"MatMulBnb4 needs blocks of 16, 32, 64 ... that divide {layer.K} inputs", "NF4")
    return Choice(patterns.table4, replace(layer, bits=4, block=block), "MatMulBnb4")


def _fp8(layer: Layer, target: str, dtype: str) -> Choice | Refusal:
    weight, x = layer.scheme.weight, layer.scheme.input
    assert x is not None
    if not (isinstance(weight.grid, Float) and isinstance(x.grid, Float)):
        return Refusal("integer weights with float8 inputs have no op", "FP8 or W4A16")
    if x.dynamic:
        return Refusal("no runtime quantizes to float8 for each token", "FP8")
    if target == "ort-cpu":
        note = "float8 is computed in float on a CPU: to check values, not for speed"
        return Choice(patterns.qdq_fp8, layer, "", note=note)
    if weight.grid != E4M3 or x.grid != E4M3:
        return Refusal(f"{target} computes with E4M3 only", "FP8")
    if target == "tensorrt":
        return Choice(patterns.qdq_fp8, layer, "")
    if dtype != "float16":
        return Refusal(f"float8 products take no {dtype} inputs", "the same with dtype='float16'")
    return Choice(patterns.fp8_weight, layer, "MatMulBlockQuantizedFp8Weight")


def _int8(layer: Layer, target: str, dtype: str) -> Choice | Refusal:
    weight, x = layer.scheme.weight, layer.scheme.input
    assert x is not None and isinstance(weight.grid, Int) and isinstance(x.grid, Int)
    layer = replace(layer, bits=8)
    if x.grid.bits != 8:
        return Refusal(f"inputs of {x.grid.bits} bits have no op", "W8A8_STATIC")
    if weight.block[1] not in (-1, layer.K):
        return Refusal("integer products take no groups of weights", "W8A8_STATIC or W4A16")
    note = _wider(weight.grid.bits, 8)
    unsigned = {"unsigned": target == "ort-cpu"}  # exact on every CPU, see qdq_int8
    if x.dynamic:
        if target == "tensorrt":  # its parser has neither DynamicQuantizeLinear nor MatMulInteger
            return Refusal("TensorRT quantizes no int8 input at run time", "W8A8_STATIC")
        if not weight.symmetric:
            return Refusal("MatMulInteger takes no zero point for each output here", "W8A8")
        if x.symmetric:
            return Choice(patterns.integer_dynamic, layer, "MatMulInteger", unsigned, note)
        if x.block != (-1, -1) or target == "ort-cuda":  # DynamicQuantizeLinear has no CUDA kernel
            return Refusal("inputs with a zero point found at run time have no op", "W8A8")
        return Choice(patterns.integer_dynamic_tensor, layer, "DynamicQuantizeMatMul", note=note)
    if target == "ort-cpu" and dtype == "float32":
        return Choice(patterns.qdq_int8, layer, "MatMulIntegerToFloat", unsigned, note)
    if not weight.symmetric:
        return Refusal(f"{target} takes no zero points of weights", "W8A8_STATIC")
    if target == "tensorrt":
        if not x.symmetric:
            return Refusal("TensorRT takes no zero points", "W8A8_STATIC")
        # a Clip in front of Q would keep TensorRT from fusing it with what comes before: it uses the code -128, too
        return Choice(patterns.qdq_int8, layer, "", {"narrow": False}, note)
    # elsewhere, and in float16 on a CPU, a product between Q and DQ is computed in float
    return Choice(patterns.integer_static, layer, "MatMulInteger", unsigned, note)


def _block(weight: QSpec, columns: int, limit: int, whole: bool = False) -> int | None:
    """The largest power of two, at least 16, that divides a group; a whole row may end in a part of one."""
    group = columns if weight.block[1] == -1 else weight.block[1]
    sizes = [size for size in (256, 128, 64, 32, 16) if size <= limit]
    fits = next((size for size in sizes if group % size == 0), None)
    if fits is None and group == columns and not whole:
        return next((size for size in reversed(sizes) if size >= columns), 128)
    return fits


def _equal_groups(layer: Layer) -> bool:
    groups = layer.linear.stored()["g_idx"]
    assert groups is not None
    counts = groups.bincount()
    return bool((counts == layer.K // counts.numel()).all())


def _divides(block: int, size: int) -> bool:
    return size % block == 0


def _wider(bits: int, width: int) -> str:
    return "" if bits == width else f"codes of {bits} bits are stored in {width}"
