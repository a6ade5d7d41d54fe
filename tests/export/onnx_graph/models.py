"""Small quantized linears as graphs, each as its runtime wants it, and ways to break them."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

K, N, GROUP = 128, 32, 64
MICROSOFT = "com.microsoft"
E4M3 = ml_dtypes.float8_e4m3fn
RNG = np.random.default_rng(0)


def codes(*shape: int, dtype: Any = np.int8, low: int = -127, high: int = 128) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(np.int16).astype(dtype)


class Build:
    """Nodes in the order in which they are added; the input is x, the output what `model` is told."""

    def __init__(self, dtype: Any = np.float32, rank: int = 3, opset: int = 21) -> None:
        self.dtype = np.dtype(dtype)
        self.type = ir.TensorType(ir.DataType.from_numpy(self.dtype))
        sizes = ["batch", "sequence"][: rank - 1]
        self.sizes = sizes
        self.x = ir.Value(name="x", type=self.type, shape=ir.Shape([*sizes, K]))
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": opset}, name="small")

    def stored(self, name: str, array: Any) -> ir.Value:
        value = ir.Value(name=name)
        self.graph.register_initializer(_filled(value, array))
        return value

    def real(self, name: str, array: Any) -> ir.Value:
        return self.stored(name, np.asarray(array, self.dtype))

    def __call__(self, op: str, *inputs: ir.Value | None, name: str, domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(op, list(inputs), attributes, name=name, domain=domain)
        node.outputs[0].name = f"{name}.out"
        self.graph.append(node)
        if domain:
            self.graph.opset_imports[domain] = 1
        return node.outputs[0]

    def model(self, y: ir.Value, ir_version: int = 10) -> ir.Model:
        y.type, y.shape = self.type, ir.Shape([*self.sizes, N])
        self.graph.outputs.append(y)
        return ir.Model(self.graph, ir_version=ir_version)


def _filled(value: ir.Value, array: Any) -> ir.Value:
    tensor = array if isinstance(array, ir.TensorProtocol) else ir.tensor(np.asarray(array), name=value.name)
    value.const_value, value.shape, value.type = tensor, ir.Shape(tensor.shape), ir.TensorType(tensor.dtype)
    return value


def static(bias: bool = False, relu: bool = False, kind: Any = np.int8, **settings: Any) -> ir.Model:
    """Q and DQ around the product of int8 or float8: what TensorRT and the CPU fuse."""
    g = Build(**settings)
    x = g("Relu", g.x, name="act") if relu else g.x
    s, z = g.real("sx", 0.1), g.stored("zx", np.zeros((), kind))
    xd = g("DequantizeLinear", g("QuantizeLinear", x, s, z, name="q"), s, z, name="dq")
    weight = codes(K, N, dtype=kind, low=-8, high=8) if kind == E4M3 else codes(K, N)
    wd = g("DequantizeLinear", g.stored("codes", weight), g.real("sw", np.full(N, 0.01)), name="weight", axis=1)
    y = g("MatMul", xd, wd, name="layer.proj")
    return g.model(g("Add", y, g.real("bias", np.ones(N)), name="add") if bias else y)


def unsigned() -> ir.Model:
    """As `static`, its weight as uint8 around 128."""
    model = static()
    signed = model.graph.initializers["codes"].const_value.numpy()  # type: ignore[union-attr]
    store(model, codes=(signed.astype(np.int16) + 128).astype(np.uint8))
    feed(model, "weight", 2, np.full(N, 128, np.uint8))
    return model


def gemm(float_bias: bool = False) -> ir.Model:
    """As `static`, of two axes, with an int32 bias in a Gemm."""
    g = Build(rank=2)
    s, z, sw = g.real("sx", 0.1), g.stored("zx", np.zeros((), np.int8)), np.full(N, 0.01, np.float32)
    xd = g("DequantizeLinear", g("QuantizeLinear", g.x, s, z, name="q"), s, z, name="dq")
    weight, zero = g.stored("codes", codes(K, N)), g.stored("zw", np.zeros(N, np.int8))
    wd = g("DequantizeLinear", weight, g.stored("sw", sw), zero, name="weight", axis=1)
    scale = g.stored("sb", np.float32(0.1) * sw)
    b = g("DequantizeLinear", g.stored("bias", codes(N, dtype=np.int32)), scale, name="bias.dq", axis=0)
    return g.model(g("Gemm", xd, wd, g.real("floats", np.ones(N)) if float_bias else b, name="layer.proj"))


def int4(bias: bool = False, group: int = GROUP, **settings: Any) -> ir.Model:
    """DQ of int4 in blocks, and the product."""
    g = Build(**settings)
    s = g.real("sw", np.full((K // group, N), 0.01))
    weight = g.stored("codes", codes(K, N, dtype=ml_dtypes.int4, low=-8, high=8))
    wd = g("DequantizeLinear", weight, s, name="weight", axis=0, block_size=group)
    y = g("MatMul", g.x, wd, name="layer.proj")
    return g.model(g("Add", y, g.real("bias", np.ones(N)), name="add") if bias else y)


def integer(**settings: Any) -> ir.Model:
    """Q, MatMulInteger, and the scales behind it: what CUDA computes."""
    g = Build(**settings)
    xq = g("QuantizeLinear", g.x, g.real("sx", 0.1), g.stored("zx", np.zeros((), np.int8)), name="q")
    sums = g("Cast", g("MatMulInteger", xq, g.stored("codes", codes(K, N)), name="layer.proj"), name="cast", to=1)
    y = g("Mul", sums, g.stored("s", np.full(N, 0.001, np.float32)), name="scale")
    return g.model(g("Cast", y, name="half", to=10) if g.dtype == np.float16 else y)


def dynamic() -> ir.Model:
    """DynamicQuantizeLinear and MatMulInteger: for the CPU."""
    g = Build()
    node = ir.node("DynamicQuantizeLinear", [g.x], num_outputs=3, name="q")
    for value, leaf in zip(node.outputs, "xsz", strict=True):
        value.name = f"q.{leaf}"
    g.graph.append(node)
    xq, s, z = node.outputs
    sums = g("MatMulInteger", xq, g.stored("codes", codes(K, N)), z, name="layer.proj")
    scale = g("Mul", s, g.real("sw", np.full(N, 0.01)), name="scales")
    return g.model(g("Mul", g("Cast", sums, name="cast", to=1), scale, name="scale"))


def nbits(bits: int = 4, zero: bool = True, **settings: Any) -> ir.Model:
    g, blocks = Build(**settings), K // GROUP
    weight = g.stored("codes", codes(N, blocks, GROUP * bits // 8, dtype=np.uint8, low=0, high=256))
    z = g.stored("zeros", np.full((N, blocks * bits // 8), 0x88, np.uint8)) if zero else None
    s, b = g.real("sw", np.full((N, blocks), 0.01)), g.real("bias", np.ones(N))
    sizes = {"K": K, "N": N, "bits": bits, "block_size": GROUP}
    return g.model(g("MatMulNBits", g.x, weight, s, z, None, b, name="layer.proj", domain=MICROSOFT, **sizes))


def bnb4() -> ir.Model:
    g = Build()
    weight = g.stored("codes", codes(N * K // 2, dtype=np.uint8, low=0, high=256))
    s = g.real("absmax", np.full(N * K // GROUP, 0.1))
    sizes = {"K": K, "N": N, "block_size": GROUP, "quant_type": 1, "transB": 1}
    return g.model(g("MatMulBnb4", g.x, weight, s, name="layer.proj", domain=MICROSOFT, **sizes))


def fp8_weight() -> ir.Model:
    g = Build(dtype=np.float16)
    weight = g.stored("codes", codes(N, K, dtype=E4M3, low=-8, high=8))
    s, a = g.stored("sw", np.full((N, 1), 0.01, np.float32)), g.stored("sx", np.asarray(0.1, np.float32))
    op = "MatMulBlockQuantizedFp8Weight"
    bias = g.real("bias", np.ones(N))
    return g.model(g(op, g.x, weight, s, a, bias, name="layer.proj", domain=MICROSOFT, block_size=128))


def fp4_weight() -> ir.Model:
    g = Build(dtype=np.float16)
    weight = g.stored("codes", codes(N, K // 2, dtype=np.uint8, low=0, high=256))
    s, t = g.stored("sw", np.full((N, K // 16), 56, np.uint8)), g.stored("global", np.asarray(0.1, np.float32))
    op = "MatMulBlockQuantizedFp4Weight"
    return g.model(g(op, g.x, weight, s, t, name="layer.proj", domain=MICROSOFT, block_size=16))


def node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.name == name)


def set_attributes(model: ir.Model, name: str, **attributes: Any) -> None:
    node(model, name).attributes.update({a.name: a for a in ir.convenience.convert_attributes(attributes)})


def store(model: ir.Model, **arrays: Any) -> None:
    """Replaces what initializers hold."""
    for name, array in arrays.items():
        _filled(model.graph.initializers[name], array)


def feed(model: ir.Model, name: str, index: int, array: Any) -> None:
    """Gives a node a new stored input."""
    value = ir.Value(name=f"{name}.{index}")
    model.graph.register_initializer(_filled(value, array))
    target = node(model, name)
    target.resize_inputs(max(len(target.inputs), index + 1))
    target.replace_input_with(index, value)


def insert(model: ir.Model, op: str, before: str, index: int = 0, domain: str = "", **attributes: Any) -> ir.Node:
    """Puts a node between another and one of its inputs."""
    reader = node(model, before)
    new = ir.node(op, [reader.inputs[index]], attributes, name="inserted", domain=domain)
    new.outputs[0].name = "inserted.out"
    model.graph.insert_before(reader, new)
    reader.replace_input_with(index, new.outputs[0])
    return new


def rules(findings: Sequence[Any]) -> set[str]:
    return {found.rule for found in findings}
