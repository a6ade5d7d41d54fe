"""The nodes that a linear becomes, one function a pattern; `targets` says which target gets which.

With `x [..., K]`, a weight `W [K, N]`, and scales `s`. Each function returns `y [..., N]` of x's dtype, bias included.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qfx.core.grid import Int
from qfx.export.onnx_graph.emit import CONTRIB, Emit
from qfx.export.onnx_graph.layer import float8, input_range, packed_blocks, packed_table, packed_zeros, table_code

FLOAT, INT8, UINT8 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8
E4M3, E5M2, INT4 = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2, ir.DataType.INT4
TINY = float(np.finfo(np.float32).tiny)


def qdq_int8(emit: Emit, unsigned: bool = False, narrow: bool = True) -> ir.Value:
    """`MatMul(DQ(Q(x)), DQ(W))`: static inputs of 8 bits; a scale, and a zero point, for each output of W.

    On a matrix, ONNX Runtime would first make a float Gemm of the product and its bias: it gets a third axis.

    Args:
        emit: the linear.
        unsigned: store signed codes as uint8 with the zero point 128. ONNX Runtime's products of uint8 and int8
            saturate in 16 bits on x86 CPUs without VNNI (errors of 10 % were measured); those of uint8 are exact.
        narrow: cut off what a narrow grid does not hold, since QuantizeLinear would use the code -128.
    """
    layer = emit.layer
    x, flat = _at_least_3d(emit)
    kind, shift = _codes_of_input(emit, unsigned)
    scale, zero = input_range(layer)

    def quantize() -> ir.Value:
        s = emit.const("input_scale", np.asarray(scale, emit.numpy))
        z = emit.const("input_zero", np.asarray(zero + shift, kind.numpy()))
        q = emit("QuantizeLinear", _cut(emit, x, scale) if narrow else x, s, z, to=kind, like=x)
        return emit("DequantizeLinear", q, s, z, to=emit.kind, like=x)

    xd = emit.once(("qdq", flat, scale, zero, kind), quantize)
    weight, zeros = _codes(emit, unsigned)
    s = emit.lazy("weight_scale", emit.kind, (layer.N,), lambda: layer.row_scales(emit.numpy))
    z = None if zeros is None else emit.const("weight_zero", zeros)
    wd = emit("DequantizeLinear", weight, s, z, to=emit.kind, axis=1)
    y = _biased(emit, emit("MatMul", xd, wd, to=emit.kind))
    return emit("Squeeze", y, emit.axes(0), to=emit.kind) if flat else y


def integer_static(emit: Emit, unsigned: bool = False) -> ir.Value:
    """`MatMulInteger` with the scales behind it; without zero points as inputs, or, if `unsigned`, with them.

    A CUDA device takes int8 alone: there a zero point of x becomes one number for each output. `unsigned` as above.
    """
    layer = emit.layer
    scale, zero = input_range(layer)
    rounded = float(np.asarray(scale, emit.numpy))  # what the graph divides by
    kind, shift = (UINT8, 128 * _signed(emit)) if unsigned else (INT8, -128 * (not _signed(emit)))

    def quantize() -> tuple[ir.Value, ir.Value]:
        s = emit.const("input_scale", np.asarray(rounded, emit.numpy))
        z = emit.const("input_zero", np.asarray(zero + shift, kind.numpy()))
        return emit("QuantizeLinear", _cut(emit, emit.x, rounded), s, z, to=kind, like=emit.x), z

    xq, z = emit.once(("q", scale, zero), quantize)
    y = _integer_product(emit, xq, z, unsigned)
    if not unsigned and zero + shift:
        offset = emit.lazy(
            "offset",
            FLOAT,
            (layer.N,),
            lambda: (layer.signed_codes().astype(np.int64).sum(1) * (zero + shift)).astype(np.float32),
        )
        y = emit("Sub", y, offset, to=FLOAT)
    s = emit.lazy("scale", FLOAT, (layer.N,), lambda: (rounded * layer.row_scales()).astype(np.float32))
    return _rescaled(emit, y, s)


def integer_dynamic(emit: Emit, unsigned: bool = False) -> ir.Value:
    """`MatMulInteger` with a symmetric scale of x for each token, or for all of x, from its own values.

    `unsigned` as above.
    """
    layer = emit.layer
    x = layer.scheme.input
    assert x is not None
    reach = float(x.grid.reach)
    per_token, shift = x.block == (1, -1), 128.0 if unsigned else 0.0

    def quantize() -> tuple[ir.Value, ir.Value]:
        xf = emit("Cast", emit.x, to_=FLOAT) if emit.kind != FLOAT else emit.x
        size = emit("Abs", xf, to=FLOAT)
        axes = emit.axes(-1) if per_token else None
        top = emit("ReduceMax", size, axes, to=FLOAT, keepdims=1)
        s = emit("Max", emit("Div", top, emit.scalar(reach, FLOAT), to=FLOAT), emit.scalar(TINY, FLOAT), to=FLOAT)
        codes = emit("Round", emit("Div", xf, s, to=FLOAT), to=FLOAT)
        if shift:
            codes = emit("Add", codes, emit.scalar(shift, FLOAT), to=FLOAT)
        ends = emit.scalar(shift - reach, FLOAT), emit.scalar(shift + reach, FLOAT)
        return emit("Cast", emit("Clip", codes, *ends, to=FLOAT), to_=UINT8 if unsigned else INT8), s

    xq, s = emit.once(("dynamic", per_token, reach), quantize)
    y = _integer_product(emit, xq, emit.scalar(128, UINT8) if unsigned else None, unsigned)
    y = emit("Mul", y, s, to=FLOAT)
    return _rescaled(emit, y, emit.lazy("scale", FLOAT, (layer.N,), layer.row_scales))


def integer_dynamic_tensor(emit: Emit) -> ir.Value:
    """`DynamicQuantizeLinear` (uint8, one scale and zero point for all of x) and `MatMulInteger` of uint8."""
    layer = emit.layer
    xq, s, z = emit.once(
        "dynamic_tensor",
        lambda: _typed(emit("DynamicQuantizeLinear", emit.x, outputs=3), UINT8, FLOAT, UINT8),
    )
    y = _integer_product(emit, xq, z, unsigned=True)
    sw = emit.lazy("scale", FLOAT, (layer.N,), layer.row_scales)
    return _biased(emit, emit("Mul", y, emit("Mul", s, sw, to=FLOAT), to=FLOAT))


def nbits(emit: Emit, accuracy_level: int = 0) -> ir.Value:
    """`MatMulNBits`: weights of 2, 4 or 8 bits in blocks, with or without zero points; x stays float."""
    layer = emit.layer
    blocks = -(-layer.K // layer.block)
    bits, shape = layer.bits, (layer.N, blocks, layer.block * layer.bits // 8)
    weight = emit.lazy("weight", UINT8, shape, lambda: packed_blocks(layer))
    s = emit.lazy("weight_scale", emit.kind, (layer.N, blocks), lambda: layer.scales(emit.numpy))
    z = None
    if not layer.scheme.weight.symmetric:
        z = emit.lazy("weight_zero", UINT8, (layer.N, -(-blocks * bits // 8)), lambda: _there(packed_zeros(layer)))
    bias = _bias(emit)
    inputs = [_ordered(emit), weight, s, z, None, bias]
    while inputs[-1] is None:
        inputs.pop()
    sizes: dict[str, Any] = {
        "K": layer.K,
        "N": layer.N,
        "bits": bits,
        "block_size": layer.block,
        "accuracy_level": accuracy_level,
    }
    return emit("MatMulNBits", *inputs, to=emit.kind, domain=CONTRIB, **sizes)


def dq_blocks(emit: Emit) -> ir.Value:
    """`MatMul(x, DQ(W))` with symmetric int4 in blocks along K."""
    layer = emit.layer
    blocks = layer.K // layer.block
    weight = emit.lazy("weight", INT4, (layer.K, layer.N), lambda: _t(layer.signed_codes()).astype(ml_dtypes.int4))
    s = emit.lazy("weight_scale", emit.kind, (blocks, layer.N), lambda: _t(layer.scales(emit.numpy)))
    wd = emit("DequantizeLinear", weight, s, to=emit.kind, axis=0, block_size=layer.block)
    return _biased(emit, emit("MatMul", _ordered(emit), wd, to=emit.kind))


def dq_channels(emit: Emit) -> ir.Value:
    """`MatMul(x, DQ(W))` with symmetric int8 and a scale for each output."""
    layer = emit.layer
    weight = emit.lazy("weight", INT8, (layer.K, layer.N), lambda: _t(layer.signed_codes()))
    s = emit.lazy("weight_scale", emit.kind, (layer.N,), lambda: layer.row_scales(emit.numpy))
    wd = emit("DequantizeLinear", weight, s, to=emit.kind, axis=1)
    return _biased(emit, emit("MatMul", _ordered(emit), wd, to=emit.kind))


def qdq_fp8(emit: Emit) -> ir.Value:
    """`MatMul(DQ(Q(x)), DQ(W))` in float8, with one scale for all of x and one for W or for each output."""
    layer = emit.layer
    kind = E4M3 if layer.scheme.weight.grid.man == 3 else E5M2  # type: ignore[union-attr]
    x, flat = _at_least_3d(emit)
    scale, _ = input_range(layer)

    def quantize() -> ir.Value:
        s = emit.const("input_scale", np.asarray(scale, emit.numpy))
        z = emit.const("input_zero", np.zeros((), kind.numpy()))
        q = emit("QuantizeLinear", x, s, z, to=kind, like=x, saturate=1)
        return emit("DequantizeLinear", q, s, z, to=emit.kind, like=x)

    xd = emit.once(("fp8", flat, scale, kind), quantize)
    weight = emit.lazy("weight", kind, (layer.K, layer.N), lambda: _t(float8(layer)))
    if layer.scheme.weight.block[0] == -1:
        s = emit.lazy("weight_scale", emit.kind, (), lambda: layer.row_scales(emit.numpy)[0].reshape(()))
        wd = emit("DequantizeLinear", weight, s, to=emit.kind)
    else:
        s = emit.lazy("weight_scale", emit.kind, (layer.N,), lambda: layer.row_scales(emit.numpy))
        wd = emit("DequantizeLinear", weight, s, to=emit.kind, axis=1)
    y = _biased(emit, emit("MatMul", xd, wd, to=emit.kind))
    return emit("Squeeze", y, emit.axes(0), to=emit.kind) if flat else y


FP8_BLOCK = 128


def fp8_weight(emit: Emit) -> ir.Value:
    """`MatMulBlockQuantizedFp8Weight`: W `[N, K]` in E4M3, x rounded to E4M3 by one scale."""
    layer = emit.layer
    scale, _ = input_range(layer)
    blocks = -(-layer.K // FP8_BLOCK)
    weight = emit.lazy("weight", E4M3, (layer.N, layer.K), lambda: float8(layer))
    s = emit.lazy("weight_scale", FLOAT, (layer.N, blocks), lambda: np.repeat(layer.scales()[:, :1], blocks, 1))
    inputs = [emit.x, weight, s, emit.const("input_scale", np.asarray(scale, np.float32)), _bias(emit)]
    inputs = inputs[:-1] if inputs[-1] is None else inputs
    return emit("MatMulBlockQuantizedFp8Weight", *inputs, to=emit.kind, domain=CONTRIB, block_size=FP8_BLOCK)


def table4(emit: Emit) -> ir.Value:
    """`MatMulBnb4`: codes of NF4 or FP4 as bitsandbytes has them, with float scales."""
    layer = emit.layer
    weight = emit.lazy("weight", UINT8, (layer.N * layer.K // 2,), lambda: packed_table(layer))
    count = layer.N * layer.K // layer.block
    s = emit.lazy("weight_scale", emit.kind, (count,), lambda: layer.scales(emit.numpy).reshape(-1))
    sizes: dict[str, Any] = {
        "K": layer.K,
        "N": layer.N,
        "block_size": layer.block,
        "quant_type": table_code(layer),
        "transB": 1,
    }
    y = emit("MatMulBnb4", _ordered(emit), weight, s, to=emit.kind, domain=CONTRIB, **sizes)
    return _biased(emit, y)


def _signed(emit: Emit) -> bool:
    """Whether the codes of x are."""
    x = emit.layer.scheme.input
    assert x is not None and isinstance(x.grid, Int)
    return x.grid.signed


def _cut(emit: Emit, x: ir.Value, scale: float) -> ir.Value:
    """The input without values below the lowest code of a narrow grid."""
    grid = emit.layer.scheme.input.grid  # type: ignore[union-attr]
    if not (isinstance(grid, Int) and grid.narrow):
        return x
    least = emit.const("input_least", np.asarray(grid.lo * scale, emit.numpy))
    return emit("Clip", x, least, to=emit.kind, like=x)


def _codes_of_input(emit: Emit, unsigned: bool) -> tuple[ir.DataType, int]:
    """The type of x's codes, and what is added to them."""
    if not _signed(emit):
        return UINT8, 0
    return (UINT8, 128) if unsigned else (INT8, 0)


