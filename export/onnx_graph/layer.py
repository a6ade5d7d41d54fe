"""A quantized linear as arrays in the layouts that ONNX ops read; each array is made when a file is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from qfx.core.errors import PackageError
from qfx.core.grid import Codebook, Float, Int
from qfx.core.qtensor import QTensor
from qfx.core.spec import Scheme
from qfx.modules.linear import QLinear

Array = np.ndarray
TINY16 = float(np.finfo(np.float16).smallest_subnormal)


@dataclass(frozen=True)
class Layer:
    """One quantized linear; K are its inputs, N its outputs.

    Attributes:
        name: its path in the model.
        linear: the module.
        block: columns that share a scale in what is written; it divides the scheme's own groups.
        bits: of a stored code: those of the scheme, or the next width that the target has.
    """

    name: str
    linear: QLinear
    block: int = -1
    bits: int = 8

    @property
    def scheme(self) -> Scheme:
        """As the module has it."""
        return self.linear.scheme

    @property
    def K(self) -> int:
        """Inputs."""
        return self.linear.in_features

    @property
    def N(self) -> int:
        """Outputs."""
        return self.linear.out_features

    @property
    def bias(self) -> Array | None:
        """float32 `[N]`."""
        bias = self.linear.bias
        return None if bias is None else array(bias.float())

    @cached_property
    def order(self) -> Array | None:
        """int64 `[K]`: the columns sorted by group, if the groups are not consecutive."""
        if not self.linear.has_g_idx:
            return None
        groups = self.linear.stored()["g_idx"]
        assert groups is not None
        order = array(groups.long().argsort(stable=True))
        return None if np.array_equal(order, np.arange(self.K)) else order

    def qtensor(self) -> QTensor:
        """The weight, its columns in `order`."""
        weight = self.linear.qtensor()
        if self.order is not None:
            weight.codes = weight.codes[:, torch.from_numpy(self.order).to(weight.codes.device)]
        weight.g_idx = None
        return weight

    def codes(self) -> Array:
        """Integers as they are, int8 or uint8 `[N, K]`."""
        return array(self.qtensor().codes)

    def signed_codes(self) -> Array:
        """int8 `[N, K]`: unsigned codes have 2^(bits - 1) taken away."""
        codes = self.codes()
        return codes if codes.dtype == np.int8 else (codes.astype(np.int16) - 2 ** (self.bits - 1)).astype(np.int8)

    def unsigned_codes(self) -> Array:
        """uint8 `[N, K]`: signed codes have 2^(bits - 1) added."""
        codes = self.codes()
        return codes if codes.dtype == np.uint8 else (codes.astype(np.int16) + 2 ** (self.bits - 1)).astype(np.uint8)

    def zeros(self) -> Array | None:
        """Zero points of unsigned codes, uint8 `[N, blocks]`, or None if they are all 2^(bits - 1)."""
        zero = self.qtensor().zero
        return None if zero is None else self._per_block(zero).astype(np.uint8)

    def scales(self, dtype: type = np.float32) -> Array:
        """`[N, blocks]`, positive in the dtype; PackageError if one is too large for it."""
        return self._cast(self._per_block(self.qtensor().scale), dtype)

    def row_scales(self, dtype: type = np.float32) -> Array:
        """`[N]`, for weights with a scale for each output."""
        return self.scales(dtype)[:, 0]

    def _cast(self, scales: Array, dtype: type) -> Array:
        if dtype == np.float32:
            return scales.astype(np.float32)
        if scales.max(initial=0.0) > float(np.finfo(np.float16).max):
            raise PackageError(f"{self.name}: a scale of {scales.max():.3g} is beyond float16; export in float32")
        return np.maximum(scales, TINY16).astype(np.float16)

    def _per_block(self, values: Tensor) -> Array:
        """`[rows, groups]` of the scheme to `[N, blocks]` of what is written."""
        found = array(values)
        found = np.broadcast_to(found, (self.N, found.shape[1]))
        blocks = 1 if self.block == -1 else -(-self.K // self.block)
        size = self.K // found.shape[1]  # of a group
        if blocks == found.shape[1] or self.block == -1:
            return found
        first = np.arange(blocks) * self.block
        return found[:, first // size]


def float8(layer: Layer) -> Array:
    """float8 codes `[N, K]` with numpy's type."""
    grid = layer.scheme.weight.grid
    assert isinstance(grid, Float)
    kind = ml_dtypes.float8_e4m3fn if grid.man == 3 else ml_dtypes.float8_e5m2
    codes = layer.qtensor().codes
    return array(codes.view(torch.uint8)).view(kind)


def packed_blocks(layer: Layer) -> Array:
    """The weight of MatMulNBits: uint8 `[N, blocks, block · bits / 8]`, the first code in the lowest bits."""
    codes = layer.unsigned_codes()
    codes = np.pad(codes, ((0, 0), (0, -layer.K % layer.block)), constant_values=2 ** (layer.bits - 1))
    return pack(codes.reshape(layer.N, -1, layer.block), layer.bits)


def packed_zeros(layer: Layer) -> Array | None:
    """The zero points of MatMulNBits: uint8 `[N, ceil(blocks · bits / 8)]`, or None."""
    if (zeros := layer.zeros()) is None:
        return None
    return pack(np.pad(zeros, ((0, 0), (0, -zeros.shape[1] % (8 // layer.bits)))), layer.bits)


def pack(codes: Array, bits: int) -> Array:
    """Packs uint8 codes of 2, 4 or 8 bits along the last axis, whose length is a multiple of 8 / bits."""
    per = 8 // bits
    out = codes[..., 0::per].copy()
    for i in range(1, per):
        out |= codes[..., i::per] << (bits * i)
    return out


def packed_table(layer: Layer) -> Array:
    """The weight of MatMulBnb4: uint8 `[N · K / 2]`, the even code in the high nibble, rows one after the other."""
    flat = layer.codes().reshape(-1)
    return (flat[0::2] << 4) | flat[1::2]


def table_code(layer: Layer) -> int | None:
    """`quant_type` of MatMulBnb4, if it has the table."""
    grid = layer.scheme.weight.grid
    return {"fp4_bnb": 0, "nf4": 1}.get(grid.name) if isinstance(grid, Codebook) else None


def input_range(layer: Layer) -> tuple[float, int]:
    """Scale and zero point of a static input."""
    scale, zero = layer.linear.input_scale, layer.linear.input_zero
    assert scale is not None
    return float(scale), 0 if zero is None else int(zero)


def is_int(layer: Layer, bits: int | None = None) -> bool:
    """Whether the weight's codes are integers (of that width)."""
    grid = layer.scheme.weight.grid
    return isinstance(grid, Int) and (bits is None or grid.bits == bits)


def array(tensor: Tensor) -> Array:
    """The values of a tensor on any device."""
    return tensor.detach().cpu().contiguous().numpy()


Maker = Callable[[], Array]
