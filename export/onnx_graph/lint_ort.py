"""What ONNX Runtime has no kernel for, or runs in float though it is quantized: `CUDA_RULES` and `CPU_RULES`.

Sources: ONNX Runtime's operator kernels (docs/OperatorKernels.md), the kernels in its CUDA wheel, and graphs that its
optimizer wrote.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qfx.export.onnx_graph.findings import Finding
from qfx.export.onnx_graph.reading import (
    DQ,
    MICROSOFT,
    Q,
    constant,
    dequantized_by,
    dtype_of,
    integer,
    label,
    linears,
    nodes,
    operand,
    readers,
    shape_of,
)

_NO_CUDA_KERNEL = (
    *("QLinearMatMul", "QLinearConv", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearSoftmax", "QLinearConcat"),
    *("QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLinear", "DynamicQuantizeLSTM"),
    "ConvInteger",
)
NO_CPU_KERNEL = ("MatMulBlockQuantizedFp8Weight", "MatMulBlockQuantizedFp4Weight", "GemmFloat8")
_CUDA_BLOCKS = (16, 32, 64, 128)
_FLOAT8 = ("FLOAT8E4M3FN", "FLOAT8E5M2")


def cuda_kernels(model: ir.Model) -> Iterator[Finding]:
    """Ops without a CUDA kernel run on the CPU, with copies there and back."""
    for node in nodes(model):
        if node.op_type in _NO_CUDA_KERNEL and node.domain in ("", "ai.onnx", MICROSOFT):
            fix = "use MatMulInteger with QuantizeLinear, or MatMulNBits"
            yield Finding(label(node), f"{node.op_type} has no CUDA kernel", fix)


def bfloat16_qdq(model: ir.Model) -> Iterator[Finding]:
    """QuantizeLinear and DequantizeLinear have kernels for float32 and float16."""
    for node in nodes(model, Q, DQ):
        if ir.DataType.BFLOAT16 in (dtype_of(operand(node, 1)), dtype_of(operand(node, 0))):
            yield Finding(label(node), "it is bfloat16, for which there is no kernel", "export in float16 or float32")


def int32_dequantize(model: ir.Model) -> Iterator[Finding]:
    """A bias is float: DequantizeLinear of int32 has no CUDA kernel."""
    for node in nodes(model, DQ):
        if dtype_of(operand(node, 0)) == ir.DataType.INT32:
            yield Finding(label(node), "int32 has no CUDA kernel", "store the bias as float")


def nbits_blocks(model: ir.Model) -> Iterator[Finding]:
    """MatMulNBits, and what fuses to it, has kernels for blocks of 16 to 128; else weights are dequantized first."""
    weights = (weight for _, weight in linears(model))
    for node in (*nodes(model, "MatMulNBits", domain=MICROSOFT), *weights):
        block = integer(node, "block_size", 0)
        if block and block not in _CUDA_BLOCKS:
            yield Finding(label(node), f"its blocks are of {block}", "use a group size of 32, 64 or 128")


def nbits_portable(model: ir.Model) -> Iterator[Finding]:
    """MatMulNBits has no g_idx, which is deprecated, and no weight in the layout of one GPU."""
    for node in nodes(model, "MatMulNBits", domain=MICROSOFT):
        if operand(node, 4) is not None:
            yield Finding(label(node), "it has g_idx, which is deprecated", "permute the rows, and gather the input")
        if integer(node, "weight_prepacked", 0):
            yield Finding(label(node), "its weight is packed for one GPU", "store it plainly, and let sessions pack it")


def integer_products(model: ir.Model) -> Iterator[Finding]:
    """MatMulInteger takes int8 twice, with no zero points or one for a whole tensor."""
    for node in nodes(model, "MatMulInteger"):
        for index in (0, 1):
            dtype, zero = dtype_of(operand(node, index)), shape_of(operand(node, 2 + index))
            if dtype not in (None, ir.DataType.INT8):
                yield Finding(label(node), f"an operand is {dtype}", "quantize symmetrically, to int8")
            if zero not in (None, (), (1,)):
                yield Finding(label(node), f"it has zero points {list(zero or ())}", "leave them out")


def float_products(model: ir.Model) -> Iterator[Finding]:
    """Nothing fuses QuantizeLinear, DequantizeLinear and MatMul on CUDA: they run as three, the product in float."""
    for node, weight in linears(model):
        activation = dequantized_by(operand(node, 0))
        if activation is not None and constant(operand(activation, 0)) is None:
            wrong = f"it multiplies what {label(activation)} and {label(weight)} give, in float"
            yield Finding(label(node), wrong, "use MatMulInteger or MatMulBlockQuantizedFp8Weight, or target tensorrt")


def cpu_kernels(model: ir.Model) -> Iterator[Finding]:
    """Products of float8 and float4 weights have CUDA kernels only; nothing reads float4."""
    for node in nodes(model, *NO_CPU_KERNEL, domain=MICROSOFT):
        yield Finding(label(node), f"{node.op_type} has no CPU kernel", "target ort-cuda, or choose an integer scheme")
    for node in nodes(model, Q, DQ):
        codes = node.outputs[0] if node.op_type == Q else operand(node, 0)
        if dtype_of(codes) == ir.DataType.FLOAT4E2M1:
            yield Finding(label(node), "float4 has no CPU kernel", "choose an integer scheme")


def float8(model: ir.Model) -> Iterator[Finding]:
    """float8 needs two session options, or a Relu before QuantizeLinear is lost and the product may not load."""
    for node in nodes(model, Q):
        dtype = dtype_of(node.outputs[0])
        if dtype is None or dtype.name not in _FLOAT8:
            continue
        value = operand(node, 0)
        source = None if value is None else value.producer()
        after = f" of Relu {label(source)}, which is dropped" if source is not None and source.op_type == "Relu" else ""
        fix = "open the session with SESSION_OPTIONS['float8']"
        yield Finding(label(node), f"it makes {dtype}{after or ', which runs dequantized'}", fix)


def biased_2d(model: ir.Model) -> Iterator[Finding]:
    """A quantized product of two axes has no float bias: with one, it becomes a float Gemm.

    A Gemm with an int32 bias is fused, if its weight has a zero point, be it zero.
    """
    for node, weight in linears(model):
        activation = dequantized_by(operand(node, 0))
        if activation is None:
            continue  # weights alone: Gemm fuses to MatMulNBits as well
        if node.op_type == "Gemm":
            bias = operand(node, 2)
            int32 = bias is None or dtype_of(_dequantized(bias)) == ir.DataType.INT32
            falls = not int32 or operand(weight, 2) is None
        else:
            rank = len(shape_of(node.outputs[0]) or shape_of(operand(node, 0)) or ())
            users = readers(node.outputs[0])
            falls = rank == 2 and len(users) == 1 and users[0][0].op_type == "Add"
        if falls:
            wrong = "it has two axes and a bias, and runs as a float Gemm"
            yield Finding(label(node), wrong, "open the session with SESSION_OPTIONS['biased_2d']")


def exact_int8(model: ir.Model) -> Iterator[Finding]:
    """int8 weights do not meet uint8 inputs: on x64 CPUs without VNNI, their sums saturate at int16.

    255 · 127 + 255 · 127 is above 32767. Static int8 inputs become uint8 when the product is fused. MatMulInteger of
    int8 inputs is exact, as are uint8 weights with a zero point of 128.
    """
    products = [(node, operand(node, 0), operand(node, 1)) for node in nodes(model, "MatMulInteger")]
    for node, weight in linears(model):
        activation = dequantized_by(operand(node, 0))
        if activation is not None and dtype_of(operand(weight, 1)) == ir.DataType.FLOAT:
            products.append((node, activation.outputs[0], operand(weight, 0)))
    for node, x, codes in products:
        signed = node.op_type == "MatMulInteger" and dtype_of(x) != ir.DataType.UINT8
        if dtype_of(codes) == ir.DataType.INT8 and not signed:
            wrong = "its int8 weight meets uint8 inputs, and sums saturate on x64 CPUs without VNNI"
            fix = "open the session with SESSION_OPTIONS['exact_int8'], or store the weight as uint8"
            yield Finding(label(node), wrong, fix)


def half_qdq(model: ir.Model) -> Iterator[Finding]:
    """Static int8 is float32: in float16, the product runs dequantized."""
    for node, weight in linears(model):
        half = dtype_of(operand(weight, 1)) in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        if half and dequantized_by(operand(node, 0)) is not None:
            yield Finding(label(node), "its scales are in half precision, so it is not fused", "export in float32")


def _dequantized(value: ir.Value) -> ir.Value | None:
    node = dequantized_by(value)
    return None if node is None else operand(node, 0)


CUDA_RULES = [
    cuda_kernels,
    bfloat16_qdq,
    int32_dequantize,
    nbits_blocks,
    nbits_portable,
    integer_products,
    float_products,
]
CPU_RULES = [cpu_kernels, bfloat16_qdq, float8, biased_2d, exact_int8, half_qdq]