def _codes(emit: Emit, unsigned: bool) -> tuple[ir.Value, np.ndarray | None]:
    """W as `[K, N]` codes of 8 bits, and its zero points `[N]`."""
    layer = emit.layer
    zeros = layer.zeros()
    if unsigned:
        weight = emit.lazy("weight", UINT8, (layer.K, layer.N), lambda: _t(layer.unsigned_codes()))
        return weight, np.full(layer.N, 128, np.uint8) if zeros is None else zeros[:, 0]
    weight = emit.lazy("weight", INT8, (layer.K, layer.N), lambda: _t(layer.signed_codes()))
    return weight, None if zeros is None else (zeros[:, 0].astype(np.int16) - 128).astype(np.int8)


def _integer_product(emit: Emit, xq: ir.Value, zero: ir.Value | None, unsigned: bool) -> ir.Value:
    """float32 of the int32 sums; a symmetric W."""
    weight, _ = _codes(emit, unsigned)
    inputs = (xq, weight, zero, emit.scalar(128, UINT8)) if unsigned else (xq, weight)
    return emit("Cast", emit("MatMulInteger", *inputs, to=ir.DataType.INT32), to_=FLOAT)


def _ordered(emit: Emit) -> ir.Value:
    """The input with its columns in the order of the groups."""
    order = emit.layer.order
    if order is None:
        return emit.x

    def gather() -> ir.Value:
        return emit("Gather", emit.x, emit.const("order", order), to=emit.kind, like=emit.x, axis=-1)

    return emit.once(("order", order.tobytes()), gather)


def _at_least_3d(emit: Emit) -> tuple[ir.Value, bool]:
    if emit.x.shape is None or len(emit.x.shape) != 2 or emit.layer.linear.bias is None:
        return emit.x, False
    return emit.once("3d", lambda: emit("Unsqueeze", emit.x, emit.axes(0), to=emit.kind)), True


def _bias(emit: Emit) -> ir.Value | None:
    bias = emit.layer.bias
    return None if bias is None else emit.const("bias", bias.astype(emit.numpy))


def _biased(emit: Emit, y: ir.Value) -> ir.Value:
    bias = _bias(emit)
    return y if bias is None else emit("Add", y, bias, to=emit.kind)


def _rescaled(emit: Emit, y: ir.Value, scale: ir.Value) -> ir.Value:
    y = emit("Mul", y, scale, to=FLOAT)
    return _biased(emit, emit("Cast", y, to_=emit.kind) if emit.kind != FLOAT else y)


def _typed(values: tuple[ir.Value, ...], *kinds: ir.DataType) -> tuple[ir.Value, ...]:
    for value, kind in zip(values, kinds, strict=True):
        value.type = ir.TensorType(kind)
    return values


def _t(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.T)


def _there(values: np.ndarray | None) -> np.ndarray:
    assert values is not None
    return values
